"""What attacks and lessons bring back, as page and Markdown show it: curves of relearning, a table of attacks."""

from collections.abc import Mapping
from dataclasses import dataclass

from palimpsest.attacks.attack import ATTACKED
from palimpsest.audit.recovery import RELEARNED
from palimpsest.audit.results import Audit, Audited
from palimpsest.metrics.auc import Auc
from palimpsest.metrics.scores import Measure, Score
from palimpsest.relearning.judgement import RelearnReport
from palimpsest.report.figures import kind
from palimpsest.report.text import interval, number


@dataclass(frozen=True)
class Curve:
    """Answer probability by budget; places are shares of the chart's width and height, from above."""

    name: str
    kind: str
    places: tuple[tuple[float, float], ...]
    lows: tuple[tuple[float, float], ...]
    """The intervals' lower ends over seeds; where there is none, the value itself."""
    highs: tuple[tuple[float, float], ...]
    told: tuple[str, ...]
    """Each value in words."""


@dataclass(frozen=True)
class RelearnChart:
    """One unlearned model between original and gold, by the lesson that decides; its own curve is the last."""

    model: Audited
    lesson: str
    report: RelearnReport
    curves: tuple[Curve, ...]
    steps: tuple[tuple[float, int], ...]
    """Where each budget stands on the axis, a share of its width, and the budget."""
    others: tuple[str, ...]
    """The lessons that do not decide, in a sentence each."""


@dataclass(frozen=True)
class AttackRow:
    """One attack: what every model answers under it, and what share of the way the unlearned ones come back."""

    measure: Measure
    values: tuple[Score | None, ...]
    """A model each, in the audit's order."""
    shares: tuple[Score | None, ...]
    """The same; None where it is no number: for the original, and under an attack that tells nothing."""
    tells: bool
    """Whether original and gold are apart under it, and the original keeps half of its answers."""
    worst_of: tuple[str, ...]
    """The unlearned models of which no other attack brings back as much as surely."""


def relearn_charts(audit: Audit) -> list[RelearnChart]:
    """One chart for each unlearned model that was taught."""
    controls: dict[str, Audited] = {model.role: model for model in audit.models if model.role in ("original", "gold")}
    return [
        _chart(model, controls, point, model.recovered.relearned)
        for model in audit.models
        if model.role == "unlearned" and model.recovered and (point := model.recovered.worst_lesson)
    ]


def attack_rows(audit: Audit) -> list[AttackRow]:
    """A row an attack, in the audit's order."""
    models = audit.models
    rows = []
    for measure in audit.measures:
        if measure.on != ATTACKED:
            continue
        found = [model.recovered.shares.get(measure.key) if model.recovered else None for model in models]
        worst_of = [
            model.name
            for model in models
            if model.role == "unlearned" and model.recovered and model.recovered.worst_attack == measure.key
        ]
        values = tuple(model.scores.get(measure.key) for model in models)
        rows.append(AttackRow(measure, values, tuple(found), any(found), tuple(worst_of)))
    return rows


@dataclass(frozen=True)
class Foretelling:
    """One score, and how well it tells, in each model with enough facts that came back and that did not."""

    measure: Measure
    aucs: tuple[Auc | None, ...]


def foretellings(audit: Audit) -> tuple[list[Audited], list[Foretelling]]:
    """The unlearned models in which anything can be said, and a row a score."""
    models = [model for model in audit.models if model.recovered and model.recovered.foretold]
    told = [model.recovered.foretold for model in models if model.recovered]
    rows = [
        Foretelling(measure, tuple(of_model.get(measure.key) for of_model in told))
        for measure in audit.measures
        if any(measure.key in of_model for of_model in told)
    ]
    return models, rows


def lesson_name(point: str) -> str:
    """A point of the grid for people."""
    return point.replace("_", ", rate ")


def attack_name(measure: Measure) -> str:
    """An attack's name for people."""
    return measure.name.replace("_", " ")


def told(report: RelearnReport) -> str:
    """A report in a line: the verdict, and the share of the way that is back at the worst budget."""
    return f"{report.verdict.lower()}: {report.summary}"


def _chart(
    model: Audited, controls: Mapping[str, Audited], point: str, reports: Mapping[str, RelearnReport]
) -> RelearnChart:
    report = reports[point]
    budgets = report.settings.budgets
    widest = max(budgets[-1] - budgets[0], 1)
    across = [(budget - budgets[0]) / widest for budget in budgets]

    def curve(each: Audited) -> Curve:
        scores = [each.scores[f"{RELEARNED}/{point}_{budget}"] for budget in budgets]

        def places(heights: list[float]) -> tuple[tuple[float, float], ...]:
            return tuple((x, 1 - height) for x, height in zip(across, heights, strict=True))

        return Curve(
            each.name,
            kind(each),
            places([score.value for score in scores]),
            places([score.low for score in scores]),
            places([score.high for score in scores]),
            tuple(
                f"{each.name}, after {budget} steps: {number(score.value)} ({interval(score)})"
                for budget, score in zip(budgets, scores, strict=True)
            ),
        )

    return RelearnChart(
        model,
        lesson_name(point),
        report,
        tuple(curve(each) for each in (controls["original"], controls["gold"], model)),
        tuple(zip(across, budgets, strict=True)),
        tuple(f"{lesson_name(other)}: {told(each)}" for other, each in reports.items() if other != point),
    )
