"""A reversible rewriting of text: what a codec is, the identity, words swapped by a table, and records rewritten."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from palimpsest.data.records import QA
from palimpsest.errors import SpecError

WORD = re.compile(r"\w+")
"""A run of letters, digits and underscores of any script."""


class Codec(ABC):
    """Text into another surface form, and back.

    Where `exact` holds, `decode(encode(text)) == text` for every text; `encode` may refuse a text with an error, but
    never loses any of it. `decode` takes any text, since what a model says need not be an encoding.
    """

    name: str
    exact: bool

    @abstractmethod
    def encode(self, text: str) -> str:
        """The text in the other form."""

    @abstractmethod
    def decode(self, text: str) -> str:
        """The text back from the other form."""

    def encode_all(self, texts: Sequence[str]) -> list[str]:
        """Every text encoded, in order; a codec that works in batches does them together."""
        return [self.encode(text) for text in texts]

    def decode_all(self, texts: Sequence[str]) -> list[str]:
        """Every text decoded, in order."""
        return [self.decode(text) for text in texts]


@dataclass(frozen=True)
class TextCodec(Codec):
    """A codec made of two functions of a text."""

    name: str
    exact: bool
    forward: Callable[[str], str] = field(repr=False)
    backward: Callable[[str], str] = field(repr=False)

    def encode(self, text: str) -> str:
        """`forward` of the text."""
        return self.forward(text)

    def decode(self, text: str) -> str:
        """`backward` of the text."""
        return self.backward(text)


IDENTITY = TextCodec("identity", True, str, str)
"""Leaves every text as it is."""


class WordTable(Codec):
    """Words replaced by those of a table, everything else left alone; exact on any text.

    A text may hold words of the other side already. So the table is closed to a permutation: a word that is only a
    replacement becomes, in turn, the word at the beginning of its chain. Two sides without a common word are swapped.
    """

    exact = True

    def __init__(self, name: str, table: Mapping[str, str]) -> None:
        """Close the table to a permutation.

        Args:
            name: the codec's.
            table: each word and its replacement, spelt as they stand in texts; capitals count.

        Raises:
            SpecError: an entry is not one whole word, or two words have one replacement.
        """
        self.name = name
        for word in (word for pair in table.items() for word in pair):
            if not WORD.fullmatch(word):
                raise SpecError(f"{name}: {word!r} is not one word; give runs of letters, digits and underscores")
        source = {new: old for old, new in table.items()}
        if len(source) < len(table):
            twice = next(new for old, new in table.items() if source[new] != old)
            raise SpecError(f"{name}: two words become {twice!r}, which could not be undone; give each its own")
        ends = [new for new in source if new not in table]
        self._forward = {**table, **{end: _beginning(end, source) for end in ends}}
        self._backward = {new: old for old, new in self._forward.items()}

    def encode(self, text: str) -> str:
        """Every word of the table replaced."""
        return WORD.sub(lambda found: self._forward.get(found[0], found[0]), text)

    def decode(self, text: str) -> str:
        """Every replacement replaced by its word."""
        return WORD.sub(lambda found: self._backward.get(found[0], found[0]), text)


def encoded(records: Sequence[QA], codec: Codec) -> list[QA]:
    """The records with all their text encoded; id and subject stay, and the entity's place in the answer is lost.

    The words around question and answer ("Question:", "Answer:") are the template's and stay as they are. Where a
    prompt is to be encoded as a whole, make it the question and use the template `raw`.
    """
    texts = iter(codec.encode_all([text for record in records for text in _texts(record)]))
    return [_with_texts(record, [next(texts) for _ in _texts(record)]) for record in records]


def _texts(record: QA) -> list[str]:
    reworded = [] if record.paraphrased_answer is None else [record.paraphrased_answer]
    return [record.question, record.answer, *record.paraphrases, *record.wrong, *reworded]


def _with_texts(record: QA, texts: Sequence[str]) -> QA:
    question, answer, *others = texts
    n_paraphrases, n_wrong = len(record.paraphrases), len(record.wrong)
    return replace(
        record,
        question=question,
        answer=answer,
        paraphrases=tuple(others[:n_paraphrases]),
        wrong=tuple(others[n_paraphrases : n_paraphrases + n_wrong]),
        paraphrased_answer=None if record.paraphrased_answer is None else others[-1],
        entity_span=None,
    )


def _beginning(word: str, source: Mapping[str, str]) -> str:
    """The first word of the chain of replacements that ends in `word`."""
    while word in source:
        word = source[word]
    return word
