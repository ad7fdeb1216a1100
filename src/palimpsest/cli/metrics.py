"""`palimpsest metrics`: benchmark numbers from files that other tools wrote."""

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.output import print_json, warn
from palimpsest.progress import console

app = typer.Typer(help="Compute benchmark numbers from other tools' evaluation logs.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `tofu-log` a verb of its own while it is the only one."""


@app.command("tofu-log")
def tofu_log(
    log: Annotated[Path, typer.Argument(help="The model's eval_log_aggregated.json.")],
    retain: Annotated[Path | None, typer.Option(help="The retain model's log, for Forget Quality.")] = None,
) -> None:
    """Print TOFU's Model Utility, truth ratio and Forget Quality as JSON."""
    with console.status("reading the logs"):
        from palimpsest.metrics.tofu_log import forget_questions, tofu_log_metrics

        metrics = tofu_log_metrics(log, retain)
        asked = forget_questions(log, retain) if retain else None
    if asked and asked.shared < asked.n_retain:
        warn(
            f"the logs share {asked.shared} forget questions of {asked.n} and {asked.n_retain}, "
            "so Forget Quality compares answers to different questions"
        )
    print_json(metrics)
