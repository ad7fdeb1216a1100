"""What a study has measured: a JSON file a cell, so that nothing is measured twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from palimpsest.files import write_json
from palimpsest.progress import console

Cell = dict[str, Any]
"""What was measured of one model, by name."""


def kept(path: Path, what: str, measure: Callable[[], Cell]) -> Cell:
    """The cell in that file, measured now and written there if there is none yet; an empty one is not written."""
    if path.exists():
        cell: Cell = json.loads(path.read_text(encoding="utf-8"))
        return cell
    console.print(what, highlight=False)
    if cell := measure():
        write_json(path, cell)
    return cell
