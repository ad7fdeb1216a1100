"""What forget and retain sets have in common with each other and with themselves."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from palimpsest.data.records import QA, Record, content_key
from palimpsest.errors import DataError

SHARED_WORDS = 13
"""Words in the same order that two texts do not share by chance, as in GPT-3's decontamination (Brown et al. 2020)."""
Groups = tuple[tuple[str, ...], ...]
"""Ids of rows that belong together, each group in the order of the rows."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Rows that stand more than once. Two rows are the same when their text is (`content_key`), whatever their ids."""

    n_forget: int
    """Rows of the forget set."""
    n_retain: int
    """Rows of the retain set."""
    forget_duplicates: Groups
    """Ids of forget rows of the same content."""
    retain_duplicates: Groups
    """Ids of retain rows of the same content."""
    shared: tuple[str, ...]
    """Ids of the forget rows whose content is in the retain set too."""
    retain_only: int
    """Retain rows whose content is not in the forget set."""
    same_question: Groups
    """Ids, over both sets, of rows that ask one question and answer it differently."""

    def summary(self) -> str:
        """One line for people."""
        found = [
            f"{_count(self.n_forget, 'forget row')}, {_count(self.n_retain, 'retain row')}",
            f"{len(self.shared)} in both" + _first(self.shared),
            f"{_extra(self.forget_duplicates)} duplicated in forget" + _first_groups(self.forget_duplicates),
            f"{_extra(self.retain_duplicates)} duplicated in retain" + _first_groups(self.retain_duplicates),
        ]
        if self.same_question:
            asked = _count(len(self.same_question), "question")
            found.append(f"{asked} with different answers" + _first_groups(self.same_question))
        return "; ".join(found)

    @property
    def clean(self) -> bool:
        """Whether no row stands twice and no question is answered in two ways."""
        return not (self.forget_duplicates or self.retain_duplicates or self.shared or self.same_question)

    def check(self) -> None:
        """Refuse a request that asks to forget only what it asks to keep.

        Raises:
            DataError: the sets hold the same rows, or every forget row is in the retain set.
        """
        if not self.n_forget or len(self.shared) < self.n_forget:
            return
        rows = _count(self.n_forget, "row")
        if not self.retain_only:
            raise DataError(
                f"forget set and retain set hold the same {rows}{_first(self.shared)}; was one file given twice?"
            )
        raise DataError(
            f"every forget row is in the retain set too: {rows} of {self.n_retain}{_first(self.shared)}; "
            "take them out of the retain set"
        )


def find_overlap(forget: Sequence[Record], retain: Sequence[Record]) -> Overlap:
    """Compare two sets of records by their content.

    Args:
        forget: what is to be forgotten.
        retain: what is to be kept.
    """
    kept = {content_key(record) for record in retain}
    gone = {content_key(record) for record in forget}
    return Overlap(
        n_forget=len(forget),
        n_retain=len(retain),
        forget_duplicates=_duplicates(forget),
        retain_duplicates=_duplicates(retain),
        shared=tuple(record.id for record in forget if content_key(record) in kept),
        retain_only=sum(content_key(record) not in gone for record in retain),
        same_question=_same_question((*forget, *retain)),
    )


def told_of(texts: Sequence[Record], forget: Sequence[Record]) -> list[str]:
    """Ids of the texts that tell of the forget set: by a forget row's subject, or `SHARED_WORDS` words in its order.

    What is fitted to such texts may store what is to be forgotten.
    """
    subjects = {record.subject for record in forget if record.subject}
    runs = {run for record in forget for run in _runs(record)}
    return [text.id for text in texts if text.subject in subjects or not runs.isdisjoint(_runs(text))]


def _runs(record: Record) -> Iterator[tuple[str, ...]]:
    """Every run of `SHARED_WORDS` words; a shorter text is one run."""
    words = " ".join(str(part) for part in content_key(record)[1:]).lower().split()
    for first in range(max(1, len(words) - SHARED_WORDS + 1)):
        yield tuple(words[first : first + SHARED_WORDS])


def _duplicates(records: Iterable[Record]) -> Groups:
    ids = defaultdict(list)
    for record in records:
        ids[content_key(record)].append(record.id)
    return tuple(tuple(group) for group in ids.values() if len(group) > 1)


def _same_question(records: Iterable[Record]) -> Groups:
    asked: dict[str, dict[str, str]] = defaultdict(dict)
    for record in records:
        if isinstance(record, QA):
            asked[record.question].setdefault(record.answer, record.id)
    return tuple(tuple(answers.values()) for answers in asked.values() if len(answers) > 1)


def _extra(groups: Groups) -> int:
    """Rows beyond the first of each group."""
    return sum(len(group) - 1 for group in groups)


def _first(ids: Sequence[str], n: int = 3) -> str:
    return f" ({', '.join(ids[:n])}{', ...' if len(ids) > n else ''})" if ids else ""


def _first_groups(groups: Groups) -> str:
    return _first([" = ".join(group) for group in groups])


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
