"""The command `palimpsest` and its verbs.

Exit codes: 0 all is well, 1 a verdict or a check failed, 2 a mistake that the user can mend, 130 interrupted.
"""

from typing import Annotated

import typer

from palimpsest.cli import (
    audit,
    compare,
    concepts,
    doctor,
    exit,
    lens,
    metrics,
    report,
    rewards,
    run,
    studies,
    train,
    unlearn,
    update,
    verify,
)
from palimpsest.cli.output import fail
from palimpsest.errors import PalimpsestError

USER_MISTAKE = 2
INTERRUPTED = 130

app = typer.Typer(
    name="palimpsest",
    help="Make a language model forget, and show what is still legible underneath.",
    epilog="Exit codes: 0 all is well, 1 a verdict or a check failed, 2 a mistake that you can mend, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Every verb, in the order of the help. Their modules import what is heavy inside the verb, so that help stays quick.
app.command("demo")(run.demo)
app.command("run")(run.run)
app.command("compare")(compare.compare)
app.command("train")(train.train)
app.command("unlearn")(unlearn.unlearn)
app.add_typer(update.app, name="update")
app.add_typer(lens.app, name="lens")
app.add_typer(concepts.app, name="concepts")
app.add_typer(exit.app, name="exit")
app.add_typer(rewards.app, name="rewards")
app.command("audit")(audit.audit)
app.command("verify")(verify.verify)
app.command("report")(report.report)
app.add_typer(metrics.app, name="metrics")
app.add_typer(studies.app, name="studies")
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error, anything unforeseen keeps its traceback."""
    try:
        app()
    except PalimpsestError as error:
        fail(str(error))
        raise SystemExit(USER_MISTAKE) from None
    except KeyboardInterrupt:
        fail("interrupted")
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as end:
        # Inside a verb, typer turns the interrupt into this exit code and says nothing.
        if end.code == INTERRUPTED:
            fail("interrupted")
        raise


def _show_version(wanted: bool) -> None:
    if wanted:
        import palimpsest

        typer.echo(f"palimpsest {palimpsest.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
