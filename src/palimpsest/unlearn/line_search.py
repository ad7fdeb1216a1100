"""Finding where a falling quantity meets a goal, with as few evaluations as can be."""

from collections.abc import Callable

from palimpsest.unlearn.stopping import Measurement, Stop

NARROWINGS = 30
"""Evaluations at most, once the goal is bracketed."""
HALVINGS = 10
"""Of a guess at which the value is no lower than at 0."""
BISECTIONS = 8
"""Of a stretch in which a run had to stop: its level is met within 1/256 of it."""


def meet(value: Callable[[float], float], goal: float, guess: float, *, tolerance: float, largest: float) -> float:
    """A step length at which `value` is at or below `goal`, with little to spare: `goal - tolerance <= value <= goal`.

    The guess is doubled until the goal is bracketed, then false position (Illinois: Dowell & Jarratt 1971) narrows the
    bracket. 0 where the goal is met at once. Where it is not met: `largest`, or the last length before the value rises
    again; 0 where it rises from the start.

    Args:
        value: the quantity at a step length.
        goal: where it should come down to.
        guess: where to begin.
        tolerance: how far below the goal is still good.
        largest: the longest step allowed.
    """
    low, at_low = 0.0, value(0.0) - goal
    if at_low <= 0:
        return 0.0
    high = min(guess, largest)
    at_high = value(high) - goal
    for _ in range(HALVINGS):
        if at_high <= at_low:
            break
        high /= 2
        at_high = value(high) - goal
    else:
        return 0.0
    while at_high > 0:
        if high >= largest:
            return high
        further = min(2 * high, largest)
        at_further = value(further) - goal
        if at_further > at_high:
            return high
        low, at_low, high, at_high = high, at_high, further, at_further
    to_spare, moved = -at_high, ""
    for _ in range(NARROWINGS):
        if to_spare <= tolerance:
            break
        share = min(max(at_low / (at_low - at_high), 0.05), 0.95)
        middle = low + share * (high - low)
        at_middle = value(middle) - goal
        # An end that stays where it is twice counts for half, else the bracket would shrink from one side alone.
        if at_middle <= 0:
            at_low = at_low / 2 if moved == "high" else at_low
            high, at_high, to_spare, moved = middle, at_middle, -at_middle, "high"
        else:
            at_high = at_high / 2 if moved == "low" else at_high
            low, at_low, moved = middle, at_middle, "low"
    return high


def cross(
    stop: Stop, at: Callable[[float], Measurement], before: Measurement, beyond: Measurement
) -> tuple[float, Measurement, Measurement]:
    """Bisect a stretch for where a run had to stop first.

    Args:
        stop: when it has to.
        at: measures a share of the stretch, from 0 to 1.
        before: the measurement at 0, where it need not stop.
        beyond: the one at 1, where it must.

    Returns:
        The share to stop at, the measurement there, and the first measured that gives the reason. A target must be
        reached, so the run ends beyond it; a budget must not be overrun, so it ends before.
    """
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        now = at(middle)
        if stop.reason(now):
            high, beyond = middle, now
        else:
            low, before = middle, now
    return (low, before, beyond) if stop.over_budget(beyond) else (high, beyond, beyond)
