"""Which task a predictor behaves as though it had inferred: its predictions, laid beside those of the oracles.

A network's own posterior cannot be read out. What can be said is where its predictions lie between those for a task of
the pool and those for any other task, and which prior share of the pool would explain them best.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from palimpsest.worlds.regression import Mixture
from palimpsest.worlds.regression_oracles import bayes, log_odds_of_pool

FARTHEST = 30.0
"""The largest log-odds of the pool that are tried: beyond, alpha is 0 or 1 for every purpose."""


def g_hat(predictions: Tensor, discrete: Tensor, continuous: Tensor) -> float:
    """How discrete the predictions are: 1 if they are the discrete oracle's, 0 if the continuous one's.

    The least-squares slope of (predictions - continuous) on (discrete - continuous), over all places of all prompts;
    NaN where the oracles agree everywhere.

    Args:
        predictions: [...] the predictor's.
        discrete: [...] the oracle's whose prior is the pool.
        continuous: [...] the oracle's whose prior is the continuous one.
    """
    apart = discrete - continuous
    length = apart.square().sum().item()
    return ((predictions - continuous) * apart).sum().item() / length if length else math.nan


@dataclass(frozen=True)
class EffectivePrior:
    """The prior share of the pool that explains predictions best, and how badly it explains them."""

    alpha: float
    residual: float
    """Mean squared distance from the predictions of the best predictor with that prior. Where it grows, something
    other than the prior has changed."""


def alpha_eff(
    predictions: Tensor, prior: Mixture, x: Tensor, y: Tensor, noise: float, *, first: int = 0
) -> EffectivePrior:
    """Search for the mixture whose best predictions are nearest.

    Args:
        predictions: [n, T] the predictor's.
        prior: the pool and the other tasks; its own alpha plays no part.
        x: [n, T, d] float64.
        y: [n, T] float64.
        noise: standard deviation of the noise in y, above 0.
        first: the first place of a prompt that counts.
    """
    continuous = bayes(prior.continuous, x, y, noise)
    apart, off = bayes(prior.discrete, x, y, noise) - continuous, predictions - continuous
    log_odds = log_odds_of_pool(prior, x, y, noise)

    def residual(prior_log_odds: float) -> float:
        share = torch.sigmoid(prior_log_odds + log_odds)
        return (off - share * apart)[:, first:].square().mean().item()

    grid = np.linspace(-FARTHEST, FARTHEST, 61)
    best = float(grid[int(np.argmin([residual(value) for value in grid]))])
    found = minimize_scalar(residual, bounds=(best - 1, best + 1), method="bounded", options={"xatol": 1e-4})
    return EffectivePrior(1 / (1 + math.exp(-float(found.x))), float(found.fun))
