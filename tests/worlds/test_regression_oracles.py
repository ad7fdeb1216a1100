"""The oracles: prefix by prefix against numpy, at their limits, and against each other on their own ground."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from palimpsest.errors import SpecError
from palimpsest.worlds.regression import (
    Discrete,
    Gaussian,
    Mixture,
    Prompts,
    ScaleMixture,
    TaskPrior,
    sample_prompts,
)
from palimpsest.worlds.regression_oracles import bayes, posterior, probability_of_pool
from palimpsest.worlds.task_inference import alpha_eff, g_hat

NOISE = 0.4
POOL = Discrete.drawn(5, 3, seed=0)
MIXTURE = Mixture(POOL, ScaleMixture(3, (1.0, 2.5)), 0.3)
PRIORS: tuple[TaskPrior, ...] = (POOL, Gaussian(3, 1.7), MIXTURE.continuous, MIXTURE)
EXACT = 1e-10
"""What sums of some tens of numbers in float64 may differ by."""


def reference(prior: TaskPrior, x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Posterior mean and log evidence of k pairs, with whole covariances and one prompt at a time."""
    k, d = x.shape
    match prior:
        case Gaussian():
            mean = np.linalg.solve(x.T @ x + (NOISE / prior.scale) ** 2 * np.eye(d), x.T @ y)
            if not k:
                return mean, 0.0
            covariance = prior.scale**2 * x @ x.T + NOISE**2 * np.eye(k)
            return mean, float(multivariate_normal.logpdf(y, np.zeros(k), covariance))
        case Discrete():
            pool = prior.pool.numpy()
            log = np.array([-0.5 * np.sum((y - x @ w) ** 2) / NOISE**2 for w in pool])
            log -= 0.5 * k * math.log(2 * math.pi * NOISE**2)
            return np.exp(log - logsumexp(log)) @ pool, float(logsumexp(log) - math.log(len(pool)))
        case ScaleMixture():
            parts, shares = prior.parts, np.full(len(prior.parts), 1 / len(prior.parts))
        case Mixture():
            parts, shares = (prior.discrete, prior.continuous), np.array([prior.alpha, 1 - prior.alpha])
    means, logs = zip(*(reference(part, x, y) for part in parts), strict=True)
    joint = np.log(shares) + np.array(logs)
    return np.exp(joint - logsumexp(joint)) @ np.stack(means), float(logsumexp(joint))


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: type(prior).__name__)
def test_all_prefixes_at_once_are_each_prefix_by_itself(prior: TaskPrior) -> None:
    prompts = sample_prompts(MIXTURE, 12, 9, NOISE, seed=5)
    found = posterior(prior, prompts.x, prompts.y, NOISE)
    predicted = found.predict(prompts.x)
    for row in range(12):
        for k in range(9):
            mean, evidence = reference(prior, prompts.x[row, :k].numpy(), prompts.y[row, :k].numpy())
            assert np.abs(found.weights[row, k].numpy() - mean).max() < EXACT
            assert abs(found.log_evidence[row, k].item() - evidence) < EXACT * max(1, abs(evidence))
            assert abs(predicted[row, k].item() - mean @ prompts.x[row, k].numpy()) < EXACT


def test_before_the_first_pair_there_is_the_prior() -> None:
    prompts = sample_prompts(MIXTURE, 6, 4, NOISE, seed=1)
    told = (prompts.x, prompts.y, NOISE)
    assert bayes(Gaussian(3), *told)[:, 0].abs().max() == 0
    assert torch.allclose(posterior(POOL, *told).weights[:, 0], POOL.pool.mean(0), atol=EXACT)
    assert torch.allclose(probability_of_pool(MIXTURE, *told)[:, 0], torch.tensor(0.3, dtype=torch.float64))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**40), changed=st.integers(0, 7))
def test_what_comes_later_changes_no_prediction(seed: int, changed: int) -> None:
    prompts = sample_prompts(MIXTURE, 3, 8, NOISE, seed)
    labels = prompts.y.clone()
    labels[:, changed:] += 3.0
    before, after = (bayes(MIXTURE, prompts.x, y, NOISE) for y in (prompts.y, labels))
    assert torch.equal(before[:, : changed + 1], after[:, : changed + 1])
    assert changed == 7 or not torch.allclose(before[:, changed + 1 :], after[:, changed + 1 :])


def test_a_task_of_the_pool_is_recognised_as_noise_goes() -> None:
    of_pool, of_any = (sample_prompts(prior, 50, 8, 1e-4, seed=2) for prior in (POOL, Gaussian(3)))
    shares = [probability_of_pool(MIXTURE, p.x, p.y, 1e-4)[:, 4:] for p in (of_pool, of_any)]
    assert shares[0].min() > 1 - 1e-4 and shares[1].max() < 1e-4
    assert bayes(MIXTURE, of_pool.x, of_pool.y, 1e-4).sub(of_pool.target)[:, 4:].abs().max() < 1e-4


