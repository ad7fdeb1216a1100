"""How far unlearning has come, and what it has cost: what every run looks at to know when to stop."""

import math
from collections.abc import Sequence

import torch

from palimpsest.data.batches import Encoded, encode
from palimpsest.metrics.divergence import ReferenceLogprobs, reference_logprobs
from palimpsest.metrics.likelihood import target_nll
from palimpsest.metrics.multiple_choice import multiple_choice
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Measurement

REFERENCE_BYTES = 2_000_000_000
"""Bytes that the start model's predictions on a set of rows may take; fewer rows are looked at beyond that."""


class Gauge:
    """Measures forgetting and damage, with the start model's predictions kept from before the first step."""

    def __init__(self, model: LanguageModel, request: Request) -> None:
        self.model = model
        self.choices = request.choices
        self.forget = encode(request.forget, model.tokenizer, template=request.template)
        held_out = encode(request.retain_held_out, model.tokenizer, template=request.template)
        self.reference = affordable_reference(model, held_out)

    def forget_probability(self) -> float:
        """Mean answer probability on the forget set."""
        return torch.exp(-target_nll(self.model, self.forget)).mean().item()

    def measure(self, step: float) -> Measurement:
        """What the model as it is now says on the forget set, and how far it moved on held-out retain rows."""
        return Measurement(
            step,
            self.forget_probability(),
            self.reference.kl(self.model).mean().item(),
            multiple_choice(self.model, self.choices).correct.double().mean().item() if self.choices else None,
        )

    @property
    def noise(self) -> float:
        """Two standard errors of an accuracy over as many questions as there are, at most; 0 without any."""
        return 1 / math.sqrt(len(self.choices)) if self.choices else 0.0


def affordable_reference(model: LanguageModel, encoded: Sequence[Encoded]) -> ReferenceLogprobs:
    """The model's predictions on these rows, or on as many of the first as `REFERENCE_BYTES` hold."""
    vocabulary, _ = model.anatomy.unembedding.get_parameter("weight").shape
    room, kept = REFERENCE_BYTES // (4 * vocabulary), []
    for row in encoded:
        room -= row.n_targets
        if room >= 0:
            kept.append(row)
    return reference_logprobs(model, kept or encoded[:1])
