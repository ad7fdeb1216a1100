"""What the objectives of unlearning are made of: batches by step, token and answer likelihoods, the term that keeps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from palimpsest.data.batches import Batch, Encoded, batch_at, encode
from palimpsest.data.records import Text
from palimpsest.errors import SpecError
from palimpsest.metrics.divergence import token_kl
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import Predictions, predict_unpadded
from palimpsest.unlearn.lora import frozen_start
from palimpsest.unlearn.request import Request

if TYPE_CHECKING:
    from palimpsest.unlearn.descent import Descent

Objective = Callable[[int], Tensor]
"""The loss to go down at a step, nats; it reads the model's present weights.

One that remembers more than the weights between steps keeps it in `memory`, a dictionary of numbers. It goes into
checkpoints, and is put back when a stretch is taken back.
"""


@dataclass(frozen=True)
class Sampler:
    """Shuffled batches of encoded rows, by step."""

    encoded: list[Encoded]
    batch_size: int
    seed: int
    device: torch.device

    def at(self, step: int) -> Batch:
        """The batch of a step; every epoch covers every row."""
        return batch_at(self.encoded, step, batch_size=self.batch_size, seed=self.seed).to(self.device)


def sampler(
    method: "Descent", model: LanguageModel, request: Request, records: tuple[Text, ...], *, salt: int = 0
) -> Sampler:
    """Batches of the answers of `records`; another `salt` shuffles otherwise."""
    encoded = encode(records, model.tokenizer, template=request.template)
    return Sampler(encoded, min(method.batch_size, len(encoded)), method.seed + 7919 * salt, model.device)


def token_mean_nll(predictions: Predictions) -> Tensor:
    """Mean negative log-likelihood over all answer tokens of a batch, nats/token (Hugging Face's causal LM loss)."""
    return -predictions.logprobs().mean()


def row_sum_logprobs(predictions: Predictions, n_rows: int) -> Tensor:
    """[B] log-probability of each row's whole answer, nats."""
    return predictions.sum_by_row(predictions.logprobs(), n_rows)


RetainTerm = Literal["nll", "kl"]
"""`nll`: the answer's likelihood on retain rows; `kl`: KL(start model || model) at the answers' tokens."""


def retain_loss(term: RetainTerm, method: "Descent", model: LanguageModel, request: Request) -> Objective:
    """What keeps the retain set: nats/token over the answers of a retain batch.

    The KL term holds a frozen copy of the start model in memory, unless low-rank factors are trained.

    Raises:
        SpecError: no such term.
    """
    if term not in get_args(RetainTerm):
        raise SpecError(f"{method.name}: retain_term {term!r} is unknown; choose nll or kl")
    rows = sampler(method, model, request, request.retain, salt=1)
    if term == "nll":
        return lambda step: token_mean_nll(predict_unpadded(model, rows.at(step)))
    start = frozen_start(model)

    def kl(step: int) -> Tensor:
        batch = rows.at(step)
        with start() as frozen:
            reference = predict_unpadded(frozen, batch).logits.log_softmax(-1)
        return token_kl(reference, predict_unpadded(model, batch).logits).mean()

    return kl
