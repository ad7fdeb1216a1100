"""Cutting long texts: no word lost or doubled, no passage too long, every text's turn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.data.passages import cut, passages
from palimpsest.data.records import Passage

TEXTS = st.lists(st.text(alphabet="ab \n\t", min_size=1).filter(str.strip), min_size=1, max_size=8)


@given(st.text(alphabet="ab \n\tß", min_size=1).filter(str.strip), st.integers(1, 9))
def test_no_word_is_lost_or_doubled_and_no_passage_is_too_long(text: str, words: int) -> None:
    pieces = list(cut(Passage(text, id="d"), words=words))
    counts = [len(piece.text.split()) for piece in pieces]
    assert [word for piece in pieces for word in piece.text.split()] == text.split()
    assert max(counts) <= words and max(counts) - min(counts) <= 1
    assert len(pieces) == -(-sum(counts) // words)  # as few as will do
    assert all(piece.text in text for piece in pieces)  # white space inside is the text's own


def test_passages_of_one_text_share_its_subject_and_have_ids_of_their_own() -> None:
    named, nameless = Passage("a b c", "Anna", "x"), Passage("d e f", id="y")
    assert [(piece.subject, piece.id) for piece in cut(named, words=2)] == [("Anna", "x/1"), ("Anna", "x/2")]
    assert [(piece.subject, piece.id) for piece in cut(nameless, words=2)] == [("y", "y/1"), ("y", "y/2")]


def test_every_texts_first_passage_comes_before_anyones_second() -> None:
    documents = [Passage("a1 a2 a3", id="a"), Passage("b1", id="b"), Passage("c1 c2", id="c")]
    ids = [piece.id for piece in passages(documents, words=1)]
    assert ids == ["a/1", "b/1", "c/1", "a/2", "c/2", "a/3"]
    assert [piece.id for piece in passages(documents, words=1, most=4)] == ids[:4]


@given(TEXTS, st.integers(1, 5), st.integers(0, 20))
def test_fewer_passages_are_the_first_ones(texts: list[str], words: int, most: int) -> None:
    documents = [Passage(text, id=str(number)) for number, text in enumerate(texts)]
    everything = passages(documents, words=words)
    assert sum(len(piece.text.split()) for piece in everything) == sum(len(text.split()) for text in texts)
    assert passages(documents, words=words, most=most) == everything[:most]


def test_texts_that_are_not_needed_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr("palimpsest.data.passages.subject_of", lambda document: looked.append(document.id) or "s")
    passages([Passage("a b", id=name) for name in "abc"], words=1, most=2)
    assert looked == ["a", "b"]
