"""The study of random-label forgetting: its judgement on made-up cells, and a run from end to end in seconds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from palimpsest.data.records import Choice
from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import Architecture, new_model
from palimpsest.models.tokenizers import word_tokenizer
from palimpsest.models.training import TrainingSettings
from palimpsest.studies import task_cells
from palimpsest.studies.claims import Claim
from palimpsest.studies.task_cells import Measured, Setting, crossings, given, probed_layer, relabelled
from palimpsest.studies.task_forgetting import judge, matrix, page, run
from palimpsest.worlds.tasks import TasksWorld

TASKS = [f"t{place}" for place in range(5)]
FRAGILE = {"t0": 0.5, "t1": 0.4, "t2": 0.2, "t3": 0.1, "t4": 0.0}
"""What every forgetting takes off each task."""


def seed_of(shift: float = 0.0) -> Measured:
    learned = {
        "rows": dict.fromkeys(TASKS, 400) | {"near chance": 400},
        "accuracy": dict.fromkeys(TASKS, 1.0) | {"near chance": 0.55},
        "confidence": {task: 0.9 - 0.1 * place for place, task in enumerate(reversed(TASKS))},
        "variance": {task: 5.0 - place for place, task in enumerate(TASKS)},
        "learned_at": {task: [10 * (place + 1) for place in range(120)] for task in TASKS},
        "probes": {
            task: {"learned": 0.9, "untrained": 0.6 if task != "t4" else 0.85, "words": 0.5, "shuffled": 0.5}
            for task in TASKS
        },
    }

    def cell(task: str, *, few: bool = False) -> task_cells.Cell:
        after = {other: 1.0 - FRAGILE[other] - (0.05 if other == task else 0.0) - shift for other in TASKS}
        after = {task: after[task] + 0.025} if few else after | {"near chance": 0.4}
        return {"task": task, "rows": 1000, "train_accuracy": 0.5, "label_fit": 0.6, "accuracy": after} | {
            "forgotten_at": [None if place < 10 else 2000 - place for place in range(120)],
            "probe": 0.84,
        }

    forgotten = {kind: {task: cell(task, few=kind == "few") for task in TASKS} for kind in ("random", "few", "flipped")}
    return Measured(learned, forgotten)


@pytest.fixture(scope="module")
def claims() -> dict[str, Claim]:
    return {claim.id: claim for claim in judge({0: seed_of(), 1: seed_of(0.01), 2: seed_of(0.02)})}


def test_the_evaluated_task_decides_a_matrix_made_of_columns(claims: dict[str, Claim]) -> None:
    """Without its diagonal a row's mean tells a little of the column it lacks: 1 / (n - 1)² of the variance."""
    assert claims["c/random"].estimate == pytest.approx(1 - 1 / 16) and claims["c/random"].verdict == "reproduced"
    assert claims["c/random"].note == "evaluated 0.94, forgotten 0.00"


def test_tasks_near_chance_are_left_out() -> None:
    assert seed_of().tasks == TASKS and matrix(seed_of()).shape == (5, 5)
    assert matrix(seed_of())[0, 1] == pytest.approx(0.8) and matrix(seed_of(), "flipped")[0, 1] == pytest.approx(0.4)


def test_probes_count_only_where_they_beat_their_controls_before(claims: dict[str, Claim]) -> None:
    """Of t4 an untrained model tells as much."""
    assert claims["e/behaviour"].note.startswith("12 of 15 tasks; probe 0.90 before and 0.84 after, best control 0.60")
    assert claims["e/kept"].estimate == pytest.approx(0.24 / 0.3)
    assert claims["e/kept"].verdict == "not testable here" or claims["e/kept"].verdict == "contradicted"
    behaviour = sum(1 - FRAGILE[task] - 0.05 for task in TASKS[:4]) / 4 - 0.01
    assert claims["e/behaviour"].estimate == pytest.approx(0.84 - behaviour)


def test_where_no_probe_could_read_anything_nothing_is_claimed() -> None:
    seed = seed_of()
    for probes in seed.learned["probes"].values():
        probes["untrained"] = 0.9
    found = {claim.id: claim for claim in judge({0: seed})}
    assert found["e/behaviour"].verdict == "not testable here" and found["e/behaviour"].estimate is None
    assert found["e/behaviour"].note == "of 5 tasks a probe could read none before"


def test_spread_order_predictors_and_size(claims: dict[str, Claim]) -> None:
    assert claims["a"].estimate == pytest.approx(0.41, abs=0.02) and claims["a"].note.startswith("from 0.10 to 1.14")
    assert claims["f"].estimate == pytest.approx(-1.0) and claims["f"].seeds == 3
    assert claims["d/confidence"].estimate == pytest.approx(-1.0) and claims["d/confidence"].verdict == "reproduced"
    assert claims["d/variance"].estimate == pytest.approx(1.0) and claims["d/variance"].verdict == "contradicted"
    assert "permutation p = 0.017, 5 tasks" in claims["d/variance"].note
    assert claims["g"].estimate == pytest.approx(0.05) and claims["g"].verdict == "reproduced"


