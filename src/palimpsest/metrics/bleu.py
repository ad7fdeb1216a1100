"""Sentence BLEU: how many runs of one to four words of what was said stand in a reference (Papineni et al. 2002).

Smoothed by method 3 of Chen & Cherry 2014, as ConceptVectors does: of the run lengths that have no match, the first
counts as half a match, the next as a quarter, and so on. So a text of fewer than four words is not 1 even beside
itself; a single word is 0.35.
"""

from collections.abc import Sequence

import torch
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from torch import Tensor

DEFINITION = "bleu4@method3"


def bleu(texts: Sequence[str], references: Sequence[str]) -> Tensor:
    """[n] in float64, from 0 (no word in common) to 1, of n texts against n references; spaces part words."""
    smoothing = SmoothingFunction().method3
    scores = [
        sentence_bleu([reference.split()], text.split(), smoothing_function=smoothing)
        for text, reference in zip(texts, references, strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float64)
