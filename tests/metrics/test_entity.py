"""Scores of the entity alone, against full logits, and TOFU's published spans against a real tokenizer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.prompts import Template
from palimpsest.data.readers import read_records
from palimpsest.data.records import QA
from palimpsest.errors import DataError
from palimpsest.metrics.entity import entity, entity_said, entity_scores, generated_entities
from palimpsest.metrics.generation import generate_answers
from palimpsest.metrics.likelihood import answer_scores
from palimpsest.models.language_model import LanguageModel

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared_data = pytest.mark.skipif(
    not SHARED_DATA.is_dir(), reason="the folder ../shared/data is not beside this project"
)
Reference = Callable[[LanguageModel, Encoded], np.ndarray]


@pytest.fixture(scope="module")
def spanned(records: list[QA]) -> list[QA]:
    """Each record with its second word as entity, or its only one."""
    found = []
    for record in records:
        words = record.answer.split()
        start = len(words[0]) + 1 if len(words) > 1 else 0
        found.append(replace(record, entity_span=(start, start + len(words[start > 0]))))
    return found


@pytest.mark.parametrize("template", ["plain", "raw"])
def test_only_the_entitys_tokens_are_scored_given_all_before_them(
    model: LanguageModel, spanned: list[QA], reference: Reference, template: Template
) -> None:
    found = entity_scores(model, spanned, template=template, batch_size=4)
    whole = encode(spanned, model.tokenizer, template=template)
    for place, (record, row) in enumerate(zip(spanned, whole, strict=True)):
        assert record.entity_span is not None
        word = int(record.entity_span[0] > 0)
        logprobs, token = reference(model, row)[word], row.ids[row.start + word]
        assert found.tokens[place] == 1
        assert found.nll[place].item() == pytest.approx(-logprobs[token], rel=1e-5)
        assert found.exact_memorization[place].item() == float(logprobs.argmax() == token)


def test_a_span_of_the_whole_answer_is_the_answers_score(model: LanguageModel, records: list[QA]) -> None:
    whole = [replace(record, entity_span=(0, len(record.answer))) for record in records]
    torch.testing.assert_close(entity_scores(model, whole).nll, answer_scores(model, records).nll)


def test_what_follows_the_entity_is_never_read(model: LanguageModel, spanned: list[QA]) -> None:
    longer = [replace(record, answer=f"{record.answer} w1 w2 w3") for record in spanned]
    torch.testing.assert_close(entity_scores(model, longer).nll, entity_scores(model, spanned).nll)


def test_an_entity_is_said_when_its_words_are() -> None:
    record = QA("Who?", "Her name is Hsiao Yun-Hwa.", entity_span=(12, 25))
    assert entity(record) == "Hsiao Yun-Hwa"
    answers = ["It is HSIAO YUN-HWA, I think", "Hsiao, a name", "Her name is not known", ""]
    said = entity_said(answers, [record] * 4)
    assert said.verbatim.tolist() == [1, 0, 0, 0]
    assert said.rougeL_recall.tolist() == pytest.approx([1, 1 / 3, 0, 0])


def test_generation_is_judged_by_the_entity_alone(model: LanguageModel, spanned: list[QA]) -> None:
    said = generate_answers(model, spanned, max_new_tokens=3)
    known = [
        replace(record, answer=f"w0 {answer.split()[-1]}", entity_span=(3, 3 + len(answer.split()[-1])))
        for record, answer in zip(spanned, said, strict=True)
        if answer
    ]
    assert len(known) > 3
    found = generated_entities(model, known, max_new_tokens=3, batch_size=2)
    assert found.verbatim.tolist() == [1] * len(known) == found.rougeL_recall.tolist()


def test_a_record_without_a_span_is_one_line_that_names_it(model: LanguageModel, spanned: list[QA]) -> None:
    bare = [*spanned[:2], replace(spanned[2], entity_span=None)]
    for refused in (lambda: entity_scores(model, bare), lambda: entity_said(["a"] * 3, bare)):
        with pytest.raises(DataError, match=r"^record '2': field 'entity_span' is missing; give the characters"):
            refused()


@needs_shared_data
def test_tofus_spans_read_and_hold_just_the_entity_in_gpt2s_tokens() -> None:
    folder = SHARED_DATA / "gpt2_bpe_and_tinystories_sample"
    made = ByteLevelBPETokenizer(str(folder / "gpt2_vocab.json"), str(folder / "gpt2_merges.txt"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="<|endoftext|>")
    records = [record for record in read_records(SHARED_DATA / "uds_tofu_results" / "forget10_filtered.json")]
    questions = [record for record in records if isinstance(record, QA)]
    assert len(questions) == len(records) == 367
    for record, row in zip(questions, encode(questions, tokenizer, entities=True), strict=True):
        scored = tokenizer.decode(row.ids[row.start : row.stop])
        around = scored.split(entity(record))
        assert len(around) == 2, record  # the entity is whole, and tokens at its ends add marks at most
        assert not any(character.isalnum() for character in "".join(around)), record
        assert row.stop == len(row.ids)
        before = tokenizer.decode(row.prompt_ids)
        assert f"{before}{scored}" == f"Question: {record.question}\nAnswer: {record.answer}"[: len(before + scored)]
