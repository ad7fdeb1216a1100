"""The best prediction of every y of a prompt, for each prior of tasks: exact, in float64, for all prefixes at once.

Under squared error it is <w*, x> with w* the posterior mean of the weights (Kotha et al. 2024, arXiv 2309.10105, §2):
ridge regression for a Gaussian prior, a softmax over the pool for a discrete one, and for a mixture the parts' own
means, weighted by what evidence there is for each. Evidence is summed from one-step predictive densities, so that no
[T, T] covariance is ever made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.errors import SpecError
from palimpsest.worlds.regression import Discrete, Gaussian, Mixture, ScaleMixture, TaskPrior


@dataclass(frozen=True, eq=False)
class Posterior:
    """What is known before each y of a prompt, from the pairs before it."""

    weights: Tensor
    """[n, T, d] posterior mean."""
    log_evidence: Tensor
    """[n, T] log density of the labels before, given their x."""

    def predict(self, x: Tensor) -> Tensor:
        """[n, T] <w*, x> at each x [n, T, d]."""
        return (self.weights * x).sum(-1)


def posterior(prior: TaskPrior, x: Tensor, y: Tensor, noise: float) -> Posterior:
    """The posterior at every prefix.

    Args:
        prior: of the task.
        x: [n, T, d] float64.
        y: [n, T] float64.
        noise: standard deviation of the noise in y, above 0.

    Raises:
        SpecError: the noise is not above 0.
    """
    if not noise > 0:
        raise SpecError(f"regression: the noise is {noise}; an oracle needs it above 0")
    match prior:
        case Discrete():
            return _discrete(prior, x, y, noise)
        case Gaussian():
            return _ridge(prior, x, y, noise)
        case ScaleMixture():
            return _combined([1 / len(prior.parts)] * len(prior.parts), [_ridge(p, x, y, noise) for p in prior.parts])
        case Mixture():
            parts = [posterior(part, x, y, noise) for part in (prior.discrete, prior.continuous)]
            return _combined([prior.alpha, 1 - prior.alpha], parts)


def bayes(prior: TaskPrior, x: Tensor, y: Tensor, noise: float) -> Tensor:
    """[n, T] the best predictions under this prior."""
    return posterior(prior, x, y, noise).predict(x)


def log_odds_of_pool(prior: Mixture, x: Tensor, y: Tensor, noise: float) -> Tensor:
    """[n, T] log Bayes factor at every prefix: evidence for a task of the pool over evidence for any other."""
    discrete, continuous = (posterior(part, x, y, noise) for part in (prior.discrete, prior.continuous))
    return discrete.log_evidence - continuous.log_evidence


def probability_of_pool(prior: Mixture, x: Tensor, y: Tensor, noise: float) -> Tensor:
    """[n, T] the posterior g that the task is one of the pool."""
    if prior.alpha in (0, 1):
        return torch.full_like(y, prior.alpha)
    return torch.sigmoid(math.log(prior.alpha / (1 - prior.alpha)) + log_odds_of_pool(prior, x, y, noise))


def _ridge(prior: Gaussian, x: Tensor, y: Tensor, noise: float) -> Posterior:
    """Ridge regression on the pairs before, with a penalty of noise^2 / scale^2."""
    penalty = (noise / prior.scale) ** 2 * torch.eye(prior.dim, dtype=x.dtype)
    precision = _before(x.unsqueeze(-1) * x.unsqueeze(-2)) + penalty
    moments = _before(x * y.unsqueeze(-1))
    solved = torch.linalg.solve(precision, torch.stack([moments, x], -1))
    weights, leverage = solved[..., 0], (solved[..., 1] * x).sum(-1)
    variance = noise**2 * (1 + leverage)
    return Posterior(weights, _before(_log_normal(y - (weights * x).sum(-1), variance)))


def _discrete(prior: Discrete, x: Tensor, y: Tensor, noise: float) -> Posterior:
    """The pool's mean, each task weighted by the likelihood of the labels before."""
    residuals = y.unsqueeze(-1) - x @ prior.pool.T
    likelihoods = _before(_log_normal(residuals, torch.tensor(noise**2, dtype=x.dtype)))
    evidence = likelihoods.logsumexp(-1) - math.log(len(prior.pool))
    return Posterior(likelihoods.softmax(-1) @ prior.pool, evidence)


def _combined(shares: Sequence[float], parts: Sequence[Posterior]) -> Posterior:
    """The parts' means, each weighted by its prior share times its evidence."""
    log_shares = torch.tensor(shares, dtype=torch.float64).log()
    joint = torch.stack([part.log_evidence for part in parts], -1) + log_shares
    weights = torch.stack([part.weights for part in parts], -1)
    return Posterior((weights * joint.softmax(-1).unsqueeze(-2)).sum(-1), joint.logsumexp(-1))


def _before(values: Tensor) -> Tensor:
    """[n, T, ...] at each place the sum of all before it, 0 at the first."""
    sums = values.cumsum(1)
    return torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)


def _log_normal(residuals: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (residuals.square() / variance + variance.log() + math.log(2 * math.pi))
