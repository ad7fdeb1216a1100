"""The linear probe: it finds what is linear, finds nothing in noise, and minds no scale."""

import numpy as np
import pytest

from palimpsest.errors import DataError
from palimpsest.metrics.probe import probe_accuracy

N, D = 200, 12


def states(seed: int, signal: float) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    right = draw.integers(2, size=N)
    features = draw.normal(size=(N, 2, D)).astype(np.float32) + 5 * draw.normal(size=(N, 1, D)).astype(np.float32)
    features[np.arange(N), right, 3] += signal
    return features, right


def test_it_reads_a_linear_signal_on_new_questions() -> None:
    assert probe_accuracy(*states(0, 8.0), *states(1, 8.0)) > 0.95


def test_noise_reads_at_chance() -> None:
    found = [probe_accuracy(*states(seed, 0.0), *states(seed + 50, 0.0)) for seed in range(5)]
    assert abs(np.mean(found) - 0.5) < 0.05


def test_a_signal_that_is_a_product_of_two_features_is_not_linear() -> None:
    """The right candidate's last feature has the sign of another one: readable to a curve, not to a line."""

    def product(seed: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.default_rng(seed)
        right = draw.integers(2, size=N)
        features = draw.choice([-1.0, 1.0], size=(N, 2, D)).astype(np.float32)
        features[:, :, 1] = features[:, :, 0] * np.where(np.arange(2) == right[:, None], 1, -1)
        return features, right

    assert abs(probe_accuracy(*product(0), *product(1)) - 0.5) < 0.12


def test_scale_of_a_feature_does_not_matter() -> None:
    (train, right), (test, test_right) = states(0, 4.0), states(1, 4.0)
    scale = np.logspace(-3, 3, D).astype(np.float32)
    plain = probe_accuracy(train, right, test, test_right)
    assert probe_accuracy(train * scale, right, test * scale, test_right) == pytest.approx(plain, abs=0.02)


def test_what_is_refused() -> None:
    features, right = states(0, 1.0)
    with pytest.raises(DataError, match="4 questions are too few for a probe; give at least 5"):
        probe_accuracy(features[:4], right[:4], features, right)
    broken = features.copy()
    broken[3, 0, 0] = np.nan
    with pytest.raises(DataError, match="a hidden state is not finite"):
        probe_accuracy(broken, right, features, right)
