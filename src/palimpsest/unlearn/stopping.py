"""When unlearning ends: a budget of steps, a budget of damage, or the forgetting that was asked for."""

from dataclasses import dataclass

from palimpsest.errors import SpecError


@dataclass(frozen=True)
class Measurement:
    """Where unlearning stands after a step."""

    step: float
    """Fractional at the end of a run that stopped between two measurements."""
    forget_probability: float
    """Mean answer probability on the forget set."""
    retain_kl: float
    """KL(start || model) on held-out retain answers, nats/token."""
    forget_accuracy: float | None = None
    """Share of the request's multiple-choice questions that it answers rightly; None where there are none."""


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
    forget_accuracy: float | None = None
    """End when accuracy on the request's multiple-choice questions has come down to this: chance and a margin, say."""

    def __post_init__(self) -> None:
        if self.measure_every < 1:
            raise SpecError(f"stop: measure_every is {self.measure_every}; it counts steps, so at least 1")

    def reason(self, now: Measurement) -> str:
        """Why the run must end here, for people; empty while it may go on.

        Raises:
            SpecError: an accuracy is asked for, but there are no multiple-choice questions to measure it on.
        """
        if self.over_budget(now):
            return f"the budget of {self.retain_kl:g} nats/token on held-out retain rows was used up"
        return self._forgotten(now)

    def met(self, now: Measurement) -> bool:
        """Whether a forget level that was asked for is reached, within the budget."""
        return not self.over_budget(now) and self._forgotten(now) != ""

    def _forgotten(self, now: Measurement) -> str:
        if self.forget_probability is not None and now.forget_probability <= self.forget_probability:
            return f"the forget set was down to an answer probability of {self.forget_probability:.3f}"
        if self.forget_accuracy is not None and _accuracy(now) <= self.forget_accuracy:
            return f"accuracy on the forget set's multiple-choice questions was down to {self.forget_accuracy:.3f}"
        return ""

    def share_of_the_way(self, start: Measurement, before: Measurement, now: Measurement, noise: float) -> float:
        """How much of the way from `start` to a forget level lies between `before` and `now`: the most of the levels.

        Args:
            start: where the run began, above every level.
            before: an earlier measurement.
            now: a later one.
            noise: of the accuracy, which moves by whole questions and by chance; a difference within it is no way gone.
        """
        covered = [0.0]
        if self.forget_probability is not None:
            way = start.forget_probability - self.forget_probability
            covered.append((before.forget_probability - now.forget_probability) / way)
        if self.forget_accuracy is not None:
            way = _accuracy(start) - self.forget_accuracy
            covered.append((_accuracy(before) - _accuracy(now) - noise) / way)
        return max(covered)

    def over_budget(self, now: Measurement) -> bool:
        """Whether more was spent on the retain set than is allowed."""
        return self.retain_kl is not None and now.retain_kl >= self.retain_kl


def _accuracy(now: Measurement) -> float:
    if now.forget_accuracy is None:
        raise SpecError(
            "stop: forget_accuracy needs multiple-choice questions, but the request has none; "
            "give it some, or stop at forget_probability"
        )
    return now.forget_accuracy
