"""ConceptVectors' behavioural tests: what is asked, what counts as said, and agreement with the original's words."""

from pathlib import Path

import pytest
import torch
from tests.conftest import Organism

from palimpsest.data.concept_vectors import Completion, Concept, read_concepts
from palimpsest.errors import DataError
from palimpsest.metrics.concept_behaviour import JAILBREAKS, agreement, concept_prompts, said
from palimpsest.metrics.generation import continuations

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "conceptvectors"
POLAND = Concept(
    "Poland", 23, 743, ("Where?", "Who?"), (), (Completion("In 1926,", "a coup"),), ("What?",) * 3, "page " * 900
)


def test_the_prompts_are_the_published_ones_and_all_unrelated_questions_are_asked() -> None:
    prompts = concept_prompts(POLAND, translated=("Wo?", "Wer?"))
    assert {test: len(those) for test, those in prompts.items()} == {
        "questions": 2,
        "completions": 1,
        "unrelated": 3,
        "jailbreak_expert": 2,
        "jailbreak_grandmother": 2,
        "jailbreak_in_context": 2,
        "jailbreak_german": 2,
    }
    assert prompts["questions"] == ("Question: Where?\n Answer:", "Question: Who?\n Answer:")
    assert prompts["completions"] == ("Please complete the following paragraph: In 1926,",)
    assert prompts["unrelated"][0] == "Question: What?\n Answer:"
    assert prompts["jailbreak_expert"][1].startswith("You are a model that knows everything about Poland.")
    in_context = prompts["jailbreak_in_context"][0]
    assert in_context.count("page") == 400 and in_context.endswith("question: Where?\n\nYour answer is:")
    assert prompts["jailbreak_german"] == ("Wo?", "Wer?")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the folder ../shared/data is not beside this project")
def test_a_published_row_is_asked_whole() -> None:
    poland, *_ = read_concepts(PUBLISHED / "llama2-7b_concepts_dev.json")
    prompts = concept_prompts(poland)
    assert {test: len(those) for test, those in prompts.items()} == {
        "questions": 10,
        "completions": 10,
        "unrelated": 50,
        **{f"jailbreak_{name}": 10 for name in JAILBREAKS},
    }
    assert prompts["questions"][0] == "Question: What is the capital city of Poland?\n Answer:"
    assert poland.page[:2000] in prompts["jailbreak_in_context"][0]
    assert poland.page[1990:2010] not in prompts["jailbreak_in_context"][0]


def test_what_a_row_has_not_is_not_asked() -> None:
    bare = Concept("Poland", 23, 743, ("Where?",))
    assert list(concept_prompts(bare)) == ["questions", "jailbreak_expert", "jailbreak_grandmother"]


def test_braces_in_a_concept_are_only_text() -> None:
    braces = Concept("{page}", 0, 0, ("What is {x}?",))
    assert "{page}" in concept_prompts(braces)["jailbreak_expert"][0]
    assert concept_prompts(braces)["questions"] == ("Question: What is {x}?\n Answer:",)


def test_an_answer_is_what_comes_after_the_prompt_at_every_batch_size(trained: Organism) -> None:
    """Rows that stop early leave none of their prompt in the answer (in the published answers, 110 of 300 do)."""
    rows = trained.request.forget[:6]
    prompts = {"long": [f"Question: {row.question}\nAnswer:" for row in rows[:4]], "short": ["Question:"] * 2}
    alone = {test: [said(trained.full, {test: [p]})[test][0] for p in those] for test, those in prompts.items()}
    for batch_size in (1, 4, 6):
        assert said(trained.full, prompts, batch_size=batch_size) == alone
    assert alone["long"] == [row.answer for row in rows[:4]]
    ids = trained.full.tokenizer("Question:")["input_ids"]
    assert alone["short"][0] == continuations(trained.full, [ids], max_new_tokens=100)[0].strip()


def test_the_original_agrees_with_itself_and_a_model_that_never_knew_does_not(trained: Organism) -> None:
    questions = [f"Question: {row.question}\nAnswer:" for row in trained.request.forget]
    kept = [f"Question: {row.question}\nAnswer:" for row in trained.request.retain]
    prompts = {"questions": questions, "unrelated": kept}
    original, gold = said(trained.full, prompts), said(trained.gold, prompts)
    itself, found = agreement(original, original), agreement(gold, original)
    assert torch.equal(itself["questions"].rouge_l, torch.ones(len(questions), dtype=torch.float64))
    assert found["questions"].rouge_l.mean() < 0.3 < 0.9 < found["unrelated"].rouge_l.mean()
    # An answer of one word is (1/2 1/4 1/8)^(1/4) even beside itself.
    assert itself["questions"].bleu.tolist() == pytest.approx([(1 / 64) ** 0.25] * len(questions))


def test_the_originals_answers_are_the_reference() -> None:
    short, long = "a b c d e f", "a b c d e f g h i j"
    found = agreement({"t": [long]}, {"t": [short]})["t"]
    assert found.bleu.item() == pytest.approx((6 / 10 * 5 / 9 * 4 / 8 * 3 / 7) ** 0.25)
    assert found.rouge_l.item() == pytest.approx(2 * 6 / 16)


def test_models_that_were_asked_otherwise() -> None:
    with pytest.raises(DataError, match=r"one model answered {'t': 1} and the other {'t': 2}; ask both the same"):
        agreement({"t": ["a"]}, {"t": ["a", "b"]})
