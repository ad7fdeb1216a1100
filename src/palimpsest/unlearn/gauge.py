"""How far unlearning has come, and what it has cost: what every run looks at to know when to stop."""

import torch

from palimpsest.data.batches import encode
from palimpsest.metrics.divergence import reference_logprobs
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import score_rows
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Measurement

HELD_OUT_BYTES = 2_000_000_000
"""Bytes that the start model's predictions on held-out retain rows may take; fewer rows are measured beyond that."""


class Gauge:
    """Measures forgetting and damage, with the start model's predictions kept from before the first step."""

    def __init__(self, model: LanguageModel, request: Request) -> None:
        self.model = model
        self.forget = encode(request.forget, model.tokenizer, template=request.template)
        held_out = encode(request.retain_held_out, model.tokenizer, template=request.template)
        vocabulary, _ = model.anatomy.unembedding.get_parameter("weight").shape
        room, kept = HELD_OUT_BYTES // (4 * vocabulary), []
        for row in held_out:
            room -= row.n_targets
            if room >= 0:
                kept.append(row)
        self.reference = reference_logprobs(model, kept or held_out[:1])

    def measure(self, step: float) -> Measurement:
        """What the model as it is now says on the forget set, and how far it moved on held-out retain rows."""
        nll = score_rows(self.model, self.forget, lambda p, n_rows: p.mean_by_row(-p.logprobs(), n_rows))
        return Measurement(step, torch.exp(-nll).mean().item(), self.reference.kl(self.model).mean().item())
