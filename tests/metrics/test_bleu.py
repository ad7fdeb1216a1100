"""Sentence BLEU against its definition, by hand."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.metrics.bleu import bleu

SENTENCES = st.lists(st.sampled_from("alpha beta gamma delta".split()), max_size=9)


def by_definition(said: list[str], reference: list[str]) -> float:
    """Papineni et al. 2002, eq. 1 to 3, with method 3 of Chen & Cherry 2014, eq. 9."""
    logs, unmatched = 0.0, 0
    for n in range(1, 5):
        ours, theirs = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (said, reference))
        matches, total = sum((ours & theirs).values()), max(1, sum(ours.values()))
        if n == 1 and not matches:
            return 0.0
        unmatched += not matches
        logs += math.log((matches or 0.5**unmatched) / total) / 4
    brevity = 1.0 if len(said) > len(reference) else math.exp(1 - len(reference) / len(said))
    return brevity * math.exp(logs)


@pytest.mark.parametrize(
    ("said", "reference", "value"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1.0),
        # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 fours
        ("the cat sat on a mat", "the cat sat on the mat", (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        # 3 of 4, 1 of 3, no triple (1/2 of 2), no four (1/4 of 1); 4 words for 6
        ("the cat on dogs", "the cat sat on the mat", math.exp(1 - 6 / 4) * (3 / 4 / 3 * (1 / 4) * (1 / 4)) ** 0.25),
        ("Oslo", "Oslo", (1 / 2 * 1 / 4 * 1 / 8) ** 0.25),
        ("", "the cat", 0.0),
        ("dogs", "", 0.0),
        ("dogs bark", "the cat", 0.0),
    ],
)
def test_by_hand(said: str, reference: str, value: float) -> None:
    assert bleu([said], [reference]).item() == pytest.approx(value)


@given(SENTENCES, SENTENCES)
@settings(deadline=None, max_examples=100)
def test_it_is_its_definition(said: list[str], reference: list[str]) -> None:
    assert bleu([" ".join(said)], [" ".join(reference)]).item() == pytest.approx(by_definition(said, reference))


def test_the_reference_is_the_reference() -> None:
    """Saying more costs precision, saying less is punished for brevity: the two are not the same."""
    short, long = "the cat sat on the mat", "the cat sat on the mat and slept all day"
    more, less = bleu([long, short], [short, long]).tolist()
    assert more == pytest.approx((6 / 10 * 5 / 9 * 4 / 8 * 3 / 7) ** 0.25)
    assert less == pytest.approx(math.exp(1 - 10 / 6))
