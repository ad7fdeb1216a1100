"""Which price of time to run at: the dearest whose loss of accuracy is shown to be small enough, or what a target asks.

Prices are tried from the cheapest on, and trying stops at the first that fails. So the chance of choosing a price that
costs more than was allowed is at most 5 %, however many are tried (fixed-sequence testing; Angelopoulos et al. 2021,
Learn then Test, arXiv 2110.01052).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from palimpsest.early_exit.exit_table import ExitTable
from palimpsest.early_exit.policy import Policy
from palimpsest.early_exit.rules import Learned, exits_by
from palimpsest.errors import DataError, SpecError

RISK = 0.05
"""How often the bound on the drop may be too low."""


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
            examples with 95 % confidence.
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
            f"even the cheapest price, {points[0].price:g}, may cost {points[0].drop_high:.3f} of accuracy (allowed "
            f"{max_drop:g}); give more held-out examples, allow more, or train the policy for cheaper prices"
        )
    return kept


def drop_interval(full: NDArray[np.bool_], early: NDArray[np.bool_]) -> tuple[float, float]:
    """95 % interval of accuracy lost, of the same examples: what is lost, less what is won.

    Each of the two shares is bounded by Clopper and Pearson (1934), each end with 1.25 %, so it holds at any n.

    Args:
        full: [N] whether the whole network is right.
        early: [N] whether the exit is.
    """
    n = len(full)
    ends = [_share(int(np.sum(only)), n) for only in (full & ~early, early & ~full)]
    (lost_low, lost_high), (won_low, won_high) = ends
    return lost_low - won_high, lost_high - won_low


def fewest_examples(max_drop: float) -> int:
    """How many examples show a drop below this, if none of them is lost or won."""
    return math.ceil(math.log(RISK / 4) / math.log1p(-max_drop))


def _share(k: int, n: int) -> tuple[float, float]:
    found = stats.binomtest(k, n).proportion_ci(1 - RISK / 2, "exact")
    return float(found.low), float(found.high)
