"""The study of learned rewards: judged on made-up cells, and run in arms that take no time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from palimpsest.rewards.preference_loop import PreferenceSettings
from palimpsest.rewards.relearning import RELEARNERS, Rate
from palimpsest.rewards.reward_models import RewardSettings
from palimpsest.rewards.signals import FAILS_WHEN
from palimpsest.studies import reward_relearning as study
from palimpsest.studies import reward_relearning_cells
from palimpsest.studies.cells import Cell
from palimpsest.studies.claims import Claim

N = 60


def cell(fails: int, n: int = N, online: bool = True) -> Cell:
    """The first `fails` seeds fail their planner, and a quarter of them other learners.

    There every signal says so, but for accuracy and the sampler's return, which alternate.
    """

    def of(kind: str, failed: int) -> Cell:
        budgets = [1] if kind == "planner" else [480, 1920, 7680]
        artefact = [[0.1 if seed < failed else 0.9] * len(budgets) for seed in range(n)]
        curves = {"artefact": artefact, "floor": [[0.0] * len(budgets)] * n, "ceiling": [[1.0] * len(budgets)] * n}
        return {
            "seeds": list(range(n)), "bad_samplers": 0, "weak_learners": 0, "budgets": budgets, "curves": curves,
        }  # fmt: skip

    values = {name: [0.5 + 0.4 * (seed < fails) * FAILS_WHEN[name] for seed in range(n)] for name in FAILS_WHEN}
    values["accuracy"] = values["sampler_return"] = [0.8 + 0.1 * (seed % 2) for seed in range(n)]
    repaired = {
        how: [[0.1 if seed < fails else 0.9 for seed in range(n)], [after] * n]
        for how, after in (("targeted", 0.9), ("elsewhere", 0.1))
    }
    return {
        "seeds": list(range(n)),
        "reward_steps": 1360,
        "sampler": [0.9] * n if online else None,
        "signals": values if online else {},
        "relearned": {kind: of(kind, fails if kind == "planner" else fails // 4) for kind in RELEARNERS},
        "repaired": repaired,
    }


def world(**changed: Cell) -> dict[str, list[Cell]]:
    """Where everything is as others say, and signals are as ours."""
    cells = {name: cell(2) for name in reward_relearning_cells.ARMS}
    cells |= {name: cell(0) for name in cells if "l2" in name or "pessimism" in name or "everywhere" in name}
    cells |= {name: cell(45) for name in ("table", "mlp", "stay_table", "stay_mlp", "slope_table", "slope_mlp")}
    cells |= {"rounds_90": cell(40), "rounds_90_matched": cell(40), "steps_111": cell(40)}
    cells |= {name: cell(N, online=False) for name in cells if name.endswith("offline_expert")}
    return {name: [found] for name, found in (cells | changed).items()}


def judged(cells: dict[str, list[Cell]]) -> dict[str, Claim]:
    return {claim.id: claim for claim in study.judge(cells)}


def test_every_claim_holds_where_things_are_so() -> None:
    claims = judged(world())
    doubtful = {"e/false_alarm", "f/strong_q_learner"}  # 0.5 is above the alarm; made up as weak as the other
    assert {claim.verdict for name, claim in claims.items() if name not in doubtful} == {"reproduced"}
    assert claims["a/table"].estimate == pytest.approx(0.75) and claims["a/table"].note.startswith("45 of 60; sampler")
    assert claims["b/table_mean"].estimate == pytest.approx((2 - 45) / N)
    assert claims["c/expert/mlp/planner"].estimate == pytest.approx(0.8 - 2 / N * 0.8)
    assert claims["e/proxy_gap"].estimate == 1 and claims["e/accuracy"].estimate == pytest.approx(0.5, abs=0.1)
    assert claims["e/false_alarm"].estimate == 1
    assert len(claims) == len(study.judge(world()))  # no identifier stands twice


@pytest.mark.parametrize(
    ("claim", "changed"),
    [
        ("a/table", {"table": cell(10)}),
        ("b/table_l2_1e-3", {"table_l2_1e-3": cell(30)}),
        ("b/mlp_pessimism", {"mlp_pessimism": cell(30)}),
        ("b/table_mean", {"table_mean": cell(59)}),
        ("c/table_offline_everywhere", {"table_offline_everywhere": cell(40, online=False)}),
        (
            "c/expert/mlp/planner",
            {"mlp_offline_random": cell(40, online=False), "mlp_offline_expert": cell(0, online=False)},
        ),
        ("d/longer", {"rounds_90": cell(1), "rounds_10": cell(30)}),
        ("d/longer_matched", {"rounds_90_matched": cell(2), "rounds_10_matched": cell(30)}),
        ("h/stay_mlp", {"stay_mlp": cell(2), "stay_mlp_l2": cell(40)}),
    ],
)
def test_a_claim_is_contradicted_where_it_should_be(claim: str, changed: dict[str, Cell]) -> None:
    assert judged(world(**changed))[claim].verdict == "contradicted"


def test_what_tells_the_wrong_way_is_below_a_half() -> None:
    cells = world()
    for blocks in cells.values():
        for block in blocks:
            if block["signals"]:
                block["signals"]["proxy_gap"] = [-value for value in block["signals"]["proxy_gap"]]
    assert judged(cells)["e/proxy_gap"].estimate == 0
    assert judged(cells)["e/alarm"].estimate == 0


def test_claims_whose_arms_are_missing_are_left_out() -> None:
    claims = judged({"table": [cell(45)]})
    assert {"a/table", "g/targeted/table", "f/q_learner"} < set(claims)
    assert not {"a/mlp", "b/table_mean", "d/longer", "h/stay_mlp"} & set(claims)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((56, 70), (48, 80), (0.2, 0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.6, 0.1705, 0.8090)),
        ((10, 10), (0, 10), (1.0, 0.6075, 1.0)),
    ],
)
def test_the_difference_of_rates_is_newcombes(
    first: tuple[int, int], second: tuple[int, int], expected: tuple[float, float, float]
) -> None:
    """His table II, method 10."""
    assert study.difference(Rate(*first), Rate(*second)) == pytest.approx(expected, abs=1e-4)


def test_blocks_are_put_together() -> None:
    first, second = cell(4, n=5), cell(0, n=4)
    for kind in second["relearned"].values():
        kind["seeds"] = [5, 6, 7, 8]
    second["seeds"] = [5, 6, 7, 8]
    assert reward_relearning_cells.failures([first, second]) == Rate(4, 9)
    found = reward_relearning_cells.report([first, second], "q_learner")
    assert found and found.settings.seeds == tuple(range(9)) and found.settings.incumbent == pytest.approx(0.9)
    assert found.points[1].artefact == pytest.approx((0.1 + 8 * 0.9) / 9)
    assert set(reward_relearning_cells.of_seeds([first, second], "unseen")) == set(range(9))


def test_the_matched_arms_have_as_many_steps_of_the_reward() -> None:
    steps = {name: arm.settings.reward_steps for name, arm in reward_relearning_cells.ARMS.items()}
    assert (steps["rounds_10"], steps["mlp"], steps["rounds_90"]) == (560, 1360, 3760)
    assert (steps["rounds_10_matched"], steps["rounds_90_matched"]) == (1358, 1316)
    assert (steps["steps_16"], steps["steps_111"]) == (544, 3774)


def test_a_study_from_end_to_end_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = PreferenceSettings(rounds=2, episodes=32, comparisons=30, reward=RewardSettings(steps=2, first_steps=2))
    table = reward_relearning_cells.Arm(short, horizon=12, times=2, relearners=tuple(RELEARNERS))
    arms = {"table": table, "table_offline_random": replace(table, settings=replace(short, offline="random"))}
    monkeypatch.setattr(reward_relearning_cells, "ARMS", arms)
    monkeypatch.setattr(study, "ARMS", arms)
    monkeypatch.setattr(reward_relearning_cells, "BLOCK", 5)
    claims = study.run(range(3, 7), tmp_path)
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json"))
    assert written[:2] == ["table/seeds-3-7.json", "table/seeds-8-10.json"] and len(written) == 4
    found: dict[str, Any] = json.loads((tmp_path / written[0]).read_text())
    assert found["seeds"] == [3, 4, 5, 6, 7] and set(found["signals"]) == set(FAILS_WHEN)
    page = (tmp_path / study.PAGE).read_text()
    assert "Every arm" in page and "<script" not in page and "http" not in page.replace("http-equiv", "")
    monkeypatch.setattr(reward_relearning_cells, "measured", lambda *_: pytest.fail("measured twice"))
    assert study.run(range(3, 7), tmp_path) == claims
