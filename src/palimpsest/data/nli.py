"""Natural-language inference in four languages: rows of premise, hypothesis and label, and what a model is asked.

XNLI's files (Conneau et al. 2018, arXiv 1809.05053) as Kotha, Springer & Raghunathan 2024 (arXiv 2309.10105) ask
them: does fine-tuning on code in English cost reasoning in other languages as much?
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from palimpsest.data.readers import CONTAINERS, Rows, read_text
from palimpsest.data.records import Choice
from palimpsest.data.schemas import Fields
from palimpsest.errors import DataError

Language = Literal["en", "fr", "es", "de"]
Label = Literal["entailment", "neutral", "contradiction"]
LABELS: tuple[Label, ...] = get_args(Label)
"""In the order in which XNLI's Parquet files count them, from 0."""


@dataclass(frozen=True, slots=True)
class Wording:
    """How one language asks."""

    question: str
    options: str
    answer: str
    verbalisers: tuple[str, str, str]
    """What stands for each of `LABELS`."""


WORDINGS: dict[Language, Wording] = {
    "en": Wording("Question", "True, False or Neither?", "Answer", ("True", "Neither", "False")),
    "fr": Wording("Question", "Vrai, Faux ou Ni?", "Réponse", ("Vrai", "Ni", "Faux")),
    "es": Wording("Pregunta", "Verdadero, Falso o Ni?", "Respuesta", ("Verdadero", "Ni", "Falso")),
    "de": Wording("Frage", "Wahr, Falsch oder Weder?", "Antwort", ("Wahr", "Weder", "Falsch")),
}
"""As published."""


@dataclass(frozen=True, slots=True)
class Inference:
    """Whether a hypothesis follows from a premise, contradicts it, or neither."""

    premise: str
    hypothesis: str
    label: Label
    language: Language
    id: str = ""

    @property
    def prompt(self) -> str:
        """What a model is asked; its answer begins with a verbaliser after a space."""
        wording = WORDINGS[self.language]
        return f"{self.premise}\n{wording.question}: {self.hypothesis} {wording.options}\n{wording.answer}:"

    @property
    def verbaliser(self) -> str:
        """The right answer."""
        return WORDINGS[self.language].verbalisers[LABELS.index(self.label)]

    @property
    def choice(self) -> Choice:
        """The same as a multiple choice for the metric `cloze`, with the verbalisers in the order of `LABELS`."""
        verbalisers = WORDINGS[self.language].verbalisers
        return Choice(self.prompt, verbalisers, LABELS.index(self.label), id=self.id)


def said_label(language: Language, said: str) -> Label | None:
    """The label whose verbaliser an answer begins with as a whole word, or None: `Niño` does not say `Ni`."""
    for label, verbaliser in zip(LABELS, WORDINGS[language].verbalisers, strict=True):
        if re.match(rf"{verbaliser}\b", said.lstrip()):
            return label
    return None


def read_nli(path: str | Path, language: Language) -> list[Inference]:
    """Read a local file of rows: `.jsonl`, `.json`, `.csv`, `.parquet`, or `.tsv` as XNLI's own.

    Fields are `premise`, `hypothesis` and `label`, or XNLI's and MNLI's `sentence1`, `sentence2` and `gold_label`; a
    label is its name, or its number in `LABELS`. Where rows name a `language`, only those of the one asked for are
    read. A quote in a `.tsv` file is a character like any other. A row's id is its own `id` or `pairID`, else the
    file's stem and the row's number.

    Raises:
        DataError: an unknown language, no such file, a row that is none, or no rows; the message names file, row and
            field.
    """
    path = Path(path)
    if language not in WORDINGS:
        raise DataError(f"language {language!r} is unknown; choose {', '.join(WORDINGS)}")
    readers = {suffix: read for suffix, read in CONTAINERS.items() if suffix != ".txt"}
    if path.suffix.lower() not in (*readers, ".tsv"):
        raise DataError(f"{path}: the suffix {path.suffix!r} is unknown; expected one of .tsv, {', '.join(readers)}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    rows = _tab_rows(path) if path.suffix.lower() == ".tsv" else readers[path.suffix.lower()](path, None)
    found = []
    for row, fields in rows:
        if fields.get("language", language) == language:
            try:
                found.append(_inference(fields, language, f"{path.stem}-{row:05d}"))
            except DataError as error:
                raise DataError(f"{path}: row {row}: {error}") from None
    if not found:
        raise DataError(f"{path}: holds no rows in language {language!r}")
    return found


def _tab_rows(path: Path) -> Rows:
    header, *lines = [line.rstrip("\r").split("\t") for line in read_text(path).split("\n")]
    for row, cells in enumerate(lines, start=1):
        if cells == [""]:
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{path}: row {row}: {len(cells)} cells, but the header has {len(header)}; part them by tabs"
            )
        yield row, dict(zip(header, cells, strict=True))


def _inference(fields: Fields, language: Language, id: str) -> Inference:
    own = next((fields[name] for name in ("id", "pairID") if fields.get(name) not in (None, "")), id)
    return Inference(
        _text(fields, "premise", "sentence1"),
        _text(fields, "hypothesis", "sentence2"),
        _label(fields),
        language,
        str(own),
    )


def _text(fields: Fields, *names: str) -> str:
    name, value = _given(fields, *names)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"field {name!r} is {'empty' if isinstance(value, str) else type(value).__name__}; expected text"
        )
    return value.strip()


def _label(fields: Fields) -> Label:
    name, value = _given(fields, "label", "gold_label")
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(LABELS):
        return LABELS[value]
    if value in LABELS:
        return value
    raise DataError(f"field {name!r} is {value!r}; expected {', '.join(LABELS)}, or 0, 1, 2 for them")


def _given(fields: Fields, *names: str) -> tuple[str, Any]:
    for name in names:
        if fields.get(name) is not None:
            return name, fields[name]
    raise DataError(f"field {names[0]!r} is missing; a row has premise, hypothesis and label")
