"""The loop under K-FADE: measure curvature, step back towards the start's predictions, step uphill to the next goal."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from palimpsest.curvature.blocks import flattened
from palimpsest.curvature.curvature import RetainCurvature
from palimpsest.curvature.modules import matrices
from palimpsest.curvature.quadratic import Direction, coupling
from palimpsest.data.batches import batches, encode, epoch_order
from palimpsest.errors import SpecError, TrainingError
from palimpsest.files import content_hash
from palimpsest.metrics.divergence import ReferenceLogprobs, token_kl
from palimpsest.models.checkpoint import Checkpoints
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import cache_folder
from palimpsest.models.scoring import predict
from palimpsest.progress import console, progress
from palimpsest.unlearn.gauge import Gauge, affordable_reference
from palimpsest.unlearn.line_search import meet
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Measurement, Stop
from palimpsest.unlearn.subspace import combined, inner, lengths, separate, unit
from palimpsest.unlearn.update import Update
from palimpsest.unlearn.weights import copied, only_these_change, put

if TYPE_CHECKING:
    from palimpsest.unlearn.kfade import KFade

DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e3, 1e4)
"""What is tried, in mean eigenvalues. Beyond the largest eigenvalue, the direction in each matrix is the plain
gradient's, and only the lengths know of curvature."""
TOGETHER = 3
"""Dampings whose steps are coupled in one pass; each takes as much memory as the weights."""
HARMLESS = 1e-3
"""Nats on held-out retain rows, for the whole way, that are no reason to prefer one damping, or power, to another."""
POWERS = (1.0, 0.5)
"""Spectral powers: what is tried first, and what else where that does harm."""
PULL_BACKS = (1.0, 0.5, 0.25, 0.1)
"""Shares of the full pull-back, the first that lowers the retain KL being taken."""
FIRST_KL = 1e-4
"""Nats on the retain set that the first guess at a step length costs by the quadratic form."""
FARTHEST_KL = 0.5
"""Nats that one step may cost by the quadratic form, which is meaningless far beyond."""
TOLERANCE = 0.05
"""How far a step may go beyond its goal, as a share of the way to it in log-odds; the last step: `LAST_TOLERANCE`."""
LAST_TOLERANCE = 0.004
NO_LEVEL = 1e-4
"""The forget probability to which `steps` steps go where none was asked for; more steps go as far beyond it."""
BISECTIONS, FINEST = 24, 1 / 256
"""Halvings of the last step, at most, and the share of it within which its end is found."""
ENOUGH_OF_BUDGET = 0.9
"""A run that a budget ends has used at least this share of it."""


def climb_by_either_power(
    method: "KFade", model: LanguageModel, request: Request, stop: Stop, folder: str | Path | None
) -> Update:
    """Run K-FADE, and again at the other of `POWERS` where the first run did harm; the better run's update.

    The better one forgot as far as was asked for and did held-out retain rows less harm, by `HARMLESS` at least; where
    neither came so far, it is the one that forgot more. The second may cost no more than that, so a bad one soon ends.
    """

    def run(power: float, stop: Stop) -> Update:
        room = Path(folder) / f"power-{power:g}" if folder else None
        return climb(replace(method, spectral_power=power), model, request, stop, room)

    first, *others = POWERS
    tried = {first: run(first, stop)}
    end = last_measurement(tried[first])
    if end.retain_kl > HARMLESS:
        within = replace(stop, retain_kl=end.retain_kl - HARMLESS) if stop.met(end) else stop
        for power in others:
            with suppress(TrainingError):  # what the first run found stands, whatever becomes of another
                tried[power] = run(power, within)

    def order(power: float) -> tuple[bool, float]:
        end = last_measurement(tried[power])
        return (False, end.retain_kl) if stop.met(end) else (True, end.forget_probability)

    chosen = min(tried, key=order)
    asked = {"method": method.settings(), "stop": asdict(stop)}
    ends = {f"{power:g}": asdict(last_measurement(update)) for power, update in tried.items()}
    seconds = sum(update.provenance["seconds"] for update in tried.values())
    found = {"spectral_power": chosen, "tried": ends, "seconds": seconds}
    return replace(tried[chosen], provenance=tried[chosen].provenance | asked | found)


