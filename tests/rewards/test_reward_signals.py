"""Signals of a failing reward, and its repair."""

from dataclasses import replace

import numpy as np
import pytest

from palimpsest.errors import SpecError
from palimpsest.rewards.gridworlds import near, plan, returns
from palimpsest.rewards.preference_loop import LearnedReward, PreferenceSettings, learn_reward
from palimpsest.rewards.reward_models import RewardSettings, true_reward
from palimpsest.rewards.signals import ALARM, FAILS_WHEN, NEEDS_TRUTH, correlation, proxy_gap, repair, signals

WORLD = near()


@pytest.fixture(scope="module")
def learned() -> LearnedReward:
    return learn_reward(WORLD, PreferenceSettings(reward=RewardSettings(members=2)), range(4))


@pytest.fixture(scope="module")
def ideal(learned: LearnedReward) -> LearnedReward:
    """The true reward beside the best sampler."""
    best = plan(WORLD, np.tile(WORLD.reward, (4, 1)))
    return replace(learned, reward=true_reward(WORLD, 4), policy=best)


def test_a_correlation_under_weights_is_one_over_repeated_cells() -> None:
    rng = np.random.default_rng(0)
    rewards, truth, times = rng.normal(size=(3, 7)), rng.normal(size=7), rng.integers(0, 5, (3, 7))
    expected = [
        np.corrcoef(np.repeat(each, many), np.repeat(truth, many))[0, 1]
        for each, many in zip(rewards, times, strict=True)
    ]
    np.testing.assert_allclose(correlation(rewards, truth, times / times.sum(1, keepdims=True)), expected)
    assert correlation(np.ones((1, 7)), truth, np.full((1, 7), 1 / 7))[0] == 0


def test_the_truth_beside_the_best_sampler_raises_nothing(ideal: LearnedReward) -> None:
    found = signals(ideal)
    np.testing.assert_allclose(found["proxy_gap"], 0, atol=1e-12)
    np.testing.assert_allclose(found["correlation_everywhere"], 1)
    np.testing.assert_allclose(found["sampler_return"], 1)
    assert set(found) == set(FAILS_WHEN) and set(NEEDS_TRUTH) < set(found)


def test_the_gap_is_what_a_fresh_optimiser_gains_over_the_sampler(learned: LearnedReward) -> None:
    values = learned.reward.values
    assert learned.policy is not None
    best = returns(WORLD, plan(WORLD, values), values) / WORLD.horizon
    own = returns(WORLD, learned.policy, values) / WORLD.horizon
    np.testing.assert_allclose(proxy_gap(learned), best - own, atol=1e-12)
    np.testing.assert_allclose(signals(learned)["proxy_gap"], best - own, atol=1e-12)
    assert (proxy_gap(learned) >= 0).all()


def test_unseen_and_rare_are_shares(learned: LearnedReward) -> None:
    found = signals(learned)
    np.testing.assert_allclose(found["unseen"], (learned.comparisons.visits == 0).mean(1))
    assert ((found["rarely_compared"] >= 0) & (found["rarely_compared"] <= 1 + 1e-12)).all()
    assert (found["spread"] > 0).all()


def test_repair_closes_the_gap_where_as_many_labels_elsewhere_do_not(learned: LearnedReward) -> None:
    before = learned.reward.fingerprint()
    assert (proxy_gap(learned) > ALARM).any()
    aimed, elsewhere = (repair(learned, rounds=4, targeted=targeted) for targeted in (True, False))
    np.testing.assert_array_equal(aimed.gaps[0], proxy_gap(learned))
    assert aimed.gaps.shape == aimed.scores.shape == (5, 4)
    assert aimed.gaps[-1].mean() < 0.5 * aimed.gaps[0].mean() < elsewhere.gaps[-1].mean()
    assert aimed.scores[-1].mean() > aimed.scores[0].mean() + 0.2 > elsewhere.scores[-1].mean()
    assert learned.reward.fingerprint() == before


def test_without_a_sampler_there_is_nothing_to_compare_with() -> None:
    settings = PreferenceSettings(offline="random", rounds=2, comparisons=20, reward=RewardSettings(first_steps=2))
    offline = learn_reward(near(12), settings, (0,))
    for asked in (signals, proxy_gap, repair):
        with pytest.raises(SpecError, match="learned offline"):
            asked(offline)
