"""The records that everything else speaks: a question with its answer, a passage, a multiple choice, a preference.

Records are frozen: equal content is equal, and a record can be a dictionary's key.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from palimpsest.files import content_hash


@dataclass(frozen=True, slots=True)
class QA:
    """A question with its answer; `subject` is whom or what it is about and groups rows in every interval."""

    question: str
    answer: str
    subject: str | None = None
    paraphrases: tuple[str, ...] = ()
    """Other wordings of the question, never trained on: they measure whether forgetting reaches beyond the wording."""
    paraphrased_answer: str | None = None
    """The right answer in other words (TOFU's truth ratio compares it with `wrong`)."""
    wrong: tuple[str, ...] = ()
    """Plausible wrong answers in the wording of `paraphrased_answer`."""
    entity_span: tuple[int, int] | None = None
    """Characters of `answer` that carry the fact, start inclusive, end exclusive."""
    id: str = ""


@dataclass(frozen=True, slots=True)
class Passage:
    """Running text, learnt or scored from its first token to its last."""

    text: str
    subject: str | None = None
    id: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A multiple-choice question; `answer` counts the choices from 0."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str | None = None
    id: str = ""


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a preferred and a rejected completion."""

    prompt: str
    chosen: str
    rejected: str
    subject: str | None = None
    id: str = ""


Record = QA | Passage | Choice | Preference
Text = QA | Passage
"""What is learnt and forgotten: a question with its answer, or running text."""


def reworded(records: Sequence[Record]) -> list[QA]:
    """One QA for every held-out wording of every question; id and subject stay the original's."""
    return [
        replace(record, question=question, paraphrases=())
        for record in records
        if isinstance(record, QA)
        for question in record.paraphrases
    ]


def content_key(record: Record) -> tuple[Any, ...]:
    """What makes two records the same row, whatever their ids: the text that a model is trained on."""
    match record:
        case QA():
            return ("qa", record.question, record.answer)
        case Passage():
            return ("passage", record.text)
        case Choice():
            return ("choice", record.question, record.choices, record.answer)
        case Preference():
            return ("preference", record.prompt, record.chosen, record.rejected)


def subject_of(record: Record) -> str:
    """Whom or what a row is about; a row without a subject is its own."""
    return record.subject or record.id or str(content_key(record)[1])


def records_hash(records: Sequence[Record]) -> str:
    """SHA-256 (hex) of the records' whole content in their order."""
    return content_hash([[type(record).__name__, asdict(record)] for record in records])
