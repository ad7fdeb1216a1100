"""Curves that are kept: learned once, played back, never for another artefact, and not where it changed meanwhile."""

import json
from collections.abc import Mapping
from pathlib import Path

from palimpsest.relearning.judgement import RelearnSettings
from palimpsest.relearning.protocol import RelearnSpec, relearn
from palimpsest.studies.relearning_cells import kept_curves


class Counted:
    """A learner that knows its budget, and counts how often any was made."""

    made = 0

    def __init__(self, seed: int) -> None:
        Counted.made += 1
        self.seed, self.budget = seed, 0

    def fit_to(self, budget: int) -> None:
        self.budget = budget

    def probe(self) -> Mapping[str, float]:
        return {"m": self.budget + self.seed / 10}


def test_a_curve_is_learned_once_and_played_back_at_every_budget(tmp_path: Path) -> None:
    Counted.made = 0
    for _ in range(2):
        learner = kept_curves(Counted, (1, 4), tmp_path, lambda seed: "stone")(3)
        found = []
        for budget in (1, 4):
            learner.fit_to(budget)
            found.append(learner.probe())
        assert found == [{"m": 1.3}, {"m": 4.3}]
    assert Counted.made == 1
    assert json.loads((tmp_path / "seed-3-stone.json").read_text()) == {"1": {"m": 1.3}, "4": {"m": 4.3}}


def test_another_artefact_is_another_curve(tmp_path: Path) -> None:
    Counted.made = 0
    for content in ("one", "other"):
        kept_curves(Counted, (1,), tmp_path, lambda seed, content=content: content)(0)  # type: ignore[misc]
    assert Counted.made == 2


def test_what_changed_while_it_was_learned_from_is_seen_and_leaves_no_file(tmp_path: Path) -> None:
    class Drifting:
        looks = 0

        def fingerprint(self) -> str:
            self.looks += 1
            return str(self.looks)

    drifting = Drifting()
    spec = RelearnSpec(
        RelearnSettings(budgets=(1,), seeds=(0,), metric="m", want="return"),
        kept_curves(Counted, (1,), tmp_path, lambda seed: drifting.fingerprint()),
        Counted,
        Counted,
        {"the reward": drifting},
    )
    assert relearn(spec).reason == "changed"
    assert list(tmp_path.glob("*.json")) == []
