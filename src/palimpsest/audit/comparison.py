"""Models side by side at one forget level, over seeds: what each still says, what it cost. Plain data and its means."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from palimpsest.audit.results import Role
from palimpsest.metrics.statistics import over_seeds


@dataclass(frozen=True)
class Quantity:
    """What is measured of every model; one number a model and seed."""

    title: str
    unit: str
    """`probability` or `nats/token`."""


QUANTITIES: dict[str, Quantity] = {
    "forget": Quantity("answer probability on the forget rows", "probability"),
    "reworded": Quantity("answer probability in wordings never trained on", "probability"),
    "harm": Quantity("KL(original || model) on retain rows that nothing looked at", "nats/token"),
    "unseen": Quantity("answer probability on those rows", "probability"),
    "from_gold": Quantity("KL(gold || model) on the forget answers", "nats/token"),
}
"""By the names under which they are kept. `reworded` and `from_gold` need other wordings and a gold."""


@dataclass(frozen=True)
class Compared:
    """One model made with one seed."""

    name: str
    role: Role
    seed: int
    reached: bool
    """Whether it came down to the forget level; true of controls."""
    values: dict[str, float]
    """By `QUANTITIES`."""
    settings: dict[str, Any]
    """Those that the search chose."""
    seconds: float
    """What making it took, every trial together."""


@dataclass(frozen=True)
class Mean:
    """A quantity over seeds; without a second seed there is no interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """All that a comparison found."""

    title: str
    trials: int
    """Runs that each method was given, in each seed, to be tuned by."""
    models: tuple[Compared, ...]
    spec: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Controls first, then methods, each in the order of the specification."""
        roles = {model.name: model.role for model in self.models}
        return sorted(roles, key=lambda name: roles[name] == "unlearned")

    def of(self, name: str) -> list[Compared]:
        """One model's results, by seed."""
        return sorted((model for model in self.models if model.name == name), key=lambda model: model.seed)

    def role(self, name: str) -> Role:
        """Control or unlearned."""
        return self.of(name)[0].role

    def reached(self, name: str) -> tuple[int, int]:
        """In how many seeds it came down to the forget level, and of how many."""
        models = self.of(name)
        return sum(model.reached for model in models), len(models)

    def mean(self, name: str, quantity: str) -> Mean | None:
        """Over the seeds in which the model came down to the level; None where there is no such value.

        KL is averaged on the logarithmic scale: one seed's disaster is not ten seeds' mean.
        """
        values = [model.values[quantity] for model in self.of(name) if model.reached and quantity in model.values]
        ratio = QUANTITIES[quantity].unit == "nats/token" and all(value > 0 for value in values)
        value, low, high = over_seeds(values, ratio=ratio)
        return None if value is None else Mean(value, low, high)

    @property
    def left(self) -> str:
        """What a method leaves legible although the level is met: other wordings, or else its distance from gold."""
        for quantity in ("reworded", "from_gold"):
            if any(quantity in model.values for model in self.models if model.role == "unlearned"):
                return quantity
        return "forget"

    def front(self) -> list[str]:
        """The methods that no other beats both in harm and in what is left, the gentlest first."""
        places = {}
        for name in self.names:
            harm, left = self.mean(name, "harm"), self.mean(name, self.left)
            if self.role(name) == "unlearned" and harm and left:
                places[name] = (harm.value, left.value)
        return [
            name
            for name in sorted(places, key=places.__getitem__)
            if not any(_beats(other, places[name]) for other in places.values())
        ]

    def to_json(self) -> dict[str, Any]:
        """As plain data, means included."""
        means = {
            name: {quantity: asdict(mean) for quantity in QUANTITIES if (mean := self.mean(name, quantity))}
            for name in self.names
        }
        return asdict(self) | {"means": means, "front": self.front()}


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)
