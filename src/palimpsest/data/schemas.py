"""The shapes that rows come in, known by their fields, and how each becomes a record.

TOFU's fields are those of Maini et al. 2024 (arXiv:2401.06121) as its files spell them, LUME's those of Ramakrishna et
al. 2025 (arXiv:2502.15097), RWKU's those of Jin et al. 2024 (arXiv:2406.10890), KnowUnDo's those of Tian et al. 2024
(arXiv:2407.01920), MUSE's those of Shi et al. 2024 (arXiv:2407.06460): its `knowmem` rows are `question`, `answer`, its
corpora and `privleak` rows `text` or bare texts. Articles are those of WMDP's biology corpora (Li et al. 2024,
arXiv:2403.03218). Entity spans of TOFU's forget10 are those of the Unlearning Depth Score.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal

from palimpsest.data.records import QA, Choice, Passage, Preference, Record
from palimpsest.errors import DataError

Format = Literal[
    "palimpsest",
    "tofu",
    "tofu_options",
    "lume",
    "prompt_completion",
    "input_output",
    "text",
    "article",
    "choice",
    "preference",
    "tofu_entities",
    "rwku",
    "knowundo",
    "muse_verbmem",
]
"""A schema by name. One is known from a row's fields; naming it makes every row keep to it."""

Fields = dict[str, Any]
"""A row as its file gives it: field to value."""

LISTS = frozenset({"choices", "entity_span", "paraphrases", "perturbed_answer", "wrong"})
"""The fields that hold a list; a table of text cells has to spell them as JSON."""


@dataclass(frozen=True, slots=True)
class Schema:
    """One shape of row. Any row may have an `id` and a `subject` beside the fields named here."""

    name: Format
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Fields, str], Record]
    """Fields and an id for the row to a record; the message of its DataError starts with the field."""

    @property
    def fields(self) -> frozenset[str]:
        """Every field that is read."""
        return frozenset((*self.required, *self.optional, "id", "subject"))

    @property
    def needs(self) -> str:
        """What a message says of it."""
        return f"a row of schema {self.name} has {', '.join(self.required)}"


def to_record(fields: Fields, id: str, format: Format | None = None) -> Record:
    """One row as a record. Fields that its schema does not know are left out.

    Args:
        fields: the row.
        id: the record's id where the row has none of its own.
        format: the row's schema; known from its fields when None.

    Raises:
        DataError: a required field is missing, or a value has the wrong type; the message starts with the field.
    """
    given = frozenset(name for name, value in fields.items() if value is not None and value != "")
    schema = SCHEMAS[format] if format else recognise(given)
    if schema is None or not given.issuperset(schema.required):
        raise DataError(_what_is_missing(fields, given, schema or _nearest(fields)))
    return schema.read(fields, _id(fields) or id)


def check_format(format: str | None) -> None:
    """Refuse a schema's name that there is none of.

    Raises:
        DataError: the name is unknown.
    """
    if format is not None and format not in SCHEMAS:
        raise DataError(f"format {format!r} is unknown; {_did_you_mean(format, SCHEMAS)}choose {', '.join(SCHEMAS)}")


@lru_cache(maxsize=256)
def recognise(given: frozenset[str]) -> Schema | None:
    """Of the schemas whose required fields are all given, the one that reads most of the fields."""
    complete = [schema for schema in SCHEMAS.values() if given.issuperset(schema.required)]
    return max(complete, key=lambda schema: len(given & schema.fields), default=None)


def _palimpsest(fields: Fields, id: str) -> QA:
    answer = _text(fields, "answer")
    return QA(
        question=_text(fields, "question"),
        answer=answer,
        subject=_optional_text(fields, "subject"),
        paraphrases=_texts(fields, "paraphrases"),
        paraphrased_answer=_optional_text(fields, "paraphrased_answer"),
        wrong=_texts(fields, "wrong"),
        entity_span=_span(fields, "entity_span", answer),
        id=id,
    )


def _tofu(fields: Fields, id: str) -> QA:
    reworded = _optional_text(fields, "paraphrased_question")
    return QA(
        question=_text(fields, "question"),
        answer=_text(fields, "answer"),
        subject=_optional_text(fields, "subject"),
        paraphrases=(reworded,) if reworded else (),
        paraphrased_answer=_optional_text(fields, "paraphrased_answer"),
        wrong=_texts(fields, "perturbed_answer"),
        id=id,
    )


