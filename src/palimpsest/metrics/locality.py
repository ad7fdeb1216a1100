"""Where damage falls: any score of rows that were to be kept, by how near they are to what was to be forgotten.

A mean over all retain rows hides harm to the few that resemble the forget set; TOFU's own utility rows are its first
authors and its forget rows the last, so it never looks near them. Here rows are put into groups from near to far.
"""

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from palimpsest.data.records import QA, Choice, Passage, Preference, Record, subject_of
from palimpsest.errors import DataError
from palimpsest.metrics.scores import Score
from palimpsest.metrics.statistics import Floats, clustered_mean

DEFINITION = "locality@relation_tfidf"
"""The versioned name of the way in which rows are put into groups."""

Distance = Literal["same subject", "same relation", "neighbour", "far"]
DISTANCES: tuple[Distance, ...] = ("same subject", "same relation", "neighbour", "far")
"""From near to far:

- `same subject`: about a subject of the forget set.
- `same relation`: a question that some forget row asks too, in one of its wordings, about another subject ("Where was
  _ born?").
- `neighbour`: of the others, the share whose words are most like those of some forget row.
- `far`: what is left."""


def distances(forget: Sequence[Record], records: Sequence[Record], *, neighbours: float = 0.25) -> tuple[Distance, ...]:
    """[n] the group of each record, the first of `DISTANCES` that it belongs to.

    Likeness is the cosine between vectors of words weighted by their rarity among all these rows (TF-IDF; Salton &
    Buckley 1988), to the likest forget row. Equally like rows go by their order.

    Args:
        forget: the rows to be forgotten.
        records: n rows that were to be kept.
        neighbours: the share of the rows of no common subject or relation that are called neighbours, 0 to 1.

    Raises:
        DataError: there are no forget rows, or the share is not one.
    """
    if not forget:
        raise DataError("there are no forget rows to be near to; give the rows that were to be forgotten")
    if not 0 <= neighbours <= 1:
        raise DataError(f"neighbours is {neighbours}; give a share of the rows, from 0 to 1")
    subjects = {subject_of(record) for record in forget}
    relations = {relation for record in forget for relation in _relations(record)}
    found: list[Distance] = []
    for record in records:
        if subject_of(record) in subjects:
            found.append("same subject")
        else:
            found.append("same relation" if relations & _relations(record) else "far")
    rest = [place for place, distance in enumerate(found) if distance == "far"]
    likeness = likest(forget, [records[place] for place in rest])
    nearest = np.argsort(-likeness, kind="stable")[: round(neighbours * len(rest))]
    for place in nearest:
        found[rest[place]] = "neighbour"
    return tuple(found)


def likest(forget: Sequence[Record], records: Sequence[Record]) -> Floats:
    """[n] each record's likeness to the likest forget row, from 0 (no word in common) to 1 (the same words)."""
    if not records:
        return np.zeros(0)
    texts = [_words(record) for record in (*forget, *records)]
    number = {word: place for place, word in enumerate(sorted({word for words in texts for word in words}))}
    columns = [number[word] for words in texts for word in words]
    rows = np.repeat(np.arange(len(texts)), [len(words) for words in texts])
    shape = (len(texts), max(1, len(number)))
    weighted = sparse.csr_array(sparse.coo_array((np.ones(len(columns)), (rows, columns)), shape=shape))
    seen_in = np.bincount(weighted.indices, minlength=weighted.shape[1])
    weighted = weighted * (np.log((1 + len(texts)) / (1 + seen_in)) + 1)
    lengths = np.sqrt(weighted.power(2).sum(1))
    weighted = sparse.csr_array(weighted * (1 / np.where(lengths, lengths, 1))[:, None])
    return np.asarray((weighted[len(forget) :] @ weighted[: len(forget)].T).max(axis=1).toarray()).ravel()


def locality_curve(
    values: ArrayLike, groups: Sequence[Distance], clusters: Sequence[str], *, seed: int
) -> dict[Distance, Score]:
    """The mean of a score in each group that has rows, from near to far, with its interval clustered by subject.

    Args:
        values: [n] one number a record: a KL from the original, or a score's difference from it.
        groups: [n] each record's group, from `distances`.
        clusters: [n] each record's subject.
        seed: of the resampling.

    Raises:
        DataError: n differs among the three, or a value is not a finite number.
    """
    items = np.asarray(values, dtype=np.float64)
    if not len(items) == len(groups) == len(clusters):
        raise DataError(
            f"{len(items)} values, {len(groups)} groups and {len(clusters)} subjects; give one each a record"
        )
    curve = {}
    for distance in DISTANCES:
        inside = [place for place, group in enumerate(groups) if group == distance]
        if inside:
            curve[distance] = clustered_mean(items[inside], [clusters[place] for place in inside], seed=seed)
    return curve


def _relations(record: Record) -> set[str]:
    """The wordings of a question without its subject's name; none where they do not name it."""
    if not isinstance(record, QA) or not record.subject:
        return set()
    name = re.compile(re.escape(record.subject), re.IGNORECASE)
    return {
        name.sub("_", wording).lower() for wording in (record.question, *record.paraphrases) if name.search(wording)
    }


def _words(record: Record) -> list[str]:
    match record:
        case QA():
            text = f"{record.question} {record.answer}"
        case Passage():
            text = record.text
        case Choice():
            text = " ".join((record.question, *record.choices))
        case Preference():
            text = f"{record.prompt} {record.chosen}"
    return re.findall(r"\w+", text.lower())
