"""Methods that know the direction of their change from the start, and have only its length to find."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

from torch import Tensor

from palimpsest.errors import TrainingError
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.gauge import Gauge
from palimpsest.unlearn.line_search import cross
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Measurement, Stop
from palimpsest.unlearn.update import Update
from palimpsest.unlearn.weights import copied, put

DOUBLINGS = 12
"""Of the first length, at most."""


def go_along(
    direction: Mapping[str, Tensor],
    first: float,
    method: Method,
    model: LanguageModel,
    request: Request,
    stop: Stop,
    *,
    started: float,
    doublings: int = DOUBLINGS,
) -> Update:
    """Go along a fixed direction of change until `stop`; the model is left as it was.

    The first length is doubled until the run has to stop; the last stretch is bisected. Where nothing stops it (no
    level can be reached along this direction), it ends where the forget set was lowest. Without any level, at the
    first length. A measurement's `step` is the length.

    Args:
        direction: the change at length 1, by parameter.
        first: the length to begin with.
        method: whose change it is.
        model: the model to start from.
        request: what to forget and keep.
        stop: levels and budgets; its steps are not for this.
        started: when the method began, on the monotonic clock.
        doublings: of the first length, at most; with none it is the furthest.

    Raises:
        TrainingError: the start model's measurements are not finite.
    """
    base = {"base_weights": model.weights_hash(), "base": model.fingerprint()}
    provenance = {"method": method.settings(), "stop": asdict(stop), "request": request.hash, **base}
    everything = dict(model.network.named_parameters())
    parameters: dict[str, Tensor] = {name: everything[name] for name in direction}
    gauge, start = Gauge(model, request), copied(parameters)

    def measure(length: float) -> Measurement:
        moved = {name: start[name] + length * direction[name].to(start[name].device) for name in start}
        put(parameters, moved)
        return gauge.measure(length)

    try:
        reason, trace = _search(measure, first, doublings, stop, method.name)
        measure(trace[-1].step)
        found = {"stopped": reason, "trace": [asdict(point) for point in trace]}
        return Update.between(start, parameters, provenance | found | {"seconds": time.monotonic() - started})
    finally:
        put(parameters, start)


def _search(
    measure: Callable[[float], Measurement], first: float, doublings: int, stop: Stop, name: str
) -> tuple[str, list[Measurement]]:
    """Why it stopped, and the measurements on the way, the last of them where it stopped."""
    trace = [measure(0.0)]
    if not _finite(trace[0]):
        raise TrainingError(f"{name}: the model's own weights are damaged; restore them")
    if reason := stop.reason(trace[0]):
        return reason, trace
    if stop.forget_probability is None and stop.forget_accuracy is None and stop.retain_kl is None:
        return f"no level was asked for, so it went {first:g} far", [*trace, measure(first)]
    for doubling in range(doublings + 1):
        now = measure(first * 2**doubling)
        if not _finite(now):
            break
        if stop.reason(now):
            return _bisected(measure, stop, trace, now)
        trace.append(now)
    lowest = min(range(len(trace)), key=lambda place: trace[place].forget_probability)
    return "the level was not reached at any length; it ends where the forget set was lowest", trace[: lowest + 1]


def _bisected(
    measure: Callable[[float], Measurement], stop: Stop, trace: list[Measurement], beyond: Measurement
) -> tuple[str, list[Measurement]]:
    begun, width = trace[-1].step, beyond.step - trace[-1].step
    share, last, beyond = cross(stop, lambda share: measure(begun + share * width), trace[-1], beyond)
    return stop.reason(beyond), [*trace, last] if share > 0 else trace


def _finite(now: Measurement) -> bool:
    return math.isfinite(now.forget_probability) and math.isfinite(now.retain_kl)
