"""Recovery on the page: a curve for each model that was taught, and a table of attacks with every share."""

from dataclasses import replace

import pytest
from tests.report.conftest import measure
from tests.report.test_report_html import Page

from palimpsest.audit.results import Recovered
from palimpsest.metrics.auc import Auc
from palimpsest.metrics.scores import Score
from palimpsest.relearning.judgement import ProbeRow, RelearnSettings, judge
from palimpsest.report import figures, recovery, render_html, render_markdown

ATTACKS = [
    measure(name, "forget_attacked", "probability", f"Under attack: {name}", "toward gold", "How likely.")
    for name in ("int4", "noise_0.2")
]
LESSONS = [
    measure(f"related_0.001_{steps}", "forget_relearned", "probability", f"After {steps}", "toward gold", "How likely.")
    for steps in (0, 10, 40)
]
INT4, NOISE = (attack.key for attack in ATTACKS)
CURVES = {
    "original": (0.9, 0.9, 0.8),
    "gold": (0.06, 0.08, 0.10),
    "grad_diff": (0.15, 0.5, 0.62),
    "npo": (0.08, 0.1, 0.1),
}
BACK = {"gold": 0.0, "sham": 0.97, "grad_ascent": 0.0, "grad_diff": 0.41, "npo": 0.02, "random_labels": 0.05}


def report(name):
    settings = RelearnSettings(budgets=(0, 10, 40), metric="said", want="stay_gone")
    whose = {"artefact": name, "floor": "gold", "ceiling": "original"}
    rows = [
        ProbeRow(who, seed, budget, {"said": value + 0.001 * seed})
        for who, of in whose.items()
        for seed in settings.seeds
        for budget, value in zip(settings.budgets, CURVES[of], strict=True)
    ]
    return replace(judge(settings, rows), rows=())


@pytest.fixture(scope="module")
def attacked(audit):
    models = []
    for model in audit.models:
        scores = {key: Score(0.3, 0.2, 0.4, 40, 10) for key in (INT4, NOISE)}
        for lesson, value in zip(LESSONS, CURVES.get(model.name, ()), strict=False):
            scores[lesson.key] = Score(value, value - 0.02, value + 0.02, 5, 5)
        taught = {"related_0.001": report(model.name)} if model.name in ("grad_diff", "npo") else {}
        recovered = None
        if model.name in BACK:
            back = BACK[model.name]
            told = {audit.measures[0].key: Auc(0.83, 0.61, 0.94, 9, 31, 5, 9)} if model.name == "grad_diff" else {}
            recovered = Recovered({INT4: Score(back, back - 0.05, back + 0.05, 40, 10)}, taught, "", told)
        models.append(replace(model, scores=model.scores | scores, recovered=recovered))
    return replace(audit, measures=(*audit.measures, *ATTACKS, *LESSONS), models=tuple(models))


def test_a_chart_for_each_model_that_was_taught_stands_between_the_controls(attacked):
    charts = recovery.relearn_charts(attacked)
    assert [(chart.model.name, chart.report.verdict, chart.lesson) for chart in charts] == [
        ("grad_diff", "FAIL", "related, rate 0.001"),
        ("npo", "PASS", "related, rate 0.001"),
    ]
    assert [curve.name for curve in charts[0].curves] == ["original", "gold", "grad_diff"]
    own = charts[0].curves[-1]
    across, down = zip(*own.places, strict=True)
    assert across == (0, 0.25, 1) and down == pytest.approx((0.85, 0.5, 0.38))
    assert own.told[2] == "grad_diff, after 40 steps: 0.620 (0.600 to 0.640)"
    assert charts[0].steps == ((0, 0), (0.25, 10), (1, 40))


def test_a_row_an_attack_says_which_speaks_and_against_whom(attacked):
    int4, noise = recovery.attack_rows(attacked)
    assert int4.tells and not noise.tells
    assert int4.worst_of == ("grad_ascent", "grad_diff", "npo", "random_labels") and noise.worst_of == ()
    assert [share and share.value for share in int4.shares] == [None, *BACK.values()]


def test_the_page_holds_curves_and_table(attacked):
    page = Page(render_html(attacked))
    assert page.unbalanced == []
    (section,) = page.all("section", id="recovery")
    assert "Can it come back?" in section["text"] and "noise 0.2" in section["text"]
    (table,) = [each for each in page.all("table") if "attacks" in each.get("class", "")]
    assert "0.4100.360 to 0.460" in table["text"].replace(" 0.360", "0.360") and "says nothing here" in table["text"]
    assert "after 40 steps: 0.620" in render_html(attacked)
    assert all(header.get("scope") in ("row", "col", "rowgroup") for header in page.all("th"))


def test_which_score_would_have_told_stands_below_the_attacks(attacked):
    models, (row,) = recovery.foretellings(attacked)
    assert [model.name for model in models] == ["grad_diff"] and row.measure == attacked.measures[0]
    (section,) = Page(render_html(attacked)).all("section", id="recovery")
    assert "What would have told" in section["text"] and "0.610 to 0.940" in section["text"]
    assert f"| {row.measure.label} | 0.830 (0.610 to 0.940) |" in render_markdown(attacked)
    untold = [
        replace(model, recovered=model.recovered and replace(model.recovered, foretold={})) for model in attacked.models
    ]
    page = render_html(replace(attacked, models=tuple(untold)))
    assert "What would have told" not in page


def test_attacks_and_lessons_have_no_panel(attacked, audit):
    assert [panel.measure.key for panel in figures.panels(attacked)] == [
        panel.measure.key for panel in figures.panels(audit)
    ]


def test_the_markdown_has_both_tables(attacked):
    report = render_markdown(attacked)
    assert "## Can it come back?" in report
    assert "| grad\\_diff | 40 | 0.802 | 0.102 | 0.622 | 0.743 (0.743 to 0.743) |" in report
    assert "| int4 | 0.300 | 0.300 | 0.300; 0.970 (0.920 to 1.020) |" in report
    assert "0.300; 0.410\\* (0.360 to 0.460)" in report and "| noise 0.2 (says nothing here) |" in report


def test_without_recovery_there_is_no_section(audit):
    assert recovery.attack_rows(audit) == [] and recovery.relearn_charts(audit) == []
    assert not Page(render_html(audit)).all("section", id="recovery")
    assert "Can it come back" not in render_markdown(audit)
