"""An update put into a model that was trained further: the direction is kept, how far to go is measured again.

Unlearning updates can be reapplied after further training (K-FADE, arXiv 2602.10568), but the scale at which they were
made is that of the model they were made for. So the line search is run again, on the model as it is now.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from palimpsest.errors import SpecError, UpdateError
from palimpsest.models.language_model import LanguageModel
from palimpsest.progress import console, progress
from palimpsest.unlearn.gauge import Gauge
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Measurement, Stop
from palimpsest.unlearn.update import Update, origins_in
from palimpsest.unlearn.weights import copied, put

LIMIT = 2.0
"""The largest scale that is tried, unless another is asked for."""
STRETCHES = 8
"""Measurements on the way to the limit: between two of them a level is looked for."""
BISECTIONS = 8
"""Halvings of the stretch in which a level is crossed: it is met within 1/256 of it."""
COARSE = 0.1
"""Rounding beyond this share of the change is worth a warning."""


@dataclass(frozen=True)
class Rounding:
    """What the weights' own type loses of a change: ||taken - meant|| / ||meant||, Frobenius; 0 where none is meant.

    A change below half a unit in the last place of a bf16 weight, about 0.2 to 0.4 % of it, is lost altogether.
    """

    overall: float
    worst: float
    """The largest of any one parameter."""
    worst_parameter: str
    """Which one; empty for an update that changes nothing."""


@dataclass(frozen=True, eq=False)
class Reapplied:
    """An update for the model as it is now, and what it does there."""

    update: Update
    """Made for the present weights: applied, undone and saved as any other."""
    scale: float
    """How much of the update that was given it is."""
    stopped: str
    """Why the search ended there, for people."""
    before: Measurement
    """The model as it is now."""
    after: Measurement
    """With the update in it; `retain_kl` is KL(model as it is now || with the update), so what it costs."""
    rounding: Rounding


def reapply(
    update: Update, model: LanguageModel, request: Request, stop: Stop | None = None, *, limit: float = LIMIT
) -> Reapplied:
    """Find the scale at which an update does its work in a model that was trained further. The model is left as it was.

    With a forget level to meet, the scale is raised from 0 until the level is met or the budget is spent, and the
    crossing is bisected: the level is met with next to nothing to spare, the budget never overrun. Without one it is 1,
    or what the budget allows. A level that is not met by `limit` leaves the scale there, and `stopped` says so.

    Args:
        update: made from other weights of the same architecture.
        model: the model as it is now.
        request: on whose forget rows the level, and on whose held-out retain rows the budget is measured.
        stop: its forget levels and its budget are heeded; there are no steps here.
        limit: the largest scale.

    Raises:
        UpdateError: it does not fit the model, it or an earlier reapplication of it is in the model already, or a
            measurement is not finite.
        SpecError: the limit is not above 0, or a level is asked for that the request cannot measure.
    """
    stop, started = stop or Stop(), time.monotonic()
    if not 0 < limit < math.inf:
        raise SpecError(f"reapply: limit is {limit:g}; it is the largest scale that is tried, so above 0")
    _refuse_if_inside(update, model)
    parameters = update.parameters(model)
    base = {"base_weights": model.weights_hash(), "base": model.fingerprint()}
    start = copied(parameters)
    gauge = Gauge(model, request)

    def measure(scale: float) -> Measurement:
        if scale:
            scaled = update.scale(scale)
            put(parameters, {name: scaled.added(name, weight) for name, weight in start.items()})
        return _finite(gauge.measure(scale), update)

    try:
        trace, stopped = _search(measure, stop, limit)
    finally:
        put(parameters, start)
    before, after = trace[0], trace[-1]
    rounding = rounding_of(update.scale(after.step), start)
    _warn_if_coarse(rounding, start)
    provenance = {
        "method": update.provenance.get("method", {}),
        "stop": asdict(stop),
        "request": request.hash,
        **base,
        "origins": list(update.origins),
        "reapplied": {"update": update.identity, "scale": after.step, "limit": limit, "rounding": asdict(rounding)},
        "stopped": stopped,
        "trace": [asdict(point) for point in trace],
        "seconds": time.monotonic() - started,
    }
    made = Update(update.delta, provenance, update.factor * after.step)
    return Reapplied(made, after.step, stopped, before, after, rounding)


def rounding_of(update: Update, weights: Mapping[str, Tensor]) -> Rounding:
    """What is lost when the update is added to these weights in their own type."""
    shares: dict[str, float] = {}
    lost = meant = 0.0
    for name, weight in weights.items():
        change = update.change(name, weight.device).double()
        taken = update.added(name, weight).double() - weight.double()
        lost_here, meant_here = (taken - change).norm().item(), change.norm().item()
        shares[name] = lost_here / meant_here if meant_here else 0.0
        lost, meant = lost + lost_here**2, meant + meant_here**2
    worst = max(shares, key=shares.__getitem__, default="")
    return Rounding(math.sqrt(lost / meant) if meant else 0.0, shares.get(worst, 0.0), worst)


def _search(measure: Callable[[float], Measurement], stop: Stop, limit: float) -> tuple[list[Measurement], str]:
    """The measurements on the way to the scale that is taken, which is the last one's `step`; and why it is."""
    trace = [measure(0.0)]
    if reason := stop.reason(trace[0]):
        return trace, reason
    seeks_a_level = stop.forget_probability is not None or stop.forget_accuracy is not None
    farthest, stretches = (limit, STRETCHES) if seeks_a_level else (min(1.0, limit), 1)
    with progress() as display:
        task = display.add_task("searching the scale", total=stretches, note="")
        for stretch in range(1, stretches + 1):
            now = measure(farthest * stretch / stretches)
            note = f"scale {now.step:.2f}  forget {now.forget_probability:.3f}  retain KL {now.retain_kl:.3f}"
            display.update(task, completed=stretch, note=note)
            if stop.reason(now):
                end, reason = _crossing(measure, stop, trace[-1], now)
                return (trace if end is trace[-1] else [*trace, end]), reason
            trace.append(now)
    return trace, f"the scale was at its limit of {farthest:g}" if seeks_a_level else "all of it was within bounds"


