"""Rewards from fragments against float64 references: the judge, the loss, the standardisation, and what is frozen."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.errors import DataError, SpecError
from palimpsest.rewards.control_rewards import (
    ConstantReward,
    FragmentComparisons,
    FrozenNetworkReward,
    NetworkSettings,
    RewardNetwork,
    compare_fragments,
    features,
)
from palimpsest.rewards.randomness import drawing_from, stream_seed

F = 5  # two numbers of an observation, one of an action


def episodes(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """[6, 12, F] whose true reward is the third feature."""
    transitions = np.random.default_rng(seed).normal(size=(6, 12, F)).astype(np.float32)
    return transitions, transitions[..., 2]


def compared(number: int = 200, temperature: float = 1.0) -> FragmentComparisons:
    return compare_fragments(*episodes(), number, np.random.default_rng(1), length=4, temperature=temperature)


def network(**settings: float) -> RewardNetwork:
    return RewardNetwork(NetworkSettings(width=8, **settings), F, seed=3)  # type: ignore[arg-type]


def test_fragments_are_runs_of_one_episode_and_equal_ones_are_a_coin() -> None:
    transitions, _ = episodes()
    drawn = compared(50).transitions.numpy()
    assert drawn.shape == (50, 2, 4, F)
    runs = {run.tobytes() for episode in transitions for run in (episode[i : i + 4] for i in range(9))}
    assert all(side.tobytes() in runs for pair in drawn for side in pair)
    flat = compare_fragments(transitions, np.zeros((6, 12)), 4000, np.random.default_rng(0), length=4)
    assert abs(flat.first.mean().item() - 0.5) < 0.03


def test_the_judge_prefers_as_bradley_and_terry_say() -> None:
    """Pairs binned by the difference of true returns: each bin's share is near the mean of the sigmoid."""
    pairs = compared(20_000, temperature=2.0)
    gains = pairs.transitions[..., 2].double().sum(-1)
    expected = torch.sigmoid((gains[:, 0] - gains[:, 1]) / 2)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (expected >= low) & (expected < low + 0.2)
        error = (pairs.first[inside].double().mean() - expected[inside].mean()).abs().item()
        assert error < 4 * 0.5 / inside.sum().item() ** 0.5


def test_a_cold_judge_errs_nowhere_and_a_fragment_must_fit() -> None:
    pairs = compared(500, temperature=1e-9)
    gains = pairs.transitions[..., 2].double().sum(-1)
    differ = gains[:, 0] != gains[:, 1]  # the same fragment can be drawn twice
    assert torch.equal(pairs.first.bool()[differ], (gains[:, 0] > gains[:, 1])[differ])
    with pytest.raises(SpecError, match=r"fragments of 13 steps out of episodes of 12"):
        compare_fragments(*episodes(), 1, np.random.default_rng(0), length=13)


def test_the_loss_is_the_mean_negative_log_likelihood_member_by_member() -> None:
    pairs, ensemble = compared(40), network(members=3)
    ensemble.fit(pairs, 2)
    rows = pairs.transitions.double().numpy()
    for member, loss in enumerate(ensemble.loss(pairs).tolist()):
        hidden = (rows - ensemble.centre.double().numpy()) / ensemble.scale.double().numpy()
        for place, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
            hidden = hidden @ weight[member].detach().double().numpy() + bias[member].detach().double().numpy()
            hidden = np.tanh(hidden) if place < 2 else hidden
        gains = hidden[..., 0].sum(-1)
        first = pairs.first.double().numpy()
        p = 1 / (1 + np.exp(gains[:, 1] - gains[:, 0]))
        assert loss == pytest.approx(-(first * np.log(p) + (1 - first) * np.log(1 - p)).mean(), rel=1e-5)


def test_fitting_finds_the_true_reward_where_the_judge_is_sure() -> None:
    pairs, learner = compared(400, temperature=0.1), network()
    before = learner.loss(pairs).item()
    learner.fit(pairs, 400)
    assert learner.loss(pairs).item() < 0.5 * before
    reward = learner.frozen(pairs)
    rewards = reward.of(pairs.transitions.numpy())
    assert pairs.accuracy(rewards) > 0.9
    assert pairs.accuracy(-rewards) == pytest.approx(1 - pairs.accuracy(rewards), abs=0.01)
    assert np.corrcoef(rewards.ravel(), pairs.transitions[..., 2].numpy().ravel())[0, 1] > 0.8


