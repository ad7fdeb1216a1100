"""The loop under every method that goes down a loss: steps, measurements, and a stop exactly at the level asked for.

Batches follow from the step alone, so a run that was killed goes on from its checkpoint to the same weights.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from palimpsest.data.batches import encode
from palimpsest.errors import TrainingError
from palimpsest.files import content_hash
from palimpsest.metrics.divergence import reference_logprobs
from palimpsest.models.checkpoint import Checkpoints
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import score_rows
from palimpsest.progress import progress
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update

if TYPE_CHECKING:
    from palimpsest.unlearn.method import Method

HELD_OUT_BYTES = 2_000_000_000
"""Bytes that the start model's predictions on held-out retain rows may take; fewer rows are measured beyond that."""
BISECTIONS = 8
"""Halvings of the last stretch: its level is met within 1/256 of it."""


@dataclass(frozen=True)
class Measurement:
    """Where unlearning stands after a step."""

    step: float
    """Fractional at the end of a run that stopped between two measurements."""
    forget_probability: float
    """Mean answer probability on the forget set."""
    retain_kl: float
    """KL(start || model) on held-out retain answers, nats/token."""


def descend(method: "Method", model: LanguageModel, request: Request, stop: Stop, folder: str | Path | None) -> Update:
    """Run a method's objective down from the model's weights; see `Method.run`."""
    started = time.monotonic()
    parameters = {name: value for name, value in model.network.named_parameters() if value.requires_grad}
    start = {name: value.detach().clone() for name, value in parameters.items()}
    base = {"base_weights": model.weights_hash(), "base": model.fingerprint()}
    provenance = {"method": method.settings(), "stop": asdict(stop), "request": request.hash, **base}
    checkpoints = folder and Checkpoints(folder, content_hash(provenance))
    try:
        run = _Run(method, model, request, stop, checkpoints or None)
        reason = run.to_the_end()
        found = {
            "stopped": reason,
            "trace": [asdict(point) for point in run.trace],
            "seconds": time.monotonic() - started,
        }
        return Update.between(start, parameters, {**provenance, **found})
    finally:
        _put(parameters, start)


class _Run:
    """The state of one run: the optimiser, the trace of measurements, and the weights at the last of them."""

    def __init__(
        self, method: "Method", model: LanguageModel, request: Request, stop: Stop, checkpoints: Checkpoints | None
    ) -> None:
        self.method, self.model, self.stop, self.checkpoints = method, model, stop, checkpoints
        self.parameters = {name: value for name, value in model.network.named_parameters() if value.requires_grad}
        self.gauge = _Gauge(model, request)
        self.objective = method.objective(model, request)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=method.learning_rate, weight_decay=0.0)
        self.trace = [self.gauge.measure(0)]
        self.last = _copy(self.parameters)
        self.step = 0
        self._resume()

    def to_the_end(self) -> str:
        """Step until something stops the run; the model is left where it stopped. Says why, for people."""
        with progress() as display:
            task = display.add_task(f"unlearning with {self.method.name}", total=self.stop.steps, note="")
            while self.step < self.stop.steps:
                self._step()
                if self.step % self.stop.measure_every and self.step < self.stop.steps:
                    continue
                self.trace.append(self.gauge.measure(self.step))
                now = self.trace[-1]
                note = f"forget {now.forget_probability:.3f}  retain KL {now.retain_kl:.3f}"
                display.update(task, completed=self.step, note=note)
                if reason := self._reason_to_stop(now):
                    self._go_back_to_the_level()
                    return reason
                self.last = _copy(self.parameters)
                self._save()
        return f"its {self.stop.steps} steps were used up"

    def _step(self) -> None:
        torch.manual_seed(self.method.seed * 1_000_003 + self.step)
        self.model.network.train()
        loss = self.objective(self.step)
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"{self.method.name}, step {self.step + 1}: the loss is {loss.item()}; nothing was saved and the model "
                f"is as it was. Lower the learning rate (now {self.method.learning_rate:g})"
            )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.method.clip)
        self.optimizer.step()
        self.model.network.eval()
        self.step += 1

    def _reason_to_stop(self, now: Measurement) -> str:
        if self.stop.retain_kl is not None and now.retain_kl >= self.stop.retain_kl:
            return f"the budget of {self.stop.retain_kl:g} nats/token on held-out retain rows was used up"
        if self.stop.forget_probability is not None and now.forget_probability <= self.stop.forget_probability:
            return f"the forget set came down to an answer probability of {self.stop.forget_probability:.3f}"
        return ""

    def _go_back_to_the_level(self) -> None:
        """Bisect the stretch since the last measurement for the place where the run had to stop."""
        start, end = self.last, _copy(self.parameters)
        begun, low, high = self.trace[-2].step, 0.0, 1.0
        best = self.trace.pop()
        for _ in range(BISECTIONS):
            share = (low + high) / 2
            _put(self.parameters, {name: start[name].lerp(end[name], share) for name in start})
            now = self.gauge.measure(begun + share * (self.step - begun))
            if self._reason_to_stop(now):
                high, best = share, now
            else:
                low = share
        # A budget must not be overrun; a target must be reached.
        over_budget = self.stop.retain_kl is not None and best.retain_kl >= self.stop.retain_kl
        share = low if over_budget else high
        _put(self.parameters, {name: start[name].lerp(end[name], share) for name in start})
        self.trace.append(self.gauge.measure(begun + share * (self.step - begun)))

    def _save(self) -> None:
        if self.checkpoints:
            notes = {"trace": [asdict(point) for point in self.trace]}
            self.checkpoints.save(self.step, self.parameters, [self.optimizer], notes)

    def _resume(self) -> None:
        if self.checkpoints and (state := self.checkpoints.load([self.optimizer])):
            self.step = state.step
            self.trace = [Measurement(**point) for point in state.notes["trace"]]
            _put(self.parameters, state.tensors)
            self.last = _copy(self.parameters)


class _Gauge:
    """Measures forgetting and damage, with the start model's predictions kept from before the first step."""

    def __init__(self, model: LanguageModel, request: Request) -> None:
        self.model = model
        self.forget = encode(request.forget, model.tokenizer, template=request.template)
        held_out = encode(request.retain_held_out, model.tokenizer, template=request.template)
        vocabulary = model.network.get_output_embeddings().weight.shape[0]  # type: ignore[union-attr,index]
        room, kept = HELD_OUT_BYTES // (4 * vocabulary), []
        for row in held_out:
            room -= row.n_targets
            if room >= 0:
                kept.append(row)
        self.reference = reference_logprobs(model, kept or held_out[:1])

    def measure(self, step: float) -> Measurement:
        nll = score_rows(self.model, self.forget, lambda p, n_rows: p.mean_by_row(-p.logprobs(), n_rows))
        return Measurement(step, torch.exp(-nll).mean().item(), self.reference.kl(self.model).mean().item())


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def _put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
