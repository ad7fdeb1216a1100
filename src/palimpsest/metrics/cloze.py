"""Multiple choice by the texts of the choices themselves: which of them does a model find likeliest after the question?

The other form, by letters, is `multiple_choice`. This one is what lm-eval calls `acc` of a `multiple_choice` task: the
choice's log-likelihood in all, not per token, after the question as it stands and one space.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.records import QA, Choice
from palimpsest.metrics.multiple_choice import ChoiceScores
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import row_logprobs

DEFINITION = "cloze@lm_eval_acc"
"""The versioned name of the way in which choices are scored."""


def cloze(model: LanguageModel, choices: Sequence[Choice], *, batch_size: int = 256) -> ChoiceScores:
    """Which choice a model takes, and the right one's share of the probability of all that were offered.

    Args:
        model: the model to score with.
        choices: n questions of two choices or more.
        batch_size: rows at a time; it never changes a score.
    """
    encoded = encode_choices(choices, model.tokenizer)
    logprobs = row_logprobs(model, encoded, batch_size=batch_size)
    offered = pad_sequence(
        list(logprobs.split([len(choice.choices) for choice in choices])), batch_first=True, padding_value=-torch.inf
    )
    answers: Tensor = torch.tensor([choice.answer for choice in choices])
    chosen = offered.argmax(1)
    probability = offered.softmax(1).gather(1, answers[:, None])[:, 0]
    return ChoiceScores(chosen, (chosen == answers).float(), probability)


def encode_choices(choices: Sequence[Choice], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Every choice of every question after its question, one row each; a row's targets are the choice."""
    rows = [QA(choice.question, text, id=choice.id) for choice in choices for text in choice.choices]
    return encode(rows, tokenizer, template="raw")