@pytest.mark.parametrize("pessimism", [0.0, 1.5])
def test_what_is_frozen_is_standardised_members_first_then_their_reduction(pessimism: float) -> None:
    pairs, ensemble = compared(60), network(members=4, pessimism=pessimism)
    ensemble.fit(pairs, 20)
    raw = ensemble.rewards(pairs.transitions).detach().double().numpy().reshape(4, -1)
    members = (raw - raw.mean(1, keepdims=True)) / raw.std(1, keepdims=True)
    reduced = members.mean(0) - pessimism * members.std(0)
    reward = ensemble.frozen(pairs)
    found = reward.of(pairs.transitions.numpy())
    np.testing.assert_allclose(found.ravel(), (reduced - reduced.mean()) / reduced.std(), atol=2e-4)
    np.testing.assert_allclose(reward.members(pairs.transitions.numpy()).reshape(4, -1), members, atol=2e-4)


@settings(max_examples=20)
@given(st.floats(0.1, 10), st.floats(-5, 5))
def test_neither_shift_nor_scale_of_a_member_is_left(scale: float, shift: float) -> None:
    pairs, learner = compared(30), network()
    before = learner.frozen(pairs).of(pairs.transitions.numpy())
    with torch.no_grad():
        learner.weights[-1] *= scale
        learner.biases[-1] += shift
    np.testing.assert_allclose(learner.frozen(pairs).of(pairs.transitions.numpy()), before, atol=1e-3)


def test_l2_shrinks_the_weights_and_seeds_decide_them() -> None:
    pairs = compared(100)
    sizes = {}
    for l2 in (0.0, 0.1):
        learner = network(l2=l2, learning_rate=0.01)
        learner.fit(pairs, 200)
        sizes[l2] = sum(weight.square().sum().item() for weight in learner.weights)
    assert sizes[0.1] < 0.3 * sizes[0.0]
    first, again = network(), network()
    for each in (first, again):
        each.fit(pairs, 5)
    assert first.frozen(pairs).fingerprint() == again.frozen(pairs).fingerprint()
    other = RewardNetwork(NetworkSettings(width=8), F, seed=4)
    assert other.frozen(pairs).fingerprint() != first.frozen(pairs).fingerprint()


def test_a_frozen_reward_stays_what_it_was_and_asks_rows_one_by_one(tmp_path: Path) -> None:
    pairs, learner = compared(30), network(members=2, pessimism=1.0)
    reward = learner.frozen(pairs)
    before, rows = reward.fingerprint(), pairs.transitions.numpy().reshape(-1, F)
    values = reward(rows[:, :2], rows[:, 2:3], rows[:, 3:])
    learner.fit(pairs, 5)
    assert reward.fingerprint() == before != learner.frozen(pairs).fingerprint()
    one_by_one = np.concatenate([reward.of(row[None]) for row in rows[:20]])
    np.testing.assert_allclose(one_by_one, values[:20], atol=1e-5)
    with pytest.raises(ValueError, match="read-only"):
        reward._layers[0][0][:] = 0
    reward.save(tmp_path / "reward.safetensors")
    loaded = FrozenNetworkReward.load(tmp_path / "reward.safetensors")
    assert loaded.fingerprint() == before
    assert np.array_equal(loaded(rows[:, :2], rows[:, 2:3], rows[:, 3:]), values)


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reward.safetensors"
    with pytest.raises(DataError, match="holds no reward"):
        FrozenNetworkReward.load(path)
    path.write_bytes(b"not a reward")
    with pytest.raises(DataError, match="holds no reward"):
        FrozenNetworkReward.load(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": 0}, "at least 1"),
        ({"l2": -1.0}, "0 or more"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"pessimism": 1.0}, "needs an ensemble"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        network(**settings)


def test_a_constant_reward_says_nothing() -> None:
    rows = np.ones((4, 2), np.float32)
    assert ConstantReward()(rows, rows[:, :1], rows).tolist() == [0.0] * 4
    assert ConstantReward().fingerprint() == ConstantReward().fingerprint()
    assert features(rows, rows[:, :1], rows).shape == (4, F)


def test_draws_follow_from_the_seed_and_leave_no_trace() -> None:
    np.random.seed(5)
    torch.manual_seed(5)
    expected = np.random.random(), torch.rand(1).item()
    np.random.seed(5)
    torch.manual_seed(5)
    inside = []
    for _ in range(2):
        with drawing_from(7):
            inside.append((np.random.random(), torch.rand(1).item()))
    assert inside[0] == inside[1] != expected
    assert (np.random.random(), torch.rand(1).item()) == expected
    seeds = {stream_seed(seed, step) for seed in range(50) for step in range(50)}
    assert len(seeds) == 2500 and max(seeds) < 2**31
