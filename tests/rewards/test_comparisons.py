"""Comparisons: the judge's odds, the loss against a loop, and its gradient against autograd."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.errors import SpecError
from palimpsest.rewards.comparisons import Comparisons, accuracy, bradley_terry, compare, joined


def drawn(seed: int, n_seeds: int = 2, number: int = 7, members: int = 3, cells: int = 4) -> Comparisons:
    rngs = [np.random.default_rng([seed, place]) for place in range(n_seeds)]
    arrived = np.stack([rng.integers(cells, size=(5, 6)) for rng in rngs])
    rewards = np.linspace(-1, 1, cells)
    return compare(arrived, arrived, rewards, number, rngs, length=4, members=members)


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_the_loss_and_its_gradient_are_autograds(seed: int) -> None:
    comparisons = drawn(seed)
    rewards = np.random.default_rng(seed).normal(size=(2, 3, 4))
    nll, gradient = bradley_terry(comparisons, rewards)
    free = torch.tensor(rewards, requires_grad=True)
    total = torch.zeros(2, 3, dtype=torch.float64)
    for place in range(2):
        for member in range(3):
            for pair in range(7):
                gains = [
                    (torch.tensor(comparisons.counts[place, pair, side]) * free[place, member]).sum() for side in (0, 1)
                ]
                winner = 0 if comparisons.first[place, pair] else 1
                chance = torch.exp(gains[winner]) / (torch.exp(gains[0]) + torch.exp(gains[1]))
                total[place, member] -= comparisons.weights[place, pair, member] * torch.log(chance) / 7
    total.sum().backward()
    np.testing.assert_allclose(nll, total.detach().numpy(), atol=1e-12)
    assert free.grad is not None
    np.testing.assert_allclose(gradient, free.grad.numpy(), atol=1e-12)


def test_a_loss_far_out_is_finite() -> None:
    nll, gradient = bradley_terry(drawn(0), np.random.default_rng(0).normal(size=(2, 3, 4)) * 1e4)
    assert np.isfinite(nll).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_judge_prefers_by_the_odds_of_bradley_and_terry(temperature: float) -> None:
    """A fragment that is worth 1.5 against one worth nothing."""
    good, plain = np.full((1, 1, 3), 1), np.zeros((1, 1, 3), np.int64)
    rewards, n = np.array([0.0, 0.5]), 20_000
    made = compare(good, plain, rewards, n, [np.random.default_rng(0)], length=3, temperature=temperature)
    chance = 1 / (1 + math.exp(-1.5 / temperature))
    assert abs(made.first.mean() - chance) < 5 * math.sqrt(chance * (1 - chance) / n)
    assert (made.counts[0, :, 0] == [0, 3]).all() and (made.counts[0, :, 1] == [3, 0]).all()
    np.testing.assert_array_equal(made.visits, [[3 * n, 3 * n]])
    assert accuracy(made, np.array([[0.0, 1.0]]))[0] == made.first.mean()
    assert accuracy(made, np.array([[1.0, 0.0]]))[0] == pytest.approx(1 - made.first.mean())
    assert accuracy(made, np.zeros((1, 2)))[0] == 0.5


def test_fragments_are_pieces_of_episodes_and_begin_everywhere() -> None:
    """Episodes count upwards, so a fragment is a run of cells."""
    arrived = np.arange(8)[None, None].repeat(3, 1)
    made = compare(arrived, arrived, np.zeros(8), 300, [np.random.default_rng(0)], length=3)
    begins = set()
    for counts in made.counts[0].reshape(-1, 8):
        (run,) = np.nonzero(counts)
        assert run.tolist() == list(range(run[0], run[0] + 3))
        begins.add(int(run[0]))
    assert begins == set(range(6))


def test_one_member_sees_all_and_of_more_each_a_bootstrap() -> None:
    assert (drawn(0, members=1).weights == 1).all()
    weights = drawn(0, number=4000, members=3).weights[0]
    assert np.abs(weights.mean(0) - 1).max() < 5 / math.sqrt(4000)
    assert np.abs(weights.var(0) - 1).max() < 0.15 and not (weights[:, 0] == weights[:, 1]).all()


def test_the_newest_are_the_last() -> None:
    parts = [drawn(seed, number=number) for seed, number in ((0, 6), (1, 2))]
    both = joined(parts)
    assert len(both) == 8
    newest = both.newest(0.25)
    for name in ("counts", "first", "weights"):
        np.testing.assert_array_equal(getattr(newest, name), getattr(parts[1], name))
    np.testing.assert_array_equal(both.visits, parts[0].visits + parts[1].visits)
    assert len(both.newest(0.001)) == 1 and len(both.newest(1)) == 8


def test_fragments_longer_than_episodes_are_refused() -> None:
    arrived = np.zeros((1, 2, 5), np.int64)
    with pytest.raises(SpecError, match="fragments of 6 steps out of episodes of 5; give at most 5"):
        compare(arrived, arrived, np.zeros(1), 1, [np.random.default_rng(0)], length=6)
