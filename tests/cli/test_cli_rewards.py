"""`palimpsest rewards`: from learning a reward to what fresh learners make of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import invoke

from palimpsest.studies import reward_relearning
from palimpsest.studies.claims import Claim

QUICK = ["--seeds", 8, "--rounds", 10, "--comparisons", 200]


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With L2, so that it holds."""
    folder = tmp_path_factory.mktemp("rewards") / "held"
    code, out, _ = invoke("rewards", "run", *QUICK, "--l2", 1e-3, "--out", folder)
    assert code == 0 and "The sampler's true return is" in out and out.splitlines()[-1] == str(folder)
    return folder


def test_a_reward_is_learned_and_relearned_from(reward: Path) -> None:
    code, out, _ = invoke("rewards", "relearn", reward, "--learner", "planner", "--json")
    found: dict[str, Any] = json.loads(out)
    assert found["verdict"] in ("PASS", "INCONCLUSIVE") and code == 0
    assert set(found["learners"]) == {"planner"} and found["learner"] == "planner"
    assert set(found["signals"]) >= {"proxy_gap", "accuracy", "alarms"} and "sampler_return" not in found["signals"]
    code, out, _ = invoke("rewards", "relearn", reward)
    assert all(word in out for word in ("q_learner", "strong_q_learner", "planner", "Without the truth: proxy gap"))
    page = reward / "relearning.html"
    assert str(page) in out and "A reward learned in the world near" in page.read_text()


def test_a_reward_that_fails_is_a_failed_check(tmp_path: Path) -> None:
    """Many steps of a table without regularisation."""
    folder = tmp_path / "fails"
    code, out, _ = invoke("rewards", "run", "--seeds", 12, "--out", folder, "--json")
    assert code == 0 and len(json.loads(out)["sampler"]) == 12
    code, out, _ = invoke("rewards", "relearn", folder, "--learner", "planner")
    assert code == 1 and "FAIL, planner" in out


def test_where_no_sampler_did_well_that_is_said(tmp_path: Path) -> None:
    invoke("rewards", "run", "--rounds", 1, "--comparisons", 10, "--seeds", 2, "--out", tmp_path / "poor")
    code, out, err = invoke("rewards", "relearn", tmp_path / "poor", "--learner", "planner")
    assert code == 0 and "no seed says anything" in out and "warning: no sampler did well" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["run", "--world", "far", "--out", "x"], "error: --world far: unknown; there are near, stay, slope"),
        (["run", "--kind", "tree", "--out", "x"], "error: reward: kind is 'tree'; choose table or mlp"),
        (["run", "--pessimism", "1", "--out", "x"], "error: reward: pessimism needs an ensemble to disagree"),
        (["relearn", "nowhere"], "error: nowhere: there is no reward.json"),
        (["relearn", "nowhere", "--learner", "sarsa"], "error: --learner sarsa: unknown; there are q_learner, "),
    ],
)
def test_what_is_refused_in_one_line(options: list[str], says: str) -> None:
    code, out, err = invoke("rewards", *options)
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith(says)


def test_the_study_takes_every_arm_unless_some_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []
    claim = Claim("a/table", "It is so.", "paper", "a share", 0.5, 0.25, 0.75, 20, 0.1, False)
    monkeypatch.setattr(reward_relearning, "run", lambda *given: asked.append(given) or [claim])
    assert invoke("studies", "run", "reward_relearning")[0] == 0
    code, out, _ = invoke("studies", "run", "reward_relearning", "--cell", "mlp", "--seeds", 2, "--out", tmp_path)
    assert code == 0 and "a/table  reproduced" in out
    (every, _, none), few = asked
    assert every == range(20) and none == () and few == (range(2), tmp_path / "reward_relearning", ["mlp"])
    code, _, err = invoke("studies", "run", "reward_relearning", "--cell", "tables")
    assert code == 2 and "--cell tables: unknown; there are table, table_l2_1e-3" in err
