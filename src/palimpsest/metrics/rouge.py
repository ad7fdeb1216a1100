"""ROUGE between greedy and true answers: how much of the true wording was said (Lin 2004).

TOFU reports ROUGE-L recall with the Porter stemmer, MUSE ROUGE-L F1 without: the definition's name says which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

RougeName = Literal["rougeL_recall", "rougeL_f1", "rouge1_recall"]


@dataclass(frozen=True, eq=False)
class RougeScores:
    """Each [n] in float64, in the answers' order, from 0 (no word in common) to 1."""

    rougeL_recall: Tensor
    """Longest common subsequence over the reference's words: TOFU's."""
    rougeL_f1: Tensor
    """Harmonic mean of that recall and its precision: MUSE's."""
    rouge1_recall: Tensor
    """Share of the reference's words that were said, in any order."""


def rouge(answers: Sequence[str], references: Sequence[str], *, stem: bool = True) -> RougeScores:
    """ROUGE of n answers against n references by the `rouge-score` package, `stem` with its Porter stemmer."""
    scorer = RougeScorer(["rougeL", "rouge1"], use_stemmer=stem)
    found = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return RougeScores(
        rougeL_recall=torch.tensor([score["rougeL"].recall for score in found], dtype=torch.float64),
        rougeL_f1=torch.tensor([score["rougeL"].fmeasure for score in found], dtype=torch.float64),
        rouge1_recall=torch.tensor([score["rouge1"].recall for score in found], dtype=torch.float64),
    )


def rouge_definition(name: RougeName, *, stem: bool = True) -> str:
    """The versioned name of a score, e.g. `rougeL_recall@stem`."""
    return f"{name}@{'stem' if stem else 'nostem'}"
