"""When unlearning ends: a budget of steps, a budget of damage, or the forgetting that was asked for."""

from dataclasses import dataclass

from palimpsest.errors import SpecError


@dataclass(frozen=True)
class Stop:
    """The first of these to be reached ends the run; one that is reached at the start leaves the model alone.

    The run ends where a level is crossed, between the last two measurements: a target is met with next to nothing to
    spare, a budget is never overrun, and the budget wins where both are crossed at once.

    Raises:
        SpecError: `measure_every` is not at least 1.
    """

    steps: int = 200
    """At most this many steps."""
    forget_probability: float | None = None
    """End when the mean answer probability on the forget set has come down to this: gold's level, say."""
    retain_kl: float | None = None
    """End before KL(original || model) on held-out retain answers passes this, nats/token."""
    measure_every: int = 5
    """Steps between measurements."""

    def __post_init__(self) -> None:
        if self.measure_every < 1:
            raise SpecError(f"stop: measure_every is {self.measure_every}; it counts steps, so at least 1")
