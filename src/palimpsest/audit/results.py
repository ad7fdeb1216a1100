"""What an audit found, as data: it is written to `audit.json` and is all that the report is drawn from."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from palimpsest.metrics.auc import Auc
from palimpsest.metrics.scores import Equivalence, Measure, Score
from palimpsest.relearning.judgement import Estimate, Point, RelearnReport, RelearnSettings, worst_case

Role = Literal["original", "gold", "sham", "unlearned"]
Outcome = Literal["erased", "suppressed", "scrambled", "broken", "remembered", "inconclusive"]


@dataclass(frozen=True)
class Finding:
    """One line of evidence for a verdict."""

    passed: bool | None
    """None when there is no evidence: never a pass."""
    statement: str
    """One sentence with its numbers."""


@dataclass(frozen=True)
class Verdict:
    """The answer for one model, with its reasons, the deciding one first."""

    outcome: Outcome
    where: str
    """For `suppressed`: where it is still legible; empty otherwise."""
    summary: str
    """One sentence for people."""
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class TracePoint:
    """The state of unlearning after a step."""

    step: int
    forget_probability: float
    """Mean answer probability on the forget set."""
    retain_kl: float
    """KL(original || model) on held-out retain text, nats/token."""


@dataclass(frozen=True)
class Recovered:
    """What can be brought back of one model, between gold and the original."""

    shares: dict[str, Score]
    """By an attack's `Measure.key`: the share of the way from gold to original, all attacked alike. Attacks that tell
    nothing have none."""
    relearned: dict[str, RelearnReport]
    """By point of the grid, such as `related_0.001`; their rows stand among the scores."""
    not_relearned: str = ""
    """Why there is no report; empty where there are some."""
    foretold: dict[str, Auc] = field(default_factory=dict)
    """By `Measure.key`: how well a score tells the facts that the worst attack brings back from the others."""

    @property
    def worst_attack(self) -> str | None:
        """The key of the attack that most surely brings something back; None where none tells anything."""
        return max(self.shares, key=lambda key: self.shares[key].low, default=None)

    @property
    def worst_lesson(self) -> str | None:
        """The point of the grid that decides; None without any."""
        return worst_case(self.relearned) if self.relearned else None


@dataclass(frozen=True)
class Audited:
    """One model under audit, control or unlearned."""

    name: str
    """`original`, `gold`, `sham`, or the method's name."""
    role: Role
    how: str
    """One sentence: how this model was made."""
    fingerprint: str
    scores: dict[str, Score]
    """By `Measure.key`."""
    against_gold: dict[str, Equivalence]
    """By `Measure.key`; empty for gold itself and without gold."""
    verdict: Verdict | None
    """For controls it shows that the rule can tell them apart."""
    trace: tuple[TracePoint, ...] = ()
    seconds: float | None = None
    """How long unlearning took, wall-clock."""
    stopped: str = ""
    """Why unlearning stopped."""
    recovered: Recovered | None = None
    """None for the original, in which nothing was forgotten, and where nothing was tried."""


@dataclass(frozen=True)
class Example:
    """One fact, as each model tells it."""

    id: str
    subject: str
    on: str
    """`forget`, `forget_reworded` or `retain_unseen`."""
    question: str
    answer: str
    said: dict[str, str]
    """Model name to its greedy answer."""
    probability: dict[str, float]
    """Model name to the probability of the true answer (geometric mean per token)."""


@dataclass(frozen=True)
class Audit:
    """Everything the report shows."""

    title: str
    models: tuple[Audited, ...]
    """Original, gold and sham first (those there are), then the unlearned ones."""
    measures: tuple[Measure, ...]
    examples: tuple[Example, ...]
    request: dict[str, Any]
    """Row counts and hashes of the forget and retain sets and their held-out splits."""
    spec: dict[str, Any] = field(default_factory=dict)
    """The resolved specification that made this run."""
    environment: dict[str, str] = field(default_factory=dict)
    """Package versions, platform, threads."""
    notes: tuple[str, ...] = ()
    """Caveats a reader must know, e.g. `no gold: uncalibrated`."""

    def model(self, name: str) -> Audited:
        """The audited model of that name."""
        return next(model for model in self.models if model.name == name)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Audit":
        """The inverse of `to_json`."""
        return Audit(
            title=data["title"],
            models=tuple(_audited(model) for model in data["models"]),
            measures=tuple(Measure(**measure) for measure in data["measures"]),
            examples=tuple(Example(**example) for example in data["examples"]),
            request=data["request"],
            spec=data["spec"],
            environment=data["environment"],
            notes=tuple(data["notes"]),
        )


def _audited(data: dict[str, Any]) -> Audited:
    verdict = data["verdict"]
    return Audited(
        **{
            **data,
            "scores": {key: Score(**score) for key, score in data["scores"].items()},
            "against_gold": {key: Equivalence(**found) for key, found in data["against_gold"].items()},
            "verdict": verdict
            and Verdict(**{**verdict, "findings": tuple(Finding(**finding) for finding in verdict["findings"])}),
            "trace": tuple(TracePoint(**point) for point in data["trace"]),
            "recovered": (recovered := data.get("recovered")) and _recovered(recovered),
        }
    )


def _recovered(data: dict[str, Any]) -> Recovered:
    return Recovered(
        {key: Score(**score) for key, score in data["shares"].items()},
        {point: _report(report) for point, report in data["relearned"].items()},
        data["not_relearned"],
        {key: Auc(**found) for key, found in data.get("foretold", {}).items()},
    )


def _report(data: dict[str, Any]) -> RelearnReport:
    settings = data["settings"]
    lists = {name: tuple(settings[name]) for name in ("budgets", "seeds")}
    return RelearnReport(
        **{
            **data,
            "settings": RelearnSettings(**{**settings, **lists}),
            "rows": (),
            "points": tuple(
                Point(**{**point, **{name: _estimate(point[name]) for name in ("gap", "rho", "residual")}})
                for point in data["points"]
            ),
            "area": _estimate(data["area"]),
        }
    )


def _estimate(data: dict[str, Any] | None) -> Any:
    return data and Estimate(**data)
