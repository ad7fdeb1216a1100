"""Does a learned reward hold for a fresh learner? The protocol of `relearning/`, in a grid world.

The learned reward is frozen, and learners that begin afresh are given a share of the sampler's budget, as much, and
four times as much. The floor is the same learner on a reward that says nothing, the ceiling the same learner on the
true one. What is compared is the exact true return, 0 for the uniform policy and 1 for the best.

A seed says something only where the sampler did well, for else there is nothing that a relearner could fail to
reach, and where the learner can learn from the true reward at all. Others are set aside, and counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import stats

from palimpsest.progress import Report
from palimpsest.relearning.judgement import RelearnReport, RelearnSettings
from palimpsest.relearning.protocol import RelearnSpec, relearn
from palimpsest.rewards.gridworlds import Floats, GridWorld, score, visits
from palimpsest.rewards.preference_loop import LearnedReward, generators
from palimpsest.rewards.reward_models import Reward, constant_reward, true_reward
from palimpsest.rewards.tabular_learners import Planner, QLearner, QLearning, TabularLearner

METRIC, PROXY = "score", "proxy"
"""The true return between those of the uniform and the best policy; and the return a step by what was learned from."""
GOOD, FAILED = 0.8, 0.5
"""A sampler and a learner on the true reward reach the one; a relearner below the other has failed."""
BUDGETS = (0.25, 1.0, 4.0)
"""In units of the sampler's."""


@dataclass(frozen=True)
class Relearner:
    """A kind of learner, and what it is given."""

    name: str
    make: Callable[[GridWorld, QLearning, Sequence[int]], TabularLearner]
    """From a world, how the sampler learned, and the seeds."""
    exact: bool = False
    """Whether it is the optimum at once, so that its only budget is 1."""

    def budgets(self, sampler: QLearning) -> tuple[int, ...]:
        """A quarter of the sampler's episodes, as many, and four times as many, in whole batches."""
        return (1,) if self.exact else tuple(_batches(share * sampler.decay, sampler.batch) for share in BUDGETS)

    def own_budget(self, sampler: QLearning) -> int:
        """The one that is as large as the sampler's."""
        budgets = self.budgets(sampler)
        return budgets[min(BUDGETS.index(1.0), len(budgets) - 1)]


RELEARNERS = {
    each.name: each
    for each in (
        Relearner("q_learner", lambda world, own, seeds: QLearner(world, own, generators(seeds, "relearner"))),
        Relearner(
            "strong_q_learner",
            lambda world, own, seeds: QLearner(world, own.stronger(), generators(seeds, "strong relearner")),
        ),
        Relearner("planner", lambda world, own, seeds: Planner(world, len(seeds)), exact=True),
    )
}
"""The sampler's own kind, a stronger one, and the exact optimum."""


@dataclass(frozen=True)
class Rate:
    """So many of so many, with Wilson's 95 % interval (Wilson 1927); of none nothing is known."""

    k: int
    n: int

    @property
    def value(self) -> float:
        """The share; not a number where n is 0."""
        return self.k / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """From low to high; all of [0, 1] where n is 0."""
        if not self.n:
            return 0.0, 1.0
        found = stats.binomtest(self.k, self.n).proportion_ci(0.95, "wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        """As people read it."""
        return f"{self.k}/{self.n} [{self.interval[0]:.2f}, {self.interval[1]:.2f}]"


@dataclass(frozen=True)
class Relearned:
    """What fresh learners of one kind made of a reward."""

    relearner: str
    seeds: tuple[int, ...]
    """Those that say something."""
    bad_samplers: tuple[int, ...]
    """Set aside: the sampler itself did not do well."""
    weak_learners: tuple[int, ...]
    """Set aside: the learner did not learn from the true reward either."""
    failures: Rate
    """Relearners below `FAILED` at the sampler's own budget, among `seeds`."""
    report: RelearnReport | None
    """None where no seed says anything."""

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "relearner": self.relearner,
            "seeds": list(self.seeds),
            "bad_samplers": list(self.bad_samplers),
            "weak_learners": list(self.weak_learners),
            "failures": [self.failures.k, self.failures.n, *self.failures.interval],
            "report": self.report and self.report.to_json(),
        }