def _tofu_options(fields: Fields, id: str) -> Choice:
    answer = _text(fields, "answer")
    names = sorted(name for name in fields if re.fullmatch(r"option\d", name) and fields[name] not in (None, ""))
    options = tuple(_text(fields, name) for name in names)
    if answer not in options:
        raise DataError(f"field 'answer' is {_shown(answer)}; expected the text of one of its options")
    return Choice(_text(fields, "question"), options, options.index(answer), _optional_text(fields, "subject"), id)


def _tofu_entities(fields: Fields, id: str) -> QA:
    """A question with the part of its answer that carries the fact; `idx` counts TOFU's forget10 from 0."""
    answer, entity, row = _text(fields, "answer"), _text(fields, "entity"), fields["idx"]
    start = answer.find(entity)
    if start < 0:
        raise DataError(f"field 'entity' is {_shown(entity)}; expected a part of field 'answer', letter for letter")
    if not _is_whole(row) or row < 0:
        raise DataError(f"field 'idx' is {_shown(row)}; expected the question's place in forget10, counted from 0")
    # Twenty questions an author, one author after the other (TOFU, section 2.1).
    subject = _optional_text(fields, "subject") or f"author-{row // 20:03d}"
    return QA(_text(fields, "question"), answer, subject, entity_span=(start, start + len(entity)), id=id)


def _rwku(fields: Fields, id: str) -> QA:
    """A probe; level and, of an attack, its kind stand at the end of its id: `…/3/prefix injection`."""
    level, kind = fields["level"], _optional_text(fields, "type")
    if not (str(level) in ("1", "2", "3") and isinstance(level, str | int)):
        raise DataError(f"field 'level' is {_shown(level)}; expected 1 (fill in), 2 (question) or 3 (attack)")
    probe = "/".join(filter(None, (id, str(level), kind)))
    return QA(_text(fields, "query"), _text(fields, "answer"), _optional_text(fields, "subject"), id=probe)


def _lume(fields: Fields, id: str) -> QA:
    # LUME names a row "<document>sc1" (completion) or "<document>qa0" (question); some documents stand in quotes.
    document = re.fullmatch(r'"?(.+?)"?(?:sc|qa)\d+', id)
    subject = _optional_text(fields, "subject") or (document[1] if document else None)
    return QA(_text(fields, "input"), _text(fields, "output"), subject, id=id)


def _pair(question: str, answer: str) -> Callable[[Fields, str], QA]:
    def read(fields: Fields, id: str) -> QA:
        return QA(_text(fields, question), _text(fields, answer), _optional_text(fields, "subject"), id=id)

    return read


def _passage(fields: Fields, id: str) -> Passage:
    return Passage(_text(fields, "text"), _optional_text(fields, "subject"), id)


def _article(fields: Fields, id: str) -> Passage:
    """The whole text, or its abstract under its title where that is all there is."""
    text = _optional_text(fields, "text") or f"{_text(fields, 'title')}\n\n{_text(fields, 'abstract')}"
    return Passage(text, _optional_text(fields, "subject"), id)


def _choice(fields: Fields, id: str) -> Choice:
    choices, answer = _texts(fields, "choices"), fields["answer"]
    if len(choices) < 2:
        raise DataError("field 'choices' holds fewer than two choices")
    if not _is_whole(answer) or not 0 <= answer < len(choices):
        raise DataError(
            f"field 'answer' is {_shown(answer)}; expected the right choice's place, 0 to {len(choices) - 1}"
        )
    return Choice(_text(fields, "question"), choices, answer, _optional_text(fields, "subject"), id)


def _preference(fields: Fields, id: str) -> Preference:
    prompt, chosen, rejected = (_text(fields, name) for name in ("prompt", "chosen", "rejected"))
    return Preference(prompt, chosen, rejected, _optional_text(fields, "subject"), id)


def _text(fields: Fields, name: str) -> str:
    text = _checked(fields[name], name, "expected text")
    if not text.strip():
        raise DataError(f"field {name!r} is empty; fill it in or remove the row")
    return text


def _optional_text(fields: Fields, name: str) -> str | None:
    """A field that may be left out or empty."""
    return _text(fields, name) if fields.get(name) not in (None, "") else None


