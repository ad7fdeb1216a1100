"""Multiple choice: the prompt letter for letter, every log-likelihood against a plain forward pass of its own."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data.records import Choice
from palimpsest.errors import DataError
from palimpsest.metrics.multiple_choice import (
    ChoiceScores,
    choice_prompt,
    definition,
    most_common_choice,
    multiple_choice,
)
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import Architecture, new_model
from palimpsest.models.tokenizers import byte_pair_tokenizer, word_tokenizer

WORDS = [f"w{number}" for number in range(12)]
HEADER = "The following are multiple choice questions (with answers) about {}.\n\n"


def choices(n: int, *, most: int = 4) -> list[Choice]:
    """Questions of unlike lengths with two to `most` choices."""
    draw = random.Random(1)

    def words(k: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, k)))

    made = []
    for number in range(n):
        offered = tuple(words(3) for _ in range(draw.randint(2, most)))
        made.append(Choice(words(9) + "?", offered, draw.randrange(len(offered)), "high_school_biology", str(number)))
    return made


def model_of(kind: str) -> LanguageModel:
    """`words`: a letter is a token. `bytes`: a space and a letter. `mixed`: A is a token, all others are two."""
    if kind == "words":
        everything = (
            HEADER.format("high school biology") + " ".join(WORDS) + "? A B C D E F\nA. B. C. D. E. F.\nAnswer:"
        )
        tokenizer = word_tokenizer([everything])
    else:
        # Merges are learnt from what stands most: nothing, or a space with an A behind it.
        tokenizer = byte_pair_tokenizer([" A A A A A"] if kind == "mixed" else ["-"], vocab_size=258)
    model = new_model(Architecture(layers=2, width=16, mlp_width=24, heads=2, context=512), tokenizer, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def plain_logprob(model: LanguageModel, prompt: str, letter: str) -> float:
    """log p(" A" | prompt) by one forward pass over one row, in float64 numpy; nothing here is the library's."""
    start = len(model.tokenizer(prompt)["input_ids"])
    ids = model.tokenizer(f"{prompt} {letter}")["input_ids"]
    with torch.no_grad():
        logits = model.network(torch.tensor([ids])).logits[0].numpy().astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(sum(logprobs[place - 1, ids[place]] for place in range(start, len(ids))))


def test_the_prompt_is_lm_evals_letter_for_letter() -> None:
    choice = Choice("  Which is it? ", ("one", "two", "three", "four"), 2, "high_school_biology")
    assert choice_prompt(choice) == (
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        "Which is it?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )
    assert choice_prompt(replace(choice, subject=None)).startswith(
        "The following are multiple choice questions (with answers).\n\nWhich"
    )


def test_examples_of_the_subject_stand_before_the_question_with_their_letters() -> None:
    choice = Choice("Which?", ("one", "two"), 1, "anatomy")
    examples = [Choice(" What? ", ("three", "four"), 1, "anatomy"), Choice("Who?", ("five", "six"), 0, "anatomy")]
    assert choice_prompt(choice, examples) == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "What?\nA. three\nB. four\nAnswer: B\n\nWho?\nA. five\nB. six\nAnswer: A\n\nWhich?\nA. one\nB. two\nAnswer:"
    )
    assert [definition(0), definition(5)] == ["multiple_choice@lm_eval_wmdp", "multiple_choice@lm_eval_mmlu_5shot"]


def test_each_question_is_scored_after_its_own_subjects_examples() -> None:
    model = model_of("words")
    asked = [replace(choice, subject=f"w{place % 2}") for place, choice in enumerate(choices(6))]
    examples = [replace(choice, subject=f"w{place % 2}") for place, choice in enumerate(choices(4))]
    found = multiple_choice(model, asked, examples=examples)
    for place, choice in enumerate(asked):
        prompt = choice_prompt(choice, examples[place % 2 :: 2])
        logprobs = np.array([plain_logprob(model, prompt, letter) for letter in "ABCD"[: len(choice.choices)]])
        shares = np.exp(logprobs) / np.exp(logprobs).sum()
        assert found.probability[place].item() == pytest.approx(shares[choice.answer], rel=1e-4)
    assert not torch.allclose(found.probability, multiple_choice(model, asked).probability)
    with pytest.raises(DataError, match=r"^subject 'w1' has 1 examples, but 'w0' has 2; give each as many$"):
        multiple_choice(model, asked, examples=examples[:3])


