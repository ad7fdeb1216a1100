"""Which price of time to run at: the dearest whose loss of accuracy is shown to be small enough, or what a target asks.

Prices are tried from the cheapest on, and trying stops at the first that fails. So the chance of choosing a price that
costs more than was allowed is at most 2.5 %, however many are tried (fixed-sequence testing; Angelopoulos et al. 2021,
Learn then Test, arXiv 2110.01052).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from torch import Tensor

from palimpsest.early_exit.exit_table import ExitTable
from palimpsest.early_exit.policy import Policy
from palimpsest.early_exit.rules import Learned, exits_by
from palimpsest.errors import DataError, SpecError

Z = float(stats.norm.ppf(0.975))
"""Of a two-sided 95 % interval; only its upper end is held against a promise, which may so be broken once in 40."""


@dataclass(frozen=True)
class OperatingPoint:
    """One price, and what a policy does at it on held-out examples."""

    price: float
    """Of a whole pass, nats."""
    accuracy: float
    full_accuracy: float
    """Of the whole network on the same examples."""
    drop_low: float
    drop_high: float
    """95 % interval of full_accuracy - accuracy: two-sided, each end with 2.5 %."""
    layers: float
    """Blocks run for an example, on average."""
    time: float
    """The same as a share of a whole pass's time, by the times that the policy was trained with."""
    n: int
    """Examples that it was measured on."""


def operating_points(
    policy: Policy, table: ExitTable, times: Tensor, prices: tuple[float, float], n: int = 25
) -> list[OperatingPoint]:
    """What the policy does at so many prices, from the cheapest to the dearest.

    Args:
        policy: trained.
        table: of held-out examples, which neither heads nor policy have seen.
        times: [E] until each exit, as a share of a whole pass.
        prices: the cheapest and the dearest.
        n: how many.
    """
    found = []
    for price in np.geomspace(prices[0], prices[1], n).tolist():
        exits = exits_by(Learned(policy, price), table)
        right = table.right.gather(1, exits[:, None])[:, 0].numpy()
        full = table.right[:, -1].numpy()
        low, high = drop_interval(full, right)
        time = float(times[exits].mean())
        layers, n_rows = table.mean_layers(exits), len(right)
        found.append(OperatingPoint(price, float(right.mean()), float(full.mean()), low, high, layers, time, n_rows))
    return found


def calibrated(
    points: list[OperatingPoint],
    *,
    max_drop: float | None = None,
    target_layers: float | None = None,
    target_time: float | None = None,
) -> OperatingPoint:
    """The point that keeps a promise: exactly one of the three is asked for.

    Args:
        points: from the cheapest price to the dearest.
        max_drop: the accuracy that may be lost to the whole network, 0.01 being one point; the promise holds for new
            examples with 97.5 % confidence.
        target_layers: blocks an example, on average, at most; the most accurate of those points.
        target_time: the same in shares of a whole pass's time.

    Raises:
        SpecError: none or several are asked for.
        DataError: too few examples to show so small a drop, no price that keeps it, or none that is so fast.
    """
    asked = [value is not None for value in (max_drop, target_layers, target_time)]
    if sum(asked) != 1:
        raise SpecError("early exit: ask for one of max_drop, target_layers and target_time")
    if max_drop is None:
        limit = target_layers if target_layers is not None else target_time
        assert limit is not None
        fast = [point for point in points if (point.layers if target_layers is not None else point.time) <= limit]
        if not fast:
            raise DataError(
                f"no price is so dear that the policy keeps to {limit:g}; raise the dearest that it is trained with, "
                "or the target"
            )
        return max(fast, key=lambda point: (point.accuracy, -point.layers))
    needed = fewest_examples(max_drop)
    if (n := points[0].n) < needed:
        raise DataError(
            f"{n} held-out examples cannot show a drop below {max_drop:g}; give at least {needed}, or allow more"
        )
    kept: OperatingPoint | None = None
    for point in points:
        if point.drop_high > max_drop:
            break
        kept = point
    if kept is None:
        raise DataError(
            f"even the cheapest price, {points[0].price:g}, may cost {points[0].drop_high:.4f} of accuracy (allowed "
            f"{max_drop:g}); give more held-out examples, allow more, or train the policy for cheaper prices"
        )
    return kept


def drop_interval(full: NDArray[np.bool_], early: NDArray[np.bool_]) -> tuple[float, float]:
    """95 % interval of accuracy lost, of the same examples: what is lost, less what is won.

    It is the score interval for a difference of paired shares (Tango 1998, Statistics in Medicine 17, 891), which keeps
    its promise where few or none differ.

    Args:
        full: [N] whether the whole network is right.
        early: [N] whether the exit is.
    """
    n, lost, won = len(full), int(np.sum(full & ~early)), int(np.sum(early & ~full))
    # Where all were won, or all lost, one end is the end of what there is.
    low = -1.0 if won == n else optimize.brentq(lambda drop: _score(n, lost, won, drop) - Z, -1.0, 1.0)
    high = 1.0 if lost == n else optimize.brentq(lambda drop: _score(n, lost, won, drop) + Z, -1.0, 1.0)
    return float(low), float(high)


def fewest_examples(max_drop: float) -> int:
    """How many examples show a drop below this, if none of them is lost or won."""
    return math.ceil(Z**2 * (1 - max_drop) / max_drop)


def _score(n: int, lost: int, won: int, drop: float) -> float:
    """How many deviations the difference that was seen lies above `drop`, if that is the truth."""
    # The likeliest chance of winning given the drop: the root of a quadratic (Tango 1998, equation 8).
    b = (2 * n - lost + won) * drop - lost - won
    c = -won * drop * (1 - drop)
    winning = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    deviation = math.sqrt(max(n * (2 * winning + drop * (1 - drop)), 0.0))
    above = lost - won - n * drop
    if deviation <= 1e-12:
        return math.copysign(1e9, above) if above else 0.0
    return above / deviation
