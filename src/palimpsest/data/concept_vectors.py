"""ConceptVectors' rows as published: a concept, where its vector stands, and what to ask about it.

Hong et al. 2024, arXiv 2406.11614; data under CC BY 4.0, its Wikipedia text under CC BY-SA. Its questions come with
white space around them, which is taken off, and its drafts and jailbreak rows leave fields out.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.data.readers import CONTAINERS, read_text
from palimpsest.data.schemas import Fields
from palimpsest.errors import DataError


@dataclass(frozen=True, slots=True)
class Completion:
    """A paragraph of the concept's Wikipedia page, cut in two."""

    first_half: str
    second_half: str


@dataclass(frozen=True, slots=True)
class Concept:
    """One row of the benchmark."""

    name: str
    layer: int
    column: int
    """Of the layer's value matrix: `Dim` in the file."""
    questions: tuple[str, ...]
    answers: tuple[str, ...] = ()
    """GPT-4's answers to them, where a row has them (`gpt_gold_answer`)."""
    completions: tuple[Completion, ...] = ()
    unrelated: tuple[str, ...] = ()
    """Questions about other concepts: ten of each of five."""
    page: str = ""
    """The concept's Wikipedia page."""
    id: str = ""


def read_concepts(path: str | Path) -> list[Concept]:
    """Read a file of ConceptVectors: an array of rows with `Concept`, `Layer`, `Dim` and `QA`.

    Raises:
        DataError: no such file, or a row that is none of ConceptVectors'; the message names file, row and field.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: ConceptVectors' rows are JSON; give a .json or .jsonl file")
    concepts = []
    for row, fields in CONTAINERS[path.suffix](path, None):
        try:
            concepts.append(_concept(fields, f"{path.stem}-{row:05d}"))
        except DataError as error:
            raise DataError(f"{path}: row {row}: {error}") from None
    if not concepts:
        raise DataError(f"{path}: holds no concepts")
    return concepts


def read_translated_questions(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read the benchmark's German questions: one object, concept to questions.

    Raises:
        DataError: no such file, or another shape.
    """
    path = Path(path)
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: a JSON {type(found).__name__} stands there; expected an object, concept to questions")
    try:
        return {name: _texts(found, name) for name in found}
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _concept(fields: Fields, id: str) -> Concept:
    completions = fields.get("text_completion") or []
    if not isinstance(completions, list):
        raise DataError(f"field 'text_completion' is a {type(completions).__name__}; expected a list")
    column = "Dim" if "Dim" in fields else "Dimension" if "Dimension" in fields else "Dim"
    own = fields.get("ID", fields.get("id"))
    return Concept(
        name=_text(fields, "Concept"),
        layer=_whole(fields, "Layer"),
        column=_whole(fields, column),
        questions=_texts(fields, "QA"),
        answers=_texts(fields, "gpt_gold_answer") if fields.get("gpt_gold_answer") else (),
        completions=tuple(map(_completion, completions)),
        unrelated=_texts(fields, "unrelated_QA") if fields.get("unrelated_QA") else (),
        page=_text(fields, "wikipedia_content") if fields.get("wikipedia_content") else "",
        id=id if own is None else str(own),
    )


def _completion(fields: Any) -> Completion:
    if not isinstance(fields, dict):
        raise DataError("field 'text_completion' holds something else than objects of First_half and Second_half")
    return Completion(_text(fields, "First_half"), _text(fields, "Second_half"))


def _text(fields: Fields, name: str) -> str:
    value = _given(fields, name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"field {name!r} is {'empty' if isinstance(value, str) else type(value).__name__}; expected text"
        )
    return value.strip()


def _texts(fields: Fields, name: str) -> tuple[str, ...]:
    values = _given(fields, name)
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise DataError(f"field {name!r} is no list of texts that are not empty")
    return tuple(value.strip() for value in values)


def _whole(fields: Fields, name: str) -> int:
    value = _given(fields, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"field {name!r} is {value!r}; expected a whole number, counted from 0")
    return value


def _given(fields: Fields, name: str) -> Any:
    if fields.get(name) is None:
        raise DataError(f"field {name!r} is missing; a row of ConceptVectors has Concept, Layer, Dim and QA")
    return fields[name]
