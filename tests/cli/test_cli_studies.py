"""`palimpsest studies run`: what is asked, what is printed, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import invoke

from palimpsest.cli import studies
from palimpsest.studies import (
    concept_vectors,
    conjugate_prompting,
    dissecting,
    kfade,
    recovery,
    task_cells,
    task_forgetting,
)
from palimpsest.studies.claims import Claim

CLAIMS = [
    Claim("a/people", "It is so.", "paper", "a ratio", 0.5, 0.25, 0.75, 5, 1.0, True, "best: npo"),
    Claim("d/people/[x]", "It is so.", "paper", "another", None, None, None, 0, 1.0, True),
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[kfade.Plan]:
    plans: list[kfade.Plan] = []
    monkeypatch.setattr(kfade, "run", lambda plan: plans.append(plan) or CLAIMS)
    return plans


def test_it_runs_what_was_asked_for(asked: list[kfade.Plan], tmp_path: Path) -> None:
    options = ["--seeds", 2, "--first-seed", 3, "--regime", "people", "--cell", "npo", "--trials", 4, "--out", tmp_path]
    code, out, _ = invoke("studies", "run", "kfade", *options, "--json")
    assert code == 0
    (plan,) = asked
    assert (list(plan.seeds), plan.regimes, plan.cells, plan.trials) == ([3, 4], ["people"], ["npo"], 4)
    assert plan.folder == tmp_path / "kfade" and plan.data is None
    assert [claim["verdict"] for claim in json.loads(out)] == ["reproduced", "not testable here"]


def test_people_get_a_table(asked: list[kfade.Plan]) -> None:
    code, out, _ = invoke("studies", "run", "kfade")
    assert code == 0
    assert asked[0].regimes == ("people", "topic", "tofu") and len(asked[0].seeds) == 5
    assert all(word in out for word in ("a/people", "0.25 to 0.75", "reproduced", "d/people/[x]"))


@pytest.mark.parametrize("study", [dissecting, concept_vectors, recovery, conjugate_prompting])
def test_a_study_of_models_takes_every_one_unless_some_are_named(
    study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = study.__name__.rpartition(".")[2]
    runs: list[tuple[Any, ...]] = []
    monkeypatch.setattr(study, "run", lambda *asked: runs.append(asked) or CLAIMS)
    assert invoke("studies", "run", name)[0] == 0
    some = ["--cell", "sham", "--seeds", 2, "--first-seed", 4, "--out", tmp_path]
    assert invoke("studies", "run", name, *some)[0] == 0
    (seeds, folder, every), few = runs
    assert every == study.CELLS and list(seeds) == [0, 1, 2, 3, 4] and folder == Path("runs/studies") / name
    assert few == (range(4, 6), tmp_path / name, ["sham"])


def test_every_study_says_what_it_asks_without_being_loaded() -> None:
    code, out, _ = invoke("studies", "run", "--help")
    assert code == 0
    assert set(studies.OF_MODELS) == {"dissecting", "concept_vectors", "recovery", "conjugate_prompting"}
    told = " ".join(out.replace("│", " ").split())
    for question in studies.OF_MODELS.values():
        assert question in told
    code, out, _ = invoke("studies", "run", "recovery", "--help")
    assert code == 0 and "Can someone get it back" in out and "--cell" in out and "CONTEXT" not in out.upper()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["task_forgetting", "--model", "gpt2"], "error: --model and --tasks go together: a model of yours and the"),
        (["kfade", "--regime", "peopel"], "error: --regime peopel: unknown; there are people, topic, tofu"),
        (["kfade", "--cell", "ekfca"], "error: --cell ekfca: unknown; there are controls, kfade, "),
        (["dissecting", "--cell", "gild"], "error: --cell gild: unknown; there are full, gold, sham, "),
        (
            ["kfade", "--regime", "topic"],
            "error: wikitext2/valid.txt: WikiText-2 is needed here; give the folder that holds wikitext2/",
        ),
        (["kfade", "--regime", "topic", "--data", "nowhere"], "error: nowhere/wikitext2/valid.txt: "),
    ],
)
def test_what_is_refused_in_one_line(options: list[str], says: str, tmp_path: Path) -> None:
    code, out, err = invoke("studies", "run", *options, "--seeds", 1, "--out", tmp_path)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(says)
    assert not any(tmp_path.rglob("*.json"))


def test_a_study_that_does_not_exist_is_refused() -> None:
    code, out, err = invoke("studies", "run", "kfad")
    assert (code, out) == (2, "") and "No such command 'kfad'" in err


def test_the_study_of_tasks_takes_ones_own_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[object] = []
    monkeypatch.setattr(task_forgetting, "run", lambda *given: asked.append(given) or CLAIMS)
    monkeypatch.setattr(task_cells, "given", lambda model, tasks, seed: (model, tasks, seed))
    own = ["--model", "some/model", "--tasks", tmp_path / "tasks", "--seeds", 2, "--out", tmp_path]
    assert invoke("studies", "run", "task_forgetting", *own)[0] == 0
    assert invoke("studies", "run", "task_forgetting")[0] == 0
    (setting, seeds, folder), (toy, *_) = asked  # type: ignore[misc]
    assert setting(1) == ("some/model", tmp_path / "tasks", 1) and list(seeds) == [0, 1]
    assert folder == tmp_path / "task_forgetting" and toy is task_cells.toy
