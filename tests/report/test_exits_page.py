"""The page of exits: points where their values are, the policy over the others, and nothing but text."""

import re

import pytest

from palimpsest.early_exit.frontier import Frontier, RuleLine, RulePoint
from palimpsest.report.exits_page import render_exits_page

NAMES = ("learned policy", "entropy", "largest probability", "margin", "patience", "fixed")


def drawn(*, chosen: bool = True) -> str:
    lines = tuple(
        RuleLine(name, (RulePoint("s 1", 0.5 - place / 100, 1.0, 2.0), RulePoint("<s> 2", 0.7, 3.0, 6.0)))
        for place, name in enumerate(NAMES)
    )
    whole, oracle = RulePoint("all blocks", 0.7, 4.0, 8.0), RulePoint("first right", 0.8, 1.5, 3.0)
    policy = RulePoint("price 0.3", 0.695, 2.0, 4.0)
    return render_exits_page("Exits of <m>", Frontier(100, 16, 2, lines, whole, oracle, policy if chosen else None))


def test_points_stand_where_their_values_are() -> None:
    """Across 572 units for 0 to 1.02 times the slowest point, down 312 for two points of accuracy beyond both ends."""
    page = drawn()
    policy = re.findall(r'<polyline points="([^"]+)"/>', page)[-1]
    low, high = 0.45 - 0.02, 0.8 + 0.02
    expected = [(572 * ms / 8.16, 312 * (high - accuracy) / (high - low)) for ms, accuracy in ((2, 0.5), (6, 0.7))]
    found = [tuple(map(float, place.split(","))) for place in policy.split()]
    assert found == [pytest.approx(place, abs=0.01) for place in expected]
    assert "As calibrated 2.00 times as fast as all blocks (4.00 ms a row against 8.00)" in page
    assert "the first right exit" in page and "oracle, first right: accuracy 0.800" in page


def test_the_table_tells_the_fastest_within_a_point() -> None:
    row = re.search(r"<tr><th scope=\"row\">entropy</th>(.*)</tr>", drawn())
    assert row and re.findall(r"<td>([^<]*)</td>", row[1]) == ["&lt;s&gt; 2", "6.00", "1.33", "3.00", "0.700"]


def test_what_is_not_calibrated_has_no_ring() -> None:
    page = drawn(chosen=False)
    assert 'class="chosen"' not in page and "All blocks take 8.00 ms a row" in page


def test_everything_is_escaped_and_no_script_runs() -> None:
    page = drawn()
    assert "Exits of &lt;m&gt;" in page and "<s>" not in page and "<script" not in page
    assert "default-src 'none'" in page and not re.search(r'(?:src|href)="', page) and page == drawn()
