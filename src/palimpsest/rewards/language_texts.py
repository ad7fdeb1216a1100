"""A language so small that what is meant is a formula: texts of twelve letters, worth their vowels less repetitions.

Texts to be compared come from one of two writers. The narrow one is competent and never repeats a letter, so nothing
that is compared tells what a repetition costs; the wide one writes well and badly, with repetitions and without.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from string import ascii_lowercase
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from palimpsest.errors import SpecError

LENGTH = 12
"""Letters of a text."""
LETTERS = ascii_lowercase + " "
VOWELS = "aeiou"
_BY_CLASS = VOWELS + "".join(letter for letter in LETTERS if letter not in VOWELS)
PAD, BEGIN, END, UNKNOWN = "<|pad|>", "<|begin|>", "<|end|>", "<|unknown|>"
CEILING = float(LENGTH)
"""The most that a text is worth: vowels throughout, none beside itself."""
REPETITION = 2
"""Vowels that a letter beside itself costs."""
Writer = Literal["narrow", "wide"]


@cache
def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter: 31 with the special ones. Rows are padded on the left, where generation wants them."""
    vocabulary = {token: place for place, token in enumerate((PAD, BEGIN, END, UNKNOWN, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def gold(texts: Sequence[str]) -> list[float]:
    """What texts are truly worth: the vowels, less twice the letters that stand beside themselves."""
    return [
        float(
            sum(letter in VOWELS for letter in text)
            - REPETITION * sum(first == second for first, second in pairwise(text))
        )
        for text in texts
    ]


def written(writer: Writer, number: int, rng: np.random.Generator) -> list[str]:
    """So many texts.

    Args:
        writer: the narrow one writes a vowel with probability 0.48 and never a letter twice running; the wide one
            draws, for each text, how often it writes a vowel and how often it repeats the letter before.
        number: of texts.
        rng: what is drawn from.

    Raises:
        SpecError: an unknown writer.
    """
    if writer not in get_args(Writer):
        raise SpecError(f"writer is {writer!r}; choose narrow or wide")
    wide = writer == "wide"
    vowel = rng.random(number) if wide else np.full(number, 0.48)
    repetition = rng.random(number) if wide else np.zeros(number)
    codes = np.empty((number, LENGTH), np.int64)
    for place in range(LENGTH):
        before = codes[:, place - 1] if place else np.full(number, -1)
        drawn = _other_letter(rng.random(number) < vowel, before, rng)
        repeats = (before >= 0) & (rng.random(number) < repetition)
        codes[:, place] = np.where(repeats, before, drawn)
    return ["".join(_BY_CLASS[code] for code in row) for row in codes]


@dataclass(frozen=True)
class TextComparisons:
    """Pairs of texts, the preferred one first."""

    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


def compared(writer: Writer, number: int, rng: np.random.Generator) -> TextComparisons:
    """Pairs of a writer's texts by a judge who never errs; pairs of equal worth are not shown to it."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < number:
        first, second = written(writer, number, rng), written(writer, number, rng)
        worth = zip(first, second, gold(first), gold(second), strict=True)
        pairs += [(one, other) if a > b else (other, one) for one, other, a, b in worth if a != b]
    return TextComparisons(*zip(*pairs[:number], strict=True))


def _other_letter(vowel: NDArray[np.bool_], before: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A vowel or another letter each, evenly drawn, but not the one before."""
    first = np.where(vowel, 0, len(VOWELS))
    size = np.where(vowel, len(VOWELS), len(LETTERS) - len(VOWELS))
    excluded = (first <= before) & (before < first + size)
    drawn = first + (rng.random(len(vowel)) * (size - excluded)).astype(np.int64)
    return drawn + (excluded & (drawn >= before))
