"""The study of concept vectors: judged on made-up cells, and run in a world of the size of the suite."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Organism

from palimpsest.models.organism import Corpus, Recipe
from palimpsest.studies import concept_cells, unlearned_models
from palimpsest.studies import concept_vectors as study
from palimpsest.studies.cells import Cell
from palimpsest.studies.claims import Claim
from palimpsest.studies.regimes import Setting
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.rmu import RMU

Seed = dict[str, Cell]
FINE_TUNING = unlearned_models.fine_tuning()


def effect(own: float, unrelated: float = 0.0) -> Cell:
    return {"own": own, "unrelated": unrelated}


def ablation(concept: Cell, selective: float = 0.0) -> Cell:
    return {"concept": concept, "random": effect(0.0), "selective": effect(selective)}


ABLATIONS = {
    "single": ablation(effect(-0.8)),
    "noise": ablation(effect(-0.4, -0.1), selective=-0.2),
    "set": ablation(effect(-6.0, -0.5)),
}


def cell(
    *,
    forget: float = 0.1,
    unseen: float = 0.9,
    precision: float = 0.9,
    null: float = 0.4,
    cosine: float = 0.99,
    after: float = 0.3,
) -> Cell:
    return {
        "forget": forget,
        "unseen": unseen,
        "found": {"precision": precision, "null": null, "z": 3.0},
        "traced": {"cosine": cosine, "jaccard": 0.8},
        "relearned": {"held_out": {"before": forget, "after": after}, "taught": {"before": forget, "after": 0.75}},
    }


def seed_of(**changed: Cell) -> Seed:
    """A seed in which every claim holds, with some cells changed."""
    plain = {
        "full": cell(forget=0.9) | {"ablations": ABLATIONS},
        "gold": cell(precision=0.4, after=0.05),
        "sham": cell(forget=0.8, cosine=0.995),
        **{name: cell(cosine=0.99 + 1e-4 * n, after=0.3 + 0.01 * n) for n, name in enumerate(FINE_TUNING)},
        "rmu": cell(cosine=0.6, after=0.2),
        "needle": cell(forget=0.8, cosine=0.2, after=0.1),
        "ablated": cell(forget=0.1, unseen=0.8),
    }
    return plain | changed


def every(**changed: Any) -> Seed:
    """Every fine-tuning method with the same numbers."""
    return {name: cell(**changed) for name in FINE_TUNING}


def ablated(**changed: Cell) -> Seed:
    return {"full": cell(forget=0.9) | {"ablations": ABLATIONS | changed}}


def judged(seed: Seed) -> dict[str, Claim]:
    """Of two seeds alike, so that every interval has no width."""
    return {claim.id: claim for claim in study.judge({0: seed, 1: seed})}


def test_every_claim_holds_where_it_should() -> None:
    claims = judged(seed_of())
    assert len(claims) == 14
    assert {claim.verdict for claim in claims.values()} == {"reproduced"}
    assert claims["b/noise"].estimate == pytest.approx(-0.3)
    assert claims["b/fires"].estimate == pytest.approx(-0.2)
    assert claims["b/set"].estimate == pytest.approx(-5.5)
    assert claims["d/set"].estimate == pytest.approx(0.1 / 0.9 - 0.8 / 0.9)
    assert claims["e/order"].estimate == pytest.approx(1)


@pytest.mark.parametrize(
    ("broken", "changed"),
    [
        ("a/found", {"full": cell(precision=0.3) | {"ablations": ABLATIONS}}),
        ("a/gold", {"gold": cell()}),
        ("b/noise", ablated(noise=ablation(effect(-0.1, -0.4)))),
        ("b/fires", ablated(noise=ablation(effect(-0.4), selective=-0.5))),
        ("b/single", ablated(single=ablation(effect(-0.01)))),
        ("b/set", ablated(set=ablation(effect(-6.0, -6.0)))),
        ("c/cosine", {FINE_TUNING[0]: cell(cosine=0.9)}),
        ("c/still", every(precision=0.3)),
        ("c/sham", {"sham": cell(cosine=0.9)}),
        ("d/passes", {"needle": cell(cosine=0.8)}),
        ("d/answers", {"needle": cell(forget=0.2)}),
        ("d/set", {"ablated": cell(forget=0.8, unseen=0.1)}),
        (
            "e/order",
            {name: cell(cosine=0.9 + 0.01 * n, after=0.5 - 0.01 * n) for n, name in enumerate(FINE_TUNING)}
            | {"rmu": cell(cosine=0.6, after=0.7), "needle": cell(cosine=0.2, after=0.9)},
        ),
        ("e/returns", {"gold": cell(after=0.6)}),
    ],
)
def test_every_claim_is_contradicted_where_it_should_be(broken: str, changed: Seed) -> None:
    assert judged(seed_of(**changed))[broken].verdict == "contradicted"


@pytest.mark.parametrize("missing", list(seed_of()))
def test_claims_whose_cells_are_missing_are_left_out(missing: str) -> None:
    left = judged({name: found for name, found in seed_of().items() if name != missing})
    assert set(left) < set(judged(seed_of()))


@pytest.mark.slow
def test_a_study_from_end_to_end_measures_nothing_twice(
    trained: Organism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person of the suite's organism in place of a world: what it finds there is not judged."""
    setting = Setting(trained.request, trained.full, trained.gold, (), Corpus((), ()), Recipe())
    monkeypatch.setattr(study, "lore", lambda seed: setting)
    methods = (NPO(learning_rate=1e-3), RMU(learning_rate=3e-3))
    for module in (study, unlearned_models):
        monkeypatch.setattr(module, "METHODS", methods)
    monkeypatch.setattr(unlearned_models, "STEPS", 30)
    monkeypatch.setattr(unlearned_models, "SHAM_STEPS", 20)
    monkeypatch.setattr(unlearned_models, "RELEARNING_STEPS", 5)
    monkeypatch.setattr(concept_cells, "NULL_SETS", 3)
    claims = {claim.id: claim for claim in study.run((0,), tmp_path)}
    assert len(claims) == 14
    cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "seed-0").glob("*.json")}
    assert set(cells) == {"full", "gold", "sham", "npo", "rmu", "needle", "ablated"}
    full, needle, ablated = (cells[name] for name in ("full", "needle", "ablated"))
    assert full["traced"]["cosine"] == pytest.approx(1) and full["traced"]["jaccard"] == 1 and full["kl_unseen"] == 0
    assert needle["traced"]["cosine"] < 0.5
    assert ablated["forget"] < full["forget"]
    assert full["ablations"]["set"]["concept"]["own"] < full["ablations"]["set"]["random"]["own"]

    monkeypatch.setattr(study, "lore", None)  # asking it again would fail
    assert {claim.id: claim for claim in study.run((0,), tmp_path)} == claims
