"""TOFU's own metrics on a model that is at hand (Maini et al. 2024, arXiv 2401.06121, section 2.2).

Model Utility says how much of the rest is left, Forget Quality whether the model's truth ratios on the forget set could
be those of a model that never read it. `tofu_log` computes the same from the authors' logs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from scipy import stats
from torch import Tensor

from palimpsest.data.prompts import Template
from palimpsest.data.records import QA
from palimpsest.errors import DataError
from palimpsest.metrics.generation import generate_answers
from palimpsest.metrics.likelihood import answer_nll
from palimpsest.metrics.rouge import rouge
from palimpsest.metrics.truth_ratio import truth_ratio_of, utility_truth_ratio
from palimpsest.models.language_model import LanguageModel

UtilityRatio = Literal["tofu_paper", "geometric", "open_unlearning"]
"""The truth ratio in Model Utility: `tofu_paper` is that of the paper and TOFU's `utils.py`, `geometric` and
`open_unlearning` give what OpenUnlearning reports. On the authors' own models the first is lower by .04 (0.586 against
0.623 for full Llama-2-7B)."""


@dataclass(frozen=True)
class TofuSets:
    """The questions on which utility is measured.

    Raises:
        DataError: a question has no wrong answers.
    """

    retain: tuple[QA, ...]
    real_authors: tuple[QA, ...]
    world_facts: tuple[QA, ...]

    def __post_init__(self) -> None:
        for records in (self.retain, self.real_authors, self.world_facts):
            _refuse_without_wrong(records)


@dataclass(frozen=True, eq=False)
class UtilityScores:
    """Three readings of one set, each [n] on the CPU, from 0 to 1."""

    probability: Tensor
    """Of the answer per token, or its share of the probabilities of all answers offered."""
    rougeL_recall: Tensor
    """Of the greedy answer, with stemming."""
    truth_ratio: Tensor
    """max(0, 1 - R), R the truth ratio that was asked for."""


def utility_scores(
    model: LanguageModel,
    records: Sequence[QA],
    *,
    offered: bool,
    definition: UtilityRatio = "tofu_paper",
    template: Template = "plain",
    max_new_tokens: int = 48,
    batch_size: int = 64,
) -> UtilityScores:
    """What TOFU measures on a set other than the forget set.

    Args:
        model: the model to score with.
        records: n questions, each with wrong answers.
        offered: read a probability as the right answer's share of all answers offered, as TOFU does on real authors and
            world facts; otherwise as it is, as on retain rows.
        definition: which truth ratio.
        template: how question and answer are joined.
        max_new_tokens: the longest greedy answer, in tokens.
        batch_size: rows at a time; it never changes a score.

    Raises:
        DataError: a record without wrong answers.
    """
    probability, ratio = [], []
    for right, paraphrase, wrong in _nlls(model, records, template, batch_size):
        probability.append(torch.cat([-right[None], -wrong]).softmax(0)[0] if offered else torch.exp(-right))
        ratio.append(truth_ratio_of(float(paraphrase), wrong.tolist(), definition))
    said = generate_answers(model, records, template=template, max_new_tokens=max_new_tokens)
    return UtilityScores(
        torch.stack(probability),
        rouge(said, [record.answer for record in records]).rougeL_recall,
        utility_truth_ratio(torch.tensor(ratio, dtype=torch.float64)),
    )


def model_utility(sets: Sequence[UtilityScores]) -> float:
    """The harmonic mean of the means of all readings of all sets, nine in TOFU; 0 when one of them is 0."""
    readings = [reading for each in sets for reading in (each.probability, each.rougeL_recall, each.truth_ratio)]
    return float(stats.hmean([float(reading.double().mean()) for reading in readings]))


def model_utility_definition(definition: UtilityRatio = "tofu_paper") -> str:
    """The versioned name, e.g. `model_utility@tofu_paper`."""
    return f"model_utility@{definition}"


def _nlls(
    model: LanguageModel, records: Sequence[QA], template: Template, batch_size: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each record the NLL of its answer, of that in other words (itself where there are none), of the wrong ones."""
    _refuse_without_wrong(records)
    answers = []
    for record in records:
        told = (record.answer, record.paraphrased_answer or record.answer, *record.wrong)
        answers += [replace(record, answer=answer) for answer in told]
    nll = answer_nll(model, answers, template=template, batch_size=batch_size).double()
    rows = nll.split([2 + len(record.wrong) for record in records])
    return [(row[0], row[1], row[2:]) for row in rows]


def _refuse_without_wrong(records: Sequence[QA]) -> None:
    for record in records:
        if not record.wrong:
            raise DataError(f"record {record.id!r}: TOFU's utility needs wrong answers, but field 'wrong' is empty")