class Cohort:
    """A learner a seed, all learning side by side, and one by one for the protocol."""

    def __init__(
        self,
        world: GridWorld,
        relearner: Relearner,
        reward: Reward,
        sampler: QLearning,
        seeds: Sequence[int],
    ) -> None:
        self.world, self.relearner, self.reward, self.sampler = world, relearner, reward, sampler
        self.seeds = tuple(seeds)
        self._curves: dict[int, dict[str, Floats]] = {}

    def curves(self) -> Mapping[int, Mapping[str, Floats]]:
        """[S] of `METRIC` and `PROXY` by budget; learned when first asked for."""
        if not self._curves:
            learner, done = self.relearner.make(self.world, self.sampler, self.seeds), 0
            for budget in self.relearner.budgets(self.sampler):
                learner.train(self.reward, budget - done)
                self._curves[budget], done = self._probe(learner), budget
        return self._curves

    def make(self, seed: int) -> "_OfSeed":
        """The learner of a seed, as the protocol takes it."""
        return _OfSeed(self, self.seeds.index(seed))

    def _probe(self, learner: TabularLearner) -> dict[str, Floats]:
        policy = learner.policy()
        cells = np.tile(np.arange(len(self.world.moves)), (len(self.seeds), 1))
        proxy = (visits(self.world, policy).sum(1) * self.reward(cells)).sum(-1) / self.world.horizon
        return {METRIC: score(self.world, policy), PROXY: proxy}


class _OfSeed:
    def __init__(self, cohort: Cohort, place: int) -> None:
        self.cohort, self.place, self.budget = cohort, place, 0

    def fit_to(self, budget: int) -> None:
        self.cohort.curves()
        self.budget = budget

    def probe(self) -> dict[str, float]:
        return {name: float(values[self.place]) for name, values in self.cohort.curves()[self.budget].items()}


def relearn_reward(
    learned: LearnedReward,
    relearner: Relearner,
    *,
    reward: Reward | None = None,
    report: Report | None = None,
) -> Relearned:
    """Give a learned reward to fresh learners of one kind.

    Args:
        learned: the reward, the sampler beside it, and the seeds.
        relearner: what kind.
        reward: another in the learned one's place, such as one that is not as frozen as it should be.
        report: called with (curves done, of how many, a note).
    """
    world, sampler, seeds = learned.world, learned.settings.sampler, learned.seeds
    floor, ceiling = _references(world, relearner, sampler, seeds)
    own = relearner.own_budget(sampler)
    competent = ceiling.curves()[own][METRIC] >= GOOD
    # Where hardly any learns from the true reward, it is the learner that is weak and not a few seeds: the report
    # says so.
    weak = ~competent if competent.mean() >= 0.5 else np.zeros_like(competent)
    incumbents = np.ones(len(seeds)) if learned.policy is None else learned.sampler_score
    bad = incumbents < GOOD
    kept = np.flatnonzero(~bad & ~weak)
    frozen = reward or learned.reward
    artefact = Cohort(world, relearner, frozen, sampler, seeds)
    found, failed = None, 0
    if len(kept):
        settings = RelearnSettings(
            budgets=relearner.budgets(sampler),
            seeds=tuple(seeds[place] for place in kept),
            metric=METRIC,
            want="return",
            incumbent=None if learned.policy is None else float(incumbents[kept].mean()),
            smallest_gap=FAILED,
        )
        references = {"constant": floor.reward, "true": ceiling.reward}
        spec = RelearnSpec(settings, artefact.make, floor.make, ceiling.make, {"reward": frozen, **references})
        found = relearn(spec, report=report)
        failed = int((artefact.curves()[own][METRIC][kept] < FAILED).sum())
    return Relearned(
        relearner.name,
        tuple(seeds[place] for place in kept),
        tuple(seeds[place] for place in np.flatnonzero(bad)),
        tuple(seeds[place] for place in np.flatnonzero(weak & ~bad)),
        Rate(failed, len(kept)),
        found,
    )


@lru_cache(maxsize=64)
def _references(
    world: GridWorld, relearner: Relearner, sampler: QLearning, seeds: tuple[int, ...]
) -> tuple[Cohort, Cohort]:
    """Floor and ceiling, which many rewards are read beside."""
    ends = (constant_reward(world, len(seeds)), true_reward(world, len(seeds)))
    floor, ceiling = (Cohort(world, relearner, reward, sampler, seeds) for reward in ends)
    return floor, ceiling


def _batches(episodes: float, batch: int) -> int:
    return max(1, round(episodes / batch)) * batch