def test_a_mixture_of_one_part_is_that_part_exactly() -> None:
    prompts = sample_prompts(MIXTURE, 20, 9, NOISE, seed=3)
    told = (prompts.x, prompts.y, NOISE)
    assert torch.equal(bayes(MIXTURE.at(1), *told), bayes(POOL, *told))
    assert torch.equal(bayes(MIXTURE.at(0), *told), bayes(MIXTURE.continuous, *told))
    assert (probability_of_pool(MIXTURE.at(1), *told) == 1).all() and (
        probability_of_pool(MIXTURE.at(0), *told) == 0
    ).all()
    one_scale = bayes(ScaleMixture(3, (1.7,)), *told)
    assert torch.allclose(one_scale, bayes(Gaussian(3, 1.7), *told), atol=EXACT)


def loss(prior: TaskPrior, prompts: Prompts) -> float:
    return prompts.squared_errors(bayes(prior, prompts.x, prompts.y, NOISE)).mean().item()


def test_each_oracle_is_best_on_its_own_ground() -> None:
    """In the mean over 8,000 prompts, where the differences are several of their standard errors."""
    for own in PRIORS:
        prompts = sample_prompts(own, 8000, 6, NOISE, seed=4)
        losses = {type(prior).__name__: loss(prior, prompts) for prior in PRIORS}
        assert min(losses, key=losses.__getitem__) == type(own).__name__, losses


def test_the_mixture_is_its_parts_weighted_by_the_posterior() -> None:
    prompts = sample_prompts(MIXTURE, 30, 9, NOISE, seed=6)
    told = (prompts.x, prompts.y, NOISE)
    share = probability_of_pool(MIXTURE, *told)
    parts = share * bayes(POOL, *told) + (1 - share) * bayes(MIXTURE.continuous, *told)
    assert torch.allclose(bayes(MIXTURE, *told), parts, atol=EXACT)


def test_the_posterior_is_calibrated() -> None:
    """Of prompts that are held to be the pool's with probability g, a share g is."""
    prompts = sample_prompts(MIXTURE, 20_000, 4, 1.5, seed=7)
    share = probability_of_pool(MIXTURE, prompts.x, prompts.y, 1.5)[:, -1]
    is_pools = (prompts.weights.unsqueeze(1) == POOL.pool).all(-1).any(-1).double()
    for low, high in ((0.1, 0.3), (0.3, 0.5), (0.5, 0.7)):
        inside = (share > low) & (share < high)
        assert inside.sum() > 500
        assert is_pools[inside].mean().item() == pytest.approx(share[inside].mean().item(), abs=0.06)


def test_an_oracle_needs_noise() -> None:
    prompts = sample_prompts(POOL, 2, 3, 0.0, seed=0)
    with pytest.raises(SpecError, match=r"the noise is 0\.0; an oracle needs it above 0"):
        posterior(POOL, prompts.x, prompts.y, 0.0)


# Which task a predictor seems to have inferred.


@pytest.mark.parametrize("alpha", [0.02, 0.5, 0.9])
def test_the_prior_of_an_oracle_is_found_again(alpha: float) -> None:
    prompts = sample_prompts(MIXTURE, 200, 9, NOISE, seed=8)
    told = (prompts.x, prompts.y, NOISE)
    found = alpha_eff(bayes(MIXTURE.at(alpha), *told), MIXTURE, *told, first=1)
    assert found.alpha == pytest.approx(alpha, rel=1e-2) and found.residual < 1e-6


def test_what_no_prior_explains_leaves_a_residual() -> None:
    """A constant shift of size s cannot be a mixture's, and leaves most of s^2."""
    prompts = sample_prompts(MIXTURE, 500, 9, NOISE, seed=9)
    told = (prompts.x, prompts.y, NOISE)
    found = alpha_eff(bayes(MIXTURE, *told) + 0.5, MIXTURE, *told)
    assert 0.2 < found.residual <= 0.25


@settings(deadline=None, max_examples=30)
@given(share=st.floats(-1, 2), seed=st.integers(0, 2**30))
def test_g_hat_is_where_predictions_lie_between_the_oracles(share: float, seed: int) -> None:
    prompts = sample_prompts(MIXTURE, 5, 6, NOISE, seed)
    discrete, ridge = (bayes(prior, prompts.x, prompts.y, NOISE) for prior in (POOL, Gaussian(3)))
    assert g_hat(share * discrete + (1 - share) * ridge, discrete, ridge) == pytest.approx(share, abs=1e-9)
    assert math.isnan(g_hat(ridge, ridge, ridge))
