"""What a classifier is trained on and asked: token rows, with a class each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from palimpsest.data.batches import Batch, Encoded, batches
from palimpsest.data.readers import file_rows
from palimpsest.errors import DataError


@dataclass(frozen=True, eq=False)
class Examples:
    """N rows of token ids and their classes."""

    rows: tuple[Encoded, ...]
    labels: Tensor
    """[N] classes, counted from 0."""
    classes: tuple[str, ...] = ()
    """The classes' names, where they have some."""

    def __post_init__(self) -> None:
        if not self.rows or len(self.rows) != len(self.labels):
            raise DataError(f"{len(self.rows)} rows and {len(self.labels)} labels; give at least one row, and as many")

    def __len__(self) -> int:
        """N."""
        return len(self.rows)

    def take(self, places: Sequence[int]) -> "Examples":
        """Some of the examples, by their places."""
        return Examples(tuple(self.rows[place] for place in places), self.labels[list(places)], self.classes)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, rows of like length together."""
        return batches(self.rows, batch_size=batch_size)


def encode_examples(
    texts: Sequence[str],
    labels: Sequence[str | int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    classes: Sequence[str] | None = None,
    max_length: int | None = None,
) -> Examples:
    """Texts and their labels as a tokenizer reads them, with its special tokens.

    Args:
        texts: N of them.
        labels: N; the classes are what occurs among them, in order, unless `classes` names them.
        tokenizer: of the model.
        classes: the classes' names in their order, as another set of examples had them.
        max_length: longer rows are cut at their end.

    Raises:
        DataError: an empty text, or a label that is no class.
    """
    names = [str(label) for label in labels]
    known = tuple(classes) if classes else tuple(sorted(set(names)))
    if unknown := sorted(set(names) - set(known)):
        raise DataError(f"label {unknown[0]!r} is none of the classes {', '.join(known)}")
    rows = encode_texts(texts, tokenizer, max_length=max_length)
    return Examples(rows, torch.tensor([known.index(name) for name in names]), known)


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> tuple[Encoded, ...]:
    """Texts as a tokenizer reads them.

    Raises:
        DataError: a text without a token.
    """
    ids = tokenizer(list(texts), truncation=max_length is not None, max_length=max_length)["input_ids"]
    for place, row in enumerate(ids):
        if not row:
            raise DataError(f"text {place + 1} of {len(ids)} is empty; leave it out")
    return tuple(Encoded(tuple(row), len(row), len(row)) for row in ids)


def read_examples(path: str | Path) -> tuple[list[str], list[str]]:
    """The texts and labels of a file whose rows have the fields `text` and `label` (JSON lines, JSON, CSV, Parquet).

    Raises:
        DataError: no such file, no rows, or a row without one of the two; the message names file, row and field.
    """
    texts, labels = _fields(path, ("text", "label"))
    return texts, labels


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file whose rows have the field `text`; errors as those of `read_examples`."""
    return _fields(path, ("text",))[0]


def _fields(path: str | Path, names: Sequence[str]) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in names]
    for row, fields in file_rows(Path(path)):
        for name, values in zip(names, found, strict=True):
            if fields.get(name) in (None, ""):
                raise DataError(f"{path}: row {row}: field {name!r} is missing; a row has {' and '.join(names)}")
            values.append(str(fields[name]))
    if not found[0]:
        raise DataError(f"{path}: holds no rows")
    return found
