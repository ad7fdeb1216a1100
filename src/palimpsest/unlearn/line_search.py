"""Finding where a falling quantity meets a goal, with as few evaluations as can be."""

from collections.abc import Callable


def meet(value: Callable[[float], float], goal: float, guess: float, *, tolerance: float, largest: float) -> float:
    """A step length at which `value` is at or below `goal`, with little to spare: `goal - tolerance <= value <= goal`.

    The guess is doubled until the goal is bracketed, then false position (Illinois) narrows the bracket. Where the goal
    is not met within `largest`, that is the answer.

    Args:
        value: the quantity at a step length; above the goal at 0.
        goal: where it should come down to.
        guess: where to begin.
        tolerance: how far below the goal is still good.
        largest: the longest step allowed.
    """
    low, at_low = 0.0, value(0.0) - goal
    high = min(guess, largest)
    at_high = value(high) - goal
    while at_high > 0:
        if high >= largest:
            return high
        low, at_low, high = high, at_high, min(2 * high, largest)
        at_high = value(high) - goal
    best = high
    for _ in range(30):
        if at_high >= -tolerance:
            break
        share = min(max(at_low / (at_low - at_high), 0.05), 0.95)
        middle = low + share * (high - low)
        at_middle = value(middle) - goal
        if at_middle <= 0:
            high, at_high, best = middle, at_middle, middle
            at_low /= 2
        else:
            low, at_low = middle, at_middle
    return best
