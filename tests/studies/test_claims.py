"""The verdict on a claim."""

import pytest

from palimpsest.studies.claims import Claim


def claim(low: float | None, high: float | None, *, below: bool) -> Claim:
    return Claim("a", "It is so.", "paper", "what", 1.0, low, high, 5, 1.0, below)


@pytest.mark.parametrize(
    ("low", "high", "below", "verdict"),
    [
        (0.2, 0.9, True, "reproduced"),
        (0.2, 0.9, False, "contradicted"),
        (1.1, 3.0, True, "contradicted"),
        (1.1, 3.0, False, "reproduced"),
        (0.2, 1.1, True, "inconclusive"),
        (1.0, 1.0, True, "inconclusive"),
        (None, None, True, "not testable here"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low, high, below, verdict) -> None:
    assert claim(low, high, below=below).verdict == verdict
