"""What fresh learners make of a learned reward, as one self-contained page: curves between floor and ceiling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from palimpsest.metrics.statistics import Floats, over_seeds
from palimpsest.relearning.judgement import RelearnReport, Who
from palimpsest.report.heat_map import Table
from palimpsest.report.html import environment, part
from palimpsest.report.recovery import Curve

NAMES: dict[Who, tuple[str, str]] = {
    "floor": ("learned from a constant reward", "sham"),
    "ceiling": ("learned from the true reward", "gold"),
    "artefact": ("learned from the learned reward", "original"),
}
"""What each curve is called, and how it looks; the last is drawn over the others."""


@dataclass(frozen=True)
class RelearnPanel:
    """One kind of learner on one reward."""

    title: str
    report: RelearnReport


@dataclass(frozen=True)
class _Chart:
    """A panel as it is drawn: places are shares of the chart's width and height, from above."""

    panel: RelearnPanel
    curves: tuple[Curve, ...]
    ticks: tuple[tuple[float, str], ...]
    """Down the side."""
    budgets: tuple[tuple[float, int], ...]
    incumbent: float | None
    """Where the sampler's own return lies; None where there was none."""


def render_rewards_page(title: str, headline: str, panels: Sequence[RelearnPanel], tables: Sequence[Table]) -> str:
    """The page; nothing is fetched and no script runs. Learners of a single budget have no curve and are left out."""
    shown = [panel for panel in panels if len(panel.report.points) > 1]
    lowest = min((_lowest(panel.report) for panel in shown), default=0.0)
    template = environment().get_template("rewards.html.j2")
    return template.render(
        title=title,
        headline=headline,
        charts=[_chart(panel, lowest) for panel in shown],
        tables=tables,
        style=Markup(part("style.css")),
    )


def _lowest(report: RelearnReport) -> float:
    """The lower end of the axis that this report needs: a multiple of a quarter, and 0 at the most."""
    means = [value for point in report.points for value in (point.artefact, point.floor, point.ceiling)]
    return min(0.0, math.floor(min(means) * 4) / 4)


def _chart(panel: RelearnPanel, lowest: float) -> _Chart:
    settings = panel.report.settings
    first, last = (math.log(budget) for budget in (settings.budgets[0], settings.budgets[-1]))
    across = [(math.log(budget) - first) / (last - first) for budget in settings.budgets]

    def down(value: float) -> float:
        return min(max((1 - value) / (1 - lowest), -0.03), 1.03)

    def curve(who: Who) -> Curve:
        means, lows, highs = _means(panel.report.curve(who))
        name, look = NAMES[who]

        def places(values: Sequence[float]) -> tuple[tuple[float, float], ...]:
            return tuple((x, down(value)) for x, value in zip(across, values, strict=True))

        told = tuple(
            f"{name}, after {budget} episodes: {value:.2f} ({low:.2f} to {high:.2f})"
            for budget, value, low, high in zip(settings.budgets, means, lows, highs, strict=True)
        )
        return Curve(name, look, places(means), places(lows), places(highs), told)

    marks = sorted({lowest, 0.0, 0.5, 1.0})
    return _Chart(
        panel,
        tuple(curve(who) for who in NAMES),
        tuple((down(mark), f"{mark:g}") for mark in marks),
        tuple(zip(across, settings.budgets, strict=True)),
        None if settings.incumbent is None else down(settings.incumbent),
    )


def _means(curve: Floats) -> tuple[list[float], list[float], list[float]]:
    """[B] means over seeds with their 95 % t-intervals; of one seed, the value itself."""
    found = [over_seeds(values.tolist()) for values in curve.T]
    ends = [tuple(value if end is None else end for end in (value, low, high)) for value, low, high in found]
    means, lows, highs = ([float(each[place] or 0.0) for each in ends] for place in range(3))
    return means, lows, highs
