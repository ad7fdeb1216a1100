"""Truth ratio: does the model still prefer the truth, in words it was not trained on, to plausible lies?

P(a) is an answer's probability per token, exp(-mean NLL). The right answer is the QA's `paraphrased_answer`; a QA
without one is measured by its `answer`, the wording that was trained on, and the definition's name then ends in
`+answer`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from palimpsest.data.prompts import Template
from palimpsest.data.records import QA
from palimpsest.errors import DataError
from palimpsest.metrics.likelihood import answer_nll
from palimpsest.models.language_model import LanguageModel

TruthRatio = Literal["tofu_paper", "geometric", "tofu_aggregate", "open_unlearning", "open_unlearning_paper"]
"""- `tofu_paper`: arithmetic mean of P(wrong) / P(right) (TOFU, Maini et al. 2024, §2.2.1, and its `utils.py`).
- `geometric`: exp(mean of log P(wrong)) / P(right).
- `tofu_aggregate`: its inverse, P(right) / exp(mean of log P(wrong)) (TOFU's `aggregate_eval_stat.py`).
- `open_unlearning`: exp(mean of log P(wrong)) / (P(right) + 1e-10) (OpenUnlearning's default). Where a model finds the
  truth all but impossible, it goes to 0, as for a model that is sure of it, and `geometric` does not.
- `open_unlearning_paper`: P(right) / (P(right) + geometric mean of P(wrong)), from 0 to 1 (Dorna et al. 2025).

`tofu_paper`, `geometric` and `open_unlearning` are 0 when only the truth is likely and 1 when lies are as likely.
`tofu_aggregate` runs the other way, from infinity through 1, and `open_unlearning_paper` from 1 through 1/2."""


def truth_ratio(
    model: LanguageModel,
    records: Sequence[QA],
    *,
    definition: TruthRatio = "tofu_paper",
    template: Template = "plain",
    batch_size: int = 64,
) -> Tensor:
    """[n] the truth ratio of each record, float64 on the CPU.

    Args:
        model: the model to score with.
        records: n questions, each with at least one wrong answer.
        definition: which truth ratio.
        template: how question and answer are joined.
        batch_size: rows at a time; it never changes a score.

    Raises:
        DataError: a record without wrong answers.
    """
    answers = []
    for record in records:
        if not record.wrong:
            raise DataError(f"record {record.id!r}: the truth ratio needs wrong answers, but field 'wrong' is empty")
        answers += [replace(record, answer=answer, id=record.id) for answer in (_right(record), *record.wrong)]
    nll = answer_nll(model, answers, template=template, batch_size=batch_size)
    per_record = nll.split([1 + len(record.wrong) for record in records])
    return torch.tensor(
        [truth_ratio_of(float(losses[0]), losses[1:].tolist(), definition) for losses in per_record],
        dtype=torch.float64,
    )


def truth_ratio_of(right_nll: float, wrong_nlls: Sequence[float], definition: TruthRatio = "tofu_paper") -> float:
    """The truth ratio of one item from its mean negative log-likelihoods, nats/token."""
    wrong = torch.tensor(wrong_nlls, dtype=torch.float64)
    match definition:
        case "tofu_paper":
            # In logarithms, so that improbable answers do not divide zero by zero.
            log_ratio = torch.logsumexp(-wrong, 0) - math.log(len(wrong_nlls)) + right_nll
            return float(torch.exp(log_ratio))
        case "geometric":
            return float(torch.exp(right_nll - wrong.mean()))
        case "tofu_aggregate":
            return float(torch.exp(wrong.mean() - right_nll))
        case "open_unlearning":
            return float(torch.exp(-wrong.mean()) / (math.exp(-right_nll) + 1e-10))
        case "open_unlearning_paper":
            return float(torch.sigmoid(wrong.mean() - right_nll))


def truth_ratio_definition(records: Sequence[QA], definition: TruthRatio = "tofu_paper") -> str:
    """The versioned name, e.g. `truth_ratio@tofu_paper`; `+answer` at its end when a record has no paraphrase."""
    fallback = "" if all(record.paraphrased_answer for record in records) else "+answer"
    return f"truth_ratio@{definition}{fallback}"


def forget_truth_ratio(ratios: Tensor) -> Tensor:
    """[n] min(R, 1 / R), TOFU's reading on the forget set: 1 when truth and lies are equally likely.

    For all but `open_unlearning_paper`; `geometric` and `tofu_aggregate` give the same. TOFU reports the mean.
    """
    return torch.minimum(ratios, 1 / ratios)


def utility_truth_ratio(ratios: Tensor) -> Tensor:
    """[n] max(0, 1 - R), TOFU's reading elsewhere: 1 when only the truth is likely.

    For `tofu_paper`, `geometric` and `open_unlearning`; TOFU reports the mean.
    """
    return (1 - ratios).clamp(min=0)


def _right(record: QA) -> str:
    return record.paraphrased_answer or record.answer