def test_a_model_that_always_takes_one_letter_is_known_by_it() -> None:
    model = model_of("words")
    assert most_common_choice(multiple_choice(model, choices(9, most=6))) < 1
    with torch.no_grad():
        model.network.get_output_embeddings().weight.zero_()
    assert most_common_choice(multiple_choice(model, ASKED)) == 1
    chosen = torch.tensor([0, 2, 2, 1])
    assert most_common_choice(ChoiceScores(chosen, chosen, chosen)) == 0.5


@pytest.mark.parametrize(("kind", "tokens"), [("words", {1}), ("bytes", {2}), ("mixed", {1, 2})])
def test_every_score_is_that_of_plain_forward_passes(kind: str, tokens: set[int]) -> None:
    model, asked = model_of(kind), choices(9, most=6)
    assert {len(model.tokenizer(f" {letter}")["input_ids"]) for letter in "ABCDEF"} == tokens
    found = multiple_choice(model, asked, batch_size=4)
    assert found.correct.dtype == found.probability.dtype == torch.float32
    for place, choice in enumerate(asked):
        offered = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCDEF", choice.choices, strict=False))
        prompt = f"{HEADER.format('high school biology')}{choice.question}\n{offered}Answer:"
        logprobs = np.array([plain_logprob(model, prompt, letter) for letter in "ABCDEF"[: len(choice.choices)]])
        shares = np.exp(logprobs) / np.exp(logprobs).sum()
        assert found.chosen[place] == logprobs.argmax()
        assert found.correct[place] == float(logprobs.argmax() == choice.answer)
        assert found.probability[place].item() == pytest.approx(shares[choice.answer], rel=1e-4)
    assert 0 < found.correct.sum() < len(asked), "the toy should be right now and then"


TOY = model_of("mixed")
ASKED = choices(7)
ALONE = multiple_choice(TOY, ASKED, batch_size=1)


@given(st.integers(1, 40), st.permutations(range(7)))
@settings(deadline=None, max_examples=15)
def test_neither_batch_size_nor_order_changes_a_score(batch_size: int, order: list[int]) -> None:
    found = multiple_choice(TOY, [ASKED[place] for place in order], batch_size=batch_size)
    assert torch.equal(found.chosen, ALONE.chosen[order])
    torch.testing.assert_close(found.probability, ALONE.probability[order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["words", "mixed"])
def test_a_question_is_read_once_for_all_its_letters(kind: str) -> None:
    model, asked = model_of(kind), ASKED[:1]
    read: list[int] = []
    model.network.get_input_embeddings().register_forward_pre_hook(lambda _, ids: read.append(ids[0].numel()))
    multiple_choice(model, asked)
    prompt = len(model.tokenizer(choice_prompt(asked[0]))["input_ids"])
    assert read == [prompt + (kind == "mixed")]  # of a letter in two tokens, the first is read too


def test_of_equal_letters_the_first_is_chosen() -> None:
    model = model_of("words")
    with torch.no_grad():
        model.network.get_output_embeddings().weight.zero_()
    found = multiple_choice(model, ASKED)
    assert found.chosen.tolist() == [0] * len(ASKED)
    assert found.probability.tolist() == pytest.approx([1 / len(choice.choices) for choice in ASKED])


def test_more_choices_than_letters_are_refused() -> None:
    with pytest.raises(DataError, match="record 'many': 27 choices are more than the letters"):
        multiple_choice(TOY, [Choice("q", tuple(map(str, range(27))), 0, id="many")])
