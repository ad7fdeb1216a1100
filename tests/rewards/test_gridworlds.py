"""Grid worlds: planner, occupancy and returns against other ways to compute them."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.rewards.worlds import any_world, step_matrix

from palimpsest.errors import SpecError
from palimpsest.rewards.gridworlds import (
    WORLDS,
    greedy,
    near,
    plan,
    returns,
    roll_out,
    score,
    uniform,
    visits,
)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_no_policy_of_all_there_are_is_better_than_the_plan(seed: int) -> None:
    """8 decisions for three cells, in each of three steps."""
    world = any_world(seed)
    decisions = [np.eye(2)[list(chosen)] for chosen in product(range(2), repeat=3)]
    matrices = [step_matrix(world, decision) for decision in decisions]
    best = -np.inf
    for first, second, third in product(matrices, repeat=3):
        one = world.start @ first
        two = one @ second
        best = max(best, (one + two + two @ third) @ world.reward)
    planned = plan(world, world.reward[None])
    assert returns(world, planned)[0] == pytest.approx(best, abs=1e-12)


@given(seed=st.integers(0, 10_000), cells=st.integers(2, 6), moves=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_visits_are_powers_of_the_step_matrix(seed: int, cells: int, moves: int) -> None:
    world = any_world(seed, cells=cells, moves=moves, horizon=5)
    policy = np.random.default_rng(seed).dirichlet(np.ones(moves), (2, 1, cells))
    found = visits(world, policy)
    for each, arrived in zip(policy[:, 0], found, strict=True):
        matrix = step_matrix(world, each)
        expected = [world.start @ np.linalg.matrix_power(matrix, step + 1) for step in range(5)]
        np.testing.assert_allclose(arrived, expected, atol=1e-12)
    np.testing.assert_allclose(returns(world, policy), found.sum(1) @ world.reward, atol=1e-12)


def test_episodes_arrive_where_visits_say() -> None:
    """Within five standard errors, under a policy that changes from step to step."""
    world, episodes = near(horizon=6), 20_000
    policy = np.random.default_rng(1).dirichlet(np.ones(5), (1, 6, 64))
    draws = np.random.default_rng(2).random((1, 2, 7, episodes))
    cells, moves = roll_out(world, policy, draws)
    expected = visits(world, policy)[0]
    for step in range(6):
        share = np.bincount(cells[0, :, step + 1], minlength=64) / episodes
        assert (np.abs(share - expected[step]) <= 5 * np.sqrt(expected[step] / episodes) + 1e-12).all()
    assert (cells[0, :, 0] == 0).all() and moves.shape == (1, episodes, 6)
    elsewhere, _ = roll_out(world, policy, draws, world.everywhere)
    counts = np.bincount(elsewhere[0, :, 0], minlength=64)
    assert abs(counts - episodes / 64).max() < 5 * np.sqrt(episodes / 64)


def test_without_slip_every_episode_does_what_was_chosen() -> None:
    world = replace(near(), slip=0.0)
    cells, moves = roll_out(world, uniform(world, 2), np.random.default_rng(0).random((2, 2, 31, 5)))
    assert (world.moves[cells[..., :-1], moves] == cells[..., 1:]).all()


@pytest.mark.parametrize("name", WORLDS)
def test_score_is_0_for_the_uniform_policy_and_1_for_the_best(name: str) -> None:
    world = WORLDS[name](30)
    np.testing.assert_allclose(score(world, uniform(world, 1)), 0, atol=1e-12)
    np.testing.assert_allclose(score(world, plan(world, world.reward[None])), 1, atol=1e-12)


def test_a_planner_that_knows_no_better_moves_evenly() -> None:
    world = near()
    np.testing.assert_array_equal(plan(world, np.zeros((1, 64))), np.full((1, 30, 64, 5), 0.2))
    np.testing.assert_allclose(greedy(np.array([1.0, 3.0, 3.0 - 1e-12, 2.0])), [0, 0.5, 0.5, 0])


def test_the_patch_is_two_cells_from_the_start_and_most_of_the_map_is_bad() -> None:
    reward = near().reward.reshape(8, 8)
    assert reward[0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0] and (reward[3:] == -0.5).all()
    assert near().start.argmax() == 0 and near().moves[0].tolist() == [0, 8, 0, 1, 0]


def test_a_seeds_numbers_are_the_same_bytes_whichever_others_there_are() -> None:
    world, rewards = near(), np.random.default_rng(0).normal(size=(5, 64))
    together, alone = plan(world, rewards), plan(world, rewards[3:4])
    assert together[3:4].tobytes() == alone.tobytes()
    assert visits(world, together)[3:4].tobytes() == visits(world, alone).tobytes()
    assert score(world, together)[3] == score(world, alone)[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"moves": np.array([[0, 1], [-1, 2], [2, 0]])}, "move 0 from cell 1 leads to -1, which is no cell"),
        ({"moves": np.array([[0, 3], [1, 2], [2, 0]])}, "tells the sign of the reward by its length"),
        ({"start": np.array([0.5, 0.2, 0.2])}, "start sums to 0.9"),
        ({"reward": np.zeros(2)}, "moves are of 3 cells, but reward, start and places are of 2, 3 and 3"),
        ({"horizon": 0}, "horizon 0 and slip 0.2"),
        ({"slip": 1.0}, "horizon 3 and slip 1.0"),
    ],
)
def test_a_world_that_does_not_hold_together_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        replace(any_world(0), **change)
