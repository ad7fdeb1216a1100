"""The study that dissects unlearned models: judged on made-up cells, and run in a world of the size of the suite."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Organism

from palimpsest.models.organism import Corpus, Recipe
from palimpsest.studies import dissecting as study
from palimpsest.studies import dissecting_cells, unlearned_models
from palimpsest.studies.cells import Cell
from palimpsest.studies.claims import Claim
from palimpsest.studies.regimes import REGIMES, Setting
from palimpsest.unlearn.gradient_ascent import GradientDifference
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.rmu import RMU

Seed = dict[str, Cell]
FINE_TUNING = unlearned_models.fine_tuning()
LAYERS = (0.1, 0.2, 0.3)


def forms(krs: float | None) -> Cell:
    return {"krs": krs, "krs_of_sums": krs, "krs_kl": krs, "lpr": krs}


def cell(
    *,
    forget: float = 0.1,
    coefficients: float | None = 0.8,
    attention: float = 0.1,
    both: float = 0.9,
    value: float = 0.2,
    layers: tuple[float, ...] = LAYERS,
    depth: float | None = 0.6,
    cosine: float = 0.99,
    after: float = 0.3,
    reached: bool = True,
    moved: float = 0.2,
    lead: float = 0.3,
) -> Cell:
    whole = {"coefficients": coefficients, "attention": attention, study.BOTH: both, "value": value}
    single = {study.at_layer("coefficients", layer): krs for layer, krs in enumerate(layers)}
    return {
        "forget": forget,
        "reached": reached,
        "recovered": {name: forms(krs) for name, krs in (whole | single).items()},
        "depth": {"score": depth, "encoding": [1.0] * len(layers)},
        "vectors": {"cosine": cosine},
        "kl_unseen": 0.01,
        "moved": {kind: {"forget": 0.4, "unseen": moved} for kind in ("coef", "attn")},
        "probe": [{"accuracy": 0.5 + at, "lead": at} for at in (0.0, lead, lead / 2)],
        "relearned": {"held_out": {"before": forget, "after": after}, "taught": {"before": forget, "after": 0.75}},
    }


def seed_of(**changed: Cell) -> Seed:
    """A seed in which every claim holds, with some cells changed."""
    plain = {
        "full": cell(forget=0.9, depth=0.0, cosine=1.0, after=0.8),
        "gold": cell(depth=1.0, after=0.05, lead=0.05),
        "sham": cell(forget=0.8, both=0.7, depth=0.05, cosine=0.995, moved=0.1),
        **{name: cell(depth=0.5 + 0.05 * n, after=0.5 - 0.05 * n) for n, name in enumerate(FINE_TUNING)},
        "rmu": cell(value=0.97, depth=0.4, after=0.6, cosine=0.6),
        "needle": cell(forget=0.7, depth=0.1, after=0.7, cosine=0.2),
    }
    return plain | changed


def every(**changed: Any) -> Seed:
    """Every fine-tuning method with the same numbers."""
    return {name: cell(**changed) for name in FINE_TUNING}


def told(value: float, *others: str) -> str:
    """The note of one value of every fine-tuning method and some other models."""
    return ", ".join(f"{name} {value:.2f}" for name in (*FINE_TUNING, *others))


def judged(seed: Seed) -> dict[str, Claim]:
    """Of two seeds alike, so that every interval has no width."""
    return {claim.id: claim for claim in study.judge({0: seed, 1: seed})}


def test_every_claim_holds_where_it_should() -> None:
    claims = judged(seed_of())
    assert len(claims) == 17
    assert {claim.verdict for claim in claims.values()} == {"reproduced"}


@pytest.mark.parametrize(
    ("broken", "changed"),
    [
        ("a/coefficients", every(coefficients=0.3, value=0.4)),
        ("a/attention", every(attention=0.5)),
        ("a/final", every(layers=(0.4, 0.2, 0.3))),
        ("a/cosine", {FINE_TUNING[0]: cell(cosine=0.9)}),
        ("b/recovery", {"sham": cell(both=0.3)}),
        ("b/pattern", {"sham": cell(coefficients=0.1)}),
        ("b/cosine", {"sham": cell(cosine=0.9)}),
        ("c/sham", {"sham": cell(depth=0.4)}),
        ("c/gold", {"gold": cell(depth=0.9)}),
        ("d/rmu", {"rmu": cell(value=0.5)}),
        ("d/others", every(value=0.7)),
        ("e/trace", {"needle": cell(cosine=0.8)}),
        ("e/answers", {"needle": cell(forget=0.2)}),
        ("f/order", {name: cell(depth=0.5 + 0.05 * n, after=0.5 + 0.05 * n) for n, name in enumerate(FINE_TUNING)}),
        ("g/returns", {"gold": cell(depth=1.0, after=0.6)}),
        ("h/everywhere", every(moved=0.05)),
        ("i/probe", {"gold": cell(depth=1.0, after=0.05, lead=0.4)}),
    ],
)
def test_every_claim_is_contradicted_where_it_should_be(broken: str, changed: Seed) -> None:
    assert judged(seed_of(**changed))[broken].verdict == "contradicted"


def test_the_numbers_are_those_of_the_cells() -> None:
    claims = judged(seed_of())
    assert claims["a/coefficients"].estimate == pytest.approx(0.6)
    assert claims["a/attention"].estimate == pytest.approx(0.125)
    assert claims["a/final"].estimate == pytest.approx(0.1)
    assert claims["b/recovery"].estimate == pytest.approx(0.7 / 0.9)
    assert claims["e/answers"].estimate == pytest.approx(0.7 / 0.9)
    assert claims["f/order"].estimate == pytest.approx(-1)
    assert "by the KL 0.80 against 0.20" in claims["a/coefficients"].note
    assert claims["a/final"].note == "from the first layer 0.10, 0.20, 0.30"
    assert "UDS 0.40" in claims["d/rmu"].note and "needle 0.70" in claims["f/order"].note
    assert claims["g/returns"].note.endswith("gold 0.05; of the subjects taught " + told(0.75, "gold"))


def test_methods_that_fell_short_of_the_level_are_named() -> None:
    short = cell(reached=False)
    assert judged(seed_of(npo=short))["a/coefficients"].note.endswith("short of gold's level in some seed: npo")


@pytest.mark.parametrize("missing", list(seed_of()))
def test_claims_whose_cells_are_missing_are_left_out(missing: str) -> None:
    whole = seed_of()
    left = judged({name: found for name, found in whole.items() if name != missing})
    assert set(left) < set(judged(whole))
    half = {0: whole, 1: {name: found for name, found in whole.items() if name != missing}}
    assert {claim.seeds for claim in study.judge(half)} == {1, 2}


def test_what_has_no_score_is_left_out_and_not_counted_as_none() -> None:
    """Nothing was lost that could come back, or no layer told the fact."""
    claims = judged(seed_of(npo=cell(coefficients=None)))
    assert "a/coefficients" not in claims and "d/others" in claims
    claims = judged(seed_of(sham=cell(depth=None), npo=cell(depth=None)))
    assert "c/sham" not in claims and "f/order" not in claims and "c/gold" in claims


@pytest.fixture
def small(trained: Organism, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's organism as the regime, with three quick methods."""
    setting = Setting(trained.request, trained.full, trained.gold, (), Corpus((), ()), Recipe())
    monkeypatch.setitem(REGIMES, "people", lambda seed, data: setting)
    methods = (GradientDifference(learning_rate=1e-3), NPO(learning_rate=1e-3), RMU(learning_rate=3e-3))
    for module in (study, unlearned_models):
        monkeypatch.setattr(module, "METHODS", methods)
    monkeypatch.setattr(unlearned_models, "STEPS", 60)
    monkeypatch.setattr(unlearned_models, "SHAM_STEPS", 20)
    monkeypatch.setattr(unlearned_models, "RELEARNING_STEPS", 5)


