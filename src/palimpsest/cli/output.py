"""What verbs print: results on standard output, everything about them on standard error."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from palimpsest.progress import console

if TYPE_CHECKING:
    from palimpsest.audit.results import Audit

CHECK_FAILED = 1
"""The exit code when a verdict or a check failed."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
"""The option `--json` of a verb."""


def print_json(value: Any) -> None:
    """Print one JSON value; with `--json` this is all that goes to standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def fail(message: str) -> None:
    """Print an error as one red line on standard error."""
    line = " ".join(message.split())
    console.print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)


def verdicts_json(audit: "Audit") -> dict[str, Any]:
    """The verdicts and scores of an audit, for machines."""
    models = {
        model.name: {
            "role": model.role,
            "verdict": model.verdict and model.verdict.outcome,
            "where": model.verdict.where if model.verdict else "",
            "stopped": model.stopped,
            "seconds": model.seconds,
            "scores": {key: [score.value, score.low, score.high] for key, score in model.scores.items()},
        }
        for model in audit.models
    }
    return {"title": audit.title, "models": models, "notes": list(audit.notes)}


def show_verdicts(audit: "Audit") -> None:
    """A table of models with what matters most, verdicts last."""
    columns = {
        "forget/answer_probability": "forget",
        "forget_reworded/answer_probability": "reworded",
        "forget/nll": "forget NLL",
        "retain_unseen/answer_probability": "unseen retain",
        "retain_unseen/kl_from_original": "KL unseen",
    }
    shown = {key: label for key, label in columns.items() if key in audit.models[0].scores}
    table = Table(title=audit.title, title_justify="left", box=SIMPLE)
    table.add_column("model")
    for label in shown.values():
        table.add_column(label, justify="right")
    table.add_column("verdict")
    for model in audit.models:
        verdict = model.verdict
        outcome = f"{verdict.outcome} {verdict.where}".strip() if verdict else ""
        table.add_row(model.name, *(f"{model.scores[key].value:.3f}" for key in shown), outcome)
    Console(width=max(console.width, 100)).print(table)
