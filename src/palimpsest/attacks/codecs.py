"""Surface forms that fine-tuning has hardly seen: ciphers, spellings and word games that can be undone.

What an unlearned model refuses in plain text it may still say in one of these (conjugate prompting: Kotha, Springer &
Raghunathan 2024, arXiv 2309.10105). There Leetspeak loses digits and capitals, and Pig Latin makes one word of
`ear` and `year`; here both are exact on any text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase

from palimpsest.data.codec import Codec, TextCodec, WordTable
from palimpsest.errors import DataError, SpecError
from palimpsest.metrics.chrf import chrf


def rot(n: int = 13) -> TextCodec:
    """Caesar's cipher: each ASCII letter moved on by `n` places of the alphabet, its case kept.

    Raises:
        SpecError: `n` would leave every letter where it is.
    """
    n %= 26
    if n == 0:
        raise SpecError("rot: moved on by a multiple of 26 every letter stays where it is; choose 1 to 25")
    plain = ascii_lowercase + ascii_uppercase
    turned = "".join(letters[n:] + letters[:n] for letters in (ascii_lowercase, ascii_uppercase))
    there, back = str.maketrans(plain, turned), str.maketrans(turned, plain)
    return TextCodec(f"rot{n}", True, lambda text: text.translate(there), lambda text: text.translate(back))


def leet() -> TextCodec:
    r"""Leetspeak: small a, e, i, o, s, t become 4, 3, 1, 0, 5, 7; such a digit and a backslash get a backslash."""
    letters, digits = "aeiost", "431057"
    there = str.maketrans({**dict(zip(letters, digits, strict=True)), **{each: f"\\{each}" for each in digits + "\\"}})
    back = dict(zip(digits, letters, strict=True))
    written = re.compile(rf"\\([{digits}\\])|[{digits}]")
    return TextCodec(
        "leet",
        True,
        lambda text: text.translate(there),
        lambda text: written.sub(lambda found: found[1] or back[found[0]], text),
    )


def pig_latin() -> TextCodec:
    """Pig Latin with the boundary marked: the consonants that a word begins with go behind it, `string` to `ing-stray`.

    Words are runs of ASCII letters, and y is a consonant. The hyphen tells where the word began, so `ear` (`ear-ay`)
    and `year` (`ear-yay`) stay two words.
    """
    vowel, consonant = "[aeiou]", "[b-df-hj-np-tv-z]"
    word = re.compile(rf"(?=[a-z])({consonant}*)([a-z]*)", re.IGNORECASE | re.ASCII)
    # A word of consonants alone has nothing before its hyphen, and a word's rest begins with a vowel.
    spoken = re.compile(
        rf"(?:(?<![a-z])({vowel}[a-z]*)-({consonant}*)|-({consonant}+))ay(?![a-z])", re.IGNORECASE | re.ASCII
    )
    return TextCodec(
        "pig latin",
        True,
        lambda text: word.sub(r"\2-\1ay", text),
        lambda text: spoken.sub(lambda found: f"{found[2] or found[3] or ''}{found[1] or ''}", text),
    )


def reversed_words() -> TextCodec:
    """Every word's characters from last to first; a word is what stands between white space."""

    def turn(text: str) -> str:
        return re.sub(r"\S+", lambda found: found[0][::-1], text)

    return TextCodec("reversed words", True, turn, turn)


def code_switched(table: Mapping[str, str], name: str = "code-switched") -> WordTable:
    """Text in which the words of a table are said in another language, and the rest as it was.

    Args:
        table: each word and its translation, one word each, spelt as they stand in texts.
        name: the codec's.

    Raises:
        SpecError: an entry is not one word, or two words have one translation.
    """
    return WordTable(name, table)


