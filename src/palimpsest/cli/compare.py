"""`palimpsest compare SPEC.yaml`: methods side by side over seeds, at one level of forgetting."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from palimpsest.cli.output import Json, print_json
from palimpsest.progress import console

if TYPE_CHECKING:
    from palimpsest.audit.comparison import Comparison

SHOWN = {
    "forget": "forget",
    "reworded": "reworded",
    "harm": "KL\nunseen",
    "unseen": "unseen\nretain",
    "from_gold": "KL from\ngold",
}
"""The columns of the table, by quantity."""


def compare(
    spec: Annotated[Path, typer.Argument(help="A YAML specification, as for `palimpsest run`.")],
    seeds: Annotated[int, typer.Option(help="How many seeds, from the first on.", min=1)] = 3,
    first_seed: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    trials: Annotated[
        int, typer.Option(help="Runs of every method in every seed; with 1 it has the settings given.", min=1)
    ] = 1,
    processes: Annotated[
        int | None,
        typer.Option(help="Methods run side by side; one a core where the specification trains its model.", min=1),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keeps what was measured; runs/NAME-compared by default.")] = None,
    data: Annotated[str | None, typer.Option(help="In place of data.path: a folder or a hub id.")] = None,
    as_json: Json = False,
) -> None:
    """Bring every method of a specification down to one forget level, and see what each cost and left."""
    with console.status("loading torch and transformers"):
        from palimpsest.report.comparison import write_comparison
        from palimpsest.run.compare import compare as carry_out
        from palimpsest.run.spec import read_spec

        read = read_spec(spec, data=data)
    folder = out or Path("runs") / f"{spec.stem}-compared"
    found = carry_out(read, range(first_seed, first_seed + seeds), trials, folder, processes=processes)
    page = write_comparison(found, folder)
    if as_json:
        print_json({"report": str(page), **found.to_json()})
    else:
        show(found)
        typer.echo(f"\nOpen the report: {page}")


def show(comparison: "Comparison") -> None:
    """A table on standard output: means over seeds, controls first."""
    shown = {
        quantity: label
        for quantity, label in SHOWN.items()
        if any(quantity in model.values for model in comparison.models)
    }
    table = Table(title=escape(comparison.title), title_justify="left", box=SIMPLE)
    table.add_column("\nmodel", no_wrap=True)
    table.add_column("\nreached", justify="right")
    for label in shown.values():
        table.add_column(label if "\n" in label else f"\n{label}", justify="right", no_wrap=True)
    for name in comparison.names:
        met, n = comparison.reached(name)
        means = [comparison.mean(name, quantity) for quantity in shown]
        mark = " *" if name in comparison.front() else ""
        cells = (f"{mean.value:.3f}" if mean else "" for mean in means)
        table.add_row(escape(name) + mark, f"{met}/{n}", *cells)
    Console().print(table)
    typer.echo("* no other method beats it both in harm (KL unseen) and in what is left")
