"""All rules on paper: what is told of a rule is what it does."""

import numpy as np
import pytest
from tests.early_exit.test_classifier import examples, fitted, model

from palimpsest.early_exit.classifier import ExitClassifier
from palimpsest.early_exit.frontier import SETTINGS, SURENESS, Frontier, RuleLine, RulePoint, frontier
from palimpsest.early_exit.rules import Confident, Fixed, Learned, Patience, Rule, exits_by, thresholds
from palimpsest.errors import SpecError


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palimpsest.early_exit.bench.IN_A_ROW", 1.0)


def test_every_point_is_what_its_rule_does() -> None:
    exits, data = fitted(), examples(40, seed=5)
    assert exits.policy is not None and exits.settings is not None
    found, table = frontier(exits, data, batch_size=8), exits.table(data)
    prices = np.geomspace(*exits.settings.prices, SETTINGS).tolist()
    rules: dict[str, list[Rule]] = {"learned policy": [Learned(exits.policy, price) for price in prices]}
    for name, measure in SURENESS:
        rules[name] = [Confident(measure, level) for level in thresholds(measure, table, SETTINGS)]
    rules["patience"] = [Patience(times) for times in range(1, exits.stack.n_layers)]
    rules["fixed"] = [Fixed(exit) for exit in range(exits.stack.n_layers)]
    assert [line.name for line in found.lines] == list(rules) and found.n == 40 and found.chosen is None
    for line in found.lines:
        left = [exits_by(rule, table) for rule in rules[line.name]]
        expected = [(table.accuracy(taken), table.mean_layers(taken)) for taken in left]
        assert sorted((point.accuracy, point.blocks) for point in line.points) == sorted(expected)
        assert [point.milliseconds for point in line.points] == sorted(point.milliseconds for point in line.points)
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
