"""The world of hops: the text says what the answer follows from, and noise says that nothing does."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from palimpsest.worlds.hops import NOISE, PLACES, HopsWorld

WORLD = HopsWorld()


@given(st.integers(0, 2**16))
def test_the_answer_is_where_the_edges_lead(seed: int) -> None:
    for question in WORLD.questions(20, seed):
        *edges, (here, hops) = question.text.split()
        leads = {edge[0]: edge[1] for edge in edges}
        assert sorted(leads) == sorted(leads.values()) == list(PLACES)
        if question.hops is None:
            assert hops == NOISE and question.way == () and question.answer in PLACES
            continue
        assert hops == str(question.hops) == str(len(question.way))
        for step in question.way:
            here = leads[here]
            assert here == step
        assert question.answer == here


def test_hops_come_up_alike_and_noise_as_often_as_asked() -> None:
    questions = WORLD.questions(6000, 0)
    counts = Counter(question.hops for question in questions)
    assert abs(counts.pop(None) / 6000 - 0.1) < 0.02
    assert sorted(counts) == [0, 1, 2, 3, 4, 5] and all(abs(count - 900) < 120 for count in counts.values())
    noise = Counter(question.answer for question in questions if question.hops is None)
    assert len(noise) == len(PLACES) and max(noise.values()) < 2 * min(noise.values())


def test_the_same_seed_gives_the_same_questions_and_every_word_is_known() -> None:
    assert WORLD.questions(50, 3) == WORLD.questions(50, 3) != WORLD.questions(50, 4)
    known = {word for text in WORLD.vocabulary_texts() for word in text.split()}
    assert {word for question in WORLD.questions(500, 0) for word in question.text.split()} == known
