"""Learning a reward from preferences, beside a sampler that learns from it, or from episodes that are there already.

In turn, a sampler acts, pairs of what it did are compared, a reward is fitted to all comparisons, and the sampler
learns from that reward (Christiano et al. 2017, arXiv 1706.03741). Shapes: S seeds, n cells, A moves, H steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np

from palimpsest.errors import SpecError
from palimpsest.progress import Report
from palimpsest.rewards.comparisons import Comparisons, compare, joined
from palimpsest.rewards.gridworlds import Floats, GridWorld, Ints, plan, roll_out, score, uniform
from palimpsest.rewards.reward_models import FrozenReward, RewardModel, RewardSettings
from palimpsest.rewards.tabular_learners import QLearner, QLearning

Schedule = Literal["constant", "hyperbolic"]
Source = Literal["random", "expert", "mixed", "everywhere"]
"""Offline episodes: of the uniform policy, of the best one, half of each, or of the uniform one begun in any cell."""


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """How a reward is learned.

    Raises:
        SpecError: an unknown schedule or source, or a number out of range.
    """

    reward: RewardSettings = field(default_factory=RewardSettings)
    rounds: int = 30
    episodes: int = 64
    """Of the sampler, a round."""
    comparisons: int = 600
    """In all rounds together; a tenth of them are of random episodes, before the sampler's first."""
    schedule: Schedule = "constant"
    """As many comparisons in each further round, or 1, 1/2, 1/3 as many."""
    length: int = 10
    """Of a fragment, in steps."""
    temperature: float = 1.0
    """Of the judge."""
    newest: float = 1.0
    """The share of comparisons, the newest, that the reward is fitted to."""
    random_episodes: float = 0.0
    """The share of a round's compared episodes that the uniform policy plays in the sampler's place."""
    random_starts: float = 0.0
    """The share that the sampler plays from a random cell instead of from the start."""
    offline: Source | None = None
    """Compare episodes of these policies, all at once, and train no sampler; as many steps of the reward as else."""

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise SpecError(f"preferences: schedule is {self.schedule!r}; choose constant or hyperbolic")
        if self.offline is not None and self.offline not in get_args(Source):
            raise SpecError(f"preferences: offline is {self.offline!r}; choose from {', '.join(get_args(Source))}")
        if self.rounds < 1 or self.episodes < 2 or self.comparisons < 10 * self.rounds // 9 + 1:
            raise SpecError(
                f"preferences: {self.rounds} rounds of {self.episodes} episodes with {self.comparisons} comparisons; "
                "give at least one round, two episodes, and more than one comparison a round"
            )
        if not (0 < self.newest <= 1 and self.random_episodes >= 0 and self.random_starts >= 0):
            raise SpecError("preferences: newest, random_episodes and random_starts are shares of 1")
        if self.random_episodes + self.random_starts > 1 or not self.temperature > 0:
            raise SpecError("preferences: random episodes and starts are more than all, or temperature is not above 0")

    @property
    def reward_steps(self) -> int:
        """Down the reward's loss, in all: what makes a longer run of the sampler another reward altogether."""
        return self.reward.first_steps + (self.rounds - 1) * self.reward.steps

    @property
    def budget(self) -> int:
        """The sampler's episodes."""
        return self.rounds * self.episodes

    @property
    def sampler(self) -> QLearning:
        """Its exploration lasts as long as it does."""
        return QLearning(decay=self.budget)

    def numbers(self) -> list[int]:
        """How many comparisons are made in each round."""
        first = max(1, round(self.comparisons / 10))
        weights = np.ones(self.rounds - 1)
        if self.schedule == "hyperbolic":
            weights /= np.arange(1, self.rounds)
        ends = np.rint(np.cumsum(weights) / (weights.sum() or 1) * (self.comparisons - first)).astype(int)
        numbers = [first, *np.diff(ends, prepend=0).tolist()]
        return numbers if self.rounds > 1 else [self.comparisons]


@dataclass(frozen=True, eq=False)
class LearnedReward:
    """A reward and all that was there when it was learned."""

    world: GridWorld
    settings: PreferenceSettings
    seeds: tuple[int, ...]
    reward: FrozenReward
    comparisons: Comparisons
    """All that were made, those too that the reward was no longer fitted to."""
    model: RewardModel | None
    """What the reward is of, unfrozen; None of a reward that was read from a folder."""
    policy: Floats | None
    """[S, 1, n, A] the sampler's, without exploring; None of a reward that was learned offline."""

    @property
    def sampler_score(self) -> Floats:
        """[S] the sampler's true return, 0 that of the uniform policy, 1 of the best.

        Raises:
            SpecError: there was no sampler.
        """
        if self.policy is None:
            raise SpecError("this reward was learned offline, without a sampler; there is no return to show")
        return score(self.world, self.policy)


