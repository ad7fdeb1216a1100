"""What every layer believes, token by token and model beside model, as one self-contained page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from palimpsest.lens.trajectory import Trajectory
from palimpsest.report.html import environment, part, source_hash

SHADES = {
    "next": "probability of the token that follows",
    "top": "probability of the likeliest token",
    "rank": "rank of the token that follows",
    "entropy": "entropy",
    "kl": "KL from the model's own prediction",
}
"""What cells can be shaded by."""


@dataclass(frozen=True)
class LensView:
    """One text, and what the layers of each model made of it."""

    tokens: Sequence[str]
    """[T] as they are written."""
    vocabulary: Mapping[int, str]
    """Every token that stands in a trajectory, as it is written."""
    answer: range
    """Places of the tokens that matter, an answer's say; may be empty."""
    models: Mapping[str, Trajectory]
    """By the model's name, in the order in which they are to be shown."""


def render_lens_page(title: str, headline: str, views: Sequence[LensView]) -> str:
    """The page: a table a model, layers from the model down to the embeddings, a column a token.

    A cell names the likeliest next token; it is framed where that is the token that follows. Nothing is fetched, and
    only the page's own script runs, which changes what cells are shaded by and shows the likeliest tokens of one.
    """
    script = part("lens.js")
    template = environment().get_template("lens.html.j2")
    return template.render(
        title=title,
        headline=headline,
        views=[_view(view) for view in views],
        shades=SHADES,
        style=Markup(part("style.css")),
        script=Markup(script),
        script_hash=source_hash(script),
    )


def _view(view: LensView) -> dict[str, Any]:
    return {
        "tokens": [_written(token) for token in view.tokens],
        "answer": view.answer,
        "models": [{"name": name, "rows": _rows(view, trajectory)} for name, trajectory in view.models.items()],
    }


def _rows(view: LensView, trajectory: Trajectory) -> list[dict[str, Any]]:
    """The model first, then its layers from the last down."""
    n = len(trajectory.top_ids) - 1
    names = ["model", *(f"{layer}" for layer in reversed(range(n)))]
    return [
        {"name": name, "cells": [_cell(view, trajectory, layer, place) for place in range(len(view.tokens))]}
        for name, layer in zip(names, range(n, -1, -1), strict=True)
    ]


def _cell(view: LensView, trajectory: Trajectory, layer: int, place: int) -> dict[str, Any]:
    statistics = {name: values[layer, place].item() for name, values in trajectory.statistics.items()}
    ids = trajectory.top_ids[layer, place].tolist()
    likely = [math.exp(logprob) for logprob in trajectory.top_logprobs[layer, place].tolist()]
    followed = place + 1 < len(view.tokens)
    return {
        "text": _written(view.vocabulary[ids[0]]),
        "right": followed and statistics["rank"] == 1,
        "next": round(math.exp(statistics["logprob"]), 4) if followed else None,
        "top": round(likely[0], 4),
        "rank": int(statistics["rank"]) if followed else None,
        "entropy": round(statistics["entropy"], 3),
        "kl": round(max(statistics["kl"], 0.0), 3),
        "likely": [[_written(view.vocabulary[token]), round(p, 4)] for token, p in zip(ids, likely, strict=True)],
        "share": round(100 * math.exp(statistics["logprob"])) if followed else 0,
    }


def _written(token: str) -> str:
    """A token with its blanks made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or "∅"
