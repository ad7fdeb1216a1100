"""All rules on paper: what is told of a rule is what classification by it does."""

import pytest
from tests.early_exit.test_classifier import examples, fitted, model

from palimpsest.early_exit.classifier import ExitClassifier
from palimpsest.early_exit.frontier import Frontier, RuleLine, RulePoint, frontier
from palimpsest.early_exit.rules import Confident, Fixed, Learned, Patience, Rule
from palimpsest.errors import SpecError


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palimpsest.early_exit.bench.IN_A_ROW", 1.0)


def rule(line: RuleLine, point: RulePoint, exits: ExitClassifier) -> Rule:
    number = point.setting.split()[1 if line.name != "patience" else 0]
    if line.name == "learned policy":
        assert exits.policy is not None
        return Learned(exits.policy, float(number))
    if line.name == "patience":
        return Patience(int(number))
    if line.name == "fixed":
        return Fixed(exits.layers.index(int(number)))
    return Confident("max_probability" if line.name == "largest probability" else line.name, float(number))  # type: ignore[arg-type]


def test_every_point_is_what_classification_does() -> None:
    exits, data = fitted(), examples(40, seed=5)
    found = frontier(exits, data, batch_size=8)
    assert found.lines[0].name == "learned policy" and found.n == 40 and found.chosen is None
    for line in found.lines:
        assert [point.milliseconds for point in line.points] == sorted(point.milliseconds for point in line.points)
        for point in line.points[:: max(1, len(line.points) // 3)]:
            said = exits.classify(data.rows, rule=rule(line, point, exits), batch_size=8)
            # A setting is told with three digits, so a row that lies at its threshold may go the other way.
            assert point.accuracy == pytest.approx(float((said.labels == data.labels).float().mean()), abs=0.051)
            assert point.blocks == pytest.approx(float(said.layers.float().mean()), abs=0.11)
    full = exits.classify(data.rows, rule=Fixed())
    assert found.whole.accuracy == pytest.approx(float((full.labels == data.labels).float().mean()))
    assert found.whole.blocks == exits.stack.n_layers and found.whole.milliseconds > 0
    assert found.oracle.accuracy >= max(point.accuracy for line in found.lines for point in line.points)


def test_the_calibrated_price_is_among_them() -> None:
    exits = fitted()
    exits.calibrate(examples(30, seed=6), target_layers=float(exits.stack.n_layers))
    assert exits.point is not None
    found: Frontier = frontier(exits, examples(20, seed=7))
    assert found.chosen is not None and found.chosen.setting == f"price {exits.point.price:.3g}"


def test_the_fastest_that_is_accurate_enough() -> None:
    line = RuleLine(
        "x", tuple(RulePoint(str(ms), accuracy, 1.0, ms) for ms, accuracy in ((1, 0.5), (2, 0.8), (3, 0.9)))
    )
    assert line.fastest(0.8) == line.points[1] and line.fastest(0.95) is None


def test_without_a_policy_there_is_nothing_to_compare() -> None:
    with pytest.raises(SpecError, match="no policy yet"):
        frontier(ExitClassifier.of(model(), ("even", "odd")), examples(4))
