"""Self-distillation: towards the model's own predictions with the true token's logit taken down."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from palimpsest.data.batches import Batch
from palimpsest.errors import SpecError
from palimpsest.metrics.divergence import reference_logprobs
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import Predictions, predict_unpadded
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.keeping import Keeping
from palimpsest.unlearn.lora import frozen_start
from palimpsest.unlearn.losses import Objective, Sampler, sampler
from palimpsest.unlearn.request import Request


@dataclass(frozen=True, kw_only=True)
class UNDIAL(Keeping):
    """Minimise the cross-entropy to softmax(z_start - strength * 1[true token]) at the forget answers' tokens.

    The target is fixed, so the loss has a minimum. OpenUnlearning's version also takes `strength` off a wrong entry of
    the vocabulary at every prompt and padding position and averages over them; here only answer tokens count.
    """

    name: ClassVar[str] = "undial"
    source: ClassVar[str] = "Dong et al. 2025, arXiv 2402.10052; strength and no retain term as in OpenUnlearning"

    strength: float = 10.0
    """What is taken off the true token's logit: its odds fall by a factor of e to this power."""
    retain_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unless_positive("strength")

    def forget_loss(self, model: LanguageModel, request: Request) -> Objective:
        """Cross-entropy to the adjusted predictions of the start model, nats/token."""
        forget = sampler(self, model, request, request.forget)
        at_start = start_logprobs(model, forget)

        def loss(step: int) -> Tensor:
            batch = forget.at(step)
            predictions = predict_unpadded(model, batch)
            target = lowered(at_start(batch), predictions.targets, self.strength)
            return soft_cross_entropy(predictions.logits, target).mean()

        return loss


@dataclass(frozen=True, kw_only=True)
class CEU(Descent):
    """Minimise the cross-entropy to the model's present predictions without the true token, at forget answers' tokens.

    The target is softmax(z) with the true token's z at -infinity, held fixed within a step. Nothing keeps the retain
    rows.
    """

    name: ClassVar[str] = "ceu"
    source: ClassVar[str] = "Yang 2025, arXiv 2503.01224"

    skip_tokens: int = 0
    """How many of each answer's first tokens are left alone. OpenUnlearning leaves 1, which is often the whole of a
    short answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip_tokens < 0:
            raise SpecError(f"{self.name}: skip_tokens is {self.skip_tokens}; it cannot be below 0")

    def objective(self, model: LanguageModel, request: Request) -> Objective:
        """Cross-entropy to the present predictions without the true token, nats/token."""
        forget = sampler(self, model, request, request.forget)
        longest = max(row.n_targets for row in forget.encoded)
        if longest <= self.skip_tokens:
            raise SpecError(
                f"{self.name}: skip_tokens is {self.skip_tokens}, but no forget answer has more than {longest} tokens; "
                "lower it"
            )

        def loss(step: int) -> Tensor:
            predictions = predict_unpadded(model, forget.at(step))
            losses = ceu_losses(predictions.logits, predictions.targets)
            counted = place_in_row(predictions) >= self.skip_tokens
            return losses[counted].sum() / counted.sum().clamp(min=1)

        return loss


def ceu_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[N] cross-entropy of logits [N, V] to the softmax of the same logits without the targets [N]."""
    return soft_cross_entropy(logits, lowered(logits.detach(), targets, torch.inf))


def lowered(logits: Tensor, targets: Tensor, by: float) -> Tensor:
    """[N, V] logits with those of the targets [N] lowered."""
    return logits.scatter_add(1, targets[:, None], torch.full_like(logits[:, :1], -by))


def soft_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    """[N] cross-entropy of logits [N, V] to the distributions that target logits [N, V] give, nats."""
    return nn.functional.cross_entropy(logits, target_logits.softmax(-1), reduction="none")


def place_in_row(predictions: Predictions) -> Tensor:
    """[N] how many targets of its row stand before each target."""
    same = predictions.row[:, None] == predictions.row
    return same.tril(-1).sum(1)


def start_logprobs(model: LanguageModel, rows: Sampler) -> Callable[[Batch], Tensor]:
    """[N, V] what the model as it is now predicts at a batch's targets, whatever becomes of its weights.

    All of it is kept where that takes less memory than a copy of the model, and else it is asked again each time.
    """
    weights = sum(value.numel() * value.element_size() for value in model.network.parameters())
    vocabulary, _ = model.anatomy.unembedding.get_parameter("weight").shape
    if 4 * vocabulary * sum(row.n_targets for row in rows.encoded) <= weights:
        kept = reference_logprobs(model, rows.encoded)
        return lambda batch: kept.of(batch).to(model.device)
    start = frozen_start(model)

    def said_now(batch: Batch) -> Tensor:
        with start() as frozen:
            return predict_unpadded(frozen, batch).logits.log_softmax(-1)

    return said_now
