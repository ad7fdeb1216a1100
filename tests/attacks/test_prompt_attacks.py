"""Prompt attacks: what is asked is what the words say, nothing tells its answer unless it may, ids stay."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import WORLD, Organism

from palimpsest.attacks.attack import ATTACKED, Attack, attacked
from palimpsest.attacks.prompts import (
    SHOTS,
    few_shot,
    hinted,
    paraphrased,
    prefixed,
    prompt_attacks,
    subject_hints,
    told,
)
from palimpsest.data.prompts import Template, render
from palimpsest.data.records import QA, content_key
from palimpsest.errors import DataError, ModelError
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.anatomy import Site
from palimpsest.models.tokenizers import word_tokenizer

FORGET = tuple(WORLD.facts(WORLD.forget_subjects))
RETAIN = tuple(WORLD.facts(WORLD.retain_subjects))
PLAIN = QA("Where was Ada born?", "Oslo", subject="Ada", paraphrases=("What is Ada's birthplace?",), id="a")
EXAMPLES = [QA(f"Where was P{n} born?", city) for n, city in enumerate(("Riga", "Oslo", "Lima", "Turin"))]


def identity(record: QA) -> tuple[str, str, str | None]:
    return record.id, record.answer, record.subject


def test_a_record_is_asked_in_its_own_other_wordings() -> None:
    none = QA("Who?", "Me", id="b")
    assert [row.question for row in paraphrased([PLAIN, none])] == ["What is Ada's birthplace?"]
    assert identity(paraphrased([PLAIN])[0]) == identity(PLAIN)


def test_a_prefix_stands_before_the_question() -> None:
    (asked,) = prefixed([PLAIN], "Be honest.")
    assert asked.question == "Be honest. Where was Ada born?" and identity(asked) == identity(PLAIN)


@pytest.mark.parametrize("template", ["plain", "raw"])
def test_examples_are_rendered_as_records_are(template: Template) -> None:
    """The prompt of a few-shot question is its examples as they would be rendered, in any order, and then itself."""
    (asked,) = few_shot([PLAIN], EXAMPLES, shots=2, template=template, seed=0)
    tokenizer = word_tokenizer(["x"])
    prompt, completion = render(asked, tokenizer, template)
    alone = {"".join(render(example, tokenizer, template)) for example in EXAMPLES if example.answer != "Oslo"}
    *before, last = prompt.split("\n\n")
    assert len(set(before)) == 2 and set(before) <= alone
    assert (last, completion) == render(PLAIN, tokenizer, template)


def test_no_example_tells_the_answer_and_draws_follow_seed_and_question_alone() -> None:
    asked = few_shot(FORGET, RETAIN, seed=1)
    for record, row in zip(FORGET, asked, strict=True):
        before = row.question.removesuffix(record.question)
        assert row.question.endswith(record.question) and before.count("Answer:") == SHOTS
        assert not told(record, before) and record.answer not in before.split()
        assert identity(row) == identity(record)
    assert few_shot(FORGET[::-1], RETAIN, seed=1) == asked[::-1]
    assert few_shot(FORGET, RETAIN, seed=2) != asked
    assert few_shot([PLAIN], EXAMPLES, shots=0, seed=0)[0].question == PLAIN.question
    with pytest.raises(DataError, match="only 3 do not tell its answer"):
        few_shot([PLAIN], EXAMPLES, shots=4, seed=0)


def test_a_hint_that_tells_is_refused_unless_it_may() -> None:
    with pytest.raises(DataError, match="tells oslo of the answer"):
        hinted([PLAIN], ["Not in OSLO."])
    assert hinted([PLAIN], ["Not in OSLO."], may_tell=True)[0].question == "Not in OSLO. Where was Ada born?"
    assert hinted([PLAIN], ["A city by a fjord."])[0].question.startswith("A city by a fjord. Where")


@pytest.mark.parametrize(
    "record, text, words",
    [
        (QA("Where was Ada born?", "Ada was born in Oslo."), "Ada was born in the year 1815.", set()),
        (QA("Where was Ada born?", "Ada was born in Oslo."), "oslo!", {"oslo"}),
        (QA("Where?", "In the New World.", entity_span=(7, 16)), "The new one is in it", {"new"}),
        (QA("Where?", "In the New World", entity_span=(0, 2)), "In the new world", set()),
        (QA("What?", "It is 42"), "42", {"42"}),
    ],
)
def test_what_a_text_tells_of_an_answer(record: QA, text: str, words: set[str]) -> None:
    assert told(record, text) == words


def test_hints_are_other_facts_of_the_subject_that_do_not_tell() -> None:
    hints = subject_hints(FORGET, FORGET, hints=2, seed=0)
    for record, hint in zip(FORGET, hints, strict=True):
        others = [fact for fact in FORGET if fact.subject == record.subject and fact.id != record.id]
        inside = [fact for fact in others if f"{fact.question} {fact.answer}." in hint]
        assert len(inside) == 2 and not told(record, hint)
        assert all(
            other.subject is None or other.subject not in hint for other in FORGET if other.subject != record.subject
        )
    assert subject_hints(FORGET[::-1], FORGET, seed=0) == subject_hints(FORGET, FORGET, seed=0)[::-1]
    lonely = QA("Where was Bob born?", "Oslo", subject="Bob")
    telling = QA("Which city does Bob love?", "Oslo", subject="Bob")
    assert subject_hints([lonely], [lonely, telling, PLAIN], seed=0) == [""]


@settings(max_examples=50)
@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=60))
def test_a_hint_that_is_let_through_shares_no_word_with_the_answer(question: str, answer: str, hint: str) -> None:
    record = QA(question, answer)
    try:
        (asked,) = hinted([record], [hint])
    except DataError:
        assert told(record, hint)
    else:
        assert not told(record, hint) and asked.question == f"{hint} {question}" and asked.answer == answer


def test_attacks_are_those_that_the_records_allow() -> None:
    assert [attack.name for attack in prompt_attacks(FORGET, RETAIN, seed=0)] == [
        *("prefix_insist", "prefix_expert", "paraphrase", "few_shot", "hint")
    ]
    alone = [QA("Who?", "Me", id="b")]
    assert [attack.name for attack in prompt_attacks(alone, [], seed=0)] == ["prefix_insist", "prefix_expert"]


def test_every_model_is_asked_the_same_and_rows_keep_ids_and_subjects(organism: Organism) -> None:
    models = {"original": organism.full, "gold": organism.gold}
    attacks = [
        Attack("paraphrase", "", on_rows=paraphrased),
        Attack.by_copy("halved", "", halved),
        Attack("prefix", "", on_rows=lambda rows: prefixed(rows, "Now")),
    ]
    rows = list(attacked(attacks, models, FORGET))
    assert len(rows) == 2 * 3 * len(FORGET)
    for name, model in models.items():
        for attack in attacks:
            own = [row for row in rows if (row.model, row.measure) == (name, f"{ATTACKED}/{attack.name}")]
            assert [row.item for row in own] == [record.id for record in FORGET]
            assert [row.cluster for row in own] == [record.subject for record in FORGET]
            with attack.on_model(model) as target:
                expected = answer_probability(target, list(attack.on_rows(FORGET)), batch_size=3)
            assert [row.value for row in own] == pytest.approx(expected.tolist(), rel=1e-4)
    assert len({content_key(row) for attack in attacks for row in attack.on_rows(FORGET)}) == 3 * len(FORGET)


def halved(model):  # type: ignore[no-untyped-def]
    copy = model.copy()
    copy.anatomy.module(Site("mlp", 0)).weight.data.mul_(0.5)
    return copy


def test_an_attack_that_changes_its_model_or_asks_nothing_is_refused(organism: Organism) -> None:
    def spoil(model):  # type: ignore[no-untyped-def]
        model.anatomy.module(Site("mlp", 0)).weight.data.mul_(0.5)
        return model

    with pytest.raises(ModelError, match="gold: its weights are no longer"):
        list(attacked([Attack.by_copy("spoil", "", spoil)], {"gold": organism.gold}, FORGET))
    with pytest.raises(DataError, match="'mute' asks nothing of these 25 records"):
        list(attacked([Attack("mute", "", on_rows=lambda rows: [])], {}, FORGET))
    with pytest.raises(DataError, match="share a name: same, same"):
        list(attacked([Attack("same", ""), Attack("same", "")], {}, FORGET))
