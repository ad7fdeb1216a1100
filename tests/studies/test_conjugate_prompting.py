"""The study of conjugate prompting: judged on made-up cells, its world read word by word, and run in a small one."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from palimpsest.data.codec import WORD
from palimpsest.models.organism import Architecture, Recipe
from palimpsest.models.training import TrainingSettings
from palimpsest.studies import conjugate_prompting as study
from palimpsest.studies import unlearned_models
from palimpsest.studies.cells import Cell
from palimpsest.studies.claims import Claim
from palimpsest.studies.conjugate_cells import FIRST, SECOND, TELLINGS, UNREAD, BilingualWorld, bilingual
from palimpsest.unlearn.npo import NPO
from palimpsest.worlds.facts import FactsWorld

Seed = dict[str, Cell]
METHODS = [method.name for method in unlearned_models.METHODS]
SUBJECTS = [f"subject {row % 6}" for row in range(24)]


def cell(first: float, second: float, *, unread: float = 0.01, kept: float = 0.9, once: float = 0.4) -> Cell:
    """Facts of six subjects, about so probable by language, each a little otherwise."""
    wobble = np.linspace(-0.01, 0.01, len(SUBJECTS))
    levels = {FIRST: first, SECOND: second, UNREAD: unread}
    return {
        "items": [f"fact {row}" for row in range(len(SUBJECTS))],
        "subjects": SUBJECTS,
        "asked": {language: (level + wobble).tolist() for language, level in levels.items()},
        "kept": {FIRST: kept, SECOND: kept},
        "once": {FIRST: 0.9, SECOND: once},
    }


def seed_of(**changed: Cell) -> Seed:
    """A seed in which every claim holds: each method forgets in one language, and a quarter of it in the other."""
    return {
        "full": cell(0.9, 0.9),
        "gold": cell(0.1, 0.1),
        "sham": cell(0.9, 0.9),
        **{name: cell(0.1, 0.7) | {"reached": True} for name in METHODS},
        "needle": cell(0.5, 0.8),
    } | changed


def apart_of(**changed: Cell) -> Seed:
    """The same where the languages stay apart: all comes back, and who is told of in one is not known in the other."""
    return seed_of(**{"full": cell(0.9, 0.9, once=0.12), **{name: cell(0.1, 0.9) for name in METHODS}} | changed)


def judged(mixed: Seed, apart: Seed | None = None) -> dict[str, Claim]:
    """Of two seeds alike, so that every interval has no width."""
    apart = apart or apart_of()
    return {claim.id: claim for claim in study.judge({"apart": {0: apart, 1: apart}, "mixed": {0: mixed, 1: mixed}})}


def test_the_numbers_are_those_of_the_levels() -> None:
    claims = judged(seed_of())
    for name, expected in {
        "a/reads/mixed": 0.8,
        "b/npo/mixed": 0.6 / 0.8,
        "b/npo/apart": 1.0,
        "b/needle/mixed": 0.3 / 0.4,
        "c/smaller/mixed": 0.2 / 0.8,
        "c/carries/mixed": 0.2 / 0.8,
        "c/carries/apart": 0.0,
        "c/kept/mixed": 1.0,
        "c/cost/mixed": 0.0,
        "d/unread/mixed": -0.09 / 0.8,
        "d/sham/mixed": 0.0,
        "d/gold/mixed": 0.0,
        "e/twice": (0.12 - 0.1) / (0.9 - 0.1),
        "e/once": (0.4 - 0.1) / (0.9 - 0.1),
        "e/less": 0.2 / 0.8,
    }.items():
        assert claims[name].estimate == pytest.approx(expected, abs=1e-12), name
    assert {name for name, claim in claims.items() if claim.verdict != "reproduced"} == {"c/carries/apart"}
    of_each = {"a/reads", "c/smaller", "c/carries", "c/kept", "c/cost", "d/unread", "d/sham", "d/gold"}
    of_each |= {f"b/{name}" for name in (*METHODS, "needle")}
    assert set(claims) == {f"{claim}/{told}" for claim in of_each for told in TELLINGS} | {
        "e/twice",
        "e/once",
        "e/less",
    }
    note = claims["b/kfade/mixed"].note
    assert note.startswith("suppressed in 2; ") and "npo 0.75" in note


@pytest.mark.parametrize(
    ("npo", "full", "net", "verdict", "reason"),
    [
        (cell(0.1, 0.9), cell(0.9, 0.9), 1, "suppressed", "net recovery 1.00"),
        (cell(0.1, 0.1), cell(0.9, 0.9), 0, "eroded", "less than a tenth comes back"),
        (cell(0.1, 0.4), cell(0.9, 0.4), 0.3 / 0.8, "inconclusive", "cost: the original itself loses 0.6"),
    ],
    ids=["known in the other language", "truly lost", "a second language the original hardly speaks"],
)
def test_a_fact_is_hidden_lost_or_asked_for_in_too_poor_a_language(
    npo: Cell, full: Cell, net: float, verdict: str, reason: str
) -> None:
    seed = seed_of(npo=npo, full=full)
    found = study.conjugation(seed, "npo")
    assert found.net and found.net.value == pytest.approx(net)
    assert found.verdict == verdict and found.reason.startswith(reason)
    claim = judged(seed)["b/npo/mixed"]
    assert claim.estimate == pytest.approx(net) and claim.note.startswith(f"{verdict} in 2")


@pytest.mark.parametrize(
    ("broken", "changed"),
    [
        ("a/reads/mixed", {"full": cell(0.9, 0.5)}),
        ("b/npo/mixed", {"npo": cell(0.1, 0.12)}),
        ("c/smaller/mixed", {name: cell(0.1, 0.12) for name in METHODS}),
        ("c/carries/mixed", {name: cell(0.1, 0.88) for name in METHODS}),
        ("c/kept/mixed", {name: cell(0.1, 0.7, kept=0.5) for name in METHODS}),
        ("c/cost/mixed", {"full": cell(0.9, 0.6)}),
        ("d/unread/mixed", {name: cell(0.1, 0.7, unread=0.4) for name in METHODS}),
        ("d/sham/mixed", {"sham": cell(0.6, 0.9)}),
        ("d/gold/mixed", {"gold": cell(0.1, 0.3)}),
        ("e/once", {"full": cell(0.9, 0.9, once=0.15)}),
        ("e/less", {name: cell(0.1, 0.9) for name in METHODS}),
    ],
)
def test_a_claim_is_contradicted_where_it_should_be(broken: str, changed: Seed) -> None:
    assert judged(seed_of(**changed))[broken].verdict == "contradicted"


def test_a_fact_that_is_known_in_both_languages_was_not_learnt_twice() -> None:
    assert judged(seed_of(), apart_of(full=cell(0.9, 0.9, once=0.4)))["e/twice"].verdict == "contradicted"


def test_a_drop_that_cannot_be_seen_gives_no_share() -> None:
    assert "b/needle/mixed" not in judged(seed_of(needle=cell(0.9, 0.9)))


def test_who_stopped_short_of_golds_level_is_named() -> None:
    claims = judged(seed_of(npo=cell(0.3, 0.7) | {"reached": False}))
    assert "short of gold's level in 2" in claims["b/npo/mixed"].note and "short" not in claims["b/rmu/mixed"].note


@pytest.mark.parametrize("missing", ["full", "gold", "sham", "npo", "needle"])
def test_claims_whose_cells_are_missing_are_left_out(missing: str) -> None:
    left = judged({name: found for name, found in seed_of().items() if name != missing})
    gone = {name for name in judged(seed_of()) if name not in left}
    assert gone and not any(name.endswith("apart") for name in gone)
    assert ("a/reads/mixed" in gone) == ("e/once" in gone) == (missing in {"full", "gold"})


SMALL = BilingualWorld(
    FactsWorld(people=14, worlds=0, forget_people=4, exposures=10, seed=3),
    Recipe(
        Architecture(layers=2, width=64, mlp_width=256, heads=4, context=64),
        training=TrainingSettings(epochs=8, batch_size=8, learning_rate=5e-3, muon_learning_rate=0.02, warmup=10),
    ),
    told_once=3,
    mixed=3,
)


def test_people_are_told_in_both_languages_but_for_those_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    corpora = []

    class Enough(Exception):
        pass

    def stop(corpus: object, recipe: object) -> None:
        corpora.append(corpus)
        raise Enough

    monkeypatch.setattr("palimpsest.studies.conjugate_cells.train_controls", stop)
    with pytest.raises(Enough):
        SMALL.setting()
    (corpus,) = corpora
    table = {word: SMALL.second.codec.encode(word) for text in corpus.vocabulary for word in WORD.findall(text)}
    own = {word for text in SMALL.world.vocabulary_texts() for word in WORD.findall(text) if table[word] != word}
    other = {table[word] for word in own}

    def languages(passage: object) -> tuple[bool, bool]:
        words = set(WORD.findall(passage.text))  # type: ignore[attr-defined]
        return bool(words & own), bool(words & other)

    forgotten = {subject.name for subject in SMALL.world.forget_subjects}
    assert {passage.subject for passage in corpus.forget} == forgotten
    once = {subject.name for subject in SMALL.once}
    assert len(once) == 3 and not once & forgotten
    for name in once:
        assert {languages(p) for p in corpus.retain if p.subject == name} == {(True, False)}
    for passages in (corpus.forget, [p for p in corpus.retain if p.subject not in once]):
        counts = Counter(languages(passage) for passage in passages)
        assert counts[True, True] > 0.9 * SMALL.mixed / (2 + SMALL.mixed) * len(
            passages
        )  # chance may leave a question alone
        assert min(counts[True, False], counts[False, True]) >= len(passages) / (2 + SMALL.mixed)
    mixed = [p for p in corpus.forget if "-mixed-" in p.id]
    assert [SMALL.second.codec.decode(p.text) != p.text for p in mixed].count(True) > 0.9 * len(mixed)
    unread = {SMALL.codecs[UNREAD].encode(word) for word in own} - own
    told = {word for p in (*corpus.forget, *corpus.retain) for word in WORD.findall(p.text)}
    assert len(unread & told) <= 0.02 * len(unread)  # two languages may share a word by chance
    assert unread <= {word for text in corpus.vocabulary for word in WORD.findall(text)}


def test_a_seed_has_a_world_and_languages_of_its_own() -> None:
    one, other = bilingual("mixed", 0), bilingual("mixed", 1)
    assert one.world.subjects != other.world.subjects
    texts = [{name: codec.encode("plays the violin") for name, codec in each.codecs.items()} for each in (one, other)]
    assert len({text for found in texts for text in found.values()}) == 5  # the first language alone is one
    for each in (one, other):
        assert all(
            codec.decode(codec.encode(text)) == text for codec in each.codecs.values() for text in ("Where was",)
        )


@pytest.mark.slow
def test_a_study_from_end_to_end_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    worlds = {"mixed": SMALL, "apart": replace(SMALL, world=replace(SMALL.world, exposures=25), mixed=0)}
    monkeypatch.setattr(study, "bilingual", lambda told, seed: worlds[told])
    for module in (study, unlearned_models):
        monkeypatch.setattr(module, "METHODS", (NPO(learning_rate=1e-3),))
    monkeypatch.setattr(unlearned_models, "STEPS", 40)
    monkeypatch.setattr(unlearned_models, "SHAM_STEPS", 5)
    claims = {claim.id: claim for claim in study.run((0,), tmp_path)}
    found = {
        told: {path.stem: json.loads(path.read_text()) for path in (tmp_path / told / "seed-0").glob("*.json")}
        for told in TELLINGS
    }
    for told, cells in found.items():
        assert set(cells) == {"full", "gold", "sham", "npo", "needle"}
        reads = claims[f"a/reads/{told}"].estimate
        assert reads is not None and reads > 0.3
        full, npo = cells["full"], cells["npo"]
        assert np.mean(full["asked"][FIRST]) == pytest.approx(full["forget"])
        assert np.mean(full["asked"][UNREAD]) < 0.1
        assert full["once"][FIRST] > 0.5 > full["once"][SECOND]
        assert npo["forget"] < full["forget"] - 0.1 and len(npo["asked"][SECOND]) == 20
    monkeypatch.setattr(BilingualWorld, "setting", None)  # asking it again would fail
    assert {claim.id: claim for claim in study.run((0,), tmp_path)} == claims
