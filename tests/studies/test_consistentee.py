"""The study's judgement on cells made by hand, and one seed of very small networks from end to end."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from palimpsest.early_exit.training import ExitTraining
from palimpsest.studies.cells import Cell
from palimpsest.studies.consistentee import accuracy, judge, run
from palimpsest.studies.consistentee_cells import BUDGETS, PLACES, Networks, Sizes, _hop_by_hop

TINY = Sizes(
    pool=200,
    policy=120,
    held_out=100,
    width=16,
    policy_steps=20,
    hops=ExitTraining(steps=4, batch_size=16),
    all_exits=ExitTraining(steps=3, batch_size=16),
    further=ExitTraining(steps=3, batch_size=16),
)


def frontier(at_two: float, at_three: float, nearly: float, noise: float) -> Cell:
    values = dict(zip(map("{:g}".format, BUDGETS), (at_two - 0.05, at_two, at_two, at_three), strict=True))
    told = {budget: {"accuracy": value, "layers": float(budget)} for budget, value in values.items()}
    kinds = {"noise": noise, "2 hops": 2.0}
    return told | {"nearly full": {"layers": nearly, "accuracy": at_three, "layers_by_kind": kinds}}


def seeds(n: int, ahead: float) -> dict[int, dict[str, Cell]]:
    made: dict[int, dict[str, Cell]] = {}
    for seed in range(n):
        noise = 0.001 * (seed - n // 2)
        rules = {name: frontier(0.70 + noise, 0.75, 2.8, 6.0) for name in ("entropy", "patience")}
        ways = ("exact", "reinforce", "memorized", "solvable")
        policies = {name: frontier(0.70 + ahead - noise, 0.75, 1.8, 1.0) for name in ways}
        joint = {"full": 0.75 - 0.01 + noise, "policy": frontier(0.70 + ahead - 0.01, 0.76 + noise, 1.9 + noise, 1.2)}
        made[seed] = {"matched": rules | policies | {"full": 0.75}, "exact": joint, "consistentee": joint}
    return made


def test_a_policy_that_is_ahead_is_found_to_be_and_joint_training_that_adds_nothing_too() -> None:
    verdicts = {claim.id: claim.verdict for claim in judge(seeds(5, 0.05))}
    reproduced = ("a/policy", "a/half", "a/patience", "a/layers", "a/reinforce", "d/noise", "d/solvable")
    assert all(verdicts[name] == "reproduced" for name in reproduced), verdicts
    assert verdicts["b/paper"] == "reproduced"
    assert verdicts["b/classifiers"] == verdicts["b/exact"] == verdicts["b/consistentee"] == "contradicted"
    assert verdicts["c/memorized"] == verdicts["c/solvable"] == "inconclusive"


def test_a_policy_that_is_behind_contradicts_the_claim_and_one_seed_tells_nothing() -> None:
    assert {claim.id: claim.verdict for claim in judge(seeds(5, -0.02))}["a/policy"] == "contradicted"
    assert {claim.verdict for claim in judge(seeds(1, 0.05))} == {"not testable here"}


def test_a_budget_that_no_rule_keeps_to_is_left_out() -> None:
    assert math.isnan(accuracy({}, 2.0))
    cells = seeds(3, 0.05)
    del cells[1]["matched"]["exact"]["2"]
    assert next(claim for claim in judge(cells) if claim.id == "a/policy").seeds == 2


def test_every_block_is_to_hop_once_until_the_answer_is_there(tmp_path: Path) -> None:
    questions = Networks(0, tmp_path, TINY).pool.questions
    for question, targets in zip(questions, _hop_by_hop(questions).tolist(), strict=True):
        places = [PLACES[target] for target in targets]
        if question.hops:
            assert tuple(places[: question.hops]) == question.way
            assert set(places[question.hops - 1 :]) == {question.answer}
        else:
            assert set(places) == {question.answer}


@pytest.mark.parametrize("cell", ["matched", "consistentee"])
def test_a_seed_from_end_to_end_is_kept_and_not_made_again(tmp_path: Path, cell: str) -> None:
    claims = run([0], tmp_path, [cell], TINY)
    files = {path.name: path.read_bytes() for path in (tmp_path / "seed-0").iterdir()}
    assert set(files) == {f"{cell}.json", "first_stage.safetensors"}
    assert run([0], tmp_path, [cell], replace(TINY, width=0)) == claims  # nothing is made, or this would fail
    again = tmp_path / "again"
    run([0], again, [cell], TINY)
    assert {path.name: path.read_bytes() for path in (again / "seed-0").iterdir()} == files
