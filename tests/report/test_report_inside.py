"""The internals on the page: a map for each unlearned model, every value beside its control."""

from dataclasses import replace

import pytest
from tests.report.conftest import against_gold, measure
from tests.report.test_report_html import Page

from palimpsest.metrics.scores import Score
from palimpsest.report import figures, render_html, render_markdown

DEPTH = measure("unlearning_depth", "forget", "share", "Unlearning depth (UDS)", "toward gold", "How deep it is gone.")
DROPS = [
    measure(f"layer_{layer}", "forget_depth_layers", "nats/token", f"Drop at layer {layer}", "toward gold", "Lost.")
    for layer in range(3)
]
RECOVERY = [
    *(
        measure(f"patch_{name}_lpr", "forget_recovery", "share of the loss", f"{name} patched in", "lower", "Back.")
        for name in ("coefficients", "attention")
    ),
    *(
        measure(f"{site}_{layer}", "forget_recovery_layers", "share of the loss", f"{site} {layer}", "lower", "Back.")
        for site in ("coef", "attn")
        for layer in range(3)
    ),
]
#                                      original gold  sham  ascent diff  npo   random
VALUES = {
    "forget/unlearning_depth": (0.0, 1.0, 0.04, 0.97, 0.31, 0.94, 0.55),
    "forget_depth_layers/layer_0": (0.0, -0.1, 0.0, 1.0, 0.1, 0.2, 0.3),
    "forget_depth_layers/layer_1": (0.0, 2.0, 0.1, 6.0, 0.6, 1.9, 1.1),
    "forget_depth_layers/layer_2": (0.0, 4.0, 0.2, 9.0, 1.2, 3.8, 2.2),
    "forget_recovery/patch_coefficients_lpr": (None, 0.02, 0.52, 0.93, 0.91, 0.88, 0.84),
    "forget_recovery/patch_attention_lpr": (None, 0.01, 0.20, 0.31, 0.47, 0.29, 0.25),
    "forget_recovery_layers/coef_0": (None, 0.00, 0.41, 0.58, 0.63, 0.60, 0.50),
    "forget_recovery_layers/coef_1": (None, 0.00, 0.14, 0.11, 0.17, 0.15, 0.12),
    "forget_recovery_layers/coef_2": (None, 0.00, 0.20, 0.07, 0.23, 0.27, 0.21),
    "forget_recovery_layers/attn_0": (None, 0.00, 0.05, 0.06, 0.61, 0.08, 0.02),
    "forget_recovery_layers/attn_1": (None, 0.00, 0.03, 0.02, 0.09, 0.05, 0.04),
    "forget_recovery_layers/attn_2": (None, 0.00, 0.02, 0.01, 0.08, 0.03, 0.02),
}


@pytest.fixture(scope="module")
def patched(audit):
    measures = (*audit.measures, DEPTH, *DROPS, *RECOVERY)
    models = []
    for place, model in enumerate(audit.models):
        own = {key: values[place] for key, values in VALUES.items() if values[place] is not None}
        scores = {key: Score(value, value - 0.03, value + 0.03, 40, 10) for key, value in own.items()}
        compared = {
            key: against_gold(own[key], VALUES[key][1], "share")
            for key in own
            if not key.startswith("forget_recovery") and model.role != "gold"
        }
        models.append(replace(model, scores=model.scores | scores, against_gold=model.against_gold | compared))
    return replace(audit, measures=measures, models=tuple(models))


def test_a_map_a_method_shows_recovery_beyond_sham_and_the_share_of_golds_drop(patched):
    maps = figures.inside_maps(patched)
    assert [each.model.name for each in maps] == ["grad_ascent", "grad_diff", "npo", "random_labels"]
    diff = maps[1]
    assert diff.layers == ("0", "1", "2")
    coefficients, attention = diff.recovery
    assert coefficients.values == pytest.approx((0.22, 0.03, 0.03, 0.39))
    assert attention.values == pytest.approx((0.56, 0.06, 0.06, 0.27))
    assert attention.told[0] == "Attention outputs, layer 0: 0.610, sham 0.050"
    assert attention.told[-1] == "Attention outputs, all layers: 0.470, sham 0.200"
    assert diff.depth.values[0] is None and diff.depth.values[1:] == pytest.approx((0.3, 0.3, 0.31))
    assert diff.depth.told[-1] == "Unlearning depth: 0.310 (0.280 to 0.340), gold 1.000"


def test_the_page_holds_the_maps_and_the_numbers(patched):
    page = Page(render_html(patched))
    assert page.unbalanced == []
    assert "Still inside" in [heading["text"] for heading in page.all("h2")]
    (section,) = page.all("section", id="inside")
    assert "less what comes back in the sham" in section["text"] and "uncalibrated" not in section["text"]
    tables = page.all("table", class_="heat")
    assert len(tables) == 4 and "0.56" in tables[1]["text"] and "−0.13" in tables[0]["text"]
    cells = [cell for cell in page.all("td", class_="all") if "Unlearning depth" in cell["title"]]
    assert [cell["text"] for cell in cells] == ["0.97", "0.31", "0.94", "0.55"]
    assert all(header.get("scope") in ("row", "col", "rowgroup") for header in page.all("th"))
    assert "Unlearning depth (UDS)" in page.all("table", class_="scores")[0]["text"]


def test_gold_is_no_measure_of_recovery_and_layers_have_no_panel(patched, audit):
    assert [panel.measure.key for panel in figures.panels(patched)] == [
        *(panel.measure.key for panel in figures.panels(audit)),
        "forget/unlearning_depth",
    ]


def test_without_sham_or_gold_the_map_says_so(patched):
    bare = replace(patched, models=tuple(m for m in patched.models if m.role not in ("sham", "gold")))
    (coefficients, _), depth = figures.inside_maps(bare)[1].recovery, figures.inside_maps(bare)[1].depth
    assert depth is None and coefficients.values == pytest.approx((0.63, 0.17, 0.23, 0.91))
    assert coefficients.told[0].endswith("no sham: uncalibrated")
    text = Page(render_html(bare)).all("section", id="inside")[0]["text"]
    assert (
        "no sham to take off, so this is uncalibrated" in text and "Without gold there is no unlearning depth" in text
    )


def test_without_internals_there_is_no_map(audit):
    assert figures.inside_maps(audit) == []
    assert not Page(render_html(audit)).all("section", id="inside")


def test_the_markdown_has_a_row_a_measure(patched):
    report = render_markdown(patched)
    assert "| Unlearning depth (UDS), forget set | 0 " in report
    assert "| coefficients patched in, forget set, parts of the original put in | – |" in report
