"""Accuracy against time for every way to leave early, as one self-contained page."""

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from palimpsest.early_exit.frontier import Frontier, RulePoint
from palimpsest.report.figures import nice_ticks
from palimpsest.report.heat_map import Table
from palimpsest.report.html import environment, part

DROP = 0.01
"""The table tells the fastest setting of each rule that loses no more accuracy than this."""
TONES = ("original", "remembered", "scrambled", "erased", "suppressed", "sham")
"""The lines' colours, the policy's first."""


@dataclass(frozen=True)
class _Mark:
    """A point as it is drawn: places are shares of the chart's width and height, from above."""

    x: float
    y: float
    told: str


@dataclass(frozen=True)
class _Line:
    name: str
    tone: str
    marks: tuple[_Mark, ...]


def render_exits_page(title: str, frontier: Frontier) -> str:
    """The page; nothing is fetched and no script runs."""
    points = [point for line in frontier.lines for point in line.points] + [frontier.whole, frontier.oracle]
    most = 1.02 * max(point.milliseconds for point in points)
    accuracies = [point.accuracy for point in points]
    low, high = min(accuracies) - 0.02, max(accuracies) + 0.02

    def mark(name: str) -> Callable[[RulePoint], _Mark]:
        return lambda point: _Mark(
            point.milliseconds / most, (high - point.accuracy) / (high - low), f"{name}, {_told(point)}"
        )

    lines = [
        _Line(line.name, tone, tuple(map(mark(line.name), line.points)))
        for line, tone in zip(frontier.lines, TONES, strict=True)
    ]
    return (
        environment()
        .get_template("exits.html.j2")
        .render(
            title=title,
            headline=_headline(frontier),
            lines=lines[::-1],
            whole=mark("the whole network")(frontier.whole),
            oracle=mark("oracle")(frontier.oracle),
            chosen=frontier.chosen and mark("as calibrated")(frontier.chosen),
            across=[(tick / most, f"{tick:g}") for tick in nice_ticks(0.0, most)],
            down=[((high - tick) / (high - low), f"{tick:g}") for tick in nice_ticks(low, high)],
            table=_table(frontier),
            n=frontier.n,
            batch_size=frontier.batch_size,
            threads=frontier.threads,
            style=Markup(part("style.css")),
        )
    )


def _told(point: RulePoint) -> str:
    return f"{point.setting}: accuracy {point.accuracy:.3f}, {point.milliseconds:.2f} ms, {point.blocks:.2f} blocks"


def _headline(frontier: Frontier) -> str:
    whole, chosen = frontier.whole, frontier.chosen
    if chosen is None:
        return f"All blocks take {whole.milliseconds:.2f} ms a row, and are right in {whole.accuracy:.1%}."
    return (
        f"As calibrated {whole.milliseconds / chosen.milliseconds:.2f} times as fast as all blocks "
        f"({chosen.milliseconds:.2f} ms a row against {whole.milliseconds:.2f}), right in {chosen.accuracy:.1%} where "
        f"they are in {whole.accuracy:.1%}."
    )


def _table(frontier: Frontier) -> Table:
    whole = frontier.whole

    def cells(point: RulePoint | None) -> list[str]:
        if point is None:
            return ["none is so accurate", "", "", "", ""]
        ratio = whole.milliseconds / point.milliseconds
        numbers = f"{point.milliseconds:.2f}", f"{ratio:.2f}", f"{point.blocks:.2f}", f"{point.accuracy:.3f}"
        return [point.setting, *numbers]

    rows = [["the whole network", *cells(whole)]]
    rows += [[line.name, *cells(line.fastest(whole.accuracy - DROP))] for line in frontier.lines]
    return Table(
        "The fastest setting of each within one point",
        "Chosen on the very rows that it is told on, so a little flattering, and more so for rules with many settings.",
        ("", "setting", "ms a row", "times as fast", "blocks", "accuracy"),
        rows,
    )
