"""The protocol on scripted learners whose curves are known: rho to the digit, every verdict and every reason."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.errors import DataError, SpecError
from palimpsest.relearning.judgement import ProbeRow, RelearnReport, RelearnSettings, judge, worst_case
from palimpsest.relearning.protocol import RelearnSpec, relearn, replayed

GONE = RelearnSettings(budgets=(0, 2, 4), metric="m", want="stay_gone")
RETURNS = replace(GONE, want="return")
Curve = Callable[[int, int], float]


class Stone:
    """An artefact that is what it is."""

    def fingerprint(self) -> str:
        return "stone"


class Clock:
    """An artefact that is never what it was."""

    def __init__(self) -> None:
        self.looks = 0

    def fingerprint(self) -> str:
        self.looks += 1
        return str(self.looks)


class Scripted:
    """A learner that knows what its curve says, and refuses to unlearn."""

    fitted: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, curve: Curve, seed: int, **more: float) -> None:
        self.curve, self.seed, self.budget, self.more = curve, seed, 0, more

    def fit_to(self, budget: int) -> None:
        assert budget >= self.budget
        self.budget = budget
        Scripted.fitted.append((self.seed, budget))

    def probe(self) -> Mapping[str, float]:
        return {"m": self.curve(self.seed, self.budget), **self.more}


def run(artefact: Curve, settings: RelearnSettings = GONE, **frozen: Any) -> RelearnReport:
    """Floor b / 10, ceiling 1 at every budget."""
    spec = RelearnSpec(
        settings,
        lambda seed: Scripted(artefact, seed, taught=0.3),
        lambda seed: Scripted(lambda _, budget: budget / 10, seed),
        lambda seed: Scripted(lambda _, budget: 1.0, seed, taught=0.9),
        frozen or {"stone": Stone()},
    )
    return relearn(spec)


def test_rho_gap_and_area_of_known_curves_are_exact() -> None:
    report = run(lambda seed, budget: [0.0, 0.6, 0.7][budget // 2])
    assert [point.rho.value for point in report.points if point.rho] == pytest.approx([0.0, 0.5, 0.5])
    assert [point.gap.value for point in report.points] == pytest.approx([1.0, 0.8, 0.6])
    # Over the floor: 0, 0.4, 0.3 at 0, 2, 4; between the references: 1, 0.8, 0.6.
    assert report.area and report.area.value == pytest.approx((0.4 + 0.7) / (1.8 + 1.4))
    assert report.worst and report.worst.budget == 2
    assert (report.verdict, report.failures) == ("FAIL", 5)
    assert "after 2, 0.50 [0.50, 0.50] of the way" in report.summary
    assert report.fingerprints == {"stone": "stone"}


def test_seeds_that_agree_leave_no_interval_and_wilson_is_the_formula() -> None:
    report = run(lambda seed, budget: 0.5 + budget / 20)
    for point in report.points:
        assert point.rho and point.rho.low == pytest.approx(0.5) and point.rho.high == pytest.approx(0.5)
    z, n, k = 1.959963984540054, 5, 5
    middle, half = (k / n + z**2 / (2 * n)), z * math.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    assert report.failure_low == pytest.approx((middle - half) / (1 + z**2 / n))
    assert report.failure_high == pytest.approx((middle + half) / (1 + z**2 / n))


def test_what_stays_gone_passes_and_what_comes_back_at_one_budget_fails() -> None:
    assert run(lambda _, budget: budget / 10 + 0.01).verdict == "PASS"
    back = run(lambda _, budget: budget / 10 + (0.4 if budget == 2 else 0.0))
    assert (back.verdict, back.reason) == ("FAIL", "") and back.worst and back.worst.budget == 2


def test_what_returns_passes_and_what_is_missing_at_one_budget_fails() -> None:
    """At 0.95 of the way, then half of it."""
    assert run(lambda _, budget: 1 - 0.05 * (1 - budget / 10), RETURNS).verdict == "PASS"
    missing = run(lambda _, budget: 1.0 if budget < 4 else 0.7, RETURNS)
    assert missing.verdict == "FAIL" and missing.worst and missing.worst.budget == 4
    assert missing.worst.residual and missing.worst.residual.value == pytest.approx(0.5)
    assert missing.worst.rho and missing.worst.rho.value == pytest.approx(0.5)
    assert "is missing" in missing.summary


def test_the_two_wants_are_mirror_images() -> None:
    """An artefact as good as gold fails the one test as surely as it passes the other."""
    like_floor = {
        want: run(lambda _, budget: budget / 10, replace(GONE, want=want)) for want in ("stay_gone", "return")
    }
    assert {want: report.verdict for want, report in like_floor.items()} == {"stay_gone": "PASS", "return": "FAIL"}


def test_intervals_that_reach_over_the_margin_are_undecided() -> None:
    """Two of five seeds come back."""
    report = run(lambda seed, budget: budget / 10 + (0.3 if seed < 2 else 0.0))
    assert (report.verdict, report.reason, report.failures) == ("INCONCLUSIVE", "undecided", 2)


def test_what_changes_while_it_is_learned_from_has_no_verdict() -> None:
    report = run(lambda _, budget: 0.9, stone=Stone(), clock=Clock())
    assert (report.verdict, report.reason) == ("INCONCLUSIVE", "changed")
    assert "clock changed" in report.summary and "stone" not in report.summary


def test_four_seeds_have_no_verdict() -> None:
    report = run(lambda _, budget: 0.9, replace(GONE, seeds=(0, 1, 2, 3)))
    assert (report.verdict, report.reason) == ("INCONCLUSIVE", "few seeds")
    one = run(lambda _, budget: 0.9, replace(GONE, seeds=(0,)))
    assert one.reason == "few seeds" and one.points[0].rho and one.points[0].rho.low is None


def references(floor: Curve, ceiling: Curve, artefact: Curve, settings: RelearnSettings) -> RelearnReport:
    curves = {"floor": floor, "ceiling": ceiling, "artefact": artefact}
    rows = [
        ProbeRow(who, seed, budget, {"m": curve(seed, budget)})  # type: ignore[arg-type]
        for who, curve in curves.items()
        for seed in settings.seeds
        for budget in settings.budgets
    ]
    return judge(settings, rows)


def test_references_that_cannot_be_told_apart_mean_a_learner_too_weak() -> None:
    """The ceiling wins in three seeds of five and loses in two."""
    report = references(lambda s, b: 0.5, lambda s, b: 0.5 + 0.1 * (-1) ** s, lambda s, b: 0.5, RETURNS)
    assert (report.verdict, report.reason) == ("INCONCLUSIVE", "weak learner")
    assert report.worst is None and report.area is None and report.failures == 0
    tiny = references(lambda s, b: 0.5, lambda s, b: 0.52, lambda s, b: 0.5, replace(RETURNS, smallest_gap=0.05))
    assert tiny.reason == "weak learner"


def test_budgets_at_which_the_references_meet_decide_nothing() -> None:
    """Before any learning all are alike; then the artefact is as good as the ceiling."""
    report = references(lambda s, b: 0.0, lambda s, b: float(b), lambda s, b: float(b), RETURNS)
    assert [point.rho is None for point in report.points] == [True, False, False]
    assert report.verdict == "PASS"


def test_a_learner_that_did_not_learn_its_lesson_is_too_weak() -> None:
    """It has 0.3 of what it was taught where the ceiling's has 0.9; nothing came back, which shows nothing."""
    report = run(lambda _, budget: budget / 10, replace(GONE, lesson="taught"))
    assert (report.verdict, report.reason) == ("INCONCLUSIVE", "weak learner")
    assert "its taught is 0.3" in report.summary
    assert run(lambda _, budget: budget / 10, replace(GONE, lesson="taught", lesson_share=0.3)).verdict == "PASS"


