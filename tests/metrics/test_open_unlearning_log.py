"""OpenUnlearning's results read, and its two comparisons with a retain model recomputed from real truth ratios."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palimpsest.errors import DataError
from palimpsest.metrics.open_unlearning_log import (
    logged_forget_quality,
    logged_privleak,
    read_open_unlearning_log,
)
from palimpsest.metrics.tofu_log import FORGET, read_tofu_log

LOG: dict[str, Any] = {
    "forget_Q_A_Prob": {
        "agg_value": 0.3,
        "value_by_index": {"0": {"prob": 0.2, "avg_loss": 1.6}, "1": {"prob": 0.4, "avg_loss": 0.9}},
    },
    "forget_Q_A_PERT_Prob": {
        "agg_value": 0.25,
        "value_by_index": {"0": {"prob": [0.1, 0.3], "avg_loss": [2.3, 1.2]}, "1": {"prob": [0.2, 0.4]}},
    },
    "forget_Q_A_ROUGE": {
        "agg_value": 0.5,
        "value_by_index": {"0": {"rougeL_recall": 0.5, "input": "q", "ground_truth": "a", "generation": ""}},
    },
    "exact_memorization": {"agg_value": 0.6, "value_by_index": {"0": {"score": 0.6}, "1": {"score": None}}},
    "mia_min_k": {
        "forget": {"agg_value": 2.0, "value_by_index": {"0": {"score": 1.5}, "1": {"score": 2.5}}},
        "holdout": {"agg_value": 3.0, "value_by_index": {"0": {"score": 3.0}}},
        "auc": 1.0,
        "agg_value": 0.99,
    },
    "forget_quality": {"agg_value": None},
    "model_utility": {"agg_value": 0.6},
}


def write(folder: Path, content: Any, name: str = "TOFU_EVAL.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_every_metric_is_read_with_its_items(tmp_path: Path) -> None:
    log = read_open_unlearning_log(write(tmp_path, LOG))
    assert set(log) == {*LOG, "mia_min_k/forget", "mia_min_k/holdout"}
    assert log["forget_Q_A_Prob"].value == 0.3 and log["forget_quality"].value is None
    assert log["forget_Q_A_Prob"].values("prob") == {"0": 0.2, "1": 0.4}
    assert log["forget_Q_A_PERT_Prob"].values("prob") == pytest.approx({"0": 0.2, "1": 0.3})
    assert log["forget_Q_A_ROUGE"].items == {"0": {"rougeL_recall": 0.5}}
    assert log["exact_memorization"].values() == {"0": 0.6}
    assert (log["mia_min_k"].value, log["mia_min_k"].items) == (0.99, {})
    assert log["mia_min_k/forget"].values() == {"0": 1.5, "1": 2.5}
    # What is kept item by item is what the aggregate is the mean of.
    for name, field in (("forget_Q_A_Prob", "prob"), ("forget_Q_A_PERT_Prob", "prob"), ("exact_memorization", "score")):
        assert np.mean(list(log[name].values(field).values())) == pytest.approx(log[name].value)
    with pytest.raises(
        DataError, match=r"^metric 'forget_Q_A_Prob': no item has field 'score'; there is avg_loss, prob$"
    ):
        log["forget_Q_A_Prob"].values()
    with pytest.raises(DataError, match=r"^metric 'model_utility': no item has field 'score'; there is none$"):
        log["model_utility"].values()


def as_open_unlearning(log: Path, inverse: bool = False) -> dict[str, Any]:
    """The real forget truth ratios of a log of TOFU's authors, written as OpenUnlearning would."""
    ratios = read_tofu_log(log)[FORGET].truth_ratio("geo")
    scores = {str(place): {"score": 1 / (ratio + 1e-10) if inverse else ratio} for place, ratio in enumerate(ratios)}
    mean = float(np.minimum(ratios, 1 / ratios).mean())
    return {"forget_truth_ratio": {"agg_value": mean, "value_by_index": scores}}


