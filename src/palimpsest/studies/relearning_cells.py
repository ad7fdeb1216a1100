"""Learners whose curves are kept on disk, so that an experiment that was broken off goes on from there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from palimpsest.files import write_json
from palimpsest.relearning.judgement import RelearnReport
from palimpsest.relearning.protocol import Make, RelearnSpec, relearn
from palimpsest.studies.cells import Cell, kept


def kept_relearning(
    spec: RelearnSpec, folder: Path, name: str, fingerprint: Callable[[int], str], *, ceiling: str
) -> RelearnReport:
    """Relearn with every curve kept in the folder, and the report beside them.

    Args:
        spec: what is relearned, and between which ends.
        folder: keeps the curves of floor and ceiling, which other designs share, and those of this one.
        name: of the design.
        fingerprint: of the artefact that a seed learns from.
        ceiling: what its ceiling learns from.
    """
    budgets = spec.settings.budgets
    kept_spec = replace(
        spec,
        make=kept_curves(spec.make, budgets, folder / name, fingerprint),
        floor=kept_curves(spec.floor, budgets, folder / "floor", lambda _: "constant"),
        ceiling=kept_curves(spec.ceiling, budgets, folder / "ceiling", lambda _: ceiling),
    )
    report = relearn(kept_spec)
    write_json(folder / f"{name}.json", report.to_json())
    return report


def kept_curves(make: Make, budgets: Sequence[int], folder: Path, fingerprint: Callable[[int], str]) -> Make:
    """Learners that play back a seed's curve from its file; where there is none, it is learned and written now.

    A file's name tells what was learned from, so a curve is never played back for anything else. What changed while it
    was learned from leaves no file, which would hide that.

    Args:
        make: a fresh learner of a seed.
        budgets: at which it is probed.
        folder: keeps one JSON file a seed.
        fingerprint: of what a seed learns from.
    """

    def played(seed: int) -> _Curve:
        before, curve = fingerprint(seed), {}

        def learned() -> Cell:
            learner = make(seed)
            for budget in budgets:
                learner.fit_to(budget)
                curve[str(budget)] = dict(learner.probe())
            return curve if fingerprint(seed) == before else {}

        cell = kept(folder / f"seed-{seed}-{before[:12]}.json", f"seed {seed}: {folder.name}", learned)
        return _Curve(cell or curve)

    return played


class _Curve:
    def __init__(self, values: Mapping[str, Mapping[str, float]]) -> None:
        self.values, self.budget = values, 0

    def fit_to(self, budget: int) -> None:
        self.budget = budget

    def probe(self) -> Mapping[str, float]:
        return self.values[str(self.budget)]
