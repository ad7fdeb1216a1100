"""The types in which measurements travel: per-item rows, a score with its interval, a comparison with gold."""

from dataclasses import dataclass
from typing import Literal

Better = Literal["toward gold", "lower", "higher"]
"""Which way an unlearned model should move: a forget-side score toward gold's, a damage down, a utility up."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What is measured, on which rows, by which versioned definition."""

    name: str
    """The field's term, e.g. `answer_probability`."""
    on: str
    """The rows: `forget`, `forget_reworded`, `retain_unseen`."""
    definition: str
    """A named version, e.g. `truth_ratio@tofu_paper`."""
    unit: str
    """`probability`, `share`, `nats/token`, `ratio`."""
    label: str
    """A heading for people, e.g. `Answer probability`."""
    explanation: str
    """One sentence: what it is and how to read it."""
    better: Better

    @property
    def key(self) -> str:
        """`on/name`, unique within an audit."""
        return f"{self.on}/{self.name}"


@dataclass(frozen=True, slots=True)
class Row:
    """One item's value: the evidence that every headline number is recomputed from."""

    model: str
    measure: str
    """A `Measure.key`."""
    item: str
    """The record's id."""
    cluster: str
    """The record's subject, or its id when it has none."""
    value: float


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over items with its interval."""

    value: float
    low: float
    """Lower end of the 95 % bootstrap interval, clustered by subject."""
    high: float
    n: int
    """Items."""
    clusters: int
    """Subjects."""


@dataclass(frozen=True, slots=True)
class Equivalence:
    """A two one-sided tests (TOST) comparison of a model with gold on the same items, clustered by subject."""

    difference: float
    """Mean of model minus gold."""
    low: float
    """Lower end of the 90 % interval of the difference; equivalent when the interval lies within +-margin."""
    high: float
    margin: float
    p: float
    """The larger of the two one-sided p-values."""
    smallest_effect: float
    """The smallest true difference that this many subjects would show (two-sided 5 %) with 80 % power."""
    equivalent: bool