@pytest.mark.parametrize("inverse", [False, True])
def test_forget_quality_is_the_golden_one_whichever_way_the_ratios_run(
    tofu_logs: Path, tmp_path: Path, inverse: bool
) -> None:
    golden = re.findall(
        r"full vs retain(\d+) \| 300 \| (\d+) \| ([\d.]+) \| (\S+)", (tofu_logs / "GOLDEN.md").read_text()
    )
    assert len(golden) == 3
    for share, n, statistic, p in golden:
        logs = [
            read_open_unlearning_log(write(tmp_path, as_open_unlearning(tofu_logs / name, inverse)))
            for name in (
                "ft_epoch5_lr1e-05_llama2-7b_full_wd0.01.json",
                f"ft_epoch5_lr1e-05_llama2-7b_retain{share}_wd0.01.json",
            )
        ]
        found = logged_forget_quality(*logs)
        assert found.p == pytest.approx(float(p), rel=1e-6)
        assert (found.statistic, found.n, found.n_retain) == (pytest.approx(float(statistic), abs=1e-6), 300, int(n))


def test_privleak_turns_open_unlearnings_auc_round(tmp_path: Path) -> None:
    log = read_open_unlearning_log(write(tmp_path, LOG))
    retain = read_open_unlearning_log(write(tmp_path, {"mia_min_k": {"agg_value": 0.5}}))
    assert logged_privleak(log, retain) == pytest.approx((0.01 - 0.5) / 0.5 * 100)
    assert logged_privleak(retain, retain) == 0


def test_without_a_retain_log_there_is_no_comparison(tmp_path: Path) -> None:
    log = read_open_unlearning_log(write(tmp_path, LOG))
    for compare, name in ((logged_forget_quality, "Forget Quality"), (logged_privleak, "PrivLeak")):
        with pytest.raises(
            DataError, match=rf"^{name} compares with a model trained without the forget set, but its log"
        ) as e:
            compare(log, None)
        assert "\n" not in str(e.value) and "retain_logs_path" in str(e.value)
    with pytest.raises(DataError, match="needs metric 'forget_truth_ratio', which the model's log lacks"):
        logged_forget_quality(log, log)
    with pytest.raises(DataError, match="needs metric 'mia_loss', which the model's log lacks"):
        logged_privleak(log, log, attack="mia_loss")
    empty = read_open_unlearning_log(write(tmp_path, {"mia_min_k": {"agg_value": None}}))
    with pytest.raises(DataError, match="metric 'mia_min_k' has no agg_value; run"):
        logged_privleak(log, empty)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[]", "holds no metrics by name; expected OpenUnlearning's"),
        ("{}", "holds no metrics by name"),
        ({"a": 3}, "metric 'a': field 'agg_value' is missing"),
        ({"a": {"value_by_index": {}}}, "metric 'a': field 'agg_value' is missing"),
        ({"a": {"agg_value": "0.3"}}, "metric 'a': field 'agg_value' is '0.3'; expected a number"),
        ({"a": {"agg_value": 1, "value_by_index": [1]}}, "metric 'a': field 'value_by_index' is a list"),
        ({"a": {"agg_value": 1, "value_by_index": {"7": 1}}}, "metric 'a': item '7' is 1; expected an object"),
        (
            {"a": {"agg_value": 1, "value_by_index": {"7": {"prob": [[1], [2, 3]]}}}},
            "metric 'a': item '7': field 'prob' is [[1], [2, 3]]; expected a number, a list of numbers or null",
        ),
        ({"a": {"agg_value": 1, "value_by_index": {"7": {"prob": []}}}}, "item '7': field 'prob' is []; expected"),
        ({"a": {"agg_value": 1, "forget": {"x": 1}}}, "metric 'a': 'forget': field 'agg_value' is missing"),
    ],
)
def test_a_broken_file_is_told_in_one_line_with_metric_item_and_field(tmp_path: Path, content: Any, says: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_open_unlearning_log(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and says in message and "\n" not in message


def test_a_missing_file_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        read_open_unlearning_log(tmp_path / "none.json")
