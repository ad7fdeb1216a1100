"""One way to show long work: what, how far, how long. It goes to standard error; standard output is for results."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)

Report = Callable[[int, int, str], None]
"""What long work calls with (steps done, steps in all, a note), if it does not show its progress itself."""


def progress(quiet: bool = False) -> Progress:
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
        disable=quiet,
    )


class Ticker:
    """Counts units of long work on a display, with units per second; `None` counts in silence."""

    def __init__(self, display: Progress | None, what: str, total: int, unit: str) -> None:
        self.display, self.unit, self.done, self.started = display, unit, 0, time.monotonic()
        self.task = display.add_task(what, total=total, note="") if display else None

    def advance(self, units: int) -> None:
        """Note that so many more units are done."""
        self.done += units
        if self.display and self.task is not None:
            rate = self.done / max(time.monotonic() - self.started, 1e-9)
            self.display.update(self.task, completed=self.done, note=f"{rate:,.0f} {self.unit}/s")

    def remove(self) -> None:
        """Take it off a display that goes on with other work."""
        if self.display and self.task is not None:
            self.display.remove_task(self.task)
