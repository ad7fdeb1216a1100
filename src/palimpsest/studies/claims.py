"""A paper's claim as a number that is measured over seeds, and what the measurement says of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from palimpsest.metrics.statistics import over_seeds

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

    @staticmethod
    def over(
        id: str,
        statement: str,
        quantity: str,
        values: Sequence[float],
        *,
        source: str,
        bound: float,
        below: bool = False,
        ratio: bool = False,
        note: str = "",
    ) -> "Claim":
        """The claim with what was measured in each seed; `ratio` takes the values' logarithms, see `over_seeds`."""
        estimate, low, high = over_seeds(values, ratio=ratio)
        return Claim(id, statement, source, quantity, estimate, low, high, len(values), bound, below, note)

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
