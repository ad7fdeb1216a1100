"""A policy trained after the fact, on what every exit of a frozen network said: seconds, and nothing else changes.

Shapes: N examples, E exits, d the model's width.
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from palimpsest.early_exit.policy import (
    Hardness,
    Policy,
    exact_objective,
    priced,
    reinforce_objective,
)
from palimpsest.errors import SpecError, TrainingError
from palimpsest.progress import Report

Estimator = Literal["exact", "reinforce"]
KEPT_BACK = 0.1
"""The share of the examples that tell when the policy was best."""
LOOKS = 20
"""How often they are asked."""


@dataclass(frozen=True)
class PolicySettings:
    """How a policy is trained."""

    estimator: Estimator = "exact"
    samples: int = 8
    """Exits drawn for an example by `reinforce`."""
    hardness: Hardness = "none"
    prices: tuple[float, float] = (0.01, 3.0)
    """The cheapest and the dearest price of a whole pass that the policy must serve, in nats; alike for one."""
    steps: int = 600
    batch_size: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.prices
        if not 0 < low <= high:
            raise SpecError(f"early exit: prices are {low} to {high}; give two numbers above 0 that rise")
        if self.samples < 2:
            raise SpecError(f"early exit: samples is {self.samples}; one sample has no baseline, give two or more")


@dataclass(frozen=True, eq=False)
class Observations:
    """What a policy learns from: N examples at all exits."""

    states: Tensor
    """[N, E, d]"""
    losses: Tensor
    """[N, E] nats, of exiting there."""
    times: Tensor
    """[E] until each exit, as a share of a whole pass."""
    weights: Tensor | None = None
    """[N] how much an example's time counts."""


def fit_policy(seen: Observations, settings: PolicySettings | None = None, *, report: Report | None = None) -> Policy:
    """Train a policy for all prices at once: each example of a batch is given a price of its own.

    The network's states are constants here. A tenth of the examples is kept back, and the weights are returned that did
    best on them; so a policy that has seen enough does not come to know its examples by heart.

    Args:
        seen: the observations; of other examples than the heads were trained on, or they all look decided early.
        settings: how.
        report: told (steps done, of how many, the objective).

    Raises:
        TrainingError: a state or a loss that is not finite.
    """
    settings = settings or PolicySettings()
    if not (seen.states.isfinite().all() and seen.losses.isfinite().all()):
        raise TrainingError("early exit: a hidden state or a loss is not finite; the network gives NaN for some row")
    n, n_exits, width = seen.states.shape
    policy = Policy(n_exits, width, seed=settings.seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(n, generator=generator)
    kept_back = order[: max(1, round(KEPT_BACK * n))]
    learned = order[len(kept_back) :] if n > 1 else order
    grid = _log_prices(settings, torch.linspace(0, 1, len(kept_back)))
    best, best_value = deepcopy(policy.state_dict()), math.inf
    every = max(1, settings.steps // LOOKS)
    for step in range(settings.steps):
        rows = learned[torch.randint(len(learned), (settings.batch_size,), generator=generator)]
        log_prices = _log_prices(settings, torch.rand(len(rows), generator=generator))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, 2 * (1 - step / settings.steps))
        sampled = settings.samples if settings.estimator == "reinforce" else None
        loss = _objective(policy, seen, rows, log_prices, sampled, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0:
            with torch.no_grad():
                value = float(_objective(policy, seen, kept_back, grid, None, generator))
            if value < best_value:
                best, best_value = deepcopy(policy.state_dict()), value
            if report:
                report(step + 1, settings.steps, f"expected cost {value:.4f}")
    policy.load_state_dict(best)
    return policy.requires_grad_(False).eval()


def _log_prices(settings: PolicySettings, places: Tensor) -> Tensor:
    """[N] places from 0 to 1 as prices, evenly in their logarithm."""
    low, high = math.log(settings.prices[0]), math.log(settings.prices[1])
    return low + (high - low) * places


def _objective(
    policy: Policy,
    seen: Observations,
    rows: Tensor,
    log_prices: Tensor,
    samples: int | None,
    generator: torch.Generator,
) -> Tensor:
    gates = policy(seen.states[rows, :-1], log_prices)
    weights = None if seen.weights is None else seen.weights[rows]
    costs = priced(seen.losses[rows], log_prices.exp(), seen.times, weights)
    if samples is None:
        return exact_objective(gates, costs)
    return reinforce_objective(gates, costs, generator, samples=samples)
