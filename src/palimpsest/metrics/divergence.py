"""Kullback-Leibler divergence between the next-token distributions of two models, on the tokens of a set of records.

KL(original || model) on held-out retain text is what unlearning may spend: 0 for a model that predicts as before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from palimpsest.data.batches import Batch, Encoded, batches, encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, Record
from palimpsest.errors import ModelError
from palimpsest.models.language_model import LanguageModel, evaluating, refuse_other_tokenizer
from palimpsest.models.scoring import predict

CHUNK = 2**24
"""Entries of [tokens, vocabulary] worked on at a time: 64 MiB for each temporary tensor."""


@dataclass(frozen=True, eq=False)
class ReferenceLogprobs:
    """A model's log-probabilities at every target of a set of records, kept so that it need not run again."""

    encoded: tuple[Encoded, ...]
    """The n records, N target tokens in all."""
    logprobs: Tensor
    """[N, V] in fp32 on the CPU, record after record. It takes 4 * N * V bytes: 2,000 tokens of a 50,000 word
    vocabulary are 400 MB."""

    def of(self, batch: Batch) -> Tensor:
        """[N, V] log-probabilities at the targets of a batch of these records."""
        return self.logprobs[_places(self.encoded, batch)]

    def take(self, records: Sequence[int]) -> "ReferenceLogprobs":
        """Those of some of the records, in the order given."""
        starts = list(accumulate((row.n_targets for row in self.encoded), initial=0))
        places = torch.cat([torch.arange(starts[record], starts[record + 1]) for record in records])
        return ReferenceLogprobs(tuple(self.encoded[record] for record in records), self.logprobs[places])

    def kl(self, model: LanguageModel, *, batch_size: int = 64) -> Tensor:
        """[n] KL(reference || model) of each record, as `kl_per_item` gives it.

        Raises:
            ModelError: the model's vocabulary differs in size.
        """
        return _kl_per_item(model, self.encoded, self.of, batch_size)


def reference_logprobs(model: LanguageModel, encoded: Sequence[Encoded], *, batch_size: int = 64) -> ReferenceLogprobs:
    """Run `model` once over n encoded records and keep 4 bytes for each target token and vocabulary entry."""
    n_targets = sum(row.n_targets for row in encoded)
    vocabulary, _ = model.anatomy.unembedding.get_parameter("weight").shape
    logprobs = torch.empty(n_targets, vocabulary, dtype=torch.float32)
    with evaluating(model) as network:
        for batch in batches(encoded, batch_size=batch_size):
            logits = predict(network, batch.to(model.device)).logits
            logprobs[_places(encoded, batch)] = logits.log_softmax(-1).cpu()
    return ReferenceLogprobs(tuple(encoded), logprobs)


def kl_per_item(
    p_model: LanguageModel,
    q_model: LanguageModel,
    records: Sequence[Record] | Sequence[QA],
    *,
    template: Template = "plain",
    batch_size: int = 64,
) -> Tensor:
    """[n] KL(p || q) of each record in nats per scored token, the mean over its target tokens; fp32 on the CPU.

    Args:
        p_model: the reference; the expectation is over its predictions. Its tokenizer encodes the records.
        q_model: the model that is compared.
        records: n records.
        template: how question and answer are joined.
        batch_size: rows at a time; it never changes a score.

    Raises:
        DataError: a record without a completion.
        ModelError: the models' tokenizers differ, or their vocabularies differ in size.
    """
    refuse_other_tokenizer(p_model, q_model)
    encoded = encode(records, p_model.tokenizer, template=template)
    with evaluating(p_model) as network:
        return _kl_per_item(
            q_model,
            encoded,
            lambda batch: predict(network, batch.to(p_model.device)).logits.log_softmax(-1),
            batch_size,
        )


def token_kl(p_logprobs: Tensor, q_logits: Tensor) -> Tensor:
    """[N] KL(p || q) in nats at each token, from log-probabilities [N, V] and logits [N, V]; gradients flow to q.

    A part of the tokens at a time, so that what is in memory besides the inputs is bounded.
    """
    tokens = max(1, CHUNK // q_logits.shape[1])
    divergences = []
    for p, logits in zip(p_logprobs.split(tokens), q_logits.split(tokens), strict=True):
        p = p.to(logits.device)
        terms = p.exp() * (p - logits.log_softmax(-1))
        # What p rules out contributes nothing, even where q rules it out too.
        divergences.append(terms.where(p > -torch.inf, 0.0).sum(-1))
    return torch.cat(divergences)


def _kl_per_item(
    model: LanguageModel, encoded: Sequence[Encoded], p_logprobs: Callable[[Batch], Tensor], batch_size: int
) -> Tensor:
    values = torch.empty(len(encoded), dtype=torch.float32)
    with evaluating(model) as network:
        for batch in batches(encoded, batch_size=batch_size):
            p, q = p_logprobs(batch), predict(network, batch.to(model.device))
            if p.shape != q.logits.shape:
                raise ModelError(
                    f"{model.name}: its vocabulary has {q.logits.shape[1]} entries, the reference's {p.shape[1]}; "
                    "compare models that share a tokenizer"
                )
            # A divergence is never negative; rounding may leave -1e-8.
            kl = q.mean_by_row(token_kl(p, q.logits), len(batch.rows)).clamp(min=0)
            values[list(batch.rows)] = kl.cpu()
    return values


def _places(encoded: Sequence[Encoded], batch: Batch) -> Tensor:
    """[N] where the targets of a batch's rows stand among the targets of all records, record after record."""
    starts = list(accumulate((row.n_targets for row in encoded), initial=0))
    return torch.cat([torch.arange(starts[row], starts[row + 1]) for row in batch.rows])
