"""lm-eval: what it is asked, what is made of its answer, and, where it is installed, that it agrees with ours."""

import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from palimpsest.data.records import Choice
from palimpsest.errors import SpecError
from palimpsest.metrics.harness import harness_scores
from palimpsest.metrics.multiple_choice import multiple_choice
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import Architecture, new_model
from palimpsest.models.tokenizers import byte_pair_tokenizer

RESULTS = {
    "mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.01, "alias": "mmlu"},
    "gsm8k": {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0, "exact_match_stderr,x": "N/A"},
}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module that answers in lm-eval's stead, and what it was asked."""
    asked: list[dict[str, Any]] = []

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        asked.append(given | {"training": given["model"]["pretrained"].training})
        if given["tasks"] == ["nowhere"]:
            raise KeyError("Spec 'nowhere' is not a registered\n task")
        if given["tasks"] == ["offline"]:
            raise ConnectionError("Couldn't reach the hub")
        return {"results": RESULTS}

    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", simple_evaluate, raising=False)
    monkeypatch.setattr(sys.modules["lm_eval.models.huggingface"], "HFLM", dict, raising=False)
    return asked


def test_the_loaded_network_is_evaluated_as_it_is(model: LanguageModel, stand_in: list[dict[str, Any]]) -> None:
    model.network.train()
    found = harness_scores(model, ("mmlu", "gsm8k"), limit=7)
    assert model.network.training
    model.network.eval()
    (asked,) = stand_in
    assert asked["model"]["pretrained"] is model.network and asked["model"]["tokenizer"] is model.tokenizer
    assert (asked["tasks"], asked["limit"], asked["training"]) == (["mmlu", "gsm8k"], 7, False)
    assert found == {
        "mmlu/acc": 0.25,
        "mmlu/acc_stderr": 0.01,
        "gsm8k/exact_match,strict-match": 0.5,
        "gsm8k/exact_match,flexible-extract": 0.0,
    }


@pytest.mark.parametrize(("task", "says"), [("nowhere", "is not a registered task"), ("offline", "Couldn't reach")])
def test_what_lm_eval_refuses_is_one_line(
    task: str, says: str, model: LanguageModel, stand_in: list[dict[str, Any]]
) -> None:
    with pytest.raises(SpecError, match=f"^lm-eval cannot evaluate {task}: .*{says}") as error:
        harness_scores(model, [task])
    assert "\n" not in str(error.value)


def test_without_lm_eval_it_says_how_to_get_it(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SpecError, match=r"^lm-eval is not installed; `pip install palimpsest\[harness\]`$"):
        harness_scores(model, ["mmlu"])


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_itself_counts_the_same_answers_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its WMDP task on rows of ours, with a header for their subject."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (palimpsest[harness])")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    draw = random.Random(0)
    words = "heat acid salt iron lead zinc gold clay".split()
    asked = [
        Choice(" ".join(draw.choices(words, k=5)) + "?", tuple(draw.sample(words, 4)), draw.randrange(4), "biology")
        for _ in range(60)
    ]
    rows = [{"question": each.question, "choices": each.choices, "answer": each.answer} for each in asked]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lettered = "".join(f"\n{letter}. {{{{choices[{place}]}}}}" for place, letter in enumerate("ABCD"))
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "description": "The following are multiple choice questions (with answers) about biology.\n\n",
        "doc_to_text": "{{question.strip()}}" + lettered + "\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(task))
    tokenizer = byte_pair_tokenizer([" A A B B C D Answer question"], vocab_size=265)
    model = new_model(Architecture(layers=2, width=32, mlp_width=48, heads=2, context=512), tokenizer, 5)
    ours = multiple_choice(model, asked).correct.mean().item()
    assert 0 < ours < 1
    assert harness_scores(model, [str(tmp_path / "ours.yaml")])["ours/acc"] == pytest.approx(ours)
