"""The loop under every method that goes down a loss: steps, measurements, and a stop exactly at the level asked for.

A learning rate that suits one model wrecks another. So a stretch between two measurements that goes too much of the way
to the forget level is taken back and the rate is halved: the level is what was asked for, the rate only where to begin.

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
FARTHEST = 0.25
"""The share of the way from the start to the forget level that one stretch between measurements may go."""
HALVINGS = 12
"""How often the rate may be halved."""
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
    base = {"base_weights": model.weights_hash(), "base": model.fingerprint()}
    provenance = {"method": method.settings(), "stop": asdict(stop), "request": request.hash, **base}
    checkpoints = Checkpoints(folder, content_hash(provenance)) if folder else None
    parameters, was_training = _trainable(model), model.network.training
    start = _copy(parameters)
    try:
        run = _Run(method, model, request, stop, checkpoints)
        reason = run.to_the_end()
        trace = [asdict(point) for point in run.trace]
        found = {"stopped": reason, "trace": trace, "last_rate": run.rate, "seconds": run.seconds()}
        return Update.between(start, parameters, provenance | found)
    finally:
        _put(parameters, start)
        model.network.zero_grad()
        model.network.train(was_training)


class _Run:
    """The state of one run: the optimiser, the trace of measurements, and the weights at the last of them."""

    def __init__(
        self, method: "Method", model: LanguageModel, request: Request, stop: Stop, checkpoints: Checkpoints | None
    ) -> None:
        self.started = time.monotonic()
        self.method, self.model, self.stop, self.checkpoints = method, model, stop, checkpoints
        self.parameters = _trainable(model)
        self.objective = method.objective(model, request)
        self.halvings = 0
        self.optimizer = self._fresh_optimizer()
        self.gauge = _Gauge(model, request)
        self.step = 0
        self.trace = [self._measure(0)]
        self._resume()
        self.last = _copy(self.parameters)

    def to_the_end(self) -> str:
        """Step until something stops the run; the model is left where it stopped. Says why, for people."""
        if reason := self._reason_to_stop(self.trace[0]):
            return reason
        with progress() as display:
            task = display.add_task(f"unlearning with {self.method.name}", total=self.stop.steps, note="")
            while self.step < self.stop.steps:
                self._step()
                if self.step % self.stop.measure_every and self.step < self.stop.steps:
                    continue
                now = self._measure(self.step)
                if self._went_too_far(now):
                    self._take_back()
                    continue
                note = f"forget {now.forget_probability:.3f}  retain KL {now.retain_kl:.3f}"
                display.update(task, completed=self.step, note=note)
                if self._reason_to_stop(now):
                    return self._go_back_to_the_level(now)
                self.trace.append(now)
                self.last = _copy(self.parameters)
                self._save()
        return f"its {self.stop.steps} steps were used up"

    @property
    def rate(self) -> float:
        """AdamW's rate now."""
        return self.method.learning_rate / 2**self.halvings

    def seconds(self) -> float:
        """How long the run has taken, what came before a kill included."""
        return time.monotonic() - self.started

    def _step(self) -> None:
        torch.manual_seed(self.method.seed * 1_000_003 + self.step)
        self.model.network.train()
        loss = self.objective(self.step)
        self._refuse_unless_finite("the loss", loss.item(), self.step + 1)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.method.clip)
        self.optimizer.step()
        self.step += 1

    def _measure(self, step: float) -> Measurement:
        now = self.gauge.measure(step)
        self._refuse_unless_finite("the forget set's answer probability", now.forget_probability, step)
        self._refuse_unless_finite("KL on held-out retain rows", now.retain_kl, step)
        return now

    def _refuse_unless_finite(self, what: str, value: float, step: float) -> None:
        if math.isfinite(value):
            return
        if self.checkpoints:
            self.checkpoints.remove()  # the same would happen again from there
        remedy = (
            f"Lower the learning rate (now {self.rate:g})"
            if self.step
            else "No step was taken yet, so the model's own weights are damaged; restore them"
        )
        raise TrainingError(
            f"{self.method.name}, step {step:g}: {what} is {value}; nothing was saved and the model is as it was. "
            + remedy
        )

    def _went_too_far(self, now: Measurement) -> bool:
        out_of_steps = self.step >= self.stop.steps  # then going back to the level is all that can be done
        if self.stop.forget_probability is None or self.halvings == HALVINGS or out_of_steps:
            return False
        way = self.trace[0].forget_probability - self.stop.forget_probability
        return self.trace[-1].forget_probability - now.forget_probability > FARTHEST * way

    def _take_back(self) -> None:
        """Go on from the last measurement at half the rate; the steps are spent, so the next batches are others."""
        _put(self.parameters, self.last)
        self.halvings += 1
        self.optimizer = self._fresh_optimizer()

    def _fresh_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters.values(), lr=self.rate, weight_decay=0.0)

    def _reason_to_stop(self, now: Measurement) -> str:
        if self._over_budget(now):
            return f"the budget of {self.stop.retain_kl:g} nats/token on held-out retain rows was used up"
        if self.stop.forget_probability is not None and now.forget_probability <= self.stop.forget_probability:
            return f"the forget set was down to an answer probability of {self.stop.forget_probability:.3f}"
        return ""

    def _over_budget(self, now: Measurement) -> bool:
        return self.stop.retain_kl is not None and now.retain_kl >= self.stop.retain_kl

    def _go_back_to_the_level(self, now: Measurement) -> str:
        """Bisect the stretch since the last measurement for where the run had to stop first; says why it had to."""
        start, end, begun = self.last, _copy(self.parameters), self.trace[-1].step
        low, before = 0.0, self.trace[-1]
        high, beyond = 1.0, now
        for _ in range(BISECTIONS):
            share = (low + high) / 2
            self._put_between(start, end, share)
            now = self._measure(begun + share * (self.step - begun))
            if self._reason_to_stop(now):
                high, beyond = share, now
            else:
                low, before = share, now
        # A target must be reached, so the run ends beyond it; a budget must not be overrun, so it ends before.
        share, last = (low, before) if self._over_budget(beyond) else (high, beyond)
        self._put_between(start, end, share)
        if share > 0:
            self.trace.append(last)
        return self._reason_to_stop(beyond)

    def _put_between(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> None:
        _put(self.parameters, {name: start[name].lerp(end[name], share) for name in start})

    def _save(self) -> None:
        if self.checkpoints:
            trace = [asdict(point) for point in self.trace]
            notes = {"trace": trace, "halvings": self.halvings, "seconds": self.seconds()}
            self.checkpoints.save(self.step, self.parameters, [self.optimizer], notes)

    def _resume(self) -> None:
        if self.checkpoints and (state := self.checkpoints.load([self.optimizer])):
            self.step, self.halvings = state.step, state.notes["halvings"]
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
            self.trace = [Measurement(**point) for point in state.notes["trace"]]
            self.started -= state.notes["seconds"]
            _put(self.parameters, state.tensors)


class _Gauge:
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
        nll = score_rows(self.model, self.forget, lambda p, n_rows: p.mean_by_row(-p.logprobs(), n_rows))
        return Measurement(step, torch.exp(-nll).mean().item(), self.reference.kl(self.model).mean().item())


def _trainable(model: LanguageModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.network.named_parameters() if value.requires_grad}


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def _put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
