import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palimpsest.errors import DataError
from palimpsest.metrics.tofu_log import forget_questions, model_utility, read_tofu_log, tofu_log_metrics


def log_of(logs: Path, model: str) -> Path:
    return logs / f"ft_epoch5_lr1e-05_{model.replace(' ', '_')}_wd0.01.json"


def golden_rows(logs: Path, first_cell: str) -> list[list[str]]:
    """The rows of GOLDEN.md's tables whose first cell fits the pattern."""
    lines = (logs / "GOLDEN.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if re.fullmatch(first_cell, row[0])]


def test_model_utility_and_truth_ratio_of_every_golden_log(tofu_logs: Path) -> None:
    rows = golden_rows(tofu_logs, r"llama2-7b \w+")
    assert len(rows) == 4
    for model, *golden in rows:
        found = tofu_log_metrics(log_of(tofu_logs, model))
        keys = ["model_utility_geo", "model_utility_arith", "forget_truth_ratio_geo", "forget_truth_ratio_arith"]
        assert list(found) == keys
        assert [found[key] for key in keys] == pytest.approx([float(value) for value in golden], abs=1e-6)


def test_forget_quality_of_every_golden_pair(tofu_logs: Path) -> None:
    rows = golden_rows(tofu_logs, r"llama2-7b full vs \w+")
    assert len(rows) == 3
    for pair, n, n_retain, _, geo, _, arith in rows:
        paths = log_of(tofu_logs, "llama2-7b full"), log_of(tofu_logs, f"llama2-7b {pair.split()[-1]}")
        found = tofu_log_metrics(*paths)
        assert found["forget_quality_geo"] == pytest.approx(float(geo), rel=1e-6)
        assert found["forget_quality_arith"] == pytest.approx(float(arith), rel=1e-6)
        questions = forget_questions(*paths)
        assert (questions.n, questions.n_retain) == (int(n), int(n_retain))


def test_only_retain90_answers_the_same_questions(tofu_logs: Path) -> None:
    full = log_of(tofu_logs, "llama2-7b full")
    shared = [forget_questions(full, log_of(tofu_logs, f"llama2-7b retain{share}")).shared for share in (90, 95, 99)]
    assert shared == [300, 100, 0]


@pytest.mark.parametrize("model", ["full", "retain90"])
def test_every_component_of_golden(tofu_logs: Path, model: str) -> None:
    text = (
        (tofu_logs / "GOLDEN.md").read_text().split(f"Components, llama2-7b {model} (geo):")[1].split("Components")[0]
    )
    golden = {(name, part): float(value) for name, part, value in re.findall(r"- (\S+):(\w+): ([\d.]+)", text)}
    assert len(golden) == 12
    log = read_tofu_log(log_of(tofu_logs, f"llama2-7b {model}"))
    for (name, part), value in golden.items():
        sub, ratio = log[name], log[name].truth_ratio("geo")
        if part == "rouge":
            found = sub.rouge
        elif part == "tr":
            found = np.minimum(ratio, 1 / ratio) if "forget" in name else np.maximum(0, 1 - ratio)
        else:
            right, wrong = np.exp(-sub.loss), np.exp(-sub.wrong_loss).sum(1)
            found = right / (right + wrong) if "real" in name else right
        assert found.mean() == pytest.approx(value, abs=1e-6)


def tiny_log(**changes: Any) -> dict[str, Any]:
    """Two questions with two wrong answers each, in every sub-log."""
    fields: dict[str, Any] = {
        "avg_gt_loss": {"0": 0.1, "1": 0.3},
        "avg_paraphrased_loss": {"1": 1.0, "0": 0.5},
        "average_perturb_loss": {"0": [1.0, 2.0], "1": [1.5, 0.5]},
        "rougeL_recall": {"0": 1.0, "1": 0.5},
        "generated_text": {"0": ["q0", "a", "a"], "1": ["q1", "a", "a"]},
    } | changes
    names = ["eval_log.json", "eval_log_forget.json", "eval_real_author_wo_options.json"]
    return {name: dict(fields) for name in [*names, "eval_real_world_wo_options.json"]}


def test_rows_are_joined_by_question_not_by_order(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(tiny_log()))
    log = read_tofu_log(path)
    assert log["eval_log_forget.json"].truth_ratio("geo") == pytest.approx(np.exp([0.5 - 1.5, 1.0 - 1.0]))
    assert log["eval_log_forget.json"].truth_ratio("arith") == pytest.approx(
        [(np.exp(-1) + np.exp(-2)) / 2 / np.exp(-0.5), (np.exp(-1.5) + np.exp(-0.5)) / 2 / np.exp(-1)]
    )
    parts = []
    for general in (False, True, True):
        right = np.exp([-0.1, -0.3])
        wrong = np.array([np.exp(-1) + np.exp(-2), np.exp(-1.5) + np.exp(-0.5)])
        parts += [(right / (right + wrong) if general else right).mean(), 0.75, (1 - np.exp(-1)) / 2]
    assert model_utility(log, "geo") == pytest.approx(9 / sum(1 / part for part in parts))


BROKEN = {
    "not JSON": "{",
    "is missing": json.dumps({name: sub for name, sub in tiny_log().items() if "forget" not in name}),
    "expected TOFU": "[1, 2]",
    "rougeL_recall": json.dumps(tiny_log(rougeL_recall={"0": 1.0})),
    "average_perturb_loss": json.dumps(tiny_log(average_perturb_loss={"0": [1.0], "1": [1.0, 2.0]})),
    "avg_paraphrased_loss": json.dumps(tiny_log(avg_paraphrased_loss={"0": "high", "1": 1.0})),
    "finite": json.dumps(tiny_log(avg_paraphrased_loss={"0": float("nan"), "1": 1.0})),
    "no questions": json.dumps(tiny_log(avg_gt_loss={})),
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_log_is_told_in_one_line_with_its_path(tmp_path: Path, said: str) -> None:
    path = tmp_path / "log.json"
    path.write_text(BROKEN[said])
    with pytest.raises(DataError) as caught:
        tofu_log_metrics(path)
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_logs_without_a_common_question_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        tofu_log_metrics(tmp_path / "none.json")
    with pytest.raises(DataError, match="cannot be read"):
        tofu_log_metrics(tmp_path)
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    ours.write_text(json.dumps(tiny_log()))
    theirs.write_text(json.dumps(tiny_log()).replace('"0"', '"10"').replace('"1"', '"11"'))
    with pytest.raises(DataError, match="share no forget question") as caught:
        tofu_log_metrics(ours, theirs)
    assert "\n" not in str(caught.value)
