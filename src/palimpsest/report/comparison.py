"""A comparison as one self-contained page and as Markdown: the trade of harm against what is left, and the table."""

import math
from dataclasses import dataclass
from pathlib import Path

import yaml
from markupsafe import Markup

from palimpsest.audit.comparison import QUANTITIES, Comparison, Mean
from palimpsest.files import write_text
from palimpsest.report.html import environment, part
from palimpsest.report.text import number

WIDTH, HEIGHT = 720, 420
"""Of the picture, in its own units."""
LETTER, LINE, MARK = 6.6, 14, 8
"""About how wide a letter of a label is, how far apart two labels stand, and the room that a mark takes."""
_LINEAR_BELOW = 0.003
_NATS = (0, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_PROBABILITIES = (*(step * 10.0**power for power in range(-6, 0) for step in (1, 3)), 1.0)
_LEAST = 1e-6
"""The least probability that the picture tells from nought."""


@dataclass(frozen=True)
class Spot:
    """A model's mean in the picture with its seeds; x and y in the picture's units."""

    name: str
    look: str
    x: float
    y: float
    seeds: tuple[tuple[float, float], ...]
    label: tuple[float, float, str]
    """x, y and anchor of its name."""
    title: str


@dataclass(frozen=True)
class Picture:
    """Harm to the right, what is left upwards; both best at nought."""

    spots: tuple[Spot, ...]
    front: str
    """The SVG path along the models that no other beats in both."""
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def picture(comparison: Comparison) -> Picture | None:
    """None where no method came down to the level."""
    places = {name: _place(comparison, name) for name in comparison.names}
    shown = {name: place for name, place in places.items() if place}
    if not any(comparison.role(name) == "unlearned" for name in shown):
        return None
    in_nats = QUANTITIES[comparison.left].unit == "nats/token"
    harms = [harm for place in shown.values() for harm, _ in place]
    lefts = [left if in_nats else max(left, _LEAST) for place in shown.values() for _, left in place]
    widest, highest = max(harms) * 1.15, max(lefts) * 1.15 or 1.0
    lowest = 0.0 if in_nats else min(lefts) / 1.5

    def x(harm: float) -> float:
        return WIDTH * _scaled(harm) / _scaled(widest)

    def y(left: float) -> float:
        if in_nats:
            return HEIGHT * (1 - _scaled(left) / _scaled(highest))
        return HEIGHT * (1 - math.log(max(left, _LEAST) / lowest) / math.log(highest / lowest))

    spots: list[Spot] = []
    marks = [(x(place[0][0]), y(place[0][1])) for place in shown.values()]
    taken = [(across - MARK, across + MARK, down + 4) for across, down in marks]
    for name, (mean, *seeds) in sorted(shown.items(), key=lambda item: item[1][0]):
        at_x, at_y = x(mean[0]), y(mean[1])
        said = f"{name}: KL {number(mean[0])}, {QUANTITIES[comparison.left].title} {number(mean[1])}"
        role = comparison.role(name)
        look = "on-front" if name in comparison.front() else "beaten" if role == "unlearned" else role
        drawn = tuple((x(harm), y(left)) for harm, left in seeds)
        spots.append(Spot(name, look, at_x, at_y, drawn, _label(name, at_x, at_y, taken), said))
    corners = [(x(shown[name][0][0]), y(shown[name][0][1])) for name in comparison.front()]
    ticks = [left for left in (_NATS if in_nats else _PROBABILITIES) if lowest <= left <= highest]
    return Picture(
        tuple(spots),
        _steps(corners),
        tuple((x(harm), f"{harm:g}") for harm in _NATS if harm <= widest),
        tuple((y(left), f"{left:.3g}") for left in ticks),
    )


def render_comparison(comparison: Comparison) -> str:
    """The page; nothing is fetched and no script runs."""
    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            comparison=comparison,
            picture=picture(comparison),
            width=WIDTH,
            height=HEIGHT,
            quantities={name: quantity for name, quantity in QUANTITIES.items() if _known(comparison, name)},
            left=QUANTITIES[comparison.left],
            n_seeds=len({model.seed for model in comparison.models}),
            ends=_ends,
            settings=_settings,
            seconds=_seconds,
            spec=yaml.safe_dump(comparison.spec, sort_keys=False, allow_unicode=True),
            style=Markup(part("style.css")),
        )
    )


