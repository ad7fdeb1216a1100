"""Means over seeds, the front, and the page, on made-up numbers."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.audit.comparison import Compared, Comparison
from palimpsest.report.comparison import HEIGHT, WIDTH, comparison_markdown, picture, render_comparison


def model(name: str, seed: int, harm: float, reworded: float, *, reached: bool = True, **more: object) -> Compared:
    role = name if name in ("original", "gold", "sham") else "unlearned"
    values = {"forget": 0.1, "harm": harm, "reworded": reworded, "unseen": 0.9}
    return Compared(name, role, seed, reached, values, dict(more), 2.0)  # type: ignore[arg-type]


def comparison(*models: Compared) -> Comparison:
    controls = [model("original", 0, 0.0, 0.9), model("gold", 0, 0.05, 0.06)]
    return Comparison("Some <b>methods</b>", 4, (*models, *controls), {"seed": 0})


def test_controls_stand_first_and_means_are_over_seeds_that_reached_the_level() -> None:
    found = comparison(
        model("npo", 0, 0.01, 0.2),
        model("npo", 1, 0.04, 0.4),
        model("npo", 2, 9.0, 0.0, reached=False),
    )
    assert found.names == ["original", "gold", "npo"]
    assert found.reached("npo") == (2, 3)
    harm, left = found.mean("npo", "harm"), found.mean("npo", "reworded")
    assert harm and left
    assert harm.value == pytest.approx(0.02)  # of nats the geometric mean
    assert left.value == pytest.approx(0.3)
    assert harm.low is not None and harm.high is not None and harm.low < 0.01 < 0.04 < harm.high
    assert found.mean("npo", "from_gold") is None


def test_one_seed_has_no_interval_and_none_that_reached_no_mean() -> None:
    found = comparison(model("npo", 0, 0.01, 0.2), model("rmu", 0, 0.01, 0.2, reached=False))
    assert found.mean("npo", "harm").low is None  # type: ignore[union-attr]
    assert found.mean("rmu", "harm") is None and "rmu" not in found.front()


places = st.lists(st.tuples(st.floats(0.001, 10), st.floats(0.0, 1.0)), min_size=1, max_size=8)


@given(places)
def test_the_front_is_what_nothing_beats_in_both(spots: list[tuple[float, float]]) -> None:
    found = comparison(*(model(f"m{place}", 0, *spot) for place, spot in enumerate(spots)))
    front = {int(name[1:]) for name in found.front()}
    means = [(found.mean(f"m{i}", "harm").value, spot[1]) for i, spot in enumerate(spots)]  # type: ignore[union-attr]
    for place, mine in enumerate(means):
        beaten = any(a[0] <= mine[0] and a[1] <= mine[1] and a != mine for a in means)
        assert (place in front) != beaten


def test_as_json_it_has_every_model_the_means_and_the_front() -> None:
    found = comparison(model("npo", 0, 0.01, 0.2, beta=0.3))
    plain = json.loads(json.dumps(found.to_json()))
    assert [Compared(**one) for one in plain["models"]] == list(found.models)
    assert plain["means"]["npo"]["harm"]["value"] == pytest.approx(0.01) and plain["front"] == ["npo"]


def test_without_other_wordings_distance_from_gold_is_what_is_left() -> None:
    values = {"forget": 0.1, "harm": 0.2, "from_gold": 3.0}
    found = Comparison("x", 1, (Compared("npo", "unlearned", 0, True, values, {}, 1.0),), {})
    assert found.left == "from_gold" and found.front() == ["npo"]
    drawn = picture(found)
    assert drawn and all(0 <= spot.x <= WIDTH and 0 <= spot.y <= HEIGHT for spot in drawn.spots)


@given(places)
def test_the_picture_keeps_order_and_stays_inside(spots: list[tuple[float, float]]) -> None:
    found = comparison(*(model(f"m{place}", 0, *spot) for place, spot in enumerate(spots)))
    drawn = picture(found)
    assert drawn
    by_name = {spot.name: spot for spot in drawn.spots}
    assert set(by_name) == set(found.names)
    for spot in drawn.spots:
        assert 0 <= spot.x <= WIDTH and 0 <= spot.y <= HEIGHT and 0 < spot.label[1] < HEIGHT
    for one in drawn.spots:
        for other in drawn.spots:
            harms = [found.mean(spot.name, "harm").value for spot in (one, other)]  # type: ignore[union-attr]
            assert (one.x < other.x) <= (harms[0] < harms[1])
    rows = sorted((spot.label[1], spot.label[0]) for spot in drawn.spots)
    assert len(set(rows)) == len(rows)  # no name is written over another


def test_the_page_says_who_reached_the_level_and_escapes_what_it_is_given() -> None:
    found = comparison(model("npo", 0, 0.01, 0.2, beta=0.3), model("rmu", 0, 1.0, 0.1, reached=False))
    page = render_comparison(found)
    assert "Some &lt;b&gt;methods&lt;/b&gt;" in page and "<b>methods" not in page
    assert "0 of 1" in page and "seed 0: beta 0.3" in page
    assert "<script" not in page and not re.search(r'(src|href)="http', page)
    table = comparison_markdown(found)
    assert "| npo | 1 of 1 | 0.1" in table and "| rmu | 0 of 1 |  |" in table


def test_where_no_method_reached_the_level_the_page_says_so() -> None:
    found = comparison(model("rmu", 0, 1.0, 0.1, reached=False))
    assert picture(found) is None
    assert "No method came down to the forget level" in render_comparison(found)
    assert not math.isnan(found.mean("gold", "harm").value)  # type: ignore[union-attr]
