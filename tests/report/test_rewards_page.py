"""The page of relearning from rewards: curves where they belong, and nothing but text."""

import re

import pytest

from palimpsest.relearning.judgement import ProbeRow, RelearnReport, RelearnSettings, Who, judge
from palimpsest.report.heat_map import Table
from palimpsest.report.rewards_page import RelearnPanel, render_rewards_page

CURVES: dict[Who, tuple[float, ...]] = {
    "artefact": (0.5, 0.0, -0.5),
    "floor": (0.0, 0.0, 0.0),
    "ceiling": (0.8, 1.0, 1.0),
}


def reported(budgets: tuple[int, ...] = (10, 40, 160)) -> RelearnReport:
    settings = RelearnSettings(budgets=budgets, metric="score", want="return", incumbent=0.9)
    rows = [
        ProbeRow(who, seed, budget, {"score": value})
        for who, values in CURVES.items()
        for seed in range(5)
        for budget, value in zip(budgets, values, strict=False)
    ]
    return judge(settings, rows)


def page(*reports: RelearnReport) -> str:
    tables = [Table("Numbers", "Read them.", ("what", "n"), [["<b>bold</b>", "3"]])]
    return render_rewards_page("Does <it> hold?", "No.", [RelearnPanel("q & a", each) for each in reports], tables)


def test_curves_stand_where_their_values_are() -> None:
    """The axis goes from 1 down to -0.5 over 150 units, and budgets are spread by their logarithm over 276."""
    drawn = page(reported())
    lines = re.findall(r'<polyline points="([^"]+)"/>', drawn)[-3:]
    places = [[tuple(map(float, place.split(","))) for place in line.split()] for line in lines]
    across = (0.0, 138.0, 276.0)
    for line, who in zip(places, ("floor", "ceiling", "artefact"), strict=True):
        expected = [(x, 150 * (1 - value) / 1.5) for x, value in zip(across, CURVES[who], strict=True)]  # type: ignore[arg-type]
        assert line == pytest.approx([pytest.approx(place, abs=0.01) for place in expected])
    assert 'class="incumbent" x1="0" x2="276" y1="10.0"' in drawn
    assert "the sampler itself: 0.90" in drawn and "learned from the learned reward, after 40 episodes: 0.00" in drawn
    assert "Fail: after 160" in drawn and "fail, 5 seeds" in drawn


def test_what_has_one_budget_has_no_curve() -> None:
    assert "<figure>" not in page(reported(budgets=(1,))) and "Numbers" in page(reported(budgets=(1,)))
    assert page().count("<polyline") == 0


def test_everything_is_escaped_and_no_script_runs() -> None:
    drawn = page(reported())
    assert "Does &lt;it&gt; hold?" in drawn and "&lt;b&gt;bold" in drawn and "q &amp; a" in drawn
    assert "<script" not in drawn and "default-src 'none'" in drawn and not re.search(r'(?:src|href)="', drawn)
    assert drawn == page(reported())
