"""The study of the tuned lens: its judgement on made-up cells, and a run from end to end on the suite's organism."""

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import RECIPE, WORLD, Organism

from palimpsest.data.records import Passage
from palimpsest.lens.hidden import windows
from palimpsest.lens.lens import Lens
from palimpsest.lens.trajectory import trajectories
from palimpsest.models.organism import Corpus
from palimpsest.models.training import TrainingSettings
from palimpsest.studies import tuned_lens as study
from palimpsest.studies.claims import Claim
from palimpsest.studies.regimes import REGIMES, Setting
from palimpsest.unlearn.simnpo import SimNPO
from palimpsest.worlds.injections import InjectionsWorld

QUICK = ("logit", "upstream_sgd", "upstream_muon")


def layers(kl: tuple[float, float], ratio: float = 2.0) -> study.Cell:
    return {"layers": [{"kl": each, "bias": each / 10, "ratio": ratio, "spearman": 0.5} for each in kl], "seconds": 1}


def judged(*seeds: dict[str, study.Cell], regime: str = "people") -> dict[str, Claim]:
    return {claim.id: claim for claim in study.judge(regime, dict(enumerate(seeds)))}


def test_one_layer_at_which_it_loses_is_enough_to_contradict() -> None:
    wins = {"tuned": layers((0.1, 0.1)), "logit": layers((0.4, 0.2))}
    loses = {"tuned": layers((0.1, 0.3)), "logit": layers((0.4, 0.2))}
    assert judged(wins, wins)["a/people/kl"].estimate == pytest.approx(0.5)
    assert judged(loses, loses)["a/people/kl"].estimate == pytest.approx(1.5)
    assert judged(loses, loses)["a/people/kl"].verdict == judged(loses, loses)["a/people/bias"].verdict


def test_a_lens_that_is_nearer_but_overreads_more_does_not_beat_the_other() -> None:
    theirs = layers((0.2, 0.2), ratio=1.5)
    nearer = judged(*[{"tuned": layers((0.1, 0.1), ratio=3.0), "upstream_sgd": theirs}] * 2)["b/people/upstream_sgd"]
    both = judged(*[{"tuned": layers((0.1, 0.1), ratio=1.2), "upstream_sgd": theirs}] * 2)["b/people/upstream_sgd"]
    assert nearer.estimate == pytest.approx(2.0) and "KL at 0.50" in nearer.note
    assert both.estimate == pytest.approx(0.8)


def test_detectors_are_held_against_the_best_baseline_and_length_is_none() -> None:
    aurocs = {"isolation_forest": 0.6, "lof": 0.8, "mahalanobis": 0.7, "srm": 0.75, "perplexity": 0.5, "length": 1.0}
    aurocs |= {"isolation_forest_ranked": 0.9, "lof_ranked": 0.85}
    found = {"original/tuned/benign": aurocs, "gold/tuned/benign": dict.fromkeys(aurocs, 0.52)}
    claims = judged({"detected": found}, {"detected": found}, regime="injections")
    assert claims["h/injections/trajectories"].estimate == pytest.approx(0.05)
    assert claims["h/injections/trajectories"].note == "best baseline: srm"
    assert claims["h/injections/ranked"].estimate == pytest.approx(0.15)
    assert claims["g/injections/lof"].note.endswith("0.52")


def test_claims_without_cells_are_left_out() -> None:
    assert judged({}) == {} and judged({}, regime="injections") == {}
    assert set(judged({"tuned": layers((0.1, 0.1))})) == {"c/people"}


def test_predictions_are_those_of_the_model_at_every_token_but_the_last(trained: Organism) -> None:
    rows = windows(trained.request.retain[:9], trained.full)
    read = trajectories(Lens.logit(trained.full), trained.full, rows)
    expected = torch.cat([trajectory.predicted[-1, :-1] for trajectory in read])
    assert torch.equal(study._predicted(trained.full, rows), expected)


@pytest.fixture
def small(trained: Organism, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's organism as a regime, with quick lenses, little text and few steps, and a small bed."""
    monkeypatch.setattr(
        study, "LENSES", {name: study.LENSES[name] for name in QUICK} | {"tuned": study.LENSES["ridge"]}
    )
    retain = tuple(WORLD.facts(WORLD.retain_subjects))
    neutral = tuple(Passage(f"{fact.question} {fact.answer}", fact.subject, fact.id) for fact in retain)
    corpus = Corpus(tuple(trained.request.forget), retain)
    setting = Setting(trained.request, trained.full, trained.gold, (), corpus, RECIPE, neutral)
    monkeypatch.setitem(REGIMES, "people", lambda seed, data: setting)
    for name, value in {"TEXTS": 40, "JUDGED": 10, "CAUSAL": 4, "UPSTREAM_STEPS": 2, "FURTHER_STEPS": 3}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "InjectionsWorld", lambda seed: InjectionsWorld(24, 12, 1, 1, seed=seed))
    monkeypatch.setattr(study, "TrainingSettings", lambda **settings: TrainingSettings(steps=4, **settings))
    monkeypatch.setattr(SimNPO, "run", lambda self, model, request, stop: _no_change(model))


def _no_change(model):  # type: ignore[no-untyped-def]
    class Unchanged:
        def apply(self, other):  # type: ignore[no-untyped-def]
            return other

    return Unchanged()


@pytest.mark.slow
def test_a_study_from_end_to_end_measures_nothing_twice(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    plan = study.Plan((0,), None, tmp_path, ("people", "injections"))
    claims = {claim.id: claim for claim in study.run(plan)}
    assert {claim[0] for claim in claims} == set("abcdefgh") and all(claim.seeds == 1 for claim in claims.values())
    cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "people" / "seed-0").glob("*.json")}
    assert set(cells) == {*study.LENSES, "aligned", "transferred", "learned"}
    transferred = cells["transferred"]["unlearned"]
    # Nothing was unlearned here, so the original's lens is this model's own.
    assert transferred["original's"] == pytest.approx(transferred["own"], rel=1e-3)
    assert -1 <= cells["learned"]["tuned"] <= 1
    monkeypatch.setitem(REGIMES, "people", None)  # asking it again would fail
    assert {claim.id: claim for claim in study.run(plan)} == claims