def generators(seeds: Sequence[int], role: str) -> list[np.random.Generator]:
    """What each seed draws from in a role; other roles and seeds draw something else.

    Raises:
        SpecError: a seed below 0.
    """
    if any(seed < 0 for seed in seeds):
        raise SpecError(f"seeds are {list(seeds)}; give whole numbers from 0 on")
    return [np.random.default_rng([seed, *role.encode()]) for seed in seeds]


def learn_reward(
    world: GridWorld, settings: PreferenceSettings, seeds: Sequence[int], *, report: Report | None = None
) -> LearnedReward:
    """Learn a reward from preferences, once a seed.

    Args:
        world: where, with the true reward by which the judge prefers.
        settings: how.
        seeds: each is a run of its own, whichever others there are.
        report: called with (rounds done, of how many, a note).

    Raises:
        SpecError: a seed below 0, or fragments longer than episodes.
    """
    return _offline(world, settings, seeds) if settings.offline else _online(world, settings, seeds, report)


def episodes(
    world: GridWorld,
    policy: Floats,
    number: int,
    rngs: Sequence[np.random.Generator],
    start: Floats | None = None,
) -> Ints:
    """[S, E, H] the cells that so many episodes of a policy arrive in."""
    draws = np.stack([rng.random((2, world.horizon + 1, number)) for rng in rngs])
    return roll_out(world, policy, draws, start)[0][..., 1:]


def _online(
    world: GridWorld, settings: PreferenceSettings, seeds: Sequence[int], report: Report | None
) -> LearnedReward:
    judge = generators(seeds, "judge")
    sampler = QLearner(world, settings.sampler, generators(seeds, "sampler"))
    model = RewardModel(settings.reward, world, generators(seeds, "reward"))
    shown = episodes(world, uniform(world, len(seeds)), settings.episodes, judge)
    made: list[Comparisons] = []
    for done, number in enumerate(settings.numbers(), 1):
        made.append(_compared(world, settings, shown, shown, number, judge))
        fitted = joined(made).newest(settings.newest)
        model.fit(fitted, settings.reward.steps if done > 1 else settings.reward.first_steps)
        reward = model.frozen(fitted)
        shown = _mixture(world, settings, sampler, sampler.train(reward, settings.episodes), judge)
        if report:
            report(done, settings.rounds, f"{len(fitted)} comparisons")
    return LearnedReward(world, settings, tuple(seeds), reward, joined(made), model, sampler.policy())


def _offline(world: GridWorld, settings: PreferenceSettings, seeds: Sequence[int]) -> LearnedReward:
    judge = generators(seeds, "judge")
    model = RewardModel(settings.reward, world, generators(seeds, "reward"))
    evenly, best = uniform(world, len(seeds)), plan(world, np.tile(world.reward, (len(seeds), 1)))
    policies = {"expert": (best,), "mixed": (evenly, best)}.get(str(settings.offline), (evenly,))
    start = world.everywhere if settings.offline == "everywhere" else None
    number = settings.budget // len(policies)
    shown = np.concatenate([episodes(world, policy, number, judge, start) for policy in policies], 1)
    made = _compared(world, settings, shown, shown, settings.comparisons, judge)
    model.fit(made, settings.reward_steps)
    return LearnedReward(world, settings, tuple(seeds), model.frozen(made), made, model, None)


def _compared(
    world: GridWorld,
    settings: PreferenceSettings,
    first: Ints,
    second: Ints,
    number: int,
    judge: Sequence[np.random.Generator],
) -> Comparisons:
    return compare(
        *(first, second, world.reward, number, judge),
        length=settings.length,
        temperature=settings.temperature,
        members=settings.reward.members,
    )


def _mixture(
    world: GridWorld, settings: PreferenceSettings, sampler: QLearner, own: Ints, judge: Sequence[np.random.Generator]
) -> Ints:
    """The sampler's newest episodes, with some in their place that it did not learn from."""
    evenly, elsewhere = (
        round(share * settings.episodes) for share in (settings.random_episodes, settings.random_starts)
    )
    parts = [own[:, evenly + elsewhere :]]
    if evenly:
        parts.append(episodes(world, uniform(world, len(own)), evenly, judge))
    if elsewhere:
        parts.append(episodes(world, sampler.exploring()[:, None], elsewhere, judge, world.everywhere))
    return np.concatenate(parts, 1)


def refitted(learned: LearnedReward, more: Comparisons, steps: int) -> LearnedReward:
    """The reward after so many steps more on its comparisons and these; what was learned before is left as it was.

    Raises:
        SpecError: the reward was read from a folder, and is frozen for good.
    """
    if learned.model is None:
        raise SpecError("a reward that was read from a folder is frozen for good; learn it again to fit it further")
    comparisons = joined([learned.comparisons, more])
    fitted = comparisons.newest(learned.settings.newest)
    model = learned.model.copy()
    model.fit(fitted, steps)
    return replace(learned, reward=model.frozen(fitted), comparisons=comparisons, model=model)
