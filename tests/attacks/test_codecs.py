"""Codecs that can be undone on any text whatever, and what a lossy one loses."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.attacks.codecs import (
    code_switched,
    compose,
    leet,
    pig_latin,
    protect,
    reversed_words,
    rot,
    round_trip,
)
from palimpsest.data.codec import IDENTITY, Codec, TextCodec, WordTable, encoded
from palimpsest.data.records import QA
from palimpsest.errors import DataError, SpecError
from palimpsest.metrics.chrf import chrf

SWITCHED = code_switched({"born": "né", "house": "casa", "casa": "Haus", "né": "x1"})
EXACT: tuple[Codec, ...] = (
    IDENTITY,
    rot(13),
    rot(-3),
    leet(),
    pig_latin(),
    reversed_words(),
    SWITCHED,
    compose(leet(), reversed_words(), pig_latin(), rot(5)),
    protect(r"\b[A-Z]{2,}\b", rot(13)),
    protect(r"\d+|\s", leet()),
)
ANY_TEXT = st.text()
NEAR_TEXT = st.text(alphabet="aeyhmst AEYT-\\4301570.\né_İK ")
"""What the codecs themselves write, so that texts look as if they were encoded already."""
WORDS = st.lists(st.sampled_from("born né house casa Haus x1 ay may a-may x-stayer -hmmay the".split())).map(" ".join)


@pytest.mark.parametrize("codec", EXACT[:-1], ids=lambda codec: codec.name)
@given(text=ANY_TEXT | NEAR_TEXT | WORDS)
def test_an_exact_codec_gives_every_text_back(codec: Codec, text: str) -> None:
    assert codec.exact
    assert codec.decode(codec.encode(text)) == text
    assert codec.encode_all([text, "x"]) == [codec.encode(text), codec.encode("x")]
    codec.decode(text)  # what a model says need not be an encoding


@given(text=ANY_TEXT | NEAR_TEXT)
def test_a_protected_codec_refuses_what_it_could_not_decode(text: str) -> None:
    codec = EXACT[-1]  # leet writes digits, which are what this one leaves alone
    try:
        there = codec.encode(text)
    except DataError:
        assert re.search("[aeiost]", text)
    else:
        assert codec.decode(there) == text


@pytest.mark.parametrize(
    ("codec", "text", "expected"),
    [
        (rot(13), "Hello, Zürich 42!", "Uryyb, Müevpu 42!"),
        (leet(), r"What is 5 plus 12? \o/", r"Wh47 15 \5 plu5 \12? \\0/"),
        (pig_latin(), "Year ear string hmm I", "ear-Yay ear-ay ing-stray -hmmay I-ay"),
        (reversed_words(), "two  words.\n", "owt  .sdrow\n"),
        (code_switched({"cat": "chat"}), "cats, a cat; chat", "cats, a chat; cat"),
        (compose(rot(1), reversed_words()), "abc d", "dcb e"),
        (protect("<[A-Z]+>", rot(13)), "I am <NAME>.", "V nz <NAME>."),
        (compose(), "as it is", "as it is"),
    ],
    ids=lambda value: value.name if isinstance(value, Codec) else None,
)
def test_what_codecs_write(codec: Codec, text: str, expected: str) -> None:
    assert codec.encode(text) == expected
    assert codec.decode(expected) == text


def test_what_a_protected_span_would_be_lost_in_is_said_in_one_line() -> None:
    with pytest.raises(DataError, match=r"'uryyb' would become 'hello', in which the pattern matches elsewhere"):
        protect("hello", rot(13)).encode("uryyb")
    with pytest.raises(SpecError, match="not a regular expression"):
        protect("(", leet())
    with pytest.raises(SpecError, match="choose 1 to 25"):
        rot(52)


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from("abcdefghXYZ"), max_size=8))
def test_a_word_table_is_a_permutation_or_is_refused(table: dict[str, str]) -> None:
    words = "abcdefghXYZ"
    if max(Counter(table.values()).values(), default=0) > 1:
        with pytest.raises(SpecError, match="two words become"):
            WordTable("t", table)
        return
    codec = WordTable("t", table)
    assert sorted(codec.encode(word) for word in words) == sorted(words)
    assert all(codec.encode(word) == new for word, new in table.items())
    assert all(codec.encode(word) == word for word in words if word not in {*table, *table.values()})


def test_a_word_table_takes_whole_words() -> None:
    with pytest.raises(SpecError, match="'two words' is not one word"):
        WordTable("t", {"deux": "two words"})


def test_records_are_encoded_in_all_their_texts() -> None:
    record = QA("Who?", "Mia", "s", ("Say who",), "It is Mia", ("Bo", "Al"), entity_span=(0, 3), id="7")
    (there,) = encoded([record], rot(13))
    assert there == QA("Jub?", "Zvn", "s", ("Fnl jub",), "Vg vf Zvn", ("Ob", "Ny"), id="7")
    (plain,) = encoded([QA("Who?", "Mia", wrong=("Bo",))], IDENTITY)
    assert plain == QA("Who?", "Mia", wrong=("Bo",))


def test_the_round_trip_of_a_lossy_codec_shows_what_is_lost() -> None:
    shout = TextCodec("shout", False, lambda text: text.upper() + "!!", lambda text: text.removesuffix("!!").lower())
    trip = round_trip(shout, ["quiet", "Loud"])
    assert (trip.exact, trip.length_ratio, trip.n) == (0.5, 13 / 9, 2)
    assert trip.chrf == pytest.approx(chrf(["quiet", "loud"], ["quiet", "Loud"])) and 0 < trip.chrf < 1
    assert round_trip(leet(), ["five of them: 5", ""]).exact == round_trip(leet(), ["five"]).chrf == 1
    with pytest.raises(DataError, match="no text to encode"):
        round_trip(leet(), [""])


@pytest.mark.parametrize(
    ("texts", "references", "sacrebleu"),
    [
        (["the cat sat on the mat"], ["the cat is on the mat"], 64.5779420625287),
        (["hi", "Where was Mira born?"], ["hi", "Where was Mira from?"], 68.48101588813664),
        (["a"], ["a"], 100),
        ([""], ["abc"], 0),
        (["Niemand hat Absicht"], ["Niemand hat die Absicht, eine Mauer zu errichten"], 35.19828826085142),
    ],
)
def test_chrf_is_that_of_sacrebleu(texts: list[str], references: list[str], sacrebleu: float) -> None:
    """The numbers are those of sacreBLEU 2.6.0, `nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no`."""
    np.testing.assert_allclose(100 * chrf(texts, references), sacrebleu, rtol=1e-12)
