"""The study of recovery: judged on made-up cells, and run in a world of the size of the suite."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import Organism

from palimpsest.models.organism import Corpus, Recipe
from palimpsest.studies import recovery as study
from palimpsest.studies import recovery_cells, unlearned_models
from palimpsest.studies.cells import Cell
from palimpsest.studies.claims import Claim
from palimpsest.studies.regimes import REGIMES, Setting
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.rmu import RMU

Seed = dict[str, Cell]
FINE_TUNING = unlearned_models.fine_tuning()
ATTACKS = ("int4", "nf4", "pruned_0.3", "paraphrase", "direction")


def cell(asked: float, benign: float = 0.1, attacked: float = 0.1, depth: float = 0.9, **attacks: float) -> Cell:
    def curve(last: float) -> Cell:
        return {"asked": [0.1, last], "taught": [0.1, 0.9]}

    lessons = {"related": asked, "forget": 0.9, "retain": benign}
    return {
        "forget": 0.1,
        "attacked": dict.fromkeys(ATTACKS, attacked) | attacks,
        "relearning": {
            f"{lesson}, rate {rate:g}": curve(value)
            for lesson, value in lessons.items()
            for rate in recovery_cells.GRID.learning_rates
        },
        "inside": {"depth": depth, "not_patched_back": 0.5, "distance": 1.0, "silence": -0.1},
    }


def seed_of(**changed: Cell) -> Seed:
    """Models that stay gone, but for the sham, and RMU under projection."""
    plain = {
        "full": cell(0.9, benign=0.9, attacked=0.9, depth=0.0),
        "gold": cell(0.1, depth=1.0),
        "sham": cell(0.8, benign=0.8, attacked=0.8, depth=0.1),
        **{name: cell(0.12, benign=0.3, attacked=0.3) for name in FINE_TUNING},
        "rmu": cell(0.12, direction=0.85),
        "needle": cell(0.7, depth=0.2),
    }
    return plain | changed


def judged(seed: Seed) -> dict[str, Claim]:
    """Of two seeds alike, so that every interval has no width."""
    return {claim.id: claim for claim in study.judge({0: seed, 1: seed})}


def test_the_numbers_are_shares_of_the_way_from_gold_to_the_original() -> None:
    claims = judged(seed_of())
    assert claims["a/npo"].estimate == pytest.approx(0.02 / 0.8)
    assert claims["a/sham"].estimate == pytest.approx(0.7 / 0.8)
    assert claims["b/benign"].estimate == pytest.approx(0.2 / 0.8)
    assert claims["c/four_bits"].estimate == pytest.approx(0.2 / 0.8)
    assert claims["c/direction"].estimate == pytest.approx(0.75 / 0.8)
    assert claims["d/cheap"].estimate == 1 and "depth 1.00" in claims["d/cheap"].note
    assert {claim.verdict for name, claim in claims.items() if name != "d/cheap"} == {"reproduced"}
    assert claims["a/kfade"].note.startswith("sham 0.88")


@pytest.mark.parametrize(
    ("broken", "changed"),
    [
        ("a/npo", {"npo": cell(0.5)}),
        ("a/sham", {"sham": cell(0.2)}),
        ("b/benign", {name: cell(0.12) for name in FINE_TUNING}),
        ("c/four_bits", {name: cell(0.12) for name in FINE_TUNING}),
        ("c/prompts", {name: cell(0.12, attacked=0.3, paraphrase=0.1) for name in FINE_TUNING}),
        ("c/direction", {"rmu": cell(0.12)}),
    ],
)
def test_a_claim_is_contradicted_where_it_should_be(broken: str, changed: Seed) -> None:
    assert judged(seed_of(**changed))[broken].verdict == "contradicted"


def test_an_attack_that_breaks_the_original_tells_nothing() -> None:
    seed = seed_of()
    seed["full"]["attacked"]["int4"] = 0.2
    assert study.recovered(seed, "npo", "int4") is None
    assert study.recovered(seed, "npo", "nf4") == pytest.approx(0.25)


@pytest.mark.parametrize("missing", ["full", "gold", "npo", "rmu"])
def test_claims_whose_cells_are_missing_are_left_out(missing: str) -> None:
    left = judged({name: found for name, found in seed_of().items() if name != missing})
    assert set(left) < set(judged(seed_of()))


@pytest.mark.slow
def test_a_study_from_end_to_end_measures_nothing_twice(
    trained: Organism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(trained.request, trained.full, trained.gold, (), Corpus((), ()), Recipe())
    monkeypatch.setitem(REGIMES, "people", lambda seed, data: setting)
    methods = (NPO(learning_rate=1e-3), RMU(learning_rate=3e-3))
    for module in (study, unlearned_models):
        monkeypatch.setattr(module, "METHODS", methods)
    monkeypatch.setattr(unlearned_models, "STEPS", 30)
    monkeypatch.setattr(unlearned_models, "SHAM_STEPS", 5)
    short = replace(recovery_cells.GRID, learning_rates=(1e-3,), steps=(0, 3))
    for module in (study, recovery_cells):
        monkeypatch.setattr(module, "GRID", short)
    # Four examples before a question are too long for this organism.
    monkeypatch.setattr(recovery_cells, "prompt_attacks", lambda *_, **__: [])
    claims = {claim.id: claim for claim in study.run((0,), tmp_path)}
    cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "seed-0").glob("*.json")}
    assert set(cells) == {"full", "gold", "sham", "npo", "rmu", "needle"}
    full, gold = cells["full"], cells["gold"]
    assert full["inside"] == {"depth": 0.0, "not_patched_back": None, "distance": 0.0, "silence": -full["forget"]}
    assert gold["inside"]["depth"] == 1
    assert full["relearning"]["related, rate 0.001"]["asked"][0] > 0.8 > gold["attacked"]["int8"]
    assert claims["a/sham"].estimate is not None and claims["a/sham"].estimate > 0.5
    monkeypatch.setitem(REGIMES, "people", None)  # asking it again would fail
    assert {claim.id: claim for claim in study.run((0,), tmp_path)} == claims
