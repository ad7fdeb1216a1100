"""Learning again from a frozen artefact: does what should be gone come back, or what should be there return?

Freeze an artefact, give a fresh learner a budget, watch a probe whose truth is known, and read it between two
references that learn by the same means: the floor, from something that does not hold it, and the ceiling, from
something that does. For an unlearned model the references are a model that never knew and the one that still does, and
it should stay gone; for a learned reward function they are a reward that says nothing and the true one, and it should
return.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, get_args

from palimpsest.progress import Report
from palimpsest.relearning.judgement import ProbeRow, RelearnReport, RelearnSettings, Who, judge


class Artefact(Protocol):
    """What is learned from, and must not change meanwhile."""

    def fingerprint(self) -> str:
        """Equal for equal content."""
        ...


class Learner(Protocol):
    """Something that learns from an artefact, fresh for every seed."""

    def fit_to(self, budget: int) -> None:
        """Go on learning until `budget` units are used in all; never called with less than before."""
        ...

    def probe(self) -> Mapping[str, float]:
        """What it knows now, by name; learning is not disturbed by it."""
        ...


Make: TypeAlias = Callable[[int], Learner]
"""A fresh learner of a seed. Learners of one seed differ in what they learn from and in nothing else."""


@dataclass(frozen=True)
class RelearnSpec:
    """An experiment: three ways to make a learner, and what must stay as it is."""

    settings: RelearnSettings
    make: Make
    """Learns from the artefact under test."""
    floor: Make
    """Learns from what does not hold it."""
    ceiling: Make
    """Learns from what holds all of it."""
    frozen: Mapping[str, Artefact]
    """The artefact, and the references where they are artefacts too, by name."""


def relearn(spec: RelearnSpec, *, report: Report | None = None) -> RelearnReport:
    """Run the experiment: one learner of each kind a seed, probed at every budget on its way.

    Args:
        spec: what to run.
        report: called with (curves done, of how many, a note).

    Raises:
        DataError: a probe that lacks the metric, or gives a value that is not finite.
    """
    settings = spec.settings
    before = {name: artefact.fingerprint() for name, artefact in spec.frozen.items()}
    rows: list[ProbeRow] = []
    makes: Mapping[Who, Make] = {"artefact": spec.make, "floor": spec.floor, "ceiling": spec.ceiling}
    for done, seed in enumerate(settings.seeds):
        for place, who in enumerate(get_args(Who)):
            rows += _learned(who, makes[who](seed), seed, settings)
            if report:
                report(3 * done + place + 1, 3 * len(settings.seeds), f"{who}, seed {seed}")
    changed = [name for name, artefact in spec.frozen.items() if artefact.fingerprint() != before[name]]
    return judge(settings, rows, fingerprints=before, changed=changed)


def replayed(make: Make) -> Make:
    """Learners that learn each budget of a seed once, and play back what was probed whenever it is asked for again.

    For references that several artefacts are read beside.
    """
    kept: dict[int, dict[int, Mapping[str, float]]] = {}
    return lambda seed: _Replay(make, seed, kept.setdefault(seed, {}))


class _Replay:
    def __init__(self, make: Make, seed: int, kept: dict[int, Mapping[str, float]]) -> None:
        self.make, self.seed, self.kept, self.budget = make, seed, kept, 0
        self.learner: Learner | None = None  # made only once there is something new to learn

    def fit_to(self, budget: int) -> None:
        self.budget = budget
        if budget not in self.kept:
            self.learner = self.learner or self.make(self.seed)
            self.learner.fit_to(budget)
            self.kept[budget] = dict(self.learner.probe())

    def probe(self) -> Mapping[str, float]:
        return self.kept[self.budget]


def _learned(who: Who, learner: Learner, seed: int, settings: RelearnSettings) -> list[ProbeRow]:
    rows = []
    for budget in settings.budgets:
        learner.fit_to(budget)
        rows.append(ProbeRow(who, seed, budget, dict(learner.probe())))
    return rows