def last_measurement(update: Update) -> Measurement:
    """Where the run that made it ended."""
    return Measurement(**update.provenance["trace"][-1])


def climb(method: "KFade", model: LanguageModel, request: Request, stop: Stop, folder: str | Path | None) -> Update:
    """Run K-FADE from the model's weights, at the spectral power that it has; see `Method.run`."""
    if stop.forget_probability is None and stop.retain_kl is None and stop.forget_accuracy is None:
        raise SpecError(f"{method.name}: give a forget level or a budget of retain KL; they set its step length")
    run = _Climb(method, model, request, stop, folder)
    start = copied(run.parameters)
    run.resume()
    was_training = model.network.training
    model.network.eval()
    try:
        with only_these_change(model, run.parameters):
            reason = run.to_the_end()
        found = {"stopped": reason, "trace": [asdict(point) for point in run.trace], "dampings": run.dampings}
        return Update.between(start, run.parameters, run.provenance | found | {"seconds": run.seconds()})
    except TrainingError:
        run.forget_checkpoint()  # the same would happen again from there
        raise
    finally:
        put(run.parameters, start)
        model.network.zero_grad()
        model.network.train(was_training)


@dataclass(frozen=True)
class _Step:
    """A direction of change for every matrix, and what it is expected to do."""

    change: dict[str, Tensor]
    """As parameters are named and shaped."""
    quadratic: float
    """change' F change: twice the nats it costs at length 1."""


