"""TOFU's own metrics on a live model, against its published aggregation fed with plain forward passes."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.records import QA
from palimpsest.errors import DataError
from palimpsest.metrics import tofu_log
from palimpsest.metrics.generation import generate_answers
from palimpsest.metrics.tofu import (
    TofuSets,
    UtilityRatio,
    UtilityScores,
    model_utility,
    model_utility_definition,
    utility_scores,
)
from palimpsest.metrics.tofu_log import GENERAL, RETAIN, SubLog
from palimpsest.models.language_model import LanguageModel

Reference = Callable[[LanguageModel, Encoded], np.ndarray]


@pytest.fixture(scope="module")
def asked(records: list[QA], model: LanguageModel) -> list[QA]:
    """Two wrong answers each; the first three are answered as the model itself does, so that something is recalled."""
    said = generate_answers(model, records, max_new_tokens=3)
    known = [replace(record, answer=answer) for record, answer in zip(records[:3], said, strict=False)]
    return [replace(record, wrong=record.wrong[:2]) for record in (*known, *records[3:])]


def losses(model: LanguageModel, reference: Reference, question: str, answers: tuple[str, ...]) -> np.ndarray:
    """Each answer's mean loss per token, float64, from one unpadded row through the full logits."""
    found = []
    for row in encode([QA(question, answer) for answer in answers], model.tokenizer):
        targets = np.array(row.ids[row.start : row.stop])
        found.append(-reference(model, row)[np.arange(len(targets)), targets].mean())
    return np.array(found)


def recall(said: str, truth: str) -> float:
    """ROUGE-L recall of words without endings: the longest common subsequence over the truth's length."""
    one, other = said.split(), truth.split()
    longest = np.zeros((len(one) + 1, len(other) + 1))
    for i, word in enumerate(one):
        for j, true in enumerate(other):
            longest[i + 1, j + 1] = longest[i, j] + 1 if word == true else max(longest[i, j + 1], longest[i + 1, j])
    return float(longest[-1, -1] / len(other))


def sub_log(model: LanguageModel, reference: Reference, records: list[QA]) -> SubLog:
    """What TOFU's evaluation would have logged."""
    said = generate_answers(model, records, max_new_tokens=3)

    def loss(answers: Callable[[QA], tuple[str, ...]]) -> np.ndarray:
        return np.array([losses(model, reference, record.question, answers(record)) for record in records])

    return SubLog(
        questions=tuple(record.id for record in records),
        prompts=(),
        loss=loss(lambda record: (record.answer,))[:, 0],
        paraphrase_loss=loss(lambda record: (record.paraphrased_answer or record.answer,))[:, 0],
        wrong_loss=loss(lambda record: record.wrong),
        rouge=np.array([recall(answer, record.answer) for answer, record in zip(said, records, strict=True)]),
    )


@pytest.mark.parametrize(("definition", "kind"), [("tofu_paper", "arith"), ("geometric", "geo")])
def test_model_utility_is_that_of_the_authors_aggregation(
    model: LanguageModel, asked: list[QA], reference: Reference, definition: UtilityRatio, kind: tofu_log.Kind
) -> None:
    bare = [replace(record, paraphrased_answer=None) for record in asked]
    sets = {RETAIN: asked, GENERAL[0]: bare[:6], GENERAL[1]: bare[2:]}
    log = {name: sub_log(model, reference, records) for name, records in sets.items()}
    scores = [
        utility_scores(model, records, offered=name != RETAIN, definition=definition, max_new_tokens=3, batch_size=4)
        for name, records in sets.items()
    ]
    expected = tofu_log.model_utility(log, kind)
    assert expected > 0.05 and tofu_log.model_utility(log, "arith") != tofu_log.model_utility(log, "geo")
    assert model_utility(scores) == pytest.approx(expected, rel=1e-5)
    assert model_utility_definition(definition) == f"model_utility@{definition}"


def test_every_reading_is_its_formula(model: LanguageModel, asked: list[QA], reference: Reference) -> None:
    plain, shared = (utility_scores(model, asked, offered=offered, max_new_tokens=3) for offered in (False, True))
    for place, record in enumerate(asked):
        right, worded, *wrong = np.exp(
            -losses(model, reference, record.question, (record.answer, str(record.paraphrased_answer), *record.wrong))
        )
        assert plain.probability[place].item() == pytest.approx(right, rel=1e-4)
        assert shared.probability[place].item() == pytest.approx(right / (right + sum(wrong)), rel=1e-4)
        truth = max(0.0, 1 - np.mean(wrong) / worded)
        assert plain.truth_ratio[place].item() == pytest.approx(truth, rel=1e-3, abs=1e-5)
    assert torch.equal(plain.truth_ratio, shared.truth_ratio)
    assert torch.equal(plain.rougeL_recall, shared.rougeL_recall) and plain.rougeL_recall[:3].tolist() == [1, 1, 1]


def test_one_reading_of_nothing_ruins_the_utility() -> None:
    half = UtilityScores(*(torch.full((4,), 0.5),) * 3)
    assert model_utility([half, half, half]) == pytest.approx(0.5)
    assert model_utility([half, half, replace(half, rougeL_recall=torch.zeros(4))]) == 0
    # A harmonic mean by hand: 3 / (1 / 0.5 + 1 / 0.25 + 1 / 1).
    mixed = UtilityScores(torch.tensor([0.25, 0.75]), torch.tensor([0.25]), torch.tensor([1.0]))
    assert model_utility([mixed]) == pytest.approx(3 / 7)


def test_batch_size_changes_no_reading(model: LanguageModel, asked: list[QA]) -> None:
    one, many = (utility_scores(model, asked, offered=True, batch_size=size, max_new_tokens=1) for size in (1, 64))
    torch.testing.assert_close(one.probability, many.probability, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.truth_ratio, many.truth_ratio, rtol=1e-4, atol=1e-5)


def test_a_question_without_wrong_answers_is_refused_before_any_work(asked: list[QA]) -> None:
    rows = tuple(asked)
    bare = (*rows[1:], replace(rows[0], wrong=(), id="bare"))
    for sets in ((bare, rows, rows), (rows, bare, rows), (rows, rows, bare)):
        with pytest.raises(DataError, match="record 'bare': TOFU's utility needs wrong answers"):
            TofuSets(*sets)
    TofuSets(rows, rows, rows)