def comparison_markdown(comparison: Comparison) -> str:
    """The table alone."""
    shown = [name for name in QUANTITIES if _known(comparison, name)]
    lines = [f"# {comparison.title}", "", f"Trials of every method in every seed: {comparison.trials}.", ""]
    lines.append("| model | reached | " + " | ".join(QUANTITIES[name].title for name in shown) + " |")
    lines.append("|---|---|" + "---|" * len(shown))
    for name in comparison.names:
        met, n = comparison.reached(name)
        means = [comparison.mean(name, quantity) for quantity in shown]
        cells = [f"{number(mean.value)} {_ends(mean)}".strip() if mean else "" for mean in means]
        lines.append(f"| {name} | {met} of {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_comparison(comparison: Comparison, folder: str | Path) -> Path:
    """Write `comparison.html` and `comparison.md`, each whole or not at all; returns the page's path.

    Raises:
        StorageError: the folder cannot be written.
    """
    page = Path(folder) / "comparison.html"
    write_text(page, render_comparison(comparison))
    write_text(page.with_suffix(".md"), comparison_markdown(comparison))
    return page


def _known(comparison: Comparison, quantity: str) -> bool:
    return any(quantity in model.values for model in comparison.models)


def _place(comparison: Comparison, name: str) -> list[tuple[float, float]]:
    """Its mean and then every seed's harm and what is left; empty where it never came down to the level."""
    harm, left = comparison.mean(name, "harm"), comparison.mean(name, comparison.left)
    if not harm or not left:
        return []
    each = [model.values for model in comparison.of(name) if model.reached]
    return [(harm.value, left.value), *((value["harm"], value[comparison.left]) for value in each)]


def _scaled(nats: float) -> float:
    return math.asinh(nats / _LINEAR_BELOW)


def _label(name: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> tuple[float, float, str]:
    """Beside its mark, moved down or up as little as keeps it off earlier labels and off the axis."""
    width = LETTER * len(name)
    anchor, left = ("start", x + 11) if x + 11 + width < WIDTH else ("end", x - 11 - width)

    def free(down: float) -> bool:
        over = [other for start, end, other in taken if left < end and start < left + width]
        return 0 < down < HEIGHT and all(abs(down - other) >= LINE for other in over)

    shifts = [sign * step * LINE / 2 for step in range(2 * HEIGHT // LINE) for sign in (1, -1)]
    down = next((y + 4 + shift for shift in shifts if free(y + 4 + shift)), y + 4)
    taken.append((left, left + width, down))
    return (left if anchor == "start" else left + width), down, anchor


def _steps(corners: list[tuple[float, float]]) -> str:
    """Along the front as a stair: from one model to the next, first to the right, then down."""
    if not corners:
        return ""
    path = f"M{corners[0][0]:.1f} 0V{corners[0][1]:.1f}"
    path += "".join(f"H{x:.1f}V{y:.1f}" for x, y in corners[1:])
    return path + f"H{WIDTH}"


def _ends(mean: Mean) -> str:
    return "" if mean.low is None or mean.high is None else f"({number(mean.low)} to {number(mean.high)})"


def _settings(comparison: Comparison, name: str) -> str:
    """What the searches chose, a phrase a seed."""
    return "; ".join(
        f"seed {model.seed}: "
        + ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in chosen)
        for model in comparison.of(name)
        if (chosen := model.settings.items())
    )


def _seconds(comparison: Comparison, name: str) -> str:
    models = comparison.of(name)
    return number(sum(model.seconds for model in models) / len(models))
