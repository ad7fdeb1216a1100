import json
import math
from dataclasses import replace

import plotly.graph_objects as graph_objects
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.metrics.scores import Score
from palimpsest.report import figures


def with_score(model, key, value):
    scores = dict(model.scores)
    if value is None:
        scores.pop(key)
    else:
        scores[key] = value
    return replace(model, scores=scores)


def in_black(value):
    if isinstance(value, dict):
        return {key: in_black(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [in_black(inner) for inner in value]
    return "black" if isinstance(value, str) and value.startswith("@") else value


def test_plotly_accepts_the_figure(audit):
    figure = figures.trade_off(figures.places(audit))
    # Figure validates every property's name and value.
    drawn = graph_objects.Figure(in_black({"data": figure["data"], "layout": figure["layout"]}))
    assert len(drawn.data) == len(audit.models) + 4


def test_damage_is_placed_by_its_own_ticks_and_zero_is_on_the_axis(audit):
    figure = figures.trade_off(figures.places(audit))
    axis = figure["layout"]["xaxis"]
    assert axis["tickvals"] == pytest.approx(
        [math.log(d / 0.01 + math.hypot(d / 0.01, 1)) for d in map(float, axis["ticktext"])]
    )
    assert axis["ticktext"][0] == "0" and axis["range"][0] < 0 < axis["range"][1]
    widest = max(t["x"][0] + t["error_x"]["array"][0] for t in figure["data"] if t["mode"] == "markers")
    assert widest < axis["range"][1]


def test_points_bars_and_paths_stand_where_the_scores_are(audit):
    figure = figures.trade_off(figures.places(audit))
    paths = [trace for trace in figure["data"] if trace["mode"] == "lines+markers"]
    points = [trace for trace in figure["data"] if trace["mode"] == "markers"]
    npo = audit.model("npo")
    forgetting, damage = npo.scores["forget/answer_probability"], npo.scores["retain_unseen/kl_from_original"]
    point = points[[m.name for m in audit.models].index("npo")]
    assert math.sinh(point["x"][0]) * 0.01 == pytest.approx(damage.value)
    assert math.sinh(point["x"][0] + point["error_x"]["array"][0]) * 0.01 == pytest.approx(damage.high)
    assert math.sinh(point["x"][0] - point["error_x"]["arrayminus"][0]) * 0.01 == pytest.approx(damage.low)
    assert point["y"][0] - point["error_y"]["arrayminus"][0] == pytest.approx(forgetting.low)
    assert paths[2]["y"] == [step.forget_probability for step in npo.trace]
    assert figure["layout"]["shapes"][0]["y0"] == audit.model("gold").scores["forget/answer_probability"].value


def test_hover_text_of_a_hostile_name_is_plain_text(audit):
    named = replace(audit, models=(*audit.models[:3], replace(audit.model("npo"), name="<a href='javascript:x'>&")))
    written = json.dumps(figures.trade_off(figures.places(named)))
    assert "<a href" not in written and "&lt;a href" in written


def test_the_original_harms_nothing_by_definition(audit):
    original = with_score(audit.models[0], "retain_unseen/kl_from_original", None)
    spots = figures.places(replace(audit, models=(original, *audit.models[1:])))
    assert (spots[0].model.name, spots[0].damage.value) == ("original", 0.0)
    assert len(spots) == len(audit.models)


def test_without_a_damage_measure_there_is_no_picture(audit):
    assert figures.places(replace(audit, measures=audit.measures[:2])) == []


def test_panels_cover_the_forget_side_and_stand_in_proportion(audit):
    panels = figures.panels(audit)
    shown = [m for m in audit.measures if m.on.startswith("forget") and m.on != "forget_layers"]
    assert [panel.measure.key for panel in panels] == [m.key for m in shown]
    first = panels[0]
    assert [dot.kind for dot in first.dots] == [
        "original", "gold", "sham", "broken", "suppressed", "erased", "scrambled"
    ]  # fmt: skip
    assert first.dots[0].x == pytest.approx(0.912)
    assert first.gold == pytest.approx(0.061) and first.zone == pytest.approx((0.0, 0.161))
    ratio = panels[3]
    # The same scale carries every dot: distances on it are proportional to differences of scores.
    scale = (ratio.dots[0].x - ratio.dots[6].x) / (ratio.dots[0].score.value - ratio.dots[6].score.value)
    assert (ratio.dots[1].x - ratio.dots[4].x) / (
        ratio.dots[1].score.value - ratio.dots[4].score.value
    ) == pytest.approx(scale)


def test_a_panel_without_gold_has_neither_line_nor_band(audit):
    ungolded = tuple(replace(m, against_gold={}) for m in audit.models if m.role != "gold")
    assert all(panel.gold is None and panel.zone is None for panel in figures.panels(replace(audit, models=ungolded)))


def test_a_ruined_model_does_not_press_the_others_against_the_edge(audit):
    ruined = with_score(audit.model("grad_ascent"), "forget/truth_ratio", Score(80.0, 70.0, 90.0, 40, 10))
    models = tuple(ruined if model.name == "grad_ascent" else model for model in audit.models)
    panel = figures.panels(replace(audit, models=models))[3]
    assert [dot.name for dot in panel.dots if dot.beyond] == ["grad_ascent"]
    assert panel.dots[3].x == 1.0 and panel.dots[1].x > 0.2
    assert float(panel.ticks[-1][1]) <= 3 * audit.model("gold").scores["forget/truth_ratio"].high


def test_a_panel_of_equal_scores_still_has_a_width(audit):
    zero = Score(0.0, 0.0, 0.0, 5, 5)
    flat = tuple(with_score(model, "forget/truth_ratio", zero) for model in audit.models)
    panel = figures.panels(replace(audit, models=flat))[3]
    assert {dot.x for dot in panel.dots} == {0.0} and len(panel.ticks) >= 2


@settings(deadline=None, max_examples=200)
@given(st.floats(-100, 100), st.floats(1e-4, 1e6))
def test_ticks_are_few_round_and_inside(low_in_widths, width):
    low = low_in_widths * width
    high = low + width
    ticks = figures.nice_ticks(low, high)
    slack = 1e-6 * (abs(low) + width)
    assert 1 <= len(ticks) <= 5
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        leading = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(leading - size) for size in (1, 2, 5)) < 1e-6


def test_each_unlearned_model_has_its_layers_among_the_controls(audit):
    charts = figures.layer_charts(audit)
    assert [chart.model.name for chart in charts] == ["grad_ascent", "grad_diff", "npo", "random_labels"]
    for chart in charts:
        assert [curve.name for curve in chart.curves] == ["original", "gold", "sham", chart.model.name]
        assert chart.layers == ("0", "1", "2", "3", "model")
        own = chart.curves[-1]
        assert [x for x, _ in own.places] == [0, 0.25, 0.5, 0.75, 1]
        for (_, y), (_, low), (_, high), layer in zip(own.places, own.lows, own.highs, range(5), strict=True):
            score = chart.model.scores[f"forget_layers/layer_{layer}"]
            assert (1 - y, 1 - low, 1 - high) == pytest.approx((score.value, score.low, score.high))
            assert high <= y <= low  # places count from above


def test_without_layers_there_is_no_chart_and_layers_have_no_panel(audit):
    bare = replace(audit, measures=tuple(m for m in audit.measures if m.on != "forget_layers"))
    assert figures.layer_charts(bare) == []
    assert all(panel.measure.on != "forget_layers" for panel in figures.panels(audit))
