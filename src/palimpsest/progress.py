"""One way to show long work: what, how far, how long. It goes to standard error; standard output is for results."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)

Report = Callable[[int, int, str], None]
"""What long work calls with (steps done, steps in all, a note), if it does not show its progress itself."""


def progress() -> Progress:
    """A progress display to use as a context manager; its tasks take a `note` field, shown at the end of their line."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=False,
    )