@dataclass(frozen=True)
class Composed(Codec):
    """Codecs one after the other, as `compose` makes them."""

    name: str
    exact: bool
    codecs: tuple[Codec, ...]

    def encode(self, text: str) -> str:
        """Through every codec, the first one first."""
        return self.encode_all([text])[0]

    def decode(self, text: str) -> str:
        """Back through every codec, the last one first."""
        return self.decode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[str]:
        """As `encode`, all texts together."""
        texts = list(texts)
        for codec in self.codecs:
            texts = codec.encode_all(texts)
        return texts

    def decode_all(self, texts: Sequence[str]) -> list[str]:
        """As `decode`, all texts together."""
        texts = list(texts)
        for codec in reversed(self.codecs):
            texts = codec.decode_all(texts)
        return texts


def compose(*codecs: Codec) -> Composed:
    """The codecs one after the other, the first one first; exact where all of them are."""
    name = " + ".join(codec.name for codec in codecs) or "identity"
    return Composed(name, all(codec.exact for codec in codecs), codecs)


@dataclass(frozen=True)
class Protected(Codec):
    """A codec that leaves alone whatever a pattern matches, as `protect` makes it."""

    name: str
    exact: bool
    pattern: re.Pattern[str]
    codec: Codec

    def encode(self, text: str) -> str:
        """The text encoded between the matches."""
        return self.encode_all([text])[0]

    def decode(self, text: str) -> str:
        """The text decoded between the matches."""
        return self.decode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[str]:
        """As `encode`, all texts together.

        Raises:
            DataError: the encoded text would be parted otherwise, so that it could not be decoded.
        """
        parts = [self._parts(text) for text in texts]
        pieces = iter(self.codec.encode_all([piece for part in parts for piece in part[::2] if piece]))
        found = []
        for text, part in zip(texts, parts, strict=True):
            done = [next(pieces) if piece and not place % 2 else piece for place, piece in enumerate(part)]
            found.append("".join(done))
            if self._parts(found[-1]) != done:
                raise DataError(
                    f"{self.name}: {_shown(text)} would become {_shown(found[-1])}, in which the pattern matches "
                    "elsewhere; choose a pattern that encoded text never matches"
                )
        return found

    def decode_all(self, texts: Sequence[str]) -> list[str]:
        """As `decode`, all texts together."""
        parts = [self._parts(text) for text in texts]
        pieces = iter(self.codec.decode_all([piece for part in parts for piece in part[::2] if piece]))
        return [
            "".join(next(pieces) if piece and not place % 2 else piece for place, piece in enumerate(part))
            for part in parts
        ]

    def _parts(self, text: str) -> list[str]:
        """The text in turn outside and inside the matches; an empty match keeps nothing and does not count."""
        parts, end = [], 0
        for match in self.pattern.finditer(text):
            if match[0]:
                parts += [text[end : match.start()], match[0]]
                end = match.end()
        return [*parts, text[end:]]


def protect(pattern: str | re.Pattern[str], codec: Codec) -> Protected:
    """The codec, but for spans that match `pattern` (placeholders, labels, names), which pass unchanged.

    Raises:
        SpecError: the pattern is not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SpecError(f"protect: {pattern!r} is not a regular expression: {error}") from None
    return Protected(f"{codec.name} but {compiled.pattern}", codec.exact, compiled, codec)


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """What n texts are after `decode(encode(text))`: what a lossy codec costs before any model is asked."""

    exact: float
    """Share of the texts that come back as they were."""
    chrf: float
    """chrF of what came back against the texts, from 0 to 1 (`chrf2@corpus`)."""
    length_ratio: float
    """Characters of the encoded texts over those of the texts."""
    n: int


def round_trip(codec: Codec, texts: Sequence[str]) -> RoundTrip:
    """Encode and decode the texts and compare.

    Raises:
        DataError: there is no text, or none with a character in it.
    """
    if not any(texts):
        raise DataError(f"{codec.name}: no text to encode; give some that are not empty")
    there = codec.encode_all(texts)
    back = codec.decode_all(there)
    same = sum(text == again for text, again in zip(texts, back, strict=True))
    ratio = sum(map(len, there)) / sum(map(len, texts))
    return RoundTrip(same / len(texts), chrf(back, texts), ratio, len(texts))


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
