"""When unlearning ends: a budget of steps, a budget of damage, or the forgetting that was asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stop:
    """The first of these to be reached ends the run.

    Both levels are met exactly, not overrun: the weights are taken between the last two measurements, where the level
    is crossed.
    """

    steps: int = 200
    """At most this many steps."""
    forget_probability: float | None = None
    """End when the mean answer probability on the forget set has come down to this: gold's level, say."""
    retain_kl: float | None = None
    """End before KL(original || model) on held-out retain answers passes this, nats/token."""
    measure_every: int = 5
    """Steps between measurements."""
