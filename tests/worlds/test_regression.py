"""Priors of regression tasks, and the prompts that are drawn from them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.errors import SpecError
from palimpsest.worlds.regression import Discrete, Gaussian, Mixture, ScaleMixture, TaskPrior, sample_prompts

POOL = Discrete.drawn(6, 3, seed=1)
PRIORS: tuple[TaskPrior, ...] = (
    POOL,
    Gaussian(3, 2.0),
    ScaleMixture(3, (1.0, 2.0, 3.0)),
    Mixture(POOL, Gaussian(3), 0.3),
)


def in_pool(weights: torch.Tensor, pool: Discrete = POOL) -> torch.Tensor:
    """[n] whether each task is one of the pool, to the last bit."""
    return (weights.unsqueeze(1) == pool.pool).all(-1).any(-1)


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: type(prior).__name__)
def test_the_seed_decides_the_prompts(prior: TaskPrior) -> None:
    one, again, other = (sample_prompts(prior, 5, 7, 0.5, seed) for seed in (3, 3, 4))
    assert one.x.shape == (5, 7, 3) and one.y.shape == (5, 7) and one.weights.shape == (5, 3)
    assert one.x.dtype == one.y.dtype == torch.float64
    assert torch.equal(one.x, again.x) and torch.equal(one.y, again.y) and torch.equal(one.weights, again.weights)
    assert not torch.equal(one.y, other.y)


@settings(deadline=None, max_examples=25)
@given(noise=st.floats(0.0, 3.0), seed=st.integers(0, 2**48))
def test_labels_are_the_tasks_own_plus_noise_of_that_size(noise: float, seed: int) -> None:
    prompts = sample_prompts(Gaussian(3), 200, 10, noise, seed)
    assert torch.allclose(prompts.target, (prompts.x * prompts.weights[:, None]).sum(-1))
    left = prompts.y - prompts.target
    assert left.std().item() == pytest.approx(noise, rel=0.12)
    assert torch.allclose(prompts.squared_errors(prompts.y), left.square())


def test_a_pool_is_drawn_from_with_replacement_and_evenly() -> None:
    weights = sample_prompts(POOL, 3000, 1, 0.0, 0).weights
    assert in_pool(weights).all()
    counts = (weights.unsqueeze(1) == POOL.pool).all(-1).sum(0)
    assert ((counts - 500).abs() < 5 * (500 * 5 / 6) ** 0.5).all()
    assert Discrete.drawn(6, 3, seed=1).pool.equal(POOL.pool)


def test_scales_are_equally_likely() -> None:
    weights = sample_prompts(ScaleMixture(3, (1.0, 3.0)), 20_000, 1, 0.0, 0).weights
    assert weights.square().mean().item() == pytest.approx((1 + 9) / 2, rel=0.05)
    assert weights.pow(4).mean().item() == pytest.approx(3 * (1 + 81) / 2, rel=0.1)
    assert Gaussian(3, 2.0).sample(20_000, torch.Generator().manual_seed(0)).std().item() == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_is_the_pools_share(alpha: float) -> None:
    mixture = Mixture(POOL, Gaussian(3), 0.5).at(alpha)
    share = in_pool(sample_prompts(mixture, 4000, 1, 0.0, 2).weights).double().mean().item()
    assert share == pytest.approx(alpha, abs=0.0 if alpha in (0, 1) else 0.04)


def test_what_makes_no_prior_is_refused() -> None:
    with pytest.raises(SpecError, match=r"alpha is 1\.5; it is a probability"):
        Mixture(POOL, Gaussian(3), 1.5)
    with pytest.raises(SpecError, match="the pool's tasks have 3 weights, the others 4"):
        Mixture(POOL, Gaussian(4), 0.5)
    with pytest.raises(SpecError, match="scale of a Gaussian prior is 0"):
        ScaleMixture(3, (1.0, 0.0)).parts  # noqa: B018
    with pytest.raises(SpecError, match="at least one scale"):
        ScaleMixture(3, ())
    with pytest.raises(SpecError, match="a pool of 0 tasks"):
        Discrete.drawn(0, 3, seed=0)
