"""`palimpsest report RUN`: draw the report again from the audit's data."""

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.output import Json, print_json
from palimpsest.progress import console


def report(run: Annotated[Path, typer.Argument(help="The run folder.")], as_json: Json = False) -> None:
    """Draw a run's report again from its audit.json."""
    with console.status("drawing the report"):
        from palimpsest.audit.evidence import RunFolder
        from palimpsest.report.draw import draw

        page = draw(RunFolder(run))
    if as_json:
        print_json({"report": str(page)})
    else:
        typer.echo(page)