def test_an_incumbent_that_is_bad_itself_has_no_verdict() -> None:
    """A model that still says it; a policy that never did what was meant. Judged where the two wants look."""
    still = run(lambda _, budget: 0.9, replace(GONE, incumbent=0.9))
    assert (still.verdict, still.reason) == ("INCONCLUSIVE", "bad incumbent")
    assert "not gone in the first place" in still.summary
    poor = run(lambda _, budget: 0.9, replace(RETURNS, incumbent=0.5))
    assert (poor.verdict, poor.reason) == ("INCONCLUSIVE", "bad incumbent")
    assert run(lambda _, budget: 0.9, replace(GONE, incumbent=0.05)).verdict == "FAIL"
    assert run(lambda _, budget: 0.98, replace(RETURNS, incumbent=0.95)).verdict == "PASS"


def test_what_must_be_mended_first_is_said_first() -> None:
    settings = replace(GONE, seeds=(0,), incumbent=0.9)
    assert run(lambda _, budget: 0.9, settings, clock=Clock()).reason == "changed"
    assert run(lambda _, budget: 0.9, settings).reason == "few seeds"


def test_the_rows_are_the_evidence_and_json_takes_the_report() -> None:
    report = run(lambda seed, budget: budget / 10 + 0.01 * seed, replace(GONE, incumbent=0.0))
    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert len(stored["rows"]) == 3 * 5 * 3
    again = judge(report.settings, [ProbeRow(**row) for row in stored["rows"]])
    assert again.to_json() | {"fingerprints": 0} == report.to_json() | {"fingerprints": 0}
    np.testing.assert_allclose(report.curve("artefact")[3], [0.03, 0.23, 0.43])
    np.testing.assert_allclose(report.curve("artefact", "taught"), 0.3)


