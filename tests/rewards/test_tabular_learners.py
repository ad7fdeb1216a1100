"""Tabular learners: Q-learning against its own fixed point and written out step by step."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.rewards.worlds import any_world

from palimpsest.errors import SpecError
from palimpsest.rewards.gridworlds import near, plan, score
from palimpsest.rewards.reward_models import FrozenReward, constant_reward, true_reward
from palimpsest.rewards.tabular_learners import Planner, QLearner, QLearning


def generators(*seeds: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in seeds]


def test_q_learning_comes_to_the_fixed_point_of_bellmans_equation() -> None:
    """Where moves do what they say, so that targets have no noise."""
    world = any_world(3, cells=5, moves=3, horizon=8, slip=0.0)
    learner = QLearner(world, QLearning(first_epsilon=1, last_epsilon=1, discount=0.9, batch=64), generators(0))
    learner.train(true_reward(world, 1), 64 * 150)
    values = np.zeros(5)
    for _ in range(500):
        values = (world.reward + 0.9 * values)[world.moves].max(1)
    reached = {0, 1, 2, 3, 4}
    np.testing.assert_allclose(
        learner.values[0][sorted(reached)], (world.reward + 0.9 * values)[world.moves], atol=1e-6
    )


def test_visits_of_one_batch_count_as_so_many_updates() -> None:
    """One cell and one move: the value goes to the reward by the rate, once an episode and step."""
    world = any_world(0, cells=1, moves=1, horizon=2, slip=0.0)
    learner = QLearner(world, QLearning(learning_rate=0.1, discount=0, batch=3), generators(0))
    learner.train(FrozenReward(np.array([[2.0]])), 3)
    assert learner.values[0, 0, 0] == pytest.approx(2 * (1 - 0.9**6))


def test_an_episode_is_learned_from_backwards_and_not_ended_by_the_horizon() -> None:
    """Two cells in a ring: 0 leads to 1, which is worth 1, and back. One episode, one step at a time."""
    world = replace(
        any_world(0, cells=2, moves=1, horizon=3, slip=0.0),
        moves=np.array([[1], [0]]), reward=np.array([0.0, 1.0]), start=np.array([1.0, 0.0]),
    )  # fmt: skip
    learner = QLearner(world, QLearning(learning_rate=0.5, discount=0.8, batch=1), generators(0))
    learner.train(true_reward(world, 1), 1)
    last = 0.5 * 1.0
    middle = 0.5 * (0.8 * last)
    first = last + 0.5 * (1 + 0.8 * middle - last)
    np.testing.assert_allclose(learner.values[0, :, 0], [first, middle])


def test_exploration_falls_to_its_last_and_stays_there() -> None:
    world = near(4)
    learner = QLearner(world, QLearning(decay=64), generators(0))
    assert learner.exploring().min() == pytest.approx(0.2)  # nothing is known: all moves are even
    learner._values[2] = 1.0
    shares = [learner.exploring().min()]
    for _ in range(3):
        learner.train(constant_reward(world, 1), 32)
        learner._values[:] = np.arange(5.0)[:, None, None]
        shares.append(learner.exploring().min())
    np.testing.assert_allclose(shares, [0.3 / 5, 0.175 / 5, 0.05 / 5, 0.05 / 5])


def test_pieces_are_the_whole_and_seeds_do_not_see_one_another() -> None:
    world = near(10)
    reward = FrozenReward(np.random.default_rng(0).normal(size=(3, 64)))
    whole, pieces = (QLearner(world, QLearning(), generators(4, 5, 6)) for _ in range(2))
    whole.train(reward, 96)
    for units in (32, 0, 64):
        pieces.train(reward, units)
    alone = QLearner(world, QLearning(), generators(5))
    alone.train(FrozenReward(reward.values[1:2]), 96)
    assert whole.values.tobytes() == pieces.values.tobytes()
    assert whole.values[1].tobytes() == alone.values[0].tobytes()


def test_both_kinds_learn_the_true_reward_and_nothing_from_a_constant_one() -> None:
    world = near()
    for settings in (QLearning(), QLearning().stronger()):
        learner = QLearner(world, settings, generators(0, 1, 2))
        arrived = learner.train(true_reward(world, 3), 1920)
        assert arrived.shape == (3, 1920, 30) and (score(world, learner.policy()) > 0.9).all()
    ignorant = QLearner(world, QLearning(), generators(0))
    ignorant.train(constant_reward(world, 1), 320)
    np.testing.assert_allclose(score(world, ignorant.policy()), 0, atol=1e-12)


def test_a_planner_plans_what_it_is_given_and_before_that_nothing() -> None:
    world, rewards = near(), np.random.default_rng(0).normal(size=(2, 64))
    planner = Planner(world, 2)
    np.testing.assert_allclose(score(world, planner.policy()), 0, atol=1e-12)
    planner.train(FrozenReward(rewards), 1)
    np.testing.assert_array_equal(planner.policy(), plan(world, rewards))


def test_a_part_of_a_batch_is_refused() -> None:
    learner = QLearner(near(3), QLearning(), generators(0))
    with pytest.raises(SpecError, match="40 episodes in batches of 32; give a multiple"):
        learner.train(constant_reward(near(3), 1), 40)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"learning_rate": 1.5}, "learning_rate is 1.5"), ({"batch": 0}, "batch and decay must be at least 1")],
)
def test_numbers_out_of_range_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        QLearning(**changes)
