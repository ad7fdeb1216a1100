"""The closed form against weighted least squares in numpy."""

import numpy as np
import pytest
import torch
from tests.models.tiny_families import WIDTH, tiny_model

from palimpsest.lens.ridge import Moments, ridge

MODEL = tiny_model("llama")
L = MODEL.anatomy.n_layers


def states(n: int, seed: int) -> torch.Tensor:
    """[L + 1, n, d] with means far from 0 and targets of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    layers = torch.randn(L + 1, n, WIDTH, generator=generator, dtype=torch.float64) + 3
    layers[-1] *= torch.rand(n, 1, generator=generator, dtype=torch.float64) * 5 + 0.1
    return layers


def moments_of(*parts: torch.Tensor) -> Moments:
    moments = Moments.of(MODEL)
    for part in parts:
        moments.add(part)
    return moments


def test_without_a_penalty_it_is_least_squares_weighted_by_what_the_norm_divides_by() -> None:
    layers = states(90, 0)
    changes, biases = ridge(moments_of(layers), 0.0)
    root = 1 / np.sqrt((layers[-1].numpy() ** 2).mean(-1, keepdims=True))
    for layer in range(L):
        inputs = np.concatenate([layers[layer].numpy(), np.ones((90, 1))], 1)
        solved, *_ = np.linalg.lstsq(inputs * root, layers[-1].numpy() * root, rcond=None)
        assert np.allclose(np.eye(WIDTH) + changes[layer].numpy(), solved[:-1].T, atol=1e-9)
        assert np.allclose(biases[layer].numpy(), solved[-1], atol=1e-8)


@pytest.mark.parametrize("penalty", [0.1, 2.0])
def test_the_penalty_is_on_the_change_from_the_identity(penalty: float) -> None:
    """Its minimum by numpy: rows for the penalty stand below those of the tokens."""
    layers = states(40, 1)
    changes, _ = ridge(moments_of(layers), penalty)
    weights = 1 / (layers[-1].numpy() ** 2).mean(-1)
    weights /= weights.sum()
    for layer in range(L):
        x, y = layers[layer].numpy(), layers[-1].numpy()
        x, difference = x - weights @ x, (y - weights @ y) - (x - weights @ x)
        strength = penalty * np.mean(weights @ x**2)
        rows = np.concatenate([x * np.sqrt(weights)[:, None], np.sqrt(strength) * np.eye(WIDTH)])
        goals = np.concatenate([difference * np.sqrt(weights)[:, None], np.zeros((WIDTH, WIDTH))])
        solved, *_ = np.linalg.lstsq(rows, goals, rcond=None)
        assert np.allclose(changes[layer].numpy(), solved.T, atol=1e-9)


def test_a_huge_penalty_leaves_the_logit_lens_with_its_mean_put_right() -> None:
    layers = states(40, 2)
    moments = moments_of(layers)
    changes, biases = ridge(moments, 1e12)
    assert changes.abs().max() < 1e-9
    means = moments.sums / moments.weight
    assert torch.allclose(biases, means[-1] - means[:-1], atol=1e-8)


def test_parts_add_up() -> None:
    layers = states(50, 3)
    whole, parts = moments_of(layers), moments_of(layers[:, :7], layers[:, 7:])
    for name in ("weight", "sums", "inputs", "crossed"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), rtol=1e-12)
