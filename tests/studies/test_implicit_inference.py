"""The study of implicit inference: judged on made-up cells, and run at a size of seconds."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import invoke

from palimpsest.models.regression_transformer import RegressionArchitecture
from palimpsest.models.training import TrainingSettings
from palimpsest.studies import implicit_inference as study
from palimpsest.studies import implicit_inference_cells as cells
from palimpsest.studies.cells import Cell
from palimpsest.studies.claims import Claim

Seed = dict[str, Cell]


def checkpoint(late: float, scaled: float, *, g_hat: float, residual: float, bands: tuple[float, ...]) -> Cell:
    inferred = {"g_hat": g_hat, "alpha": g_hat, "residual": residual}
    losses = {"1": {"all": 2 * late, "late": late}, "2": {"all": 2 * scaled, "late": scaled}}
    return {
        "continuous": losses,
        "discrete": {"all": 0.45, "late": 0.2},
        "bands": list(bands),
        "inferred": {"continuous": inferred, "discrete": inferred},
    }


def mixed(*late_and_scaled: tuple[float, float]) -> Cell:
    """The rise is 0.01, 0.02, 0.04; nearest tasks are hurt most."""
    numbers = zip(("0", "25", "100", "400"), late_and_scaled, (0.1, 0.2, 0.3, 0.4), (0.3, 0.2, 0.2, 0.2), strict=True)
    return {
        "oracles": {
            "continuous": {"mixture": {"all": 0.38}, "ridge": {"all": 0.4}},
            "discrete": {"mixture": {"all": 0.3}, "ridge": {"all": 0.5}},
        },
        "by_steps": {
            steps: checkpoint(late, scaled, g_hat=g, residual=0.01, bands=(near, 0.2))
            for (steps, (late, scaled), g, near) in [
                (steps, losses, g, 0.5 - near) for steps, losses, g, near in numbers
            ]
        },
    }


def seed_of() -> Seed:
    """A seed in which every claim holds."""
    alone = {"curve": {"10": {"continuous": 2.0, "own": 2.0}, "20": {"continuous": 0.5, "own": 0.42}}}
    pool = {"curve": {"10": {"continuous": 0.5, "own": 0.5}, "20": {"continuous": 0.9, "own": 0.32}}}
    return {
        "scaled": mixed((0.2, 0.2), (0.21, 0.2), (0.22, 0.21), (0.24, 0.23)),
        "unit": mixed((0.2, 0.3), (0.21, 0.31), (0.22, 0.32), (0.24, 0.33)),
        "continuous": alone | {"oracles": {"continuous": 0.4, "own": 0.4}},
        "pool": pool | {"oracles": {"continuous": 0.4, "own": 0.3}},
    }


def judged(seed: Seed) -> dict[str, Claim]:
    """Of two seeds alike, so that every interval has no width."""
    return {claim.id: claim for claim in study.judge({0: seed, 1: seed})}


def put(seed: Seed, path: str, value: Any) -> Seed:
    """The seed with one number changed, named by its keys."""
    changed = deepcopy(seed)
    *keys, last = path.split("/")
    at: Any = changed
    for key in keys:
        at = at[int(key) if isinstance(at, list) else key]
    at[int(last) if isinstance(at, list) else last] = value
    return changed


def test_every_claim_holds_where_it_should() -> None:
    claims = judged(seed_of())
    assert len(claims) == 16
    assert {claim.id for claim in claims.values() if claim.verdict != "reproduced"} == set()


@pytest.mark.parametrize(
    ("broken", "path", "value"),
    [
        ("a1/continuous", "continuous/curve/20/own", 0.6),
        ("a1/pool", "pool/curve/20/own", 0.5),
        ("a2/continuous", "scaled/by_steps/0/continuous/1/all", 0.5),
        ("a2/discrete", "scaled/by_steps/0/discrete/all", 0.52),
        ("a2/slowly", "scaled/by_steps/0/discrete/all", 0.31),
        ("a3/rise", "scaled/by_steps/100/continuous/1/late", 0.201),
        ("a3/inference", "scaled/by_steps/400/inferred/continuous/g_hat", 0.05),
        ("a3/prior", "scaled/by_steps/400/inferred/continuous/residual", 0.03),
        ("a4/near", "scaled/by_steps/400/bands/1", 0.6),
        ("a5/recovery", "scaled/by_steps/25/continuous/2/late", 0.209),
        ("a5/difference", "scaled/by_steps/25/continuous/2/late", 0.215),
        ("a5/decay", "scaled/by_steps/400/continuous/2/late", 0.19),
        ("a5/cost", "scaled/by_steps/0/continuous/2/late", 0.22),
        ("a5/control", "unit/by_steps/100/continuous/2/late", 0.21),
        ("a6/sooner", "continuous/curve/10/continuous", 0.5),
        ("a6/leaves", "pool/curve/20/continuous", 0.5),
    ],
)
def test_every_claim_fails_where_it_should(broken: str, path: str, value: float) -> None:
    assert judged(put(seed_of(), path, value))[broken].verdict != "reproduced"


def test_recovery_is_a_share_of_the_rise_and_the_difference_takes_the_cost_out() -> None:
    scaled, unit = seed_of()["scaled"], seed_of()["unit"]
    assert [study.recovered(scaled, steps) for steps in ("25", "100", "400")] == pytest.approx([1, 0.5, 0.25])
    assert study.recovered(unit, "25") == pytest.approx(-10)
    assert study.difference_in_differences(unit, "400") == pytest.approx(1 - 0.03 / 0.04)
    assert study.difference_in_differences(scaled, "100") == pytest.approx(0.5)


def test_the_numbers_are_those_of_the_cells() -> None:
    claims = judged(seed_of())
    assert claims["a2/continuous"].estimate == pytest.approx(0.4 / 0.38)
    assert claims["a2/slowly"].estimate == pytest.approx(0.05 / 0.2)
    assert claims["a5/recovery"].note.startswith("1 at 25, 0.5 at 100, 0.25 at 400 steps")
    assert claims["a6/sooner"].estimate == pytest.approx(0.5) and claims["a6/sooner"].note == "10 steps against 20"
    assert "before fine-tuning 0.2 at gamma 1, 0.3 at gamma 2" in claims["a5/control"].note


@pytest.mark.parametrize("missing", cells.CELLS)
def test_claims_whose_cells_are_missing_are_left_out(missing: str) -> None:
    whole = seed_of()
    left = {name: found for name, found in whole.items() if name != missing}
    assert set(judged(left)) < set(judged(whole))
    assert {claim.seeds for claim in study.judge({0: whole, 1: left})} == {1, 2}


# At a size of seconds.

QUICK = TrainingSettings(steps=150, batch_size=32, learning_rate=4e-3, weight_decay=0.0, warmup=10, schedule="cosine")
SMALL = cells.Setting(
    architecture=RegressionArchitecture(dim=1, points=6, layers=2, width=16, heads=2),
    tasks=2,
    alone_tasks=3,
    noise=0.3,
    pretraining=QUICK,
    alone=replace(QUICK, steps=32),
    finetuning=replace(QUICK, steps=60, learning_rate=2e-3, warmup=0, schedule="constant"),
    checkpoints=(5, 20, 60),
    prompts=200,
)


def test_a_study_from_end_to_end_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = study.Plan((0,), tmp_path, SMALL, device="cpu")
    claims = {claim.id: claim for claim in study.run(plan)}
    assert len(claims) == 16 and all(claim.seeds == 1 for claim in claims.values())
    files = {path.name for path in (tmp_path / "seed-0").iterdir()}
    assert files == {*(f"{name}.json" for name in cells.CELLS), "scaled.safetensors", "unit.safetensors"}

    scaled = json.loads((tmp_path / "seed-0" / "scaled.json").read_text())
    base, tuned = scaled["by_steps"]["0"], scaled["by_steps"]["60"]
    assert tuned["discrete"]["all"] < base["discrete"]["all"]
    assert (
        tuned["continuous"]["1"]["all"]
        > base["continuous"]["1"]["all"]
        > scaled["oracles"]["continuous"]["mixture"]["all"]
    )
    assert tuned["inferred"]["continuous"]["g_hat"] > base["inferred"]["continuous"]["g_hat"]
    assert sum(base["bands"]) / cells.BANDS == pytest.approx(base["continuous"]["1"]["late"])
    oracles = scaled["oracles"]["discrete"]
    assert oracles["pool"]["all"] < oracles["mixture"]["all"] < oracles["ridge"]["all"]
    assert scaled["oracles"]["scaled"]["1"] == scaled["oracles"]["continuous"]["mixture"]

    monkeypatch.setattr(cells.Bench, "_train", lambda *_: pytest.fail("it trained again"))
    assert {claim.id: claim for claim in study.run(plan)} == claims
    (tmp_path / "seed-0" / "unit.json").unlink()
    with pytest.raises(pytest.fail.Exception):  # fine-tuning is measured again, from the network that is kept
        study.run(plan)


def test_the_same_seed_gives_the_same_cell_and_another_another_pool(tmp_path: Path) -> None:
    setting = replace(SMALL, alone=replace(QUICK, steps=4))
    one, again, other = (
        cells.Bench(setting, seed, tmp_path / name, "cpu").measure(["pool"])["pool"]
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert one == again != other
    pools = [cells.Bench(setting, seed, tmp_path, "cpu").pool.pool for seed in (0, 0, 1)]
    assert torch.equal(pools[0], pools[1]) and not torch.equal(pools[0], pools[2])


def test_the_command_line_runs_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans: list[study.Plan] = []
    monkeypatch.setattr(study, "run", lambda plan: plans.append(plan) or [])
    asked = [
        "--setting",
        "paper",
        "--cell",
        "unit",
        "--seeds",
        2,
        "--first-seed",
        4,
        "--device",
        "cpu",
        "--out",
        tmp_path,
    ]
    assert invoke("studies", "run", "implicit_inference")[0] == 0
    assert invoke("studies", "run", "implicit_inference", *asked)[0] == 0
    plain, paper = plans
    assert plain.setting == cells.SETTINGS["demo"] and plain.cells == cells.CELLS and len(plain.seeds) == 3
    assert paper.setting == cells.SETTINGS["paper"] and (list(paper.seeds), paper.cells) == ([4, 5], ["unit"])
    assert paper.folder == tmp_path / "implicit_inference" / "paper" and paper.device == "cpu"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--setting", "papre"], "error: --setting papre: unknown; there are demo, paper"),
        (["--cell", "unti"], "error: --cell unti: unknown; there are scaled, unit, continuous, pool"),
        (["--device", "tpu"], "error: --device tpu: unknown; there are cpu"),
    ],
)
def test_what_is_refused_in_one_line(options: list[str], says: str, tmp_path: Path) -> None:
    code, out, err = invoke("studies", "run", "implicit_inference", *options, "--out", tmp_path)
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith(says)
    assert not any(tmp_path.rglob("*.json"))