def test_the_interval_is_as_wide_as_students() -> None:
    """Of a difference of means with constant references it must come near to the t-interval, where plain percentiles
    of five values have two thirds of its width."""
    values = [0.30, 0.42, 0.35, 0.51, 0.44]
    report = references(lambda s, b: 0.0, lambda s, b: 1.0, lambda s, b: values[s], GONE)
    rho = report.points[0].rho
    assert rho and rho.low is not None and rho.high is not None
    half = 2.7764451 * np.std(values, ddof=1) / math.sqrt(5)
    assert rho.value == pytest.approx(np.mean(values))
    assert (rho.high - rho.low) / 2 == pytest.approx(half, rel=0.15)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(*[st.floats(-1, 1)] * 3), min_size=5, max_size=8),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
def test_units_do_not_matter(values: list[tuple[float, float, float]], scale: float, shift: float) -> None:
    """Ceiling and floor far apart; all measured in another unit."""
    one_budget = replace(GONE, budgets=(0,), seeds=tuple(range(len(values))))

    def measured(factor: float, offset: float) -> RelearnReport:
        of = [[factor * value + offset for value in row] for row in values]
        return references(
            lambda s, b: of[s][0] - 3 * factor, lambda s, b: of[s][1] + 3 * factor, lambda s, b: of[s][2], one_budget
        )

    one, other = measured(1.0, 0.0), measured(scale, shift)
    assert one.points[0].rho and other.points[0].rho
    for end in ("value", "low", "high"):
        assert getattr(one.points[0].rho, end) == pytest.approx(getattr(other.points[0].rho, end), abs=1e-6)
    floor, ceiling, artefact = np.array(values).mean(0)
    expected = (artefact - floor + 3) / (ceiling - floor + 6)
    assert one.points[0].rho.value == pytest.approx(expected)


def test_replayed_learners_learn_once_and_say_the_same() -> None:
    made: list[int] = []

    def make(seed: int) -> Scripted:
        made.append(seed)
        return Scripted(lambda s, b: s + b / 100, seed)

    again = replayed(make)
    Scripted.fitted.clear()
    for _ in range(3):
        learner = again(7)
        said = []
        for budget in (0, 3):
            learner.fit_to(budget)
            said.append(learner.probe()["m"])
        assert said == [7.0, 7.03]
    assert made == [7] and Scripted.fitted == [(7, 0), (7, 3)]
    learner = again(7)
    learner.fit_to(9)  # a budget that it has not been asked for yet
    assert learner.probe()["m"] == 7.09 and made == [7, 7]


def test_progress_is_told_a_curve_at_a_time() -> None:
    told: list[tuple[int, int, str]] = []
    spec = RelearnSpec(
        replace(GONE, seeds=(4, 5)), *[lambda seed: Scripted(lambda s, b: 0.0, seed)] * 3, {"stone": Stone()}
    )
    relearn(spec, report=lambda *step: told.append(step))
    assert told[0] == (1, 6, "artefact, seed 4") and told[-1] == (6, 6, "ceiling, seed 5") and len(told) == 6


def test_the_worst_of_a_grid() -> None:
    weak = run(lambda _, budget: budget / 10, replace(GONE, lesson="taught"))
    passed, failed = run(lambda _, b: b / 10), run(lambda _, b: b / 10 + 0.2)
    worse, doubtful = run(lambda _, b: b / 10 + 0.4), run(lambda seed, b: b / 10 + (0.3 if seed < 2 else 0.0))
    assert worst_case({"weak": weak, "passed": passed}) == "passed"
    assert worst_case({"passed": passed, "doubtful": doubtful}) == "doubtful"
    assert worst_case({"failed": failed, "worse": worse, "doubtful": doubtful, "passed": passed}) == "worse"
    assert worst_case({"weak": weak}) == "weak"
    with pytest.raises(DataError, match="no report of relearning"):
        worst_case({})


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"budgets": ()}, "budgets are"),
        ({"budgets": (0, 2, 2)}, "rise"),
        ({"budgets": (-1, 2)}, "from 0 on"),
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": ()}, "at least one"),
        ({"want": "come_back"}, "choose return or stay_gone"),
        ({"margin": 0.0}, "margin is 0.0"),
        ({"incumbent_margin": 1.5}, "incumbent_margin is 1.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        replace(GONE, **changes)


def test_a_probe_that_lacks_the_metric_or_is_broken_is_refused() -> None:
    with pytest.raises(DataError, match="artefact's learner of seed 0 at budget 0 has no 'accuracy'"):
        run(lambda _, budget: 0.0, replace(GONE, metric="accuracy"))
    with pytest.raises(DataError, match="seed 3 at budget 4 has a m of nan"):
        run(lambda seed, budget: math.nan if (seed, budget) == (3, 4) else 0.0)
