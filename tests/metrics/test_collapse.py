import json
import math
import random
from dataclasses import asdict

import pytest

from palimpsest.metrics.collapse import NLL_ALONE, collapse, most_common_share, repeated_ngrams, word_entropy

DRAW = random.Random(0)
VOCABULARY = [f"word{number}" for number in range(60)]
HEALTHY = [" ".join(DRAW.sample(VOCABULARY, 8)) for _ in range(30)]
VALUES = [f"value{number}" for number in range(16)]
ONE_WORD = [DRAW.choice(VALUES) for _ in range(30)]
NLLS, GOLD_NLLS = [1.2] * 30, [1.0] * 30


def test_measures_by_hand() -> None:
    assert most_common_share(["Paris", " paris ", "Rome", "Oslo"]) == 0.5
    assert most_common_share([]) == repeated_ngrams([]) == word_entropy([]) == word_entropy([""]) == 0
    # Six 3-grams of which "a b a" and "b a b" are the only distinct ones; the other answer is too short.
    assert repeated_ngrams(["a b a b a b a b", "a b"]) == pytest.approx((1 - 2 / 6) / 2)
    assert repeated_ngrams(["!!!!!!"]) == pytest.approx(1 - 1 / 4)
    assert word_entropy(["a b", "c d"]) == pytest.approx(math.log(4))
    assert word_entropy(["a a a", "b"]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


@pytest.mark.parametrize("control", [None, HEALTHY])
def test_a_healthy_model_is_healthy(control: list[str] | None) -> None:
    found = collapse(HEALTHY, NLLS, control_answers=control, gold_nlls=GOLD_NLLS)
    assert not found.collapsed and found.reason == ""
    assert found.constant.value < 0.1 and found.repetition.value == 0


@pytest.mark.parametrize("control", [None, ONE_WORD])
def test_one_word_answers_with_few_values_are_healthy(control: list[str] | None) -> None:
    assert not collapse(ONE_WORD, NLLS, control_answers=control, gold_nlls=GOLD_NLLS).collapsed


def test_yes_and_no_are_healthy_with_and_without_a_control() -> None:
    answers = ["yes"] * 21 + ["no"] * 9
    assert not collapse(answers, NLLS).collapsed
    assert not collapse(answers, NLLS, control_answers=["yes"] * 15 + ["no"] * 15).collapsed


def test_a_relation_with_one_frequent_value_is_judged_by_its_control() -> None:
    answers = ["Africa"] * 29 + ["Asia"]
    assert collapse(answers, NLLS).collapsed
    assert not collapse(answers, NLLS, control_answers=["Africa"] * 28 + ["Asia"] * 2).constant.tripped


@pytest.mark.parametrize("constant", ["value3", "", "I was born in the town of word1"])
@pytest.mark.parametrize("control", [None, ONE_WORD, HEALTHY])
def test_a_constant_model_is_collapsed(constant: str, control: list[str] | None) -> None:
    found = collapse([constant] * 30, NLLS, control_answers=control)
    assert found.collapsed and found.constant.tripped
    assert "constant output: 100% of the answers are the same" in found.reason


def test_a_repeating_model_is_collapsed_unless_its_control_repeats_as_much() -> None:
    looping = [f"{word} and {word} and {word} and " * 3 for word in VOCABULARY[:30]]
    assert collapse(looping, NLLS, control_answers=HEALTHY).repetition.tripped
    assert not collapse(looping, NLLS, control_answers=looping).collapsed
    exclaiming = [word + "!" * 80 for word in VOCABULARY[:30]]
    found = collapse(exclaiming, NLLS)
    assert found.repetition.tripped and "repetition" in found.reason


def test_a_model_with_three_words_left_is_collapsed() -> None:
    draw = random.Random(1)
    babble = [" ".join(draw.choices(["the", "of", ","], k=5)) for _ in range(30)]
    found = collapse(babble, NLLS, control_answers=HEALTHY)
    assert found.entropy.tripped and not found.constant.tripped and "few words" in found.reason


def test_an_exploded_loss_is_a_collapse_against_gold_and_absurd_without() -> None:
    assert collapse(HEALTHY, [4.1] * 30, gold_nlls=GOLD_NLLS).nll.tripped
    assert not collapse(HEALTHY, [3.9] * 30, gold_nlls=GOLD_NLLS).collapsed
    assert not collapse(HEALTHY, [NLL_ALONE - 0.1] * 30).collapsed
    assert "exploded loss" in collapse(HEALTHY, [NLL_ALONE + 0.1] * 30).reason
    # A few forgotten items are not a destroyed model.
    assert not collapse(HEALTHY, [40.0] * 10 + [1.0] * 20, gold_nlls=GOLD_NLLS).collapsed


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_likelihood_that_is_no_number_is_a_collapse_and_still_json(broken: float) -> None:
    found = collapse(HEALTHY, [broken] * 30)
    assert found.nll.tripped
    json.dumps(asdict(found), allow_nan=False)


def test_too_few_answers_show_nothing_about_variety() -> None:
    assert not collapse(["Paris"] * 4, [1.0] * 4).collapsed
    assert collapse(["Paris"] * 5, [1.0] * 5).collapsed
