"""`palimpsest run SPEC.yaml` and `palimpsest demo`: the whole story in one command."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palimpsest.cli.output import Json, print_json, show_verdicts, verdicts_json
from palimpsest.progress import console

if TYPE_CHECKING:
    from palimpsest.run.spec import Spec

DEMO: dict[str, Any] = {
    "title": "A model that forgot twelve people and three worlds",
    "data": {"kind": "facts"},
    "model": {
        "kind": "train",
        "training": {"learning_rate": 5e-3, "muon_learning_rate": 0.02, "precision": "auto"},
    },
    "methods": [
        {"name": name, "batch_size": 32} for name in ("kfade", "grad_ascent", "grad_diff", "npo", "random_labels")
    ],
    "stop": {"steps": 400},
    "max_new_tokens": 8,
}
"""Invented people and worlds, a Llama of 1.2 million parameters, its gold, K-FADE and four first-order methods."""


def run(
    spec: Annotated[Path, typer.Argument(help="A YAML specification, e.g. examples/tofu.yaml.")],
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/NAME by default.")] = None,
    data: Annotated[str | None, typer.Option(help="In place of data.path: a folder or a hub id.")] = None,
    as_json: Json = False,
) -> None:
    """Do everything a specification says: train or load, unlearn, audit, report."""
    with console.status("reading the specification"):
        from palimpsest.run.spec import read_spec

        read = read_spec(spec, data=data)
    _carry_out(read, out or Path("runs") / spec.stem, as_json)


def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Another seed makes other people, models and batches.")] = 0,
    as_json: Json = False,
) -> None:
    """See a language model forget: train one on invented facts, unlearn some by five methods, and open the report."""
    with console.status("getting ready"):
        from palimpsest.run.spec import make_spec

        spec = make_spec(DEMO | {"seed": seed})
    _carry_out(spec, out, as_json)


def _carry_out(spec: "Spec", out: Path, as_json: bool) -> None:
    started = time.monotonic()
    with console.status("loading torch and transformers"):
        from palimpsest.run.pipeline import run as carry_out
    audit = carry_out(spec, out)
    page = out / "report.html"
    seconds = time.monotonic() - started
    if as_json:
        print_json({"report": str(page), "seconds": round(seconds, 1), **verdicts_json(audit)})
    else:
        show_verdicts(audit)
        typer.echo(f"\nDone in {seconds:.0f} s. Open the report: {page}")
        typer.echo(f"Check its evidence:  palimpsest verify {out}")
