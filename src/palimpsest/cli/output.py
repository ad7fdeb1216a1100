"""What verbs print: results on standard output, everything about them on standard error."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from palimpsest.progress import console

if TYPE_CHECKING:
    from palimpsest.audit.results import Audit, Audited

CHECK_FAILED = 1
"""The exit code when a verdict or a check failed."""

COLUMNS = {
    "forget/answer_probability": "\nforget",
    "forget_reworded/answer_probability": "\nreworded",
    "forget/nll": "forget\nNLL",
    "retain_unseen/answer_probability": "unseen\nretain",
    "retain_unseen/kl_from_original": "KL\nunseen",
}
"""What the table of verdicts shows, each with a heading of two lines."""
FEWER = ("forget/answer_probability", "retain_unseen/answer_probability")
"""What is left of it on a terminal of fewer than NARROW columns."""
BACK = ("back by\nattack", "back by\nlessons")
"""The columns of the share of the way back, by the attack and the lesson that speak most against a model."""
NARROW, NARROWEST, WIDTH_OF_FILES = 80, 56, 120

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
"""The option `--json` of a verb."""


def print_json(value: Any) -> None:
    """Print one JSON value; with `--json` this is all that goes to standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def fail(message: str) -> None:
    """Print an error as one red line on standard error."""
    _line(f"error: {message}", "red")


def warn(message: str) -> None:
    """Print a caution as one yellow line on standard error."""
    _line(f"warning: {message}", "yellow")


def _line(message: str, style: str) -> None:
    console.print(" ".join(message.split()), style=style, markup=False, highlight=False, soft_wrap=True)


def verdicts_json(audit: "Audit") -> dict[str, Any]:
    """The verdicts and scores of an audit, for machines."""
    models = {
        model.name: {
            "role": model.role,
            "verdict": model.verdict and model.verdict.outcome,
            "where": model.verdict.where if model.verdict else "",
            "summary": model.verdict.summary if model.verdict else "",
            "stopped": model.stopped,
            "seconds": model.seconds,
            "scores": {key: [score.value, score.low, score.high] for key, score in model.scores.items()},
            "recovered": _recovered(model),
        }
        for model in audit.models
    }
    return {"title": audit.title, "models": models, "notes": list(audit.notes)}


def _recovered(model: "Audited") -> dict[str, Any] | None:
    """The attack and the lesson that speak most against a model, with the share of the way that is back."""
    if model.recovered is None:
        return None
    attack, lesson = model.recovered.worst_attack, model.recovered.worst_lesson
    share = model.recovered.shares[attack] if attack else None
    report = model.recovered.relearned[lesson] if lesson else None
    return {
        "attack": attack and attack.rpartition("/")[2],
        "attack_share": share and [share.value, share.low, share.high],
        "relearning": report and report.verdict,
        "relearning_summary": report.summary if report else model.recovered.not_relearned,
    }


def show_verdicts(audit: "Audit") -> None:
    """A table of models with what matters most, verdicts last; on a narrow terminal with fewer numbers."""
    terminal = Console()
    narrow = terminal.is_terminal and terminal.width < NARROW
    columns = {key: label for key, label in COLUMNS.items() if key in audit.models[0].scores}
    shown = {key: columns[key] for key in FEWER if key in columns} if narrow else columns
    table = Table(title=escape(audit.title), title_justify="left", box=SIMPLE)
    table.add_column("\nmodel", no_wrap=True)
    tried = any(model.recovered for model in audit.models) and not narrow
    for label in (*shown.values(), *(BACK if tried else ())):
        table.add_column(label, justify="right", no_wrap=True)
    table.add_column("\nverdict", min_width=len("inconclusive"))
    for model in audit.models:
        verdict = model.verdict
        outcome = f"{verdict.outcome} {verdict.where}".strip() if verdict else ""
        numbers = [f"{model.scores[key].value:.3f}" for key in shown] + (_back(model) if tried else [])
        table.add_row(escape(model.name), *numbers, outcome)
    width = max(terminal.width, NARROWEST) if terminal.is_terminal else WIDTH_OF_FILES
    Console(width=width).print(table)


def _back(model: "Audited") -> list[str]:
    recovered = model.recovered
    if recovered is None:
        return ["", ""]
    attack, lesson = recovered.worst_attack, recovered.worst_lesson
    worst = recovered.relearned[lesson].worst if lesson else None
    return [
        f"{recovered.shares[attack].value:.2f}" if attack else "–",
        f"{worst.residual.value:.2f}" if worst and worst.residual else "–",
    ]
