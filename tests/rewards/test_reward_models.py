"""Reward models: fitted as torch would, standardised on what was compared, and frozen for good."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.rewards.worlds import any_world

from palimpsest.errors import SpecError
from palimpsest.rewards.comparisons import Comparisons, bradley_terry
from palimpsest.rewards.gridworlds import GridWorld, near
from palimpsest.rewards.reward_models import (
    FrozenReward,
    Kind,
    RewardModel,
    RewardSettings,
    constant_reward,
    standardised,
    true_reward,
)

WORLD = any_world(0, cells=5)


def compared(n_seeds: int = 2, number: int = 30, members: int = 2, cells: int = 5) -> Comparisons:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, (n_seeds, number, 2, cells)).astype(np.int16)
    return Comparisons(
        counts,
        rng.integers(2, size=(n_seeds, number)).astype(float),
        rng.poisson(1.0, (n_seeds, number, members)).astype(float),
    )


def model(world: GridWorld = WORLD, seeds: int = 2, **changes: Any) -> RewardModel:
    settings = RewardSettings(**{"members": 2, **changes})
    return RewardModel(settings, world, [np.random.default_rng(seed) for seed in range(seeds)])


@pytest.mark.parametrize("kind", ["table", "mlp"])
def test_fitting_is_torchs_adam_on_loss_and_l2(kind: Kind) -> None:
    """Every seed and member for itself, in float64."""
    comparisons, fitted = compared(), model(kind=kind, l2=0.01, width=4)
    before = [parameter.copy() for parameter in fitted.parameters]
    fitted.fit(comparisons, 7)
    for seed in range(2):
        for member in range(2):
            free = [torch.tensor(parameter[seed, member], requires_grad=True) for parameter in before]
            optimizer = torch.optim.Adam(free, lr=fitted.settings.rate)
            differences = torch.tensor(comparisons.differences[seed])
            label, weight = torch.tensor(comparisons.first[seed]), torch.tensor(comparisons.weights[seed, :, member])
            for _ in range(7):
                rewards = free[0]
                if kind == "mlp":
                    hidden = torch.tensor(WORLD.places)
                    for layer in (0, 2):
                        hidden = torch.tanh(hidden @ free[layer] + free[layer + 1])
                    rewards = (hidden @ free[4] + free[5])[:, 0]
                loss = torch.nn.functional.binary_cross_entropy_with_logits(differences @ rewards, label, weight=weight)
                loss = loss + 0.01 * sum((parameter**2).sum() for parameter in free)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            for ours, theirs in zip(fitted.parameters, free, strict=True):
                np.testing.assert_allclose(ours[seed, member], theirs.detach().numpy(), atol=1e-9)


def test_a_table_of_two_cells_comes_to_the_log_odds() -> None:
    """Three times out of four the first cell is preferred."""
    counts = np.tile(np.array([[1, 0], [0, 1]], np.int16), (1, 8, 1, 1))
    comparisons = Comparisons(counts, np.array([[1, 1, 1, 0] * 2], float), np.ones((1, 8, 1)))
    fitted = model(any_world(0, cells=2), seeds=1, members=1)
    fitted.fit(comparisons, 2000)
    first, second = fitted.rewards()[0][0, 0]
    assert first - second == pytest.approx(math.log(3), abs=1e-6)


def test_what_is_rarely_compared_goes_on_and_on_unless_l2_holds_it() -> None:
    """One pair, always decided alike, among many of other cells: its reward grows for as long as it is fitted."""
    counts = np.zeros((1, 20, 2, 3), np.int16)
    counts[0, :, 0, 0] = counts[0, :, 1, 1] = 1
    counts[0, 0] = [[1, 0, 0], [0, 0, 1]]
    comparisons = Comparisons(counts, np.array([[1.0] + [1.0, 0.0] * 9 + [1.0]]), np.ones((1, 20, 1)))
    lows = {}
    for l2 in (0.0, 1e-3):
        fitted = model(any_world(0, cells=3), seeds=1, members=1, l2=l2, deviation=0)
        at = []
        for steps in (200, 400, 800):
            fitted.fit(comparisons, steps)
            at.append(fitted.rewards()[0][0, 0, 2])
        lows[l2] = at
    assert lows[0.0][0] - 0.5 > lows[0.0][1] and lows[0.0][1] - 0.5 > lows[0.0][2]
    assert abs(lows[1e-3][1] - lows[1e-3][2]) < 0.01 and lows[1e-3][2] > -3


@given(scale=st.floats(0.01, 100), shift=st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_standardising_forgets_scale_and_shift(scale: float, shift: float) -> None:
    rng = np.random.default_rng(0)
    rewards, weights = rng.normal(size=(2, 3, 6)), rng.integers(0, 5, (2, 6)).astype(float)
    found = standardised(rewards, weights)
    np.testing.assert_allclose(found, standardised(scale * rewards + shift, weights), atol=1e-9)
    for seed in range(2):
        repeated = np.repeat(found[seed], weights[seed].astype(int), axis=1)
        np.testing.assert_allclose(repeated.mean(1), 0, atol=1e-12)
        np.testing.assert_allclose(repeated.std(1), 1, atol=1e-12)


def test_a_reward_that_is_constant_where_it_was_compared_says_nothing() -> None:
    weights = np.array([[1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(standardised(np.array([[[2.0, 2.0, 7.0]]]), weights), np.zeros((1, 1, 3)))


def test_an_ensemble_is_the_mean_of_its_standardised_members_less_their_disagreement() -> None:
    comparisons, fitted = compared(members=4), model(members=4, pessimism=1.5)
    fitted.fit(comparisons, 20)
    frozen = fitted.frozen(comparisons)
    for seed in range(2):
        weights = comparisons.counts[seed].sum((0, 1)).astype(int)

        def unit(values: np.ndarray, weights: np.ndarray = weights) -> np.ndarray:
            seen = np.repeat(values, weights)
            return (values - seen.mean()) / seen.std()

        members = np.stack([unit(fitted.parameters[0][seed, member]) for member in range(4)])
        expected = unit(members.mean(0) - 1.5 * members.std(0))
        np.testing.assert_allclose(frozen.values[seed], expected, atol=1e-10)
        np.testing.assert_allclose(frozen.spread[seed], members.std(0), atol=1e-10)


def test_what_is_frozen_does_not_follow_the_model_and_cannot_be_written() -> None:
    comparisons, fitted = compared(), model()
    frozen = fitted.frozen(comparisons)
    before, values = frozen.fingerprint(), frozen.values.copy()
    fitted.fit(comparisons, 5)
    assert frozen.fingerprint() == before and (frozen.values == values).all()
    assert fitted.frozen(comparisons).fingerprint() != before
    with pytest.raises(ValueError, match="read-only"):
        frozen.values[0, 0] = 1.0
    assert FrozenReward(values, frozen.spread).fingerprint() == before
    values[1, 3] = np.nextafter(values[1, 3], 9)
    assert FrozenReward(values, frozen.spread).fingerprint() != before


def test_a_frozen_reward_is_looked_up_seed_by_seed() -> None:
    frozen = FrozenReward(np.array([[1.0, 2.0], [3.0, 4.0]]))
    np.testing.assert_array_equal(frozen(np.array([[[0, 1]], [[1, 1]]])), [[[1.0, 2.0]], [[4.0, 4.0]]])
    world = near()
    assert (true_reward(world, 2).values == world.reward).all() and not constant_reward(world, 2).values.any()


@pytest.mark.parametrize("kind", ["table", "mlp"])
def test_a_seeds_reward_is_the_same_bytes_whichever_others_there_are(kind: Kind) -> None:
    comparisons = compared(n_seeds=3)
    together = model(kind=kind, seeds=3)
    together.fit(comparisons, 10)
    alone = RewardModel(together.settings, WORLD, [np.random.default_rng(2)])
    one = Comparisons(comparisons.counts[2:], comparisons.first[2:], comparisons.weights[2:])
    alone.fit(one, 10)
    assert together.frozen(comparisons).values[2].tobytes() == alone.frozen(one).values[0].tobytes()


def test_a_network_fits_better_the_longer_it_is_fitted() -> None:
    comparisons, fitted = compared(), model(kind="mlp")
    losses = [bradley_terry(comparisons, fitted.rewards()[0])[0]]
    for _ in range(3):
        fitted.fit(comparisons, 20)
        losses.append(bradley_terry(comparisons, fitted.rewards()[0])[0])
    assert (np.diff(losses, axis=0) < 0).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "tree"}, "kind is 'tree'; choose table or mlp"),
        ({"members": 0}, "members, width, steps and first_steps must be at least 1"),
        ({"l2": -1.0}, "l2 is -1.0; it must be 0 or more"),
        ({"pessimism": math.inf}, "pessimism is inf"),
        ({"members": 1, "pessimism": 1.0}, "pessimism needs an ensemble to disagree"),
    ],
)
def test_settings_that_do_not_hold_together_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        RewardSettings(**changes)
