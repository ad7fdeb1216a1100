"""A paper's claim as a number that is measured over seeds, and what the measurement says of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from scipy import stats

Verdict = Literal["reproduced", "contradicted", "inconclusive", "not testable here"]


@dataclass(frozen=True)
class Claim:
    """One claim; it holds if the quantity lies on the right side of a bound."""

    id: str
    statement: str
    source: str
    quantity: str
    """What is estimated, in words."""
    estimate: float | None
    low: float | None
    """95 % interval over seeds."""
    high: float | None
    seeds: int
    bound: float
    below: bool
    """Whether the claim puts the quantity below the bound, or above it."""
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """Reproduced or contradicted only where the whole interval lies on one side of the bound."""
        if self.estimate is None or self.low is None or self.high is None:
            return "not testable here"
        if self.high < self.bound:
            return "reproduced" if self.below else "contradicted"
        if self.low > self.bound:
            return "contradicted" if self.below else "reproduced"
        return "inconclusive"


def over_seeds(values: Sequence[float], *, ratio: bool = False) -> tuple[float | None, float | None, float | None]:
    """Mean and 95 % t-interval over seeds; of a ratio, the geometric ones. Fewer than two seeds give no interval.

    Args:
        values: one a seed.
        ratio: take logarithms, so that a half and a double weigh alike.
    """
    if len(values) < 2 or (ratio and min(values) <= 0):
        return (values[0] if values else None), None, None
    taken = [math.log(value) for value in values] if ratio else list(values)
    middle = mean(taken)
    half = float(stats.t.ppf(0.975, len(taken) - 1)) * stdev(taken) / math.sqrt(len(taken))
    found = (middle, middle - half, middle + half)
    return tuple(math.exp(value) for value in found) if ratio else found  # type: ignore[return-value]