class _Climb:
    def __init__(
        self, method: "KFade", model: LanguageModel, request: Request, stop: Stop, folder: str | Path | None
    ) -> None:
        self.started, self.display = time.monotonic(), progress()
        self.method, self.model, self.stop = method, model, stop
        self.matrices, self.power = matrices(model, method.modules), method.spectral_power or POWERS[0]
        names = [name for matrix in self.matrices for name in matrix.parameter_names]
        everything = dict(model.network.named_parameters())
        self.parameters: dict[str, Tensor] = {name: everything[name] for name in names}
        base = {"base_weights": model.weights_hash(), "base": model.fingerprint()}
        self.provenance = {"method": method.settings(), "stop": asdict(stop), "request": request.hash, **base}
        self.checkpoints = Checkpoints(folder, content_hash(self.provenance)) if folder else None
        self.forget = encode(request.forget, model.tokenizer, template=request.template)
        self.retain = encode(request.retain, model.tokenizer, template=request.template)
        self.gauge = Gauge(model, request)
        self.kept = affordable_reference(model, self.retain)
        self.retain_now = self.kept
        self.step = 0
        self.trace = [self._measured()]
        self.dampings: list[float] = []
        self.curvature: RetainCurvature | None = None
        self.guess: float | None = None

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def to_the_end(self) -> str:
        """Climb until something stops it; the model is left where it stopped. Says why, for people."""
        if reason := self.stop.reason(self.trace[0]):
            return reason
        with self.display as display:
            what = f"unlearning with {self.method.name}"
            if self.power != POWERS[0]:
                what += f", spectral power {self.power:g}"
            task = display.add_task(what, total=self.method.steps, note="")
            while self.step < self.stop.steps:
                before = copied(self.parameters)
                self._climb_once()
                self.step += 1
                now = self._measured()
                note = f"forget {now.forget_probability:.3f}  retain KL {now.retain_kl:.4f}"
                display.update(task, completed=self.step, total=max(self.step, self.method.steps), note=note)
                if self.stop.reason(now) and not self._met(now):
                    return self._back_to_the_level(before, now)
                self.trace.append(now)
                if reason := self.stop.reason(now):
                    return reason
                self._save()
        return f"its {self.stop.steps} steps were used up"

    # -- one step ---------------------------------------------------------------------------------------------------

    def _climb_once(self) -> None:
        self.retain_now = self._some_retain_rows(0)
        if self.step % self.method.refit_every == 0:
            self._measure_curvature()
        for pull_back in range(self.method.pull_backs if self.step > 0 else 0):
            if pull_back > 0:
                self.retain_now = self._some_retain_rows(pull_back)
            self._pull_back()
        self._take(self._step_along(self._uphill(), self._damping()), self._goal(), self._tolerance())

    def _uphill(self) -> dict[str, Tensor]:
        """[out, in] by matrix: the gradient to follow so that the forget set is forgotten."""
        n_targets = sum(row.n_targets for row in self.forget)

        def losses() -> Iterator[Tensor]:
            for batch in batches(self.forget, batch_size=self.method.batch_size):
                logprobs = predict(self.model.network, batch.to(self.model.device)).logprobs()
                yield self.method.loss(logprobs).sum() / n_targets

        return self._downhill(losses())

    def _some_retain_rows(self, pull_back: int) -> ReferenceLogprobs:
        """Retain rows for a part of this step, with the start model's predictions on them."""
        room = self.method.tokens_per_step
        rows: list[int] = []
        draw = self.step * max(1, self.method.pull_backs) + pull_back
        for row in epoch_order(len(self.kept.encoded), draw, self.method.seed):
            room -= len(self.kept.encoded[row].ids)
            if room < 0 and rows:
                break
            rows.append(row)
        return self.kept.take(rows)

    def _towards_the_start(self, kept: ReferenceLogprobs) -> dict[str, Tensor]:
        """[out, in] by matrix: down the KL from the start model's predictions on retain rows."""

        def losses() -> Iterator[Tensor]:
            for batch in batches(kept.encoded, batch_size=self.method.batch_size):
                logits = predict(self.model.network, batch.to(self.model.device)).logits
                yield token_kl(kept.of(batch), logits).sum() / len(kept.logprobs)

        return self._downhill(losses())

    def _downhill(self, losses: Iterator[Tensor]) -> dict[str, Tensor]:
        network = self.model.network
        network.zero_grad()
        for loss in losses:
            loss.backward()
        gradients = {name: parameter.grad for name, parameter in self.parameters.items()}
        for name, gradient in gradients.items():
            if gradient is None or not torch.isfinite(gradient).all():
                raise self._broken(f"the gradient of {name} is not finite")
        found = {matrix.name: -matrix.gather(gradients) for matrix in self.matrices}  # type: ignore[arg-type]
        network.zero_grad()
        return found

    def _pull_back(self) -> None:
        """Go down the retain KL by a Gauss-Newton step, as far as that lowers it."""
        back = self._towards_the_start(self.retain_now)
        step, before = self._step_along(back, self._damping()), copied(self.parameters)
        lowest = self._kept_kl()
        for share in PULL_BACKS:
            self._put(before, step, share)
            if self._kept_kl() < lowest:
                return
        put(self.parameters, before)

    def _step_along(self, gradient: Mapping[str, Tensor], damping: float) -> _Step:
        """The Gauss-Newton step for a gradient, coupled over the matrices."""
        return self._steps_along(gradient, [damping])[0]

    def _steps_along(self, gradient: Mapping[str, Tensor], dampings: Sequence[float]) -> list[_Step]:
        """One for each damping, all coupled in a single pass over this step's retain rows."""
        spans = []
        for damping in dampings:
            solved = self._solve(gradient, damping)
            spans.append([unit(direction) for direction in (separate(solved) if self.method.coupled else [solved])])
        fisher = coupling(
            self.model,
            self.retain_now.encoded,
            self.matrices,
            [direction for span in spans for direction in span],
            seed=self.method.seed + 1_000_003 * (self.step + 1),
            draws=self.method.draws,
            batch_size=self.method.batch_size,
        )
        steps, size = [], len(spans[0])
        for place, span in enumerate(spans):
            own = slice(place * size, (place + 1) * size)
            steps.append(self._step_within(span, fisher[own, own], gradient))
        return steps

    def _step_within(self, span: Sequence[Direction], fisher: Tensor, gradient: Mapping[str, Tensor]) -> _Step:
        slopes = torch.tensor([inner(direction, gradient) for direction in span], dtype=torch.float64)
        found = lengths(fisher, slopes)
        change = combined(found, span)
        named: dict[str, Tensor] = {}
        for matrix in self.matrices:
            named |= matrix.scatter(change[matrix.name])
        return _Step(named, (found @ fisher @ found).item())

    def _solve(self, gradient: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        if self.curvature is None:
            return {name: flattened(matrix, self.power) for name, matrix in gradient.items()}
        blocks = self.curvature.blocks
        solved = {name: blocks[name].solve(matrix, damping, self.power) for name, matrix in gradient.items()}
        for name, step in solved.items():
            if not torch.isfinite(step).all():
                what = f"the step in {name} is not finite: its curvature is singular at this damping"
                raise self._broken(what, "Raise the damping")
        return solved

    # -- its length ---------------------------------------------------------------------------------------------------

    def _take(self, step: _Step, goal: float, tolerance: float) -> None:
        """Go along the step until the forget set's log-odds are down to the goal."""
        before = copied(self.parameters)

        def log_odds(length: float) -> float:
            self._put(before, step, length)
            return _log_odds(self.gauge.forget_probability())

        scale = math.sqrt(2 / max(step.quadratic, 1e-30))
        guess = self.guess or scale * math.sqrt(FIRST_KL)
        length = meet(log_odds, goal, guess, tolerance=tolerance, largest=scale * math.sqrt(FARTHEST_KL))
        self._put(before, step, length)
        self.guess = length

    def _goal(self) -> float:
        """Log-odds of the forget probability after this step."""
        level, share = self.stop.forget_probability, (self.step + 1) / self.method.steps
        first = _log_odds(self.trace[0].forget_probability)
        return first + (min(1.0, share) if level else share) * (_log_odds(level or NO_LEVEL) - first)

    def _tolerance(self) -> float:
        first = _log_odds(self.trace[0].forget_probability)
        way = first - _log_odds(self.stop.forget_probability or NO_LEVEL)
        last = self.step + 1 >= self.method.steps
        return way / self.method.steps * (LAST_TOLERANCE if last else TOLERANCE)

    def _put(self, before: Mapping[str, Tensor], step: _Step, length: float) -> None:
        put(self.parameters, {name: before[name] + length * step.change[name] for name in before})

    # -- curvature and damping ------------------------------------------------------------------------------------

    def _measure_curvature(self) -> None:
        method = self.method
        if method.curvature == "identity":
            self.dampings.append(0.0)
            return
        self.curvature = RetainCurvature.fit(
            self.model,
            [*self.retain, *self.forget * method.forget_copies],
            modules=method.modules,
            kind=method.curvature,
            seed=method.seed + self.step,
            draws=method.draws,
            batch_size=method.batch_size,
            folder=cache_folder() / "curvature" if method.keep_curvature and self.step == 0 else None,
            display=self.display,
        )
        if self.curvature.warning and self.step == 0:
            console.print(f"warning: {self.curvature.warning}", style="yellow", highlight=False)
        self.dampings.append(method.damping if method.damping is not None else self._best_damping())

    def _damping(self) -> float:
        """Absolute."""
        return self.dampings[-1] * self._unit()

    def _unit(self) -> float:
        return 1.0 if self.method.absolute_damping or not self.curvature else self.curvature.mean_eigenvalue

    def _best_damping(self) -> float:
        """The largest damping that does held-out retain rows no harm; where there is none, the one that harms least.

        A small damping moves the weights far in directions that the retain rows do not use. What else uses them, nobody
        has measured: so it is worth that only where it spares the retain rows something.
        """
        uphill, before, guess, found = self._uphill(), copied(self.parameters), self.guess, dict[float, float]()
        for first in range(0, len(DAMPINGS), TOGETHER):
            tried = DAMPINGS[first : first + TOGETHER]
            steps = self._steps_along(uphill, [damping * self._unit() for damping in tried])
            for damping, step in zip(tried, steps, strict=True):
                self._take(step, self._goal(), self._tolerance())
                found[damping] = self.gauge.measure(self.step).retain_kl
                put(self.parameters, before)
                self.guess = guess
        harmless = HARMLESS * min(1.0, (self.step + 1) / self.method.steps)
        return max((d for d in found if found[d] <= harmless), default=min(found, key=lambda d: (found[d], -d)))

    # -- measuring, stopping, going on ----------------------------------------------------------------------------

    def _kept_kl(self) -> float:
        return self.retain_now.kl(self.model).mean().item()

    def _measured(self) -> Measurement:
        now = self.gauge.measure(self.step)
        for what, value in (("forget probability", now.forget_probability), ("retain KL", now.retain_kl)):
            if not math.isfinite(value):
                raise self._broken(f"the {what} is {value}")
        return now

    def _broken(self, what: str, remedy: str = "") -> TrainingError:
        remedy = remedy or (
            "Part the way into more steps, or raise the damping"
            if self.step
            else "No step was taken yet, so the model's own weights are damaged; restore them"
        )
        return TrainingError(
            f"{self.method.name}, step {self.step}: {what}; nothing was saved and the model is as it was. {remedy}"
        )

    def _met(self, now: Measurement) -> bool:
        """Whether the run ended at the forget probability, which the line search meets by itself."""
        level = self.stop.forget_probability
        return level is not None and now.forget_probability <= level and not self.stop.over_budget(now)

    def _back_to_the_level(self, before: Mapping[str, Tensor], beyond: Measurement) -> str:
        """Bisect the last step for where the run had to stop first; says why it had to."""
        end, within = copied(self.parameters), self.trace[-1]
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            if high - low <= FINEST and not self._far_below_budget(within, beyond):
                break
            share = (low + high) / 2
            self._put_between(before, end, share)
            now = self.gauge.measure(self.step - 1 + share)
            if self.stop.reason(now):
                high, beyond = share, now
            else:
                low, within = share, now
        # A target must be reached, so the run ends beyond it; a budget must not be overrun, so it ends before.
        share, last = (low, within) if self.stop.over_budget(beyond) else (high, beyond)
        self._put_between(before, end, share)
        if share > 0:
            self.trace.append(last)
        return self.stop.reason(beyond)

    def _far_below_budget(self, within: Measurement, beyond: Measurement) -> bool:
        budget = self.stop.retain_kl
        return budget is not None and self.stop.over_budget(beyond) and within.retain_kl < ENOUGH_OF_BUDGET * budget

    def _put_between(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> None:
        put(self.parameters, {name: start[name].lerp(end[name], share) for name in start})

    def _save(self) -> None:
        """Before curvature is measured anew: then a run that goes on from here measures the same."""
        if self.checkpoints and self.step % self.method.refit_every == 0:
            notes = {
                "trace": [asdict(point) for point in self.trace],
                "dampings": self.dampings,
                "guess": self.guess,
                "seconds": self.seconds(),
            }
            self.checkpoints.save(self.step, self.parameters, [], notes)

    def forget_checkpoint(self) -> None:
        """Remove what could be resumed."""
        if self.checkpoints:
            self.checkpoints.remove()

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.checkpoints and (state := self.checkpoints.load([])):
            self.step, self.dampings, self.guess = state.step, state.notes["dampings"], state.notes["guess"]
            self.trace = [Measurement(**point) for point in state.notes["trace"]]
            self.started -= state.notes["seconds"]
            put(self.parameters, state.tensors)


def _log_odds(probability: float) -> float:
    probability = min(max(probability, 1e-12), 1 - 1e-12)
    return math.log(probability / (1 - probability))
