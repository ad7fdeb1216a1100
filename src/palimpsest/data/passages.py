"""Long texts cut into passages of a bounded number of words."""

import re
from collections.abc import Iterator, Sequence
from itertools import islice

from palimpsest.data.records import Passage, subject_of


def passages(documents: Sequence[Passage], *, words: int, most: int | None = None) -> list[Passage]:
    """The first passage of every document, then the second of each, and so on, until there are enough.

    Args:
        documents: texts of any length.
        words: how many words a passage may have.
        most: how many passages to take; all when None.
    """
    return list(islice(_in_turn([cut(document, words=words) for document in documents]), most))


def cut(document: Passage, *, words: int) -> Iterator[Passage]:
    """A document in as few passages of at most `words` words as will do, all of nearly the same length.

    A word is what stands between white space; the text keeps its own between the words of a passage. A passage's
    subject is the document's, or the document itself, so that passages of one document stay together in a split.
    """
    spans = [word.span() for word in re.finditer(r"\S+", document.text)]
    parts = -(-len(spans) // words)
    for part in range(parts):
        inside = spans[part * len(spans) // parts : (part + 1) * len(spans) // parts]
        text = document.text[inside[0][0] : inside[-1][1]]
        yield Passage(text, subject_of(document), f"{document.id}/{part + 1}")


def _in_turn(cuts: Sequence[Iterator[Passage]]) -> Iterator[Passage]:
    waiting = list(cuts)
    while waiting:
        going = []
        for pieces in waiting:
            if (piece := next(pieces, None)) is not None:
                yield piece
                going.append(pieces)
        waiting = going
