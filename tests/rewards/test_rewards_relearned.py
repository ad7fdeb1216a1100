"""Relearning from rewards: what passes, what fails, what says nothing, and which seeds are set aside."""

import math
from dataclasses import replace

import numpy as np
import pytest

from palimpsest.rewards.gridworlds import Ints, near, plan, uniform
from palimpsest.rewards.preference_loop import LearnedReward, PreferenceSettings, learn_reward
from palimpsest.rewards.relearning import RELEARNERS, Cohort, Rate, Relearner, relearn_reward
from palimpsest.rewards.reward_models import FrozenReward, Reward, RewardSettings, constant_reward, true_reward
from palimpsest.rewards.tabular_learners import Planner, QLearner, QLearning

WORLD = near()
SEEDS = tuple(range(6))
PLANNER = RELEARNERS["planner"]


@pytest.fixture(scope="module")
def learned() -> LearnedReward:
    """A short run, in whose place stand the true reward and the best sampler."""
    settings = PreferenceSettings(rounds=5, comparisons=20, reward=RewardSettings(steps=1, first_steps=1))
    best = plan(WORLD, np.tile(WORLD.reward, (len(SEEDS), 1)))
    learned = learn_reward(WORLD, settings, SEEDS)
    return replace(learned, reward=true_reward(WORLD, len(SEEDS)), policy=best)


class Drifting:
    """A reward that a running normaliser keeps changing while it is asked: frozen in name alone."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.asked = reward, 0

    def __call__(self, cells: Ints) -> np.ndarray:
        self.asked += 1
        return self.reward(cells) / math.sqrt(self.asked)

    def fingerprint(self) -> str:
        return f"{self.reward.fingerprint()}/{self.asked}"


@pytest.mark.parametrize("name", RELEARNERS)
def test_the_true_reward_passes_and_a_constant_one_fails(learned: LearnedReward, name: str) -> None:
    good = relearn_reward(learned, RELEARNERS[name])
    nothing = relearn_reward(replace(learned, reward=constant_reward(WORLD, len(SEEDS))), RELEARNERS[name])
    assert good.report and (good.report.verdict, good.failures.k) == ("PASS", 0)
    assert nothing.report and nothing.report.verdict == "FAIL" and nothing.failures.k == nothing.failures.n >= 5
    assert set(good.report.fingerprints) == {"reward", "constant", "true"}
    rho = [point.rho.value for point in good.report.points if point.rho]
    np.testing.assert_allclose(rho, 1, atol=1e-12)  # the very same learner


def test_budgets_are_a_quarter_of_the_samplers_as_much_and_four_times_as_much() -> None:
    own = PreferenceSettings().sampler
    assert RELEARNERS["q_learner"].budgets(own) == (480, 1920, 7680) and PLANNER.budgets(own) == (1,)
    assert RELEARNERS["q_learner"].own_budget(own) == 1920 and PLANNER.own_budget(own) == 1


def test_a_reward_that_is_not_frozen_is_caught_by_its_fingerprint(learned: LearnedReward) -> None:
    found = relearn_reward(learned, PLANNER, reward=Drifting(learned.reward))
    assert found.report and (found.report.verdict, found.report.reason) == ("INCONCLUSIVE", "changed")
    assert "reward changed while it was learned from" in found.report.summary


def test_a_learner_that_cannot_learn_says_nothing_of_a_reward(learned: LearnedReward) -> None:
    def crippled(world: object, own: QLearning, seeds: object) -> QLearner:
        return QLearner(WORLD, replace(own, learning_rate=0.0), [np.random.default_rng(seed) for seed in SEEDS])

    found = relearn_reward(learned, Relearner("crippled", crippled))
    assert found.report and (found.report.verdict, found.report.reason) == ("INCONCLUSIVE", "weak learner")
    assert found.weak_learners == ()


def test_seeds_are_set_aside_one_by_one_for_a_bad_sampler_or_a_learner_that_missed_the_truth(
    learned: LearnedReward,
) -> None:
    """Sampler 0 acts at random; the learners of 3 and 0 are deaf to any reward."""

    class DeafInPart(Planner):
        def policy(self) -> np.ndarray:
            planned = np.broadcast_to(super().policy(), (len(SEEDS), 30, 64, 5)).copy()
            planned[[0, 3]] = 0.2
            return planned

    assert learned.policy is not None
    policy = learned.policy.copy()
    policy[0] = uniform(WORLD, 1)
    found = relearn_reward(
        replace(learned, policy=policy),
        Relearner("deaf", lambda world, own, seeds: DeafInPart(world, len(seeds)), True),
    )
    assert (found.bad_samplers, found.weak_learners, found.seeds) == ((0,), (3,), (1, 2, 4, 5))
    assert found.failures == Rate(0, 4)
    assert found.report and found.report.reason == "few seeds"


def test_where_no_sampler_did_well_there_is_no_report(learned: LearnedReward) -> None:
    found = relearn_reward(replace(learned, policy=uniform(WORLD, len(SEEDS))), PLANNER)
    assert found.report is None and found.bad_samplers == SEEDS and found.failures == Rate(0, 0)
    assert found.to_json()["failures"] == [0, 0, 0.0, 1.0]


def test_failures_are_counted_at_the_samplers_own_budget(learned: LearnedReward) -> None:
    """A reward turned upside down in two seeds."""
    values = learned.reward.values * np.array([1, -1, 1, 1, -1, 1])[:, None]
    found = relearn_reward(replace(learned, reward=FrozenReward(values)), RELEARNERS["q_learner"])
    assert found.report is not None
    own = found.report.curve("artefact")[:, 1]
    assert [seed for seed, value in zip(found.seeds, own, strict=True) if value < 0.5] == [1, 4]
    assert found.failures.k == 2


def test_a_cohorts_learner_is_the_one_that_learns_alone() -> None:
    reward, own = np.random.default_rng(0).normal(size=(3, 64)), QLearning(decay=128)
    cohort = Cohort(WORLD, RELEARNERS["q_learner"], FrozenReward(reward), own, (5, 8, 2))
    alone = Cohort(WORLD, RELEARNERS["q_learner"], FrozenReward(reward[1:2]), own, (8,))
    probes = []
    for each in (cohort, alone):
        learner = each.make(8)
        for budget in (32, 128, 512):
            learner.fit_to(budget)
            probes.append(learner.probe())
    assert probes[:3] == probes[3:] and set(probes[0]) == {"score", "proxy"}


def test_a_rates_interval_is_wilsons() -> None:
    z, n, k = 1.959963984540054, 13, 11
    middle, half = k / n + z**2 / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    assert Rate(k, n).interval == pytest.approx(((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)))
    assert str(Rate(k, n)) == "11/13 [0.58, 0.96]"
    assert Rate(0, 0).interval == (0.0, 1.0) and math.isnan(Rate(0, 0).value)


def test_a_table_without_regularisation_fails_its_planner_and_l2_mends_it() -> None:
    """The phenomenon itself, in ten seeds; the study has the rates."""
    fails = {}
    for l2 in (0.0, 1e-3):
        settings = PreferenceSettings(reward=RewardSettings(l2=l2))
        fails[l2] = relearn_reward(learn_reward(WORLD, settings, range(10)), PLANNER).failures
    assert fails[0.0].value >= 0.6 and fails[1e-3].value <= 0.15
    assert min(rate.n for rate in fails.values()) >= 5
