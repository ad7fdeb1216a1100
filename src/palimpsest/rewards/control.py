"""Does a reward that was learned from comparisons teach a fresh policy what was meant? In continuous control.

A sampler is trained by PPO beside a reward that is fitted to comparisons of its episodes (Christiano et al. 2017, arXiv
1706.03741), then the reward is frozen, and policies begin from random weights with a quarter of the sampler's steps,
as many, and four times as many (after McKinney et al. 2022, arXiv 2301.03652). Below them is the same learner on a
constant reward, above them the same on the true one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from palimpsest.errors import SpecError
from palimpsest.progress import Report
from palimpsest.relearning.judgement import RelearnSettings
from palimpsest.relearning.protocol import RelearnSpec
from palimpsest.rewards.control_learner import METRIC, PROXY, PolicyLearner, PPOSettings
from palimpsest.rewards.control_rewards import (
    ConstantReward,
    FragmentComparisons,
    FrozenNetworkReward,
    NetworkSettings,
    RewardNetwork,
    TransitionReward,
    compare_fragments,
)
from palimpsest.rewards.randomness import stream_seed

_SAMPLER, _NETWORK, _JUDGE, _RELEARNER = 1, 2, 3, 4  # purposes of seeds


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """An environment, the loop that learns a reward in it, and the policy's learner.

    Raises:
        SpecError: numbers below 1, or steps that rollouts do not divide.
    """

    environment: str
    """Gymnasium's name."""
    sampler_steps: int
    """Of the environment; a fresh learner's budgets are a quarter of it, as much, and four times."""
    rounds: int = 10
    """In each, episodes are compared, the reward is fitted on, and the sampler learns on."""
    comparisons: int = 700
    """In all."""
    fragment: int = 10
    """Steps."""
    temperature: float = 1.0
    """Of the judge, in units of true reward."""
    reward_steps: int = 200
    """Of gradient descent a round."""
    network: NetworkSettings = field(default_factory=NetworkSettings)
    ppo: PPOSettings = field(default_factory=PPOSettings)

    def __post_init__(self) -> None:
        if min(self.rounds, self.fragment, self.reward_steps, self.sampler_steps) < 1 or self.comparisons < self.rounds:
            raise SpecError(f"{self.environment}: rounds, fragment and steps must be at least 1, comparisons as rounds")
        for parts, what in ((4, "budgets"), (self.rounds, "rounds")):
            if self.sampler_steps % (parts * self.ppo.steps):
                raise SpecError(
                    f"{self.environment}: {self.sampler_steps} sampler steps cannot be parted for its {what}; give a "
                    f"multiple of {parts * self.ppo.steps} ({parts} rollouts of {self.ppo.steps})"
                )

    @property
    def budgets(self) -> tuple[int, int, int]:
        """Of a fresh learner, in steps."""
        return self.sampler_steps // 4, self.sampler_steps, 4 * self.sampler_steps


SETTINGS = {
    "reacher": ControlSettings(environment="Reacher-v5", sampler_steps=20_480),
    "pendulum": ControlSettings(
        environment="Pendulum-v1",
        sampler_steps=40_960,
        fragment=20,
        temperature=10.0,
        ppo=PPOSettings(log_deviation=0.0, gae=0.95),
    ),
    "half_cheetah": ControlSettings(
        environment="HalfCheetah-v5",
        sampler_steps=8_192_000,
        rounds=50,
        comparisons=5_000,
        fragment=50,
        temperature=10.0,
        ppo=PPOSettings(rollout=128, learning_rate=3e-4, discount=0.99, gae=0.95, evaluated=16),
    ),
}
"""The first takes minutes, the last days: a learner of 33 million steps for each of three references and seed."""


@dataclass(frozen=True)
class LearnedReward:
    """A frozen reward, and what is usually shown for it."""

    reward: FrozenNetworkReward
    sampler_return: float
    """The true return of the policy that was trained beside it: the incumbent."""
    sampler_proxy: float
    """Its return by the reward."""
    accuracy: float
    """The share of all comparisons that the reward calls as the judge did."""


def learn_reward(settings: ControlSettings, seed: int, *, report: Report | None = None) -> LearnedReward:
    """The preference loop of one seed.

    Args:
        settings: what to run.
        seed: of the sampler, the judge and the network.
        report: called with (rounds done, of how many, a note).

    Raises:
        SpecError: a package that is missing, an unknown environment, or episodes that can end early.
    """
    sampler = PolicyLearner(settings.environment, settings.ppo, ConstantReward(), stream_seed(seed, _SAMPLER))
    rng = np.random.default_rng([seed, _JUDGE])
    network: RewardNetwork | None = None
    parts: list[FragmentComparisons] = []
    for done in range(settings.rounds):
        episodes = sampler.compared(done)
        parts.append(
            compare_fragments(
                episodes.transitions,
                episodes.rewards,
                settings.comparisons // settings.rounds,
                rng,
                length=settings.fragment,
                temperature=settings.temperature,
            )
        )
        comparisons = FragmentComparisons.joined(parts)
        network = network or RewardNetwork(
            settings.network, episodes.transitions.shape[-1], stream_seed(seed, _NETWORK)
        )
        network.fit(comparisons, settings.reward_steps)
        reward = sampler.reward = network.frozen(comparisons)
        sampler.fit_to(settings.sampler_steps * (done + 1) // settings.rounds)
        if report:
            report(done + 1, settings.rounds, f"{settings.environment}, seed {seed}")
    probed = sampler.probe()
    accuracy = comparisons.accuracy(reward.of(comparisons.transitions.numpy()))
    return LearnedReward(reward, probed[METRIC], probed[PROXY], accuracy)


def control_spec(
    settings: ControlSettings, learned: Mapping[int, LearnedReward], *, margin: float = 0.2
) -> RelearnSpec:
    """The experiment that `relearn` runs: fresh policies on each seed's reward.

    Args:
        settings: those that the rewards were learned with.
        learned: one a seed.
        margin: the share of the way from floor to ceiling that a good reward may miss.
    """
    incumbent = float(np.mean([each.sampler_return for each in learned.values()]))
    protocol = RelearnSettings(
        budgets=settings.budgets,
        seeds=tuple(learned),
        metric=METRIC,
        want="return",
        incumbent=incumbent,
        margin=margin,
    )
    return RelearnSpec(
        protocol,
        lambda seed: fresh_policy(settings, learned[seed].reward, seed),
        lambda seed: fresh_policy(settings, ConstantReward(), seed),
        lambda seed: fresh_policy(settings, None, seed),
        {f"the reward of seed {seed}": each.reward for seed, each in learned.items()},
    )


def fresh_policy(settings: ControlSettings, reward: TransitionReward | None, seed: int) -> PolicyLearner:
    """A policy that has learned nothing yet and shares no draw with the sampler; `reward` None is the true one."""
    return PolicyLearner(settings.environment, settings.ppo, reward, stream_seed(seed, _RELEARNER))
