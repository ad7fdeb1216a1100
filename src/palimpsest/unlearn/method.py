"""What every unlearning method is: settings that give an objective, and one run that turns it into an update."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palimpsest.data.batches import Batch, Encoded, batch_at, encode
from palimpsest.data.records import QA
from palimpsest.errors import SpecError
from palimpsest.metrics.divergence import token_kl
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import Predictions, predict
from palimpsest.unlearn.descent import descend
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update

Objective = Callable[[int], Tensor]
"""The loss to go down at a step, nats; it reads the model's present weights."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Settings common to the methods that go down a loss. A method is a frozen dataclass in a file of its own.

    Raises:
        SpecError: a setting that must be positive is not.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """Paper and equation."""

    learning_rate: float = 3e-4
    """AdamW's rate to begin with, without weight decay; it is halved where it goes too fast (`descent.FARTHEST`)."""
    batch_size: int = 8
    """Forget rows a step; as many retain rows where the method uses them."""
    clip: float = 1.0
    """The largest allowed norm of the gradient."""
    seed: int = 0

    def __post_init__(self) -> None:
        self._refuse_unless_positive("learning_rate", "batch_size", "clip")

    @abstractmethod
    def objective(self, model: LanguageModel, request: Request) -> Objective:
        """The loss as a function of the step; whatever is computed once is computed here."""

    def run(
        self, model: LanguageModel, request: Request, stop: Stop | None = None, *, folder: str | Path | None = None
    ) -> Update:
        """Unlearn, and give back the change. The model is left as it was.

        Args:
            model: the model to start from.
            request: what to forget and keep.
            stop: budgets and targets; `Stop()` by default.
            folder: a folder of its own for the resumable state; a run that was killed goes on from there. It is
                left when the run is done, so that nothing is lost until the update is saved.

        Raises:
            SpecError: a setting that the method does not know.
            StorageError: the folder holds other files, or cannot be written.
            TrainingError: a loss or a measurement that is not finite; the resumable state is removed.
        """
        return descend(self, model, request, stop or Stop(), folder)

    def settings(self) -> dict[str, Any]:
        """Name and settings, for provenance."""
        return {"name": self.name, **asdict(self)}

    def _refuse_unless_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not value > 0:
                raise SpecError(f"{self.name}: {name} is {value}; it must be above 0")

    @classmethod
    def setting_names(cls) -> list[str]:
        """What a specification may set."""
        return [field.name for field in fields(cls)]


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
    method: Method, model: LanguageModel, request: Request, records: tuple[QA, ...], *, salt: int = 0
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


def retain_loss(term: RetainTerm, method: Method, model: LanguageModel, request: Request) -> Objective:
    """What keeps the retain set: nats/token over the answers of a retain batch.

    The KL term holds a frozen copy of the start model in memory.

    Raises:
        SpecError: no such term.
    """
    if term not in get_args(RetainTerm):
        raise SpecError(f"{method.name}: retain_term {term!r} is unknown; choose nll or kl")
    rows = sampler(method, model, request, request.retain, salt=1)
    if term == "nll":
        return lambda step: token_mean_nll(predict(model.network, rows.at(step)))
    start = model.copy().network.requires_grad_(False)
    return lambda step: _kl(start, model.network, rows.at(step))


def _kl(start: PreTrainedModel, network: PreTrainedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        reference = predict(start, batch).logits.log_softmax(-1)
    return token_kl(reference, predict(network, batch).logits).mean()
