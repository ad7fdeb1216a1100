from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.records import QA
from palimpsest.errors import DataError
from palimpsest.metrics.tofu_log import Kind, read_tofu_log
from palimpsest.metrics.truth_ratio import (
    TruthRatio,
    forget_truth_ratio,
    truth_ratio,
    truth_ratio_definition,
    truth_ratio_of,
    utility_truth_ratio,
)
from palimpsest.models.language_model import LanguageModel

Reference = Callable[[LanguageModel, Encoded], np.ndarray]


def probabilities(model: LanguageModel, reference: Reference, question: str, answers: list[str]) -> np.ndarray:
    """Each answer's probability to the power of one over its length, the TOFU paper's way."""
    found = []
    for row in encode([QA(question, answer) for answer in answers], model.tokenizer):
        targets = np.array(row.ids[row.start : row.stop])
        product = np.exp(reference(model, row)[np.arange(len(targets)), targets]).prod()
        found.append(product ** (1 / len(targets)))
    return np.array(found)


def test_every_definition_is_its_formula_on_the_full_logits(
    model: LanguageModel, records: list[QA], reference: Reference
) -> None:
    found = {
        definition: truth_ratio(model, records, definition=definition, batch_size=5)
        for definition in get_args(TruthRatio)
    }
    for place, record in enumerate(records):
        right = probabilities(model, reference, record.question, [str(record.paraphrased_answer)])[0]
        wrong = probabilities(model, reference, record.question, list(record.wrong))
        together = wrong.prod() ** (1 / len(wrong))
        assert found["tofu_paper"][place].item() == pytest.approx(wrong.mean() / right, rel=1e-4)
        assert found["geometric"][place].item() == pytest.approx(together / right, rel=1e-4)
        assert found["tofu_aggregate"][place].item() == pytest.approx(right / together, rel=1e-4)
        assert found["open_unlearning"][place].item() == pytest.approx(together / (right + 1e-10), rel=1e-4)
        assert found["open_unlearning_paper"][place].item() == pytest.approx(right / (right + together), rel=1e-4)
    assert not torch.allclose(found["tofu_paper"], found["geometric"])


def test_what_the_answers_of_a_question_share_is_read_once(model: LanguageModel, records: list[QA]) -> None:
    record = records[0]
    told = [QA(record.question, str(answer)) for answer in (record.paraphrased_answer, *record.wrong)]
    rows = encode(told, model.tokenizer)
    beginnings = {row.ids[:length] for row in rows for length in range(1, row.stop)}
    read: list[int] = []
    handle = model.network.get_input_embeddings().register_forward_pre_hook(lambda _, ids: read.append(ids[0].numel()))
    truth_ratio(model, [record])
    handle.remove()
    assert read == [len(beginnings)] and len(beginnings) < sum(row.stop - 1 for row in rows)


@given(batch_size=st.integers(1, 60), order=st.permutations(range(11)))
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neither_batch_size_nor_order_changes_a_ratio(
    model: LanguageModel, records: list[QA], batch_size: int, order: list[int]
) -> None:
    found = truth_ratio(model, [records[place] for place in order], batch_size=batch_size)
    torch.testing.assert_close(found, truth_ratio(model, records)[order], rtol=1e-5, atol=0)


def test_without_a_paraphrase_the_answer_stands_in_and_the_name_says_so(
    model: LanguageModel, records: list[QA]
) -> None:
    bare = [replace(record, paraphrased_answer=None) for record in records]
    named = [replace(record, paraphrased_answer=record.answer) for record in records]
    assert torch.equal(truth_ratio(model, bare), truth_ratio(model, named))
    assert truth_ratio_definition(records) == "truth_ratio@tofu_paper"
    assert truth_ratio_definition([records[0], bare[1]], "geometric") == "truth_ratio@geometric+answer"


def test_no_wrong_answers_is_one_line_that_names_the_record(model: LanguageModel, records: list[QA]) -> None:
    with pytest.raises(DataError, match=r"'3'.*'wrong' is empty"):
        truth_ratio(model, [*records[:3], replace(records[3], wrong=())])


def test_a_model_that_finds_everything_improbable_still_has_a_ratio() -> None:
    assert truth_ratio_of(900.0, [901.0, 901.0]) == pytest.approx(np.exp(-1))
    assert truth_ratio_of(900.0, [900.0, 905.0]) == pytest.approx((1 + np.exp(-5)) / 2)


def test_where_nothing_is_probable_open_unlearnings_ratio_is_that_of_a_model_that_knows() -> None:
    assert truth_ratio_of(900.0, [900.0], "geometric") == 1
    assert truth_ratio_of(900.0, [900.0], "open_unlearning") == 0
    assert truth_ratio_of(1.0, [1.0], "open_unlearning") == pytest.approx(1, abs=1e-9)


def test_one_definition_is_anothers_inverse_and_reads_the_same_on_the_forget_set() -> None:
    ratio, inverse = (truth_ratio_of(0.7, [1.9, 0.2], kind) for kind in ("geometric", "tofu_aggregate"))  # type: ignore[arg-type]
    assert ratio * inverse == pytest.approx(1) and ratio != inverse
    one, other = (forget_truth_ratio(torch.tensor([value])).item() for value in (ratio, inverse))
    assert one == pytest.approx(other)


def test_aggregations_read_a_ratio_and_its_inverse_alike_on_the_forget_set_only() -> None:
    ratios = torch.tensor([0.0, 0.25, 1.0, 4.0], dtype=torch.float64)
    assert forget_truth_ratio(ratios).tolist() == [0.0, 0.25, 1.0, 0.25]
    assert utility_truth_ratio(ratios).tolist() == [1.0, 0.75, 0.0, 0.0]


@pytest.mark.parametrize(
    ("definition", "kind", "of", "mean"),
    [
        ("tofu_paper", "arith", lambda ratio: ratio, 0.679652),
        ("geometric", "geo", lambda ratio: ratio, 0.674019),
        ("tofu_aggregate", "geo", lambda ratio: 1 / ratio, 0.674019),
        ("open_unlearning", "geo", lambda ratio: ratio, 0.674019),
        ("open_unlearning_paper", "geo", lambda ratio: 1 / (1 + ratio), None),
    ],
)
def test_items_agree_with_the_tofu_authors_logs(
    tofu_logs: Path,
    definition: TruthRatio,
    kind: Kind,
    of: Callable[[np.ndarray], np.ndarray],
    mean: float | None,
) -> None:
    log = read_tofu_log(tofu_logs / "ft_epoch5_lr1e-05_llama2-7b_retain90_wd0.01.json")["eval_log_forget.json"]
    ratios = [
        truth_ratio_of(float(right), wrong.tolist(), definition)
        for right, wrong in zip(log.paraphrase_loss, log.wrong_loss, strict=True)
    ]
    assert ratios == pytest.approx(of(log.truth_ratio(kind)), rel=1e-6)
    if mean is not None:
        assert forget_truth_ratio(torch.tensor(ratios)).mean().item() == pytest.approx(mean, abs=1e-5)
