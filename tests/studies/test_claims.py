"""Intervals over seeds, and the verdict on a claim."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from palimpsest.studies.claims import Claim, over_seeds


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


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_the_interval_is_students(values: list[float]) -> None:
    middle, low, high = over_seeds(values)
    spread = stats.sem(values)
    assert middle == pytest.approx(sum(values) / len(values), abs=1e-12)
    expected = stats.t.interval(0.95, len(values) - 1, middle, spread) if spread > 0 else (middle, middle)
    assert (low, high) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=9))
def test_a_half_and_a_double_weigh_alike_in_a_ratio(ratios: list[float]) -> None:
    middle, low, high = over_seeds(ratios, ratio=True)
    inverse, inverse_low, inverse_high = over_seeds([1 / ratio for ratio in ratios], ratio=True)
    assert inverse == pytest.approx(1 / middle)
    assert (inverse_low, inverse_high) == pytest.approx((1 / high, 1 / low))
    assert math.prod(ratios) ** (1 / len(ratios)) == pytest.approx(middle)


@pytest.mark.parametrize(
    ("values", "ratio", "middle"), [([], False, None), ([3.0], True, 3.0), ([0.0, 2.0], True, 0.0)]
)
def test_what_gives_no_interval(values, ratio, middle) -> None:
    assert over_seeds(values, ratio=ratio) == (middle, None, None)
