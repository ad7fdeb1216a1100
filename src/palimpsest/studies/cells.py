"""What a study has measured: a JSON file a cell, so that nothing is measured twice."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.files import write_json
from palimpsest.progress import console

Cell = dict[str, Any]
"""What was measured of one model, by name."""
Cells = Mapping[int, Mapping[str, Cell]]
"""By seed, then by model."""
Quantity = Callable[[Cell], float]


def kept(path: Path, what: str, measure: Callable[[], Cell]) -> Cell:
    """The cell in that file, measured now and written there if there is none yet; an empty one is not written."""
    if path.exists():
        cell: Cell = json.loads(path.read_text(encoding="utf-8"))
        return cell
    console.print(what, highlight=False)
    if cell := measure():
        write_json(path, cell)
    return cell


def over_models(cells: Cells, names: Sequence[str], quantity: Quantity) -> list[dict[str, float]]:
    """By seed, the quantity of each model named; seeds in which one is missing or has none are left out."""
    measured = [seed for seed in cells.values() if set(names) <= seed.keys()]
    found = [{name: quantity(seed[name]) for name in names} for seed in measured]
    return [values for values in found if np.isfinite([*values.values()]).all()]


def of_model(cells: Cells, name: str, quantity: Quantity) -> list[float]:
    """The quantity of one model, seed by seed; seeds that lack it, or in which it is not a number, are left out."""
    return [values[name] for values in over_models(cells, [name], quantity)]


def means(by_seed: Sequence[Mapping[str, float]]) -> list[float]:
    """Of each seed, the mean over models."""
    return [mean([*values.values()]) for values in by_seed]


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers."""
    return sum(values) / len(values)


def by_model(by_seed: Sequence[Mapping[str, float]]) -> str:
    """Each model's mean over seeds, in words."""
    names = by_seed[0] if by_seed else ()
    return ", ".join(f"{name} {mean([values[name] for values in by_seed]):.2f}" for name in names)


def joined(*notes: str) -> str:
    """Those of the notes that say something."""
    return "; ".join(filter(None, notes))