def _texts(fields: Fields, name: str) -> tuple[str, ...]:
    values = fields.get(name)
    if values is None or values == "":
        return ()
    if not isinstance(values, list | tuple):
        raise DataError(f"field {name!r} is {_shown(values)}; expected a list of texts")
    for value in values:
        if not _checked(value, name, "expected only texts in its list").strip():
            raise DataError(f"field {name!r} holds an empty text; fill it in or remove it")
    return tuple(values)


def _checked(value: Any, name: str, expected: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"field {name!r} holds {_shown(value)}; {expected}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        broken = value[error.start]
        raise DataError(
            f"field {name!r} holds {broken!r}, half of a surrogate pair; write the whole character"
        ) from None
    return value


def _span(fields: Fields, name: str, answer: str) -> tuple[int, int] | None:
    span = fields.get(name)
    if span is None or span == "":
        return None
    match span:
        case [start, stop] if _is_whole(start) and _is_whole(stop) and 0 <= start < stop <= len(answer):
            return start, stop
    raise DataError(
        f"field {name!r} is {_shown(span)}; expected [start, stop] with 0 <= start < stop <= {len(answer)}, "
        "the answer's length in characters"
    )


def _id(fields: Fields) -> str | None:
    own = fields.get("id")
    return str(own) if _is_whole(own) else _optional_text(fields, "id")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _nearest(fields: Fields) -> Schema | None:
    """The schema that a broken row was most likely meant for: most of its required fields are there or misspelt."""

    def likeness(schema: Schema) -> float:
        return sum(bool(name in fields or _misspelt(name, fields)) for name in schema.required) / len(schema.required)

    best = max(SCHEMAS.values(), key=likeness)
    return best if likeness(best) > 0 else None


def _what_is_missing(fields: Fields, given: frozenset[str], schema: Schema | None) -> str:
    if schema is None:
        shapes = "; ".join(" + ".join(schema.required) for schema in SCHEMAS.values())
        seen = ", ".join(map(repr, list(fields)[:6])) or "(none)"
        return f"no schema has the fields {seen}; expected one of {shapes}"
    name = next(name for name in schema.required if name not in given)
    if name in fields:
        return f"field {name!r} is {'null' if fields[name] is None else 'empty'}; {schema.needs}"
    unknown = _misspelt(name, {other: None for other in fields if other not in schema.fields})
    if unknown:
        return f"unknown field {unknown!r}; did you mean {name!r}? {schema.needs.capitalize()}"
    return f"field {name!r} is missing; {schema.needs}"


def _misspelt(name: str, fields: Fields) -> str | None:
    return next(iter(get_close_matches(name, list(fields), n=1, cutoff=0.75)), None)


def _did_you_mean(name: str, known: dict[Any, Any]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? Else " if close else ""


def _shown(value: Any) -> str:
    """A value as a message names it: its kind, and itself where it is short."""
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    kind = "null" if value is None else kinds.get(type(value), type(value).__name__)
    written = repr(value)
    return f"{kind} ({written})" if value is not None and len(written) <= 40 else kind


SCHEMAS: dict[Format, Schema] = {
    schema.name: schema
    for schema in (
        Schema(
            "tofu", ("question", "answer"), ("paraphrased_question", "paraphrased_answer", "perturbed_answer"), _tofu
        ),
        Schema(
            "palimpsest",
            ("question", "answer"),
            ("paraphrases", "paraphrased_answer", "wrong", "entity_span"),
            _palimpsest,
        ),
        Schema("tofu_options", ("question", "option1", "option2", "answer"), ("option3", "option4"), _tofu_options),
        Schema("choice", ("question", "choices", "answer"), (), _choice),
        Schema("lume", ("id", "input", "output", "task"), (), _lume),
        Schema("input_output", ("input", "output"), (), _pair("input", "output")),
        Schema("prompt_completion", ("prompt", "completion"), (), _pair("prompt", "completion")),
        Schema("preference", ("prompt", "chosen", "rejected"), (), _preference),
        Schema("text", ("text",), (), _passage),
        Schema("article", ("title", "abstract"), ("text",), _article),
        Schema("tofu_entities", ("idx", "question", "answer", "entity"), (), _tofu_entities),
        Schema("rwku", ("query", "answer", "level"), ("type",), _rwku),
        Schema("knowundo", ("text", "labels"), (), _pair("text", "labels")),
        Schema("muse_verbmem", ("prompt", "gt"), (), _pair("prompt", "gt")),
    )
}
