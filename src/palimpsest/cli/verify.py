"""`palimpsest verify RUN`: does a run folder still say what it said?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palimpsest.cli.output import CHECK_FAILED, Json, print_json
from palimpsest.progress import console

if TYPE_CHECKING:
    from palimpsest.audit.verify import Verification


def verify(run: Annotated[Path, typer.Argument(help="The run folder.")], as_json: Json = False) -> None:
    """Recompute a run's numbers from its rows and check every hash."""
    with console.status("reading the evidence"):
        from palimpsest.audit.verify import verify as verify_folder

        verification = verify_folder(run)
    if as_json:
        print_json({"run": str(run), **verification.to_json()})
    else:
        _show(verification)
    if not verification.ok:
        raise typer.Exit(CHECK_FAILED)


def _show(verification: "Verification") -> None:
    for check in verification.checks:
        mark = typer.style("ok  ", fg="green") if check.ok else typer.style("FAIL", fg="red")
        typer.echo(f"{mark}  {check.name}  {check.message}")
    n, failed = len(verification.checks), len(verification.failures)
    typer.echo(f"{failed} of {n} checks failed" if failed else f"all {n} checks passed")
