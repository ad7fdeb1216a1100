"""`palimpsest update`: look at an update, put it into a model that was trained further, make an adapter of it."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from palimpsest.cli.output import WIDTH_OF_FILES, Json, print_json
from palimpsest.cli.unlearn import Forget, Format, Retain, Seed, TemplateName
from palimpsest.errors import SpecError
from palimpsest.progress import console

if TYPE_CHECKING:
    from palimpsest.models.language_model import LanguageModel
    from palimpsest.unlearn.update import Update

app = typer.Typer(help="Look at an update, reapply it after further training, export it as LoRA.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The update's folder.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Skip the anatomy's self-checks.")]


@app.command("show")
def show(
    folder: Folder,
    model: Annotated[str | None, typer.Option(help="A model: compare the change with its weights.")] = None,
    as_json: Json = False,
) -> None:
    """Print what made an update, from what, within which budget, and how much of each parameter it changes."""
    with console.status("loading torch"):
        from palimpsest.models.language_model import load
        from palimpsest.unlearn.update import Update

    update = Update.load(folder)
    found = _described(update, load(model, check=False) if model else None)
    if as_json:
        print_json(found)
    else:
        _show(found)


@app.command("reapply")
def reapply(
    folder: Folder,
    model: Annotated[str, typer.Option(help="The model as it is now: a folder or hub id.")],
    forget: Forget,
    retain: Retain,
    out: Annotated[Path, typer.Option(help="The folder for the reapplied update.")],
    gold: Annotated[str | None, typer.Option(help="A model that never saw the forget set: go to its level.")] = None,
    forget_probability: Annotated[
        float | None, typer.Option(min=0, max=1, help="Go to this answer probability on the forget set.")
    ] = None,
    retain_kl: Annotated[float | None, typer.Option(help="Budget: KL on held-out retain rows, nats/token.")] = None,
    format: Format = None,
    template: TemplateName = "plain",
    seed: Seed = 0,
    no_check: NoCheck = False,
    as_json: Json = False,
) -> None:
    """Search the scale at which an update works in a model that was trained further, and keep it for that model."""
    with console.status("loading torch and transformers"):
        from palimpsest.models.language_model import load
        from palimpsest.run.pipeline import forget_level
        from palimpsest.run.places import require_place
        from palimpsest.run.sources import request_from_files
        from palimpsest.run.spec import check_template
        from palimpsest.unlearn.reapply import reapply
        from palimpsest.unlearn.stopping import Stop
        from palimpsest.unlearn.update import Update

    if gold and forget_probability is not None:
        raise SpecError("--gold and --forget-probability both name a level to go to; give one of them")
    require_place(out, "update.json")
    update = Update.load(folder)
    request = request_from_files(forget, retain, format=format, template=check_template(template), seed=seed)
    now = load(model, check=not no_check)
    level = forget_level(load(gold, check=False), request) if gold else forget_probability
    found = reapply(update, now, request, Stop(forget_probability=level, retain_kl=retain_kl))
    found.update.save(out)
    told = {
        "update": str(out),
        "scale": found.scale,
        "stopped": found.stopped,
        "forget_probability_before": found.before.forget_probability,
        "forget_probability": found.after.forget_probability,
        "retain_kl": found.after.retain_kl,
        "rounding": asdict(found.rounding),
    }
    if as_json:
        print_json(told)
    else:
        typer.echo(f"Scale {found.scale:.3f}: {found.stopped}.")
        typer.echo(
            f"Forget set: answer probability {found.before.forget_probability:.3f} before, "
            f"{found.after.forget_probability:.3f} with the update."
        )
        typer.echo(f"Held-out retain rows: KL {found.after.retain_kl:.4f} nats/token.")
        typer.echo(f"Update: {out}")


@app.command("adapter")
def adapter(
    folder: Folder,
    model: Annotated[str, typer.Option(help="The model that the update was made from: a folder or hub id.")],
    out: Annotated[Path, typer.Option(help="The folder for the adapter.")],
    rank: Annotated[int, typer.Option(min=1, help="The rank of each module's change.")] = 16,
    as_json: Json = False,
) -> None:
    """Write an update as a LoRA adapter in PEFT's format, and say what of it is lost."""
    with console.status("loading torch and transformers"):
        from palimpsest.models.language_model import load
        from palimpsest.run.places import require_place
        from palimpsest.unlearn.adapter import REPORT, export_adapter
        from palimpsest.unlearn.update import Update

    require_place(out, REPORT)
    report = export_adapter(Update.load(folder), load(model, check=False), out, rank=rank)
    if as_json:
        print_json({"adapter": str(out), **asdict(report)})
    else:
        typer.echo(f"Rank {report.rank}, {len(report.modules)} modules: {report.residual:.1%} of the norm is lost.")
        if report.left_out:
            share = sum(report.left_out.values())
            typer.echo(f"Left out, with {share:.1%} of the squared norm: {', '.join(report.left_out)}.")
        typer.echo(f"Adapter: {out}")


def _described(update: "Update", model: "LanguageModel | None") -> dict[str, Any]:
    weights = update.parameters(model) if model else {}
    parameters: list[dict[str, Any]] = [
        {"name": name, "norm": update.change(name).norm().item()} for name in sorted(update.delta)
    ]
    if model:
        for row in parameters:
            size = weights[row["name"]].norm().item()
            row["relative"] = row["norm"] / size if size else None
    return {
        "identity": update.identity,
        "method": update.method,
        "base": update.provenance.get("base"),
        "budget": update.provenance.get("stop"),
        "stopped": update.provenance.get("stopped"),
        "factor": update.factor,
        "norm": math.hypot(*(row["norm"] for row in parameters)),
        "parameters": parameters,
    }


def _show(found: dict[str, Any]) -> None:
    budget = ", ".join(f"{key} {value:g}" for key, value in (found["budget"] or {}).items() if value is not None)
    lines = {
        "Update": found["identity"],
        "Method": found["method"],
        "Made from": found["base"],
        "Budget": budget,
        "Stopped": found["stopped"],
        "Scale": f"{found['factor']:g}",
    }
    for label, value in lines.items():
        if value:
            typer.echo(f"{label}: {value}")
    beside_weights = any("relative" in row for row in found["parameters"])
    table = Table(box=SIMPLE)
    table.add_column("parameter")
    for heading in ("‖Δ‖", "‖Δ‖/‖W‖") if beside_weights else ("‖Δ‖",):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found["parameters"]:
        share = row.get("relative")
        table.add_row(escape(row["name"]), f"{row['norm']:.4g}", *([] if share is None else [f"{share:.2%}"]))
    table.add_row("all", f"{found['norm']:.4g}")
    terminal = Console()
    Console(width=terminal.width if terminal.is_terminal else WIDTH_OF_FILES).print(table)
