"""The study of K-FADE: its judgement on made-up cells, and a run from end to end in a world of the suite's size."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from palimpsest.data.records import QA, Passage
from palimpsest.errors import DataError
from palimpsest.models.organism import Corpus, Recipe
from palimpsest.studies import kfade as study
from palimpsest.studies import regimes
from palimpsest.studies.regimes import REGIMES, Setting, topic
from palimpsest.unlearn.gradient_ascent import GradientDifference
from palimpsest.unlearn.kfade import KFade
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.search import Between

FIRST_ORDER = [method.name for method, _ in study.FIRST_ORDER]


def cell(kl: float, *, reached: bool = True, forget: float = 0.1) -> study.Cell:
    return {"kl_unseen": kl, "reached": reached, "forget": forget, "gold_kl_forget": 2.0}


def seed_of(ours: float, theirs: dict[str, study.Cell]) -> dict[str, study.Cell]:
    controls = {"original": {"forget": 0.9, "gold_kl_forget": 4.0}, "gold": {"forget": 0.1}}
    return {"controls": controls, "kfade": cell(ours)} | theirs


def judged(cells: dict[int, dict[str, study.Cell]]) -> dict[str, study.Claim]:
    return {claim.id: claim for claim in study.judge("people", cells)}


def test_it_is_held_against_the_best_of_those_that_reached_the_level() -> None:
    """A method that fell short did less damage because it forgot less."""
    theirs = {name: cell(0.4) for name in FIRST_ORDER} | {"npo": cell(0.2), "rmu": cell(0.01, reached=False)}
    claim = judged({0: seed_of(0.1, theirs), 1: seed_of(0.05, theirs)})["a/people/kfade"]
    assert study.best_first_order(theirs) == "npo"
    assert claim.estimate == pytest.approx((0.5 * 0.25) ** 0.5) and claim.seeds == 2 and claim.note == "best: npo"


def test_seeds_in_which_none_reached_the_level_are_named_and_left_out() -> None:
    short = {name: cell(0.1, reached=False) for name in FIRST_ORDER}
    claim = judged({0: seed_of(0.1, short), 1: seed_of(0.1, {name: cell(0.2) for name in FIRST_ORDER})})[
        "a/people/kfade"
    ]
    assert claim.seeds == 1 and "no first-order method reached the level in 1 seeds" in claim.note
    assert claim.verdict == "not testable here"


def test_an_unfinished_seed_is_left_out() -> None:
    claim = judged({0: seed_of(0.1, {"npo": cell(0.2)})})["a/people/kfade"]
    assert claim.seeds == 0 and claim.estimate is None


def test_whichever_cell_is_missing_the_others_are_judged() -> None:
    again = {"before": {"forget": 0.8}, "searched": {"forget": 0.1, "kl_unseen": 0.2}}
    relearned = {"unlearned": {"before": 0.1, "after": 0.5}, "gold": {"before": 0.1, "after": 0.2}}
    whole = seed_of(0.1, {"reapplied_retain": again, "relearned": relearned, "ekfac": cell(0.2)})
    tested = {name for name, claim in judged({0: whole}).items() if claim.seeds}
    for missing in whole:
        rest = {name: cell for name, cell in whole.items() if name != missing}
        still = {name for name, claim in judged({0: rest}).items() if claim.seeds}
        assert still < tested


def test_reapplying_is_judged_by_the_share_of_the_first_forgetting() -> None:
    def again(forget: float) -> study.Cell:
        return {"before": {"forget": 0.8}, "searched": {"forget": forget, "kl_unseen": 0.2}}

    cells = {s: seed_of(0.1, {"reapplied_retain": again(forget)}) for s, forget in ((0, 0.08), (1, 0.04))}
    claim = judged(cells)["c/people/retain"]
    assert claim.estimate == pytest.approx((0.72 / 0.8 + 0.76 / 0.8) / 2)
    assert claim.note.startswith("at 2.00 times the first unseen KL")


def test_variants_nearness_and_relearning_are_judged() -> None:
    more = {
        "ekfac": cell(0.2),
        "relearned": {"unlearned": {"before": 0.1, "after": 0.5}, "gold": {"before": 0.1, "after": 0.2}},
    }
    claims = judged({0: seed_of(0.1, more), 1: seed_of(0.1, more)})
    assert claims["d/people/ekfac"].estimate == pytest.approx(0.5)
    assert claims["b/people"].estimate == pytest.approx(0.5)
    assert claims["e/people"].estimate == pytest.approx(0.3)


def test_what_is_left_in_other_words_is_held_against_the_same_first_order_method() -> None:
    theirs = {name: cell(0.4) | {"reworded": 0.3} for name in FIRST_ORDER} | {"npo": cell(0.2) | {"reworded": 0.1}}
    seed = seed_of(0.1, theirs)
    assert judged({0: seed})["f/people/kfade"].seeds == 0  # a regime without other wordings
    seed["kfade"]["reworded"] = 0.2
    claim = judged({0: seed, 1: seed})["f/people/kfade"]
    assert claim.estimate == pytest.approx(2.0) and claim.verdict == "contradicted"


def test_k_fade_tuned_stands_beside_k_fade_at_its_defaults() -> None:
    theirs = {name: cell(0.4) for name in FIRST_ORDER}
    claims = judged({0: seed_of(0.8, theirs | {"kfade_tuned": cell(0.1)})})
    assert claims["a/people/kfade"].estimate == pytest.approx(2.0)
    assert claims["a/people/kfade_tuned"].estimate == pytest.approx(0.25)
    assert claims["d/people/power_0.5"].seeds == 0


def test_people_with_one_thing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def untrained(corpus: Corpus, recipe: Recipe) -> SimpleNamespace:
        seen.append((corpus, recipe))
        return SimpleNamespace(original=None, gold=None)

    monkeypatch.setattr(regimes, "train_controls", untrained)
    plain, few, apart, _ = (REGIMES[f"people{which}"](0, None) for which in ("", "_few", "_apart", "_wide"))
    rows, fewer = plain.request, few.request
    assert set(fewer.retain) < set(rows.retain) and 4 * len(fewer.retain) - len(rows.retain) in range(4)
    assert (fewer.forget, fewer.retain_unseen) == (rows.forget, rows.retain_unseen)
    assert seen[0] == seen[1] and seen[3][0] == seen[0][0] and seen[3][1].architecture.width == 256

    def first_names(texts: Sequence[QA]) -> set[str]:
        return {row.subject.split()[0] for row in texts if " " in row.subject}

    kept = first_names(rows.all_retain)
    assert first_names(rows.forget) <= kept
    assert not first_names(apart.request.forget) & first_names(apart.request.all_retain)
    assert [row.answer for row in apart.request.forget] == [row.answer for row in rows.forget]


def test_without_wikitext_the_topic_regime_says_what_it_needs(tmp_path: Path) -> None:
    for data in (None, tmp_path):
        with pytest.raises(DataError, match="WikiText-2 is needed here; give the folder that holds wikitext2/"):
            topic(0, data)


@pytest.fixture
def small(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's organism as a regime, with two quick methods and one variant."""
    new_text = tuple(Passage(record.question) for record in trained.request.forget[:4])
    monkeypatch.setitem(
        REGIMES,
        "people",
        lambda seed, data: Setting(trained.request, trained.full, trained.gold, new_text, Corpus((), ()), Recipe()),
    )
    rate = {"learning_rate": Between(3e-4, 3e-3)}
    monkeypatch.setattr(study, "FIRST_ORDER", ((GradientDifference(learning_rate=1e-3), rate), (NPO(), rate)))
    quick = KFade(steps=4, damping=3.0)
    monkeypatch.setattr(study, "VARIANTS", {"kfade": quick, "identity": KFade(steps=4, curvature="identity")})
    monkeypatch.setattr(study, "FURTHER_STEPS", 5)


@pytest.mark.slow
def test_a_study_from_end_to_end_measures_nothing_twice(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = study.Plan((0, 1), ("people",), 1, 60, None, tmp_path)
    claims = {claim.id: claim for claim in study.run(plan)}
    assert {"c/people/retain", "c/people/new", "d/people/identity", "b/people", "e/people"} | {
        f"{claim}/people/{ours}" for claim in "af" for ours in ("kfade", "kfade_tuned")
    } == set(claims)
    assert all(claims[name].seeds == 2 for name in ("b/people", "c/people/retain", "c/people/new", "e/people"))
    kept = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "people" / "seed-0").glob("*.json")}
    assert len(kept) == 9
    assert kept["controls"]["original"]["kl_unseen"] == 0 < kept["controls"]["sham"]["kl_unseen"]
    monkeypatch.setitem(REGIMES, "people", None)  # asking it again would fail
    assert {claim.id: claim for claim in study.run(plan)} == claims
