"""How records become prompt and completion."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from palimpsest.data.prompts import Template, render
from palimpsest.data.records import QA, Choice, Passage, Preference
from palimpsest.errors import DataError

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")))
chatty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")))
chatty.chat_template = CHAT
question = QA("Where is Ann?", "At sea.", paraphrases=("Ann is where?",), wrong=("At home.",))


@pytest.mark.parametrize(
    ("template", "prompt", "completion"),
    [
        ("plain", "Question: Where is Ann?\nAnswer:", " At sea."),
        ("raw", "Where is Ann?", " At sea."),
        ("chat", "<user>Where is Ann?</><assistant>", "At sea."),
    ],
)
def test_a_question_in_every_template(template: Template, prompt: str, completion: str) -> None:
    assert render(question, chatty, template) == (prompt, completion)


def test_a_preference_gives_its_chosen_completion() -> None:
    assert render(Preference("Hi", "Hello!", "Go away."), tokenizer, "raw") == ("Hi", " Hello!")


@pytest.mark.parametrize("template", ["plain", "raw", "chat"])
def test_a_passage_has_no_prompt(template: Template) -> None:
    assert render(Passage("Once upon a time."), tokenizer, template) == ("", "Once upon a time.")


@pytest.mark.parametrize("ends", ["Ann lives in ", "Ann lives in\n", ""])
def test_raw_adds_no_second_space(ends: str) -> None:
    assert render(QA(ends, "Rome"), tokenizer, "raw") == (ends, "Rome")


def test_raw_adds_one_space_after_a_word() -> None:
    assert render(QA("Ann lives in", "Rome"), tokenizer, "raw") == ("Ann lives in", " Rome")


@settings(deadline=None, max_examples=50)
@given(asked=st.text(max_size=20), answer=st.text(min_size=1, max_size=20))
def test_the_answer_ends_the_text_and_nothing_of_it_is_in_the_prompt(asked: str, answer: str) -> None:
    for template in ("plain", "raw", "chat"):
        prompt, completion = render(QA(asked, answer), chatty, template)
        assert completion in (answer, f" {answer}")
        assert prompt == render(QA(asked, "another"), chatty, template)[0]


def test_a_multiple_choice_has_no_single_completion() -> None:
    with pytest.raises(DataError, match="record 'c7': a Choice has no single completion"):
        render(Choice("q", ("a", "b"), 0, id="c7"), tokenizer)


def test_chat_needs_a_chat_template() -> None:
    with pytest.raises(DataError, match="no chat template; use template 'plain'"):
        render(question, tokenizer, "chat")


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(DataError, match="template 'alpaca' is unknown; choose plain, chat or raw"):
        render(question, tokenizer, "alpaca")  # type: ignore[arg-type]
