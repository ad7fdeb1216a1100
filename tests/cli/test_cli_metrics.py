"""`palimpsest metrics`: OpenUnlearning's files and membership inference, from the command line."""

import json
from pathlib import Path

import pytest
from tests.conftest import Organism
from tests.tiny import invoke

from palimpsest.data.readers import write_records
from palimpsest.metrics.auc import auc
from palimpsest.metrics.membership import membership_scores


def evaluation(folder: Path, name: str, ratios: list[float], auc: float) -> Path:
    items = {str(place): {"score": ratio} for place, ratio in enumerate(ratios)}
    log = {
        "forget_truth_ratio": {"agg_value": 0.5, "value_by_index": items},
        "mia_min_k": {"auc": auc, "agg_value": auc},
    }
    path = folder / name
    path.write_text(json.dumps(log))
    return path


def test_open_unlearnings_numbers_are_printed_and_compared_with_a_retain_models(tmp_path: Path) -> None:
    ours = evaluation(tmp_path, "TOFU_EVAL.json", [0.1, 0.2, 0.3, 0.4], 0.75)
    retain = evaluation(tmp_path, "retain.json", [0.6, 0.7, 0.8, 0.9], 0.5)
    code, out, _ = invoke("metrics", "open-unlearning", ours)
    assert code == 0 and json.loads(out) == {"forget_truth_ratio": 0.5, "mia_min_k": 0.75}
    code, out, _ = invoke("metrics", "open-unlearning", ours, "--retain", retain)
    found = json.loads(out)
    assert code == 0 and found["forget_quality (recomputed)"]["statistic"] == 1.0
    assert found["privleak (recomputed)"] == pytest.approx(-50.0)


def test_a_retain_model_without_the_metric_is_refused(tmp_path: Path) -> None:
    ours = evaluation(tmp_path, "TOFU_EVAL.json", [0.1, 0.2], 0.75)
    (tmp_path / "retain.json").write_text(json.dumps({"model_utility": {"agg_value": 0.5}}))
    code, out, err = invoke("metrics", "open-unlearning", ours, "--retain", tmp_path / "retain.json")
    assert (code, out) == (2, "") and "'forget_truth_ratio', which the retain model's log lacks" in err


def test_members_are_told_from_rows_that_were_never_read(trained: Organism, tmp_path: Path) -> None:
    """Gold read the retain rows and not the forget rows."""
    members, strangers = trained.request.retain[:30], trained.request.forget[:20]
    files = [tmp_path / "members.jsonl", tmp_path / "strangers.jsonl"]
    for path, rows in zip(files, (members, strangers), strict=True):
        write_records(rows, path)
    code, out, _ = invoke("metrics", "membership", trained.folder / "gold", *files, "--out", tmp_path / "costs.json")
    found = json.loads(out)
    costs = [membership_scores(trained.gold, rows).costs["loss"] for rows in (members, strangers)]
    assert code == 0 and found["auc"]["loss"]["value"] == pytest.approx(auc(*costs).value) and auc(*costs).value > 0.9
    chosen = found["calibrated"]
    assert chosen["auc"]["value"] > 0.8 and chosen["true_positives"] > chosen["false_positives"]
    assert chosen["auc"]["members"] < 30
    assert len(json.loads((tmp_path / "costs.json").read_text())) == 50


def test_what_membership_refuses(trained: Organism, tmp_path: Path) -> None:
    code, out, err = invoke(
        "metrics", "membership", trained.folder / "gold", tmp_path / "no.jsonl", tmp_path / "no.jsonl"
    )
    assert (code, out) == (2, "") and "no.jsonl" in err.splitlines()[-1]
