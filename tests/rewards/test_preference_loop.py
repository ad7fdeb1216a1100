"""Learning a reward from preferences: seeds, schedules and sources."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.errors import SpecError
from palimpsest.rewards.gridworlds import near
from palimpsest.rewards.preference_loop import (
    LearnedReward,
    PreferenceSettings,
    Schedule,
    generators,
    learn_reward,
    refitted,
)
from palimpsest.rewards.reward_models import RewardSettings

WORLD = near(12)


def short(seeds: tuple[int, ...] = (0, 1), **changes: Any) -> LearnedReward:
    settings = {"rounds": 4, "comparisons": 40, "reward": RewardSettings(steps=5, first_steps=10)} | changes
    return learn_reward(WORLD, PreferenceSettings(**settings), seeds)


@given(rounds=st.integers(1, 40), spare=st.integers(0, 500), schedule=st.sampled_from(["constant", "hyperbolic"]))
@settings(max_examples=50, deadline=None)
def test_every_comparison_is_made_and_a_tenth_beforehand(rounds: int, spare: int, schedule: Schedule) -> None:
    in_all = 2 * rounds + 10 + spare
    numbers = PreferenceSettings(rounds=rounds, comparisons=in_all, schedule=schedule).numbers()
    assert len(numbers) == rounds and sum(numbers) == in_all and min(numbers) >= 0
    if rounds > 1:
        assert numbers[0] == max(1, round(in_all / 10))
        assert numbers[1] >= numbers[-1] - 1


def test_a_hyperbolic_schedule_asks_early() -> None:
    numbers = PreferenceSettings(rounds=5, comparisons=280, schedule="hyperbolic").numbers()
    np.testing.assert_allclose(numbers[1:], 252 * np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12), atol=1)


@pytest.mark.parametrize(
    "reward",
    [
        RewardSettings(steps=5, first_steps=10),
        RewardSettings(kind="mlp", members=3, pessimism=1.0, l2=1e-3, steps=3, first_steps=5),
    ],
    ids=["table", "ensemble"],
)
def test_a_seed_is_the_same_bytes_again_and_whichever_others_there_are(reward: RewardSettings) -> None:
    together, again = (short((3, 7, 1), reward=reward, random_episodes=0.25, random_starts=0.25) for _ in range(2))
    alone = short((7,), reward=reward, random_episodes=0.25, random_starts=0.25)
    assert together.reward.fingerprint() == again.reward.fingerprint()
    assert together.reward.values[1].tobytes() == alone.reward.values[0].tobytes()
    assert together.comparisons.counts[1].tobytes() == alone.comparisons.counts[0].tobytes()
    assert together.sampler_score[1] == alone.sampler_score[0]
    assert not np.array_equal(together.reward.values[0], together.reward.values[1])


def test_roles_and_seeds_draw_apart() -> None:
    drawn = {(seed, role): generators([seed], role)[0].random() for seed in (0, 1) for role in ("judge", "sampler")}
    assert len(set(drawn.values())) == 4
    with pytest.raises(SpecError, match=r"seeds are \[0, -1\]; give whole numbers from 0 on"):
        generators([0, -1], "judge")


def test_what_is_compared_is_what_the_sampler_did() -> None:
    """More of the cells that it never goes to where others act in its place."""
    own, others = short(rounds=10, comparisons=300), short(rounds=10, comparisons=300, random_starts=1.0)
    assert ((own.comparisons.visits > 0).sum(1) < (others.comparisons.visits > 0).sum(1)).all()
    assert len(own.comparisons) == 300 and own.settings.reward_steps == 10 + 9 * 5


def test_offline_there_is_no_sampler() -> None:
    expert, everywhere = short(offline="expert"), short(offline="everywhere", comparisons=400)
    assert expert.policy is None
    with pytest.raises(SpecError, match="learned offline, without a sampler"):
        _ = expert.sampler_score
    assert (everywhere.comparisons.visits > 0).all()
    # The best policy goes straight to the patch and stays there.
    assert (expert.comparisons.visits * WORLD.reward).sum() > 0.5 * expert.comparisons.visits.sum()
    mixed = short(offline="mixed").comparisons.visits * WORLD.reward
    assert mixed.sum() < (expert.comparisons.visits * WORLD.reward).sum()


def test_fitting_again_leaves_what_was_learned_as_it_was() -> None:
    learned = short()
    before = learned.reward.fingerprint()
    again = refitted(learned, learned.comparisons.newest(0.5), 3)
    assert learned.model.frozen(learned.comparisons).fingerprint() == before == learned.reward.fingerprint()
    assert again.reward.fingerprint() != before and len(again.comparisons) == 60


def test_the_newest_alone_give_another_reward() -> None:
    assert short().reward.fingerprint() != short(newest=0.25).reward.fingerprint()


def test_progress_is_told_round_by_round() -> None:
    told: list[tuple[int, int, str]] = []
    settings = PreferenceSettings(rounds=3, comparisons=20, reward=RewardSettings(steps=1, first_steps=1))
    learn_reward(WORLD, settings, (0,), report=lambda *step: told.append(step))
    assert told == [(1, 3, "2 comparisons"), (2, 3, "11 comparisons"), (3, 3, "20 comparisons")]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule": "linear"}, "schedule is 'linear'; choose constant or hyperbolic"),
        ({"offline": "human"}, "offline is 'human'; choose from random, expert, mixed, everywhere"),
        ({"comparisons": 30}, "30 rounds of 64 episodes with 30 comparisons"),
        ({"newest": 0.0}, "newest, random_episodes and random_starts are shares of 1"),
        ({"random_episodes": 0.6, "random_starts": 0.6}, "are more than all"),
        ({"length": 13}, "fragments of 13 steps out of episodes of 12"),
    ],
)
def test_settings_that_do_not_hold_together_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        learn_reward(WORLD, PreferenceSettings(**changes), (0,))
