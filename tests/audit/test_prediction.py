"""Which score tells what comes back, on made-up rows."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.attacks.attack import ATTACKED
from palimpsest.audit.prediction import COMES_BACK_WHEN, FEWEST, foretold
from palimpsest.metrics.scores import Row

HINT = f"{ATTACKED}/hint"
DEPTH, LEGIBLE = "forget/unlearning_depth", "forget/legible_probability"


def rows(values: Mapping[str, Sequence[float]]) -> dict[str, list[Row]]:
    """Two facts a subject."""
    return {
        key: [Row("m", key, f"i{place}", f"s{place // 2}", value) for place, value in enumerate(of)]
        for key, of in values.items()
    }


N = 12
GOLD, ORIGINAL = rows({HINT: [0.1] * N}), rows({HINT: [0.9] * N})
CAME = [0.8] * (N // 2)
STAYED = [0.1] * (N // 2)


def test_a_score_that_knows_has_1_one_that_knows_nothing_a_half_and_each_its_own_direction() -> None:
    shallow_first = [0.2] * (N // 2) + [0.9] * (N // 2)
    own = rows({HINT: CAME + STAYED, DEPTH: shallow_first, LEGIBLE: shallow_first, "forget/kl_from_gold": [1.0] * N})
    found = foretold(own, GOLD, ORIGINAL, HINT)
    assert {key: auc.value for key, auc in found.items()} == {DEPTH: 1, LEGIBLE: 0, "forget/kl_from_gold": 0.5}
    assert list(found) == [key for key in COMES_BACK_WHEN if key in own]
    auc = found[DEPTH]
    assert (auc.members, auc.nonmembers, auc.member_clusters, auc.nonmember_clusters) == (6, 6, 3, 3)


def test_half_of_the_way_from_gold_is_what_counts() -> None:
    near = [0.51] * (N // 2) + [0.49] * (N // 2)
    own = rows({HINT: near, DEPTH: [0.0] * (N // 2) + [1.0] * (N // 2)})
    assert foretold(own, GOLD, ORIGINAL, HINT)[DEPTH].value == 1


def test_facts_that_original_and_gold_answer_alike_do_not_count() -> None:
    depth = rows({HINT: CAME + STAYED, DEPTH: [0.0] * N})
    few = rows({HINT: [0.9] * (FEWEST - 1) + [0.2] * (N - FEWEST + 1)})
    assert foretold(depth, GOLD, few, HINT) == {}


def test_nothing_is_said_without_an_attack_or_of_too_few_facts() -> None:
    own = rows({HINT: [0.8] * (FEWEST - 1) + [0.1] * (N - FEWEST + 1), DEPTH: [0.0] * N})
    assert foretold(own, GOLD, ORIGINAL, HINT) == foretold(own, GOLD, ORIGINAL, None) == {}


def test_an_item_asked_in_several_ways_counts_once_and_a_score_of_some_items_is_read_on_them() -> None:
    own = rows({HINT: CAME + STAYED, DEPTH: [0.0] * (N // 2) + [1.0] * (N // 2)})
    twice = {**own, HINT: [*own[HINT], *own[HINT]]}
    assert foretold(twice, GOLD, ORIGINAL, HINT) == foretold(own, GOLD, ORIGINAL, HINT)
    some = {**own, DEPTH: own[DEPTH][1:-1]}
    auc = foretold(some, GOLD, ORIGINAL, HINT)[DEPTH]
    assert (auc.members, auc.nonmembers, auc.value) == (5, 5, 1)


@given(st.lists(st.floats(0, 1), min_size=N, max_size=N))
def test_a_score_read_backwards_is_as_far_on_the_other_side(values: list[float]) -> None:
    own = rows({HINT: CAME + STAYED, DEPTH: values, LEGIBLE: values})
    found = foretold(own, GOLD, ORIGINAL, HINT)
    assert found[DEPTH].value == pytest.approx(1 - found[LEGIBLE].value)
