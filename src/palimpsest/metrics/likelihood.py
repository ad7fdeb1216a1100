"""How likely a model finds the true answer, token by token, given the question (teacher forcing)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.data.batches import batches, encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, Record
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.models.scoring import predict, score_rows


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """Four readings of the same predictions; each [n] in fp32 on the CPU, in the records' order."""

    nll: Tensor
    """Mean negative log-likelihood of the answer's tokens, nats/token."""
    teacher_forced_exact_match: Tensor
    """1 where every token of the answer is the most likely one after the true tokens before it, else 0. Generation may
    still differ from the answer only where the model would go on after its end."""
    exact_memorization: Tensor
    """Share of the answer's tokens that are the most likely one (Tirumala et al. 2022). Its floor is not 0: a model
    that never saw TOFU's authors scores 0.59, so compare it with gold."""

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
    scores = torch.empty(3, len(records), dtype=torch.float32)
    with evaluating(model) as network:
        for batch in batches(encode(records, model.tokenizer, template=template), batch_size=batch_size):
            batch, n_rows = batch.to(model.device), len(batch.rows)
            predictions = predict(network, batch)
            nll = predictions.mean_by_row(-predictions.logprobs(), n_rows)
            right = (predictions.logits.argmax(-1) == predictions.targets).float()
            share = predictions.mean_by_row(right, n_rows)
            all_right = predictions.sum_by_row(1 - right, n_rows) == 0
            scores[:, list(batch.rows)] = torch.stack([nll, all_right.float(), share]).cpu()
    return AnswerScores(*scores.unbind())


def answer_nll(
    model: LanguageModel,
    records: Sequence[Record] | Sequence[QA],
    *,
    template: Template = "plain",
    batch_size: int = 64,
) -> Tensor:
    """[n] mean negative log-likelihood of each record's answer, nats/token, where that alone is wanted."""
    encoded = encode(records, model.tokenizer, template=template)
    return score_rows(model, encoded, lambda p, n_rows: p.mean_by_row(-p.logprobs(), n_rows), batch_size=batch_size)


def answer_probability(
    model: LanguageModel,
    records: Sequence[Record] | Sequence[QA],
    *,
    template: Template = "plain",
    batch_size: int = 64,
) -> Tensor:
    """[n] geometric mean probability per token of each record's answer, where that alone is wanted."""
    return torch.exp(-answer_nll(model, records, template=template, batch_size=batch_size))
