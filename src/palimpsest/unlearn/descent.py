"""The loop under every method that goes down a loss: steps, measurements, and a stop exactly at the level asked for.

A learning rate that suits one model wrecks another. So a stretch between two measurements that goes too much of the way
to the forget level is taken back and the rate is halved: the level is what was asked for, the rate only where to begin.

Batches follow from the step alone, so a run that was killed goes on from its checkpoint to the same weights.
"""

import math
import time
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from palimpsest.errors import TrainingError
from palimpsest.files import content_hash
from palimpsest.models.checkpoint import Checkpoints
from palimpsest.models.language_model import LanguageModel
from palimpsest.progress import progress
from palimpsest.unlearn.gauge import Gauge
from palimpsest.unlearn.line_search import cross
from palimpsest.unlearn.lora import low_rank, merged
from palimpsest.unlearn.losses import Objective
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Measurement, Stop
from palimpsest.unlearn.update import Update
from palimpsest.unlearn.weights import copied, put, trainable

FARTHEST = 0.25
"""The share of the way from the start to the forget level that one stretch between measurements may go."""
HALVINGS = 12
"""How often the rate may be halved."""


@dataclass(frozen=True, kw_only=True)
class Descent(Method):
    """Settings common to the methods that go down a loss by AdamW.

    Raises:
        SpecError: a setting that must be positive is not.
    """

    learning_rate: float = 3e-4
    """AdamW's rate to begin with, without weight decay; it is halved where it goes too fast (`FARTHEST`)."""
    batch_size: int = 8
    """Forget rows a step; as many retain rows where the method uses them."""
    clip: float = 1.0
    """The largest allowed norm of the gradient."""
    rank: int | None = None
    """Train low-rank factors (LoRA) of this rank beside the linear maps that would change; the weights when None."""

    def __post_init__(self) -> None:
        self._refuse_unless_positive("learning_rate", "batch_size", "clip")
        if self.rank is not None:
            self._refuse_unless_positive("rank")

    @abstractmethod
    def objective(self, model: LanguageModel, request: Request) -> Objective:
        """The loss as a function of the step; whatever is computed once is computed here."""

    def parameters(self, model: LanguageModel) -> dict[str, Tensor]:
        """The live parameters that the method changes, by name; no other moves by a bit."""
        return trainable(model)

    def run(
        self, model: LanguageModel, request: Request, stop: Stop | None = None, *, folder: str | Path | None = None
    ) -> Update:
        """Go down the objective until `stop`; see `Method.run`."""
        return descend(self, model, request, stop or Stop(), folder)


def descend(method: Descent, model: LanguageModel, request: Request, stop: Stop, folder: str | Path | None) -> Update:
    """Run a method's objective down from the model's weights; see `Method.run`."""
    base = {"base_weights": model.weights_hash(), "base": model.fingerprint()}
    provenance = {"method": method.settings(), "stop": asdict(stop), "request": request.hash, **base}
    checkpoints = Checkpoints(folder, content_hash(provenance)) if folder else None
    was_training = model.network.training
    with _changing(method, model) as parameters:
        start = copied(parameters)
        model.network.zero_grad()
        try:
            run = _Run(method, model, request, stop, checkpoints, parameters)
            reason = run.to_the_end()
            trace = [asdict(point) for point in run.trace]
            found = {"stopped": reason, "trace": trace, "last_rate": run.rate, "seconds": run.seconds()}
            if method.rank:
                return Update(merged(model, parameters), provenance | found)
            return Update.between(start, parameters, provenance | found)
        finally:
            put(parameters, start)
            model.network.zero_grad()
            model.network.train(was_training)


def _changing(method: Descent, model: LanguageModel) -> AbstractContextManager[dict[str, Tensor]]:
    """What the optimiser steps, by name: the method's parameters, or factors beside them."""
    parameters = method.parameters(model)
    if method.rank:
        return low_rank(model, parameters, method.rank, method.seed, method=method.name)
    return nullcontext(parameters)


class _Run:
    """The state of one run: the optimiser, the trace of measurements, and the weights at the last of them."""

    def __init__(
        self,
        method: Descent,
        model: LanguageModel,
        request: Request,
        stop: Stop,
        checkpoints: Checkpoints | None,
        parameters: Mapping[str, Tensor],
    ) -> None:
        self.started = time.monotonic()
        self.method, self.model, self.stop, self.checkpoints = method, model, stop, checkpoints
        self.parameters = parameters
        self.objective = method.objective(model, request)
        self.memory: dict[str, float] = getattr(self.objective, "memory", {})
        self.halvings = 0
        self.optimizer = self._fresh_optimizer()
        self.gauge = Gauge(model, request)
        self.step = 0
        self.trace = [self._measure(0)]
        self._resume()
        self._keep()

    def to_the_end(self) -> str:
        """Step until something stops the run; the model is left where it stopped. Says why, for people."""
        if reason := self.stop.reason(self.trace[0]):
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
                if self.stop.reason(now):
                    return self._go_back_to_the_level(now)
                self.trace.append(now)
                self._keep()
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
        loss.backward(inputs=list(self.parameters.values()))
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.method.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()  # now, so that no measurement or forward pass holds a gradient beside the weights
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
        if self.halvings == HALVINGS or out_of_steps:
            return False
        return self.stop.share_of_the_way(self.trace[0], self.trace[-1], now, self.gauge.noise) > FARTHEST

    def _keep(self) -> None:
        self.last, self.last_memory = copied(self.parameters), dict(self.memory)

    def _take_back(self) -> None:
        """Go on from the last measurement at half the rate; the steps are spent, so the next batches are others."""
        put(self.parameters, self.last)
        self.memory.update(self.last_memory)
        self.halvings += 1
        self.optimizer = self._fresh_optimizer()

    def _fresh_optimizer(self) -> torch.optim.Optimizer:
        # Fused, since a loop over the parameters takes a tenth of a step on a processor.
        return torch.optim.AdamW(self.parameters.values(), lr=self.rate, weight_decay=0.0, fused=True)

    def _go_back_to_the_level(self, now: Measurement) -> str:
        """Bisect the stretch since the last measurement for where the run had to stop first; says why it had to."""
        start, end, begun = self.last, copied(self.parameters), self.trace[-1].step

        def at(share: float) -> Measurement:
            self._put_between(start, end, share)
            return self._measure(begun + share * (self.step - begun))

        share, last, beyond = cross(self.stop, at, self.trace[-1], now)
        self._put_between(start, end, share)
        if share > 0:
            self.trace.append(last)
        return self.stop.reason(beyond)

    def _put_between(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> None:
        put(self.parameters, {name: start[name].lerp(end[name], share) for name in start})

    def _save(self) -> None:
        if self.checkpoints:
            trace = [asdict(point) for point in self.trace]
            notes = {"trace": trace, "halvings": self.halvings, "seconds": self.seconds(), "memory": self.memory}
            self.checkpoints.save(self.step, self.parameters, [self.optimizer], notes)

    def _resume(self) -> None:
        if self.checkpoints and (state := self.checkpoints.load([self.optimizer])):
            self.step, self.halvings = state.step, state.notes["halvings"]
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
            self.trace = [Measurement(**point) for point in state.notes["trace"]]
            self.started -= state.notes["seconds"]
            self.memory.update(state.notes["memory"])
            put(self.parameters, state.tensors)
