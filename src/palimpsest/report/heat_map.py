"""Matrices as shaded tables on one self-contained page, with plain tables below them."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from palimpsest.report.html import environment, part, shade


@dataclass(frozen=True)
class HeatMap:
    """A matrix of shares: 0 is blank, 1 is full ink; what lies beyond is shown by its number alone."""

    title: str
    lead: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    """[rows, columns]"""


@dataclass(frozen=True)
class Table:
    """A plain table; its cells are text."""

    title: str
    lead: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def render_heat_maps(title: str, headline: str, maps: Sequence[HeatMap], tables: Sequence[Table]) -> str:
    """The page; nothing is fetched and no script runs."""
    template = environment().get_template("heat_map.html.j2")
    return template.render(
        title=title, headline=headline, maps=maps, tables=tables, style=Markup(part("style.css")), shade=shade
    )
