"""Files that name value vectors: what `palimpsest concepts find` writes, and ConceptVectors' own rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palimpsest.data.readers import CONTAINERS
from palimpsest.data.schemas import Fields
from palimpsest.errors import DataError
from palimpsest.files import write_text
from palimpsest.internals.concepts import ConceptVector
from palimpsest.internals.value_vectors import TopTokens, ValueVector, refuse_missing
from palimpsest.models.language_model import LanguageModel

LAYER, COLUMN = ("layer", "Layer"), ("column", "Dim", "Dimension")
"""The fields' names, ours first."""


def read_vectors(path: str | Path, model: LanguageModel) -> list[ValueVector]:
    """The value vectors that a file names, each once; a row has `layer` and `column` (or `Layer` and `Dim`).

    Args:
        path: JSON lines, or a JSON array.
        model: whose they are.

    Raises:
        DataError: no such file, or a row that names no vector of this model; the message names file and row.
        ModelError: a mixture of fused experts has no value vectors.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: value vectors are read from JSON; give a .json or .jsonl file")
    named: dict[ValueVector, str] = {}
    for row, fields in CONTAINERS[path.suffix](path, None):
        where = f"{path}: row {row}"
        vector = ValueVector(_whole(fields, LAYER, where), _whole(fields, COLUMN, where), fields.get("sign", 1))
        named.setdefault(vector, where)
    if not named:
        raise DataError(f"{path}: holds no value vectors")
    refuse_missing(model, list(named), list(named.values()))
    return list(named)


def write_vectors(
    path: str | Path, concepts: Sequence[ConceptVector], tops: Sequence[TopTokens], texts: Sequence[Sequence[str]]
) -> None:
    """Write concept vectors as JSON lines that `read_vectors` gives back.

    Args:
        path: a .jsonl file.
        concepts: n of them.
        tops: what each says most.
        texts: those tokens as they are written.

    Raises:
        DataError: `path` does not end in .jsonl.
        StorageError: the file cannot be written.
    """
    refuse_other_suffix(path)
    rows = (described(*each) for each in zip(concepts, tops, texts, strict=True))
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def refuse_other_suffix(path: str | Path) -> None:
    """Refuse a file that value vectors are not written to; to be asked before they are searched for.

    Raises:
        DataError: `path` does not end in .jsonl.
    """
    if Path(path).suffix != ".jsonl":
        raise DataError(f"{path}: value vectors are written as JSON lines; name the file {Path(path).stem}.jsonl")


def described(concept: ConceptVector, top: TopTokens, texts: Sequence[str]) -> dict[str, Any]:
    """A concept vector as JSON data."""
    vector = concept.vector
    return {
        "layer": vector.layer,
        "column": vector.column,
        "sign": vector.sign,
        "precision": concept.precision,
        "z": concept.z,
        "tokens": list(texts),
        "logits": list(top.logits),
    }


def _whole(fields: Fields, names: Sequence[str], where: str) -> int:
    name = next((name for name in names if fields.get(name) is not None), None)
    if name is None:
        raise DataError(
            f"{where}: field {names[0]!r} is missing; a value vector has layer and column, or Layer and Dim"
        )
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: field {name!r} is {value!r}; expected a whole number, counted from 0")
    return value
