"""How likely a model finds the true answer, token by token, given the question (teacher forcing)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded, batches, encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, Record
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.models.scoring import Predictions, predict, row_logprobs


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """Readings of the same predictions; each [n] in fp32 on the CPU, in the records' order."""

    nll: Tensor
    """Mean negative log-likelihood of the answer's tokens, nats/token."""
    teacher_forced_exact_match: Tensor
    """1 where every token of the answer is the most likely one after the true tokens before it, else 0. Generation may
    still differ from the answer only where the model would go on after its end."""
    exact_memorization: Tensor
    """Share of the answer's tokens that are the most likely one (Tirumala et al. 2022). Its floor is not 0: a model
    that never saw TOFU's authors scores 0.59, so compare it with gold."""
    extraction_strength: Tensor
    """Share of the answer that the model says by itself once it has been told the rest: 1 - k / tokens, k the shortest
    beginning after which every token is the most likely one (Carlini et al. 2021; Dorna et al. 2025). 0 where the last
    token is not."""
    tokens: Tensor
    """The answer's tokens."""

    @property
    def extraction_strength_open_unlearning(self) -> Tensor:
        """OpenUnlearning's: its k stops at tokens - 1, so an answer of which nothing is said still has 1 / tokens.

        Short answers therefore never look forgotten, and a wrong last token and a right one alone score the same.
        """
        return self.extraction_strength.clamp(min=1 / self.tokens)

    @property
    def probability(self) -> Tensor:
        """P(answer | question)^(1 / tokens) = exp(-nll): the geometric mean per token (TOFU, Maini et al. 2024)."""
        return torch.exp(-self.nll)


def answer_scores(
    model: LanguageModel,
    records: Sequence[Record] | Sequence[QA],
    *,
    template: Template = "plain",
    batch_size: int = 64,
) -> AnswerScores:
    """Every teacher-forced score of every record's answer, in one forward pass over the records.

    Args:
        model: the model to score with.
        records: n records with one completion each; a passage is scored as running text.
        template: how question and answer are joined.
        batch_size: rows at a time; it never changes a score.

    Raises:
        DataError: a record without a completion.
    """
    return target_scores(model, encode(records, model.tokenizer, template=template), batch_size=batch_size)


def target_scores(model: LanguageModel, encoded: Sequence[Encoded], *, batch_size: int = 64) -> AnswerScores:
    """The same scores of n encoded records, over whatever tokens are their targets."""
    scores = torch.empty(5, len(encoded), dtype=torch.float32)
    with evaluating(model) as network:
        for batch in batches(encoded, batch_size=batch_size):
            batch, n_rows = batch.to(model.device), len(batch.rows)
            predictions = predict(network, batch)
            nll = predictions.mean_by_row(-predictions.logprobs(), n_rows)
            right = (predictions.logits.argmax(-1) == predictions.targets).float()
            share, tokens = predictions.mean_by_row(right, n_rows), batch.targets.sum(1)
            strength = _right_to_the_end(predictions, right, n_rows) / tokens
            scores[:, list(batch.rows)] = torch.stack([nll, (strength == 1).float(), share, strength, tokens]).cpu()
    return AnswerScores(*scores.unbind())


def _right_to_the_end(predictions: Predictions, right: Tensor, n_rows: int) -> Tensor:
    """[B] how many tokens of each row are right without a wrong one after them; `right` is 1 or 0, [N]."""
    first = torch.searchsorted(predictions.row, predictions.row)
    place = torch.arange(1, len(right) + 1, device=right.device) - first
    last_wrong = place.new_zeros(n_rows).scatter_reduce(0, predictions.row, place * (right == 0), "amax")
    return predictions.sum_by_row(torch.ones_like(right), n_rows) - last_wrong


def answer_nll(
    model: LanguageModel,
    records: Sequence[Record] | Sequence[QA],
    *,
    template: Template = "plain",
    batch_size: int = 64,
) -> Tensor:
    """[n] mean negative log-likelihood of each record's answer, nats/token, where that alone is wanted."""
    return target_nll(model, encode(records, model.tokenizer, template=template), batch_size=batch_size)


def target_nll(model: LanguageModel, encoded: Sequence[Encoded], *, batch_size: int = 64) -> Tensor:
    """[n] mean negative log-likelihood of each encoded record's targets, nats/token."""
    n_targets = torch.tensor([row.n_targets for row in encoded])
    return -row_logprobs(model, encoded, batch_size=batch_size) / n_targets


def answer_probability(
    model: LanguageModel,
    records: Sequence[Record] | Sequence[QA],
    *,
    template: Template = "plain",
    batch_size: int = 64,
) -> Tensor:
    """[n] geometric mean probability per token of each record's answer, where that alone is wanted."""
    return torch.exp(-answer_nll(model, records, template=template, batch_size=batch_size))
