import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data.batches import Batch, Encoded, batches, encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, Choice
from palimpsest.errors import DataError
from palimpsest.metrics import likelihood
from palimpsest.metrics.generation import generate_answers
from palimpsest.metrics.likelihood import (
    AnswerScores,
    _right_to_the_end,
    answer_nll,
    answer_probability,
    answer_scores,
)
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import Predictions

Reference = Callable[[LanguageModel, Encoded], np.ndarray]


def strength(right: np.ndarray) -> float:
    """1 - k / L with the smallest k from 0 to L such that everything from k on is right."""
    return 1 - next(k for k in range(len(right) + 1) if right[k:].all()) / len(right)


def strength_open_unlearning(right: np.ndarray) -> float:
    """OpenUnlearning's loop, which leaves k at L - 1 where it finds nothing."""
    k = 0
    for k in range(len(right)):
        if right[k:].all():
            break
    return 1 - k / len(right)


@pytest.mark.parametrize("template", ["plain", "raw"])
def test_every_score_is_its_formula_on_the_full_logits(
    model: LanguageModel, records: list[QA], reference: Reference, template: Template
) -> None:
    found = answer_scores(model, records, template=template, batch_size=4)
    some_right = False
    for place, row in enumerate(encode(records, model.tokenizer, template=template)):
        logprobs, targets = reference(model, row), np.array(row.ids[row.start : row.stop])
        chosen = logprobs[np.arange(len(targets)), targets]
        right = logprobs.argmax(-1) == targets
        some_right |= bool(right.any())
        assert found.nll[place].item() == pytest.approx(-chosen.mean(), rel=1e-5)
        assert found.probability[place].item() == pytest.approx(np.exp(chosen.mean()), rel=1e-4)
        assert found.exact_memorization[place].item() == pytest.approx(right.mean())
        assert found.teacher_forced_exact_match[place].item() == float(right.all())
        assert found.extraction_strength[place].item() == pytest.approx(strength(right))
        assert found.extraction_strength_open_unlearning[place].item() == pytest.approx(strength_open_unlearning(right))
        assert found.tokens[place] == len(targets)
    assert found.nll.shape == (len(records),) and found.nll.dtype == torch.float32
    assert some_right or template == "raw"


def test_targets_are_the_answers_words_alone(model: LanguageModel, records: list[QA]) -> None:
    encoded = encode(records, model.tokenizer)
    assert [row.n_targets for row in encoded] == [len(record.answer.split()) for record in records]


@given(st.integers(1, 12), st.permutations(range(11)), st.sampled_from(["left", "right"]))
@settings(deadline=None, max_examples=12)
def test_neither_batch_size_nor_order_nor_padding_changes_a_score(
    model: LanguageModel, records: list[QA], batch_size: int, order: list[int], side: str
) -> None:
    def padded(encoded: list[Encoded], *, batch_size: int) -> list[Batch]:
        return list(batches(encoded, batch_size=batch_size, side=side))  # type: ignore[arg-type]

    one = answer_scores(model, records, batch_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "batches", padded)
        many = answer_scores(model, [records[place] for place in order], batch_size=batch_size)
    torch.testing.assert_close(many.nll, one.nll[order], rtol=1e-5, atol=1e-5)
    assert torch.equal(many.exact_memorization, one.exact_memorization[order])
    assert torch.equal(many.extraction_strength, one.extraction_strength[order])


def test_what_the_model_says_itself_is_matched_exactly(model: LanguageModel, records: list[QA]) -> None:
    said = generate_answers(model, records, max_new_tokens=4)
    own = [QA(record.question, answer) for record, answer in zip(records, said, strict=True) if answer]
    kept = [record for record in own if re.fullmatch(r"w\d+( w\d+)*", record.answer)]
    assert len(kept) >= 3, "the tiny model should answer in words"
    found = answer_scores(model, kept)
    assert found.teacher_forced_exact_match.tolist() == [1.0] * len(kept)
    assert found.exact_memorization.tolist() == [1.0] * len(kept)
    wrong_end = [QA(record.question, f"{record.answer} w0 w1 w2") for record in kept]
    spoilt = answer_scores(model, wrong_end)
    assert 0 < spoilt.exact_memorization.min() and spoilt.teacher_forced_exact_match.sum() == 0
    assert found.extraction_strength.tolist() == [1.0] * len(kept)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_extraction_strength_of_any_pattern_of_right_and_wrong(rows: list[list[bool]]) -> None:
    right = torch.tensor([float(token) for row in rows for token in row])
    row = torch.tensor([line for line, tokens in enumerate(rows) for _ in tokens])
    told = _right_to_the_end(Predictions(torch.empty(0), torch.empty(0), row), right, len(rows))
    for found, tokens in zip(told.tolist(), rows, strict=True):
        assert found / len(tokens) == pytest.approx(strength(np.array(tokens)))


def test_a_wrong_last_token_has_no_strength_and_once_had_that_of_a_right_one() -> None:
    """The floor of OpenUnlearning's definition: nothing right, and the last token right, both score 1 / L."""
    for right, ours, theirs in (([0, 0, 0, 0], 0, 0.25), ([1, 1, 1, 0], 0, 0.25), ([0, 0, 0, 1], 0.25, 0.25)):
        pattern = np.array(right, dtype=bool)
        assert (strength(pattern), strength_open_unlearning(pattern)) == (ours, theirs)
        scores = AnswerScores(*torch.zeros(3, 1), torch.tensor([float(ours)]), torch.tensor([4.0]))
        assert scores.extraction_strength_open_unlearning.item() == theirs


def test_the_single_scores_are_those_of_the_single_pass(model: LanguageModel, records: list[QA]) -> None:
    found = answer_scores(model, records)
    torch.testing.assert_close(answer_nll(model, records), found.nll)
    torch.testing.assert_close(answer_probability(model, records), found.probability)


def test_no_records_give_no_scores_and_a_record_without_an_answer_is_one_line(model: LanguageModel) -> None:
    assert answer_scores(model, []).nll.shape == (0,)
    with pytest.raises(DataError, match="'7'"):
        answer_scores(model, [Choice("w1", ("w2", "w3"), 0, id="7")])