def _crossing(
    measure: Callable[[float], Measurement], stop: Stop, before: Measurement, beyond: Measurement
) -> tuple[Measurement, str]:
    """Where a level is crossed between two measurements: beyond a target, which must be met, but before a budget."""
    for _ in range(BISECTIONS):
        now = measure((before.step + beyond.step) / 2)
        if stop.reason(now):
            beyond = now
        else:
            before = now
    return before if stop.over_budget(beyond) else beyond, stop.reason(beyond)


def _refuse_if_inside(update: Update, model: LanguageModel) -> None:
    if inside := origins_in(model).intersection(update.origins):
        raise UpdateError(
            f"update {min(inside)} ({update.method}) is in {model.name!r} already, as it was made or at another scale; "
            "undo it before reapplying it"
        )


def _finite(now: Measurement, update: Update) -> Measurement:
    if math.isfinite(now.forget_probability) and math.isfinite(now.retain_kl):
        return now
    cause = (
        f"update {update.identity} ({update.method}) leads to numbers that are not finite; lower the limit"
        if now.step
        else "the model's own weights are damaged; restore them"
    )
    raise UpdateError(
        f"at scale {now.step:g} the forget set's answer probability is {now.forget_probability} and KL on held-out "
        f"retain rows {now.retain_kl}: {cause}"
    )


def _warn_if_coarse(rounding: Rounding, weights: Mapping[str, Tensor]) -> None:
    if rounding.overall <= COARSE:
        return
    kind = str(weights[rounding.worst_parameter].dtype).removeprefix("torch.")
    console.print(
        f"warning: {kind} weights take the update with an error of {rounding.overall:.0%} of its size "
        f"({rounding.worst_parameter}: {rounding.worst:.0%}); load the model in fp32 to take all of it",
        style="yellow",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