@pytest.mark.slow
def test_a_study_from_end_to_end_measures_nothing_twice(
    small: None, trained: Organism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = {claim.id: claim for claim in study.run((0,), tmp_path)}
    assert len(claims) == 17 and all(claim.seeds == 1 for claim in claims.values())
    cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "seed-0").glob("*.json")}
    assert set(cells) == {"full", "gold", "sham", "grad_diff", "npo", "rmu", "needle"}

    full, gold, sham, npo, rmu, needle = (cells[name] for name in ("full", "gold", "sham", "npo", "rmu", "needle"))
    assert full["depth"]["score"] == 0 and gold["depth"]["score"] == 1 and sham["depth"]["score"] < 0.2
    assert full["kl_unseen"] == 0 and full["recovered"]["coefficients"]["krs"] is None
    assert rmu["reached"] and rmu["steps"] < 60
    for unlearned in (npo, rmu):
        assert unlearned["reached"] == (unlearned["forget"] <= gold["forget"] + 1e-6)
    assert npo["recovered"]["coefficients"]["krs"] > npo["recovered"]["value"]["krs"]
    assert set(npo["recovered"]) == {
        *(name for kind in dissecting_cells.SETTINGS for name in (kind, *(study.at_layer(kind, n) for n in range(2)))),
        *dissecting_cells.GROUPS,
    }
    assert rmu["recovered"]["value"]["krs"] == pytest.approx(1, abs=1e-4)
    assert needle["recovered"]["value"]["krs"] == pytest.approx(1, abs=1e-4)
    assert needle["vectors"]["cosine"] < 0.5 < needle["forget"] / full["forget"]
    assert len(needle["vectors"]["at"]) == dissecting_cells.TRACKED
    taught, held_out = (full["relearned"][half]["before"] for half in ("taught", "held_out"))
    n = {half: len(trained.request.forget) // 5 * subjects for half, subjects in (("taught", 3), ("held_out", 2))}
    assert (n["taught"] * taught + n["held_out"] * held_out) / sum(n.values()) == pytest.approx(full["forget"])

    monkeypatch.setitem(REGIMES, "people", None)  # asking it again would fail
    assert {claim.id: claim for claim in study.run((0,), tmp_path)} == claims
