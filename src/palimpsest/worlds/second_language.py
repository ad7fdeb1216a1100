"""A world told in a second language: every word has one for it, so what is learnt in one can be asked in the other.

A model that reads both learns the same facts in two surface forms; what is unlearned in one can then be asked in the
other. Names stay as they are, as names do, unless they are to be translated too.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from palimpsest.data.codec import WORD, WordTable, encoded
from palimpsest.data.records import QA, Passage
from palimpsest.worlds.facts import FactsWorld, Subject

TEMPLATE = frozenset({"Question", "Answer"})
"""The words around a question and its answer are the same in both languages."""


@dataclass(frozen=True)
class SecondLanguage:
    """A language for one world: the same world and settings give the same words."""

    world: FactsWorld
    translate_names: bool = False
    """Give the subjects other names too. Then no word but the template's stands in both languages."""
    seed: int = 0

    @cached_property
    def codec(self) -> WordTable:
        """From the world's own language to this one, and back; exact on any text.

        A word and the same word with a capital are one word in both languages.
        """
        kept = TEMPLATE if self.translate_names else TEMPLATE.union(*map(_words, self._names))
        words = {word for text in self.world.vocabulary_texts() for word in _words(text)}
        roots = sorted({word.lower() for word in words})
        new = dict(zip(roots, _new_words(random.Random(f"language/{self.seed}"), len(roots), roots), strict=True))
        return WordTable("second language", {word: _like(word, new[word.lower()]) for word in sorted(words - kept)})

    def facts(self, subjects: Sequence[Subject]) -> list[QA]:
        """The world's facts about these subjects in this language: same ids and subjects, in the same order."""
        return encoded(self.world.facts(subjects), self.codec)

    def documents(self, subjects: Sequence[Subject]) -> list[Passage]:
        """All that the world writes about these subjects, in this language; ids end in `-second`."""
        return [
            replace(passage, text=self.codec.encode(passage.text), id=f"{passage.id}-second")
            for passage in self.world.documents(subjects)
        ]

    def vocabulary_texts(self) -> Iterator[str]:
        """Texts that hold every word of both languages."""
        for text in self.world.vocabulary_texts():
            yield from (text, self.codec.encode(text))

    @property
    def _names(self) -> list[str]:
        return [subject.name for subject in self.world.subjects]


def _words(text: str) -> set[str]:
    return set(WORD.findall(text))


def _like(word: str, new: str) -> str:
    return new.capitalize() if word[0].isupper() else new


def _new_words(rng: random.Random, n: int, taken: Sequence[str]) -> Iterator[str]:
    """`n` distinct words of open syllables, in small letters, none of which is taken."""
    seen = set(taken)
    while n:
        word = "".join(rng.choice("bdfghjklmnprstvz") + rng.choice("aeiouy") for _ in range(rng.choice((2, 3, 3))))
        if word not in seen:
            seen.add(word)
            n -= 1
            yield word