def test_a_task_with_few_dated_examples_says_nothing_about_order() -> None:
    seed = seed_of()
    for cell in seed.forgotten["random"].values():
        cell["forgotten_at"] = [None] * 30 + cell["forgotten_at"][30:]
    (claim,) = [claim for claim in judge({0: seed}) if claim.id == "f"]
    assert claim.seeds == 0 and claim.verdict == "not testable here"


def test_the_page_names_every_task_and_claim(claims: dict[str, Claim]) -> None:
    html = page({0: seed_of()}, list(claims.values()))
    assert all(f">{task}<" in html for task in TASKS) and "near chance" not in html
    assert "One seed, 5 tasks" in html and all(claim.statement in html for claim in claims.values())


def test_crossings_are_dated_by_the_first_look_beyond() -> None:
    looks = {30: [0.9, 0.61, 0.2], 10: [0.1, 0.7, 0.1], 20: [0.6, 0.2, 0.59]}
    assert crossings(looks, up=True) == [20, 10, None]
    assert crossings(looks, up=False) == [10, 20, 10]


def test_labels_are_even_and_the_same_for_the_same_row() -> None:
    rows = [Choice(f"q{i}", ("a", "b"), i % 2, id=str(i)) for i in range(400)]
    drawn = relabelled(rows, 0)
    assert 160 < sum(row.answer for row in drawn) < 240
    assert 160 < sum(a.answer == b.answer for a, b in zip(rows, drawn, strict=True)) < 240
    assert relabelled(rows[::-1], 0) == drawn[::-1] and relabelled(rows, 1) != drawn
    assert all(a.answer != b.answer for a, b in zip(rows, relabelled(rows, 0, flipped=True), strict=True))


def test_the_layer_is_the_fifth_from_the_end() -> None:
    """`hidden_states[-5]` of 32 blocks is what block 27 gives."""
    assert (probed_layer(32), probed_layer(12), probed_layer(3), probed_layer(1)) == (27, 7, 1, 0)


def quick(seed: int) -> Setting:
    """Two tasks that a few steps teach."""
    world = TasksWorld(taught=200, forget=60, test=40, seed=seed)
    tasks = tuple(task for task in world.tasks if task.name in ("negation", "all or no", "diet"))
    start = new_model(Architecture(2, 32, 64, 2, 64), word_tokenizer(world.vocabulary_texts()), seed)
    learning = TrainingSettings(steps=300, batch_size=32, learning_rate=5e-3, warmup=20, seed=seed)
    return Setting(start, tasks, learning, TrainingSettings(steps=30, batch_size=20, learning_rate=5e-3, warmup=1))


@pytest.mark.slow
def test_a_study_runs_and_does_not_measure_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = run(quick, range(1), tmp_path)
    folder = tmp_path / "seed-0"
    learned = json.loads((folder / "learned.json").read_text())
    assert all(learned["accuracy"][task] > 0.9 for task in ("negation", "all or no"))
    forgot = json.loads((folder / "random" / "negation.json").read_text())
    assert forgot["accuracy"]["negation"] < learned["accuracy"]["negation"]
    assert 0.3 < forgot["probe"] <= 1 and len(forgot["forgotten_at"]) == 40
    assert (folder / "few" / "negation.json").exists() and (folder / "flipped" / "diet.json").exists()
    assert "Flipped labels" in (tmp_path / "matrix.html").read_text()
    monkeypatch.setattr(task_cells, "train", None)
    again = run(quick, range(1), tmp_path)
    assert [claim.estimate for claim in again] == [claim.estimate for claim in claims]


def test_the_same_study_takes_a_model_and_tasks_of_ones_own(trained_folder: Path, tmp_path: Path) -> None:
    rows = [{"question": f"q{i}?", "choices": ["yes", "no", "who"], "answer": i % 3} for i in range(80)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setting = given(trained_folder, tmp_path, 0)
    assert isinstance(setting.start, LanguageModel) and [task.name for task in setting.tasks] == ["mine"]
    assert setting.forgetting.learning_rate == 1e-4


@pytest.fixture
def trained_folder(trained) -> Path:  # type: ignore[no-untyped-def]
    folder: Path = trained.folder / "full"
    return folder


def test_fewer_than_three_learned_tasks_are_refused(tmp_path: Path) -> None:
    def two(seed: int) -> Setting:
        setting = quick(seed)
        return replace(setting, tasks=setting.tasks[:2], learning=replace(setting.learning, steps=1))

    with pytest.raises(SpecError, match=r"seed 0: . of 2 tasks were learned .* at least 3"):
        run(two, range(1), tmp_path)
