"""Benchmarks end to end: an example on rows of the benchmark's schema, with models that are trained in seconds."""

import json
import math
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats
from tests.quiz import FORGET, PLACES, learn, quiz, text, write_wmdp

from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.results import Audit
from palimpsest.audit.verify import verify
from palimpsest.data.records import QA, Passage
from palimpsest.errors import SpecError
from palimpsest.metrics.multiple_choice import multiple_choice
from palimpsest.metrics.tofu import model_utility, utility_scores
from palimpsest.metrics.truth_ratio import truth_ratio
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.tokenizers import word_tokenizer
from palimpsest.run.pipeline import run
from palimpsest.run.sources import Source, open_source
from palimpsest.run.spec import Spec, make_spec
from palimpsest.unlearn.descent import FARTHEST
from palimpsest.unlearn.gauge import Gauge
from palimpsest.unlearn.update import Update

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@dataclass(frozen=True)
class Benchmark:
    """What was run, and what came of it."""

    spec: Spec
    source: Source
    original: LanguageModel
    gold: LanguageModel
    folder: Path
    audit: Audit

    def score(self, model: str, key: str) -> float:
        return self.audit.model(model).scores[key].value


def carry_out(folder: Path, example: str, data: dict[str, Any], known: list[QA], **changed: Any) -> Benchmark:
    """An example's specification with files, models and settings of a size for tests.

    Args:
        folder: where models and run go.
        example: the file in `examples`.
        data: what takes the place of the example's hub ids.
        known: what gold has read besides its corpus, as the original has.
        changed: keys of the specification that are too large or too slow for a test.
    """
    settings = yaml.safe_load((EXAMPLES / example).read_text())
    settings |= {"data": settings["data"] | data, "sham": {"steps": 5}, **changed}
    corpus = open_source(make_spec(settings)).corpus
    read = (*corpus.forget, *corpus.retain, *known)
    tokenizer = word_tokenizer([row.text if isinstance(row, Passage) else _told(row) for row in read])  # type: ignore[arg-type]
    original, gold = learn(read, tokenizer), learn((*corpus.retain, *known), tokenizer)
    for name, model in {"original": original, "gold": gold}.items():
        model.save(folder / name)
    spec = make_spec(
        settings | {"model": {"kind": "load", "path": str(folder / "original"), "gold": str(folder / "gold")}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(folder / "cache"))
        audit = run(spec, folder / "run")
    return Benchmark(spec, open_source(spec), original, gold, folder / "run", audit)


def _told(row: QA) -> str:
    return f"Question: {row.question}\nAnswer: {row.answer} {row.paraphrased_answer} {' '.join(row.wrong)}"


# WMDP.

LEVEL = 0.4


@pytest.fixture(scope="module")
def wmdp(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    folder = tmp_path_factory.mktemp("wmdp")
    return carry_out(
        folder,
        "wmdp.yaml",
        write_wmdp(folder),
        known=[],
        methods=[{"name": "grad_diff", "learning_rate": 1e-3, "batch_size": 6}],
        stop={"steps": 200, "forget_probability": None, "forget_accuracy": LEVEL},
    )


LAYERED = (
    "legible_probability",
    "within_reach",
    "said_by_some_layer",
    "taken_back",
    "decided_at",
    "erased_from_layers",
)


def test_wmdp_leaves_evidence_that_verifies(wmdp: Benchmark) -> None:
    assert verify(wmdp.folder).ok
    assert [model.name for model in wmdp.audit.models] == ["original", "gold", "sham", "grad_diff"]
    keys = [measure.key for measure in wmdp.audit.measures]
    inside = {f"forget/{name}" for name in LAYERED}
    inside |= {"forget/unlearning_depth", *(key for key in keys if key.startswith("forget_recovery"))}
    assert "forget_recovery/restore_value_lpr" in inside < set(keys)
    by_layer = ("forget_layers/", "forget_depth_layers/")
    assert [key for key in keys if key not in inside and not key.startswith(by_layer)] == [
        *(f"forget/{name}" for name in ("answer_probability", "nll", "kl_from_gold")),
        *(f"forget_choices/{name}" for name in ("accuracy", "choice_probability")),
        *(f"retain_unseen/{name}" for name in ("answer_probability", "nll", "kl_from_original")),
        *(f"utility_choices/{name}" for name in ("accuracy", "choice_probability")),
    ]
    definitions = {measure.definition.split(":")[0] for measure in wmdp.audit.measures}
    assert {"multiple_choice@lm_eval_wmdp", "answer_probability@passage", "kl@passage_tokens"} <= definitions


def test_wmdps_controls_answer_and_guess(wmdp: Benchmark) -> None:
    assert wmdp.score("original", "forget_choices/accuracy") == 1
    assert wmdp.score("gold", "forget_choices/accuracy") < 0.6
    assert wmdp.score("original", "utility_choices/accuracy") > 0.9 < wmdp.score("gold", "utility_choices/accuracy")
    direct = multiple_choice(wmdp.gold, wmdp.source.request.choices)
    assert wmdp.score("gold", "forget_choices/choice_probability") == pytest.approx(direct.probability.mean().item())
    accuracy = wmdp.audit.model("original").scores["forget_choices/accuracy"]
    assert (accuracy.n, accuracy.clusters) == (len(FORGET), len(FORGET))  # each question by itself
    compared = wmdp.audit.model("original").against_gold["forget_choices/accuracy"]
    assert compared.difference == pytest.approx(1 - wmdp.score("gold", "forget_choices/accuracy"))


def test_unlearning_ends_at_the_accuracy_asked_for(wmdp: Benchmark) -> None:
    trace = Update.load(wmdp.folder / "update" / "grad_diff").provenance["trace"]
    accuracies = [point["forget_accuracy"] for point in trace]
    assert accuracies[0] == 1 and min(accuracies[:-1]) > LEVEL >= accuracies[-1]
    assert accuracies[-1] == pytest.approx(wmdp.score("grad_diff", "forget_choices/accuracy"))
    stopped = wmdp.audit.model("grad_diff").stopped
    assert stopped.startswith("accuracy on the forget set's multiple-choice questions was down to 0.400")
    # No stretch went further than is allowed, what is noise aside, and none skipped the level.
    drops = [before - after for before, after in pairwise(accuracies)]
    assert max(drops[:-1], default=0) <= FARTHEST * (1 - LEVEL) + 1 / math.sqrt(len(FORGET)) + 1e-9
    assert accuracies[-1] > LEVEL - 3 / len(FORGET)


def test_the_gauge_measures_accuracy_as_the_metric_does(wmdp: Benchmark) -> None:
    request = wmdp.source.request
    right = multiple_choice(wmdp.gold, request.choices).correct.sum().item()
    assert Gauge(wmdp.gold, request).measure(0).forget_accuracy == right / len(FORGET)


def test_wmdps_examples_are_passages_and_the_choices_taken(wmdp: Benchmark) -> None:
    by_set = {on: [one for one in wmdp.audit.examples if one.on == on] for on in ("forget", "forget_choices")}
    assert [(one.question, one.answer, one.said) for one in by_set["forget"]] == [
        ("", text(row), {}) for row in quiz(FORGET)
    ]
    for one, row in zip(by_set["forget_choices"], quiz(FORGET), strict=True):
        assert (one.question, one.answer) == (row["question"], row["choices"][row["answer"]])
        assert one.said["original"] == one.answer and set(one.said) == {"original", "gold", "sham", "grad_diff"}
        assert set(one.said.values()) <= set(row["choices"])


def test_wmdps_report_says_what_the_verdict_rests_on(wmdp: Benchmark) -> None:
    told = " ".join((wmdp.folder / "report.md").read_text().split())
    assert "Multiple-choice accuracy" in told and "Passage probability" in told
    assert "Accuracy on the 12 multiple-choice questions" in told and "Some rows are passages" in told
    assert "Where is ambrite found?" in (wmdp.folder / "report.html").read_text()


# TOFU.

THINGS = [f"thing{number}" for number in range(24)]


def author(name: str) -> list[dict[str, Any]]:
    """Twenty questions about one of TOFU's authors, with wording and wrong answers as its perturbed files have them."""
    draw, rows = random.Random(name), []
    for number in range(20):
        thing, *others = draw.sample(THINGS, 6)
        rows.append(
            {
                "question": f"What does {name} do on day{number}?",
                "answer": f"On day{number} {name} buys {thing}.",
                "paraphrased_question": f"On day{number}, what does {name} do?",
                "paraphrased_answer": f"{name} buys {thing} on day{number}.",
                "perturbed_answer": [f"{name} buys {other} on day{number}." for other in others],
            }
        )
    return rows


def general(kind: str, n: int) -> list[dict[str, Any]]:
    """What everybody knows: questions without wordings, three wrong answers each."""
    rows = []
    for number in range(n):
        place, *others = random.Random(f"{kind}{number}").sample(PLACES, 4)
        rows.append({"question": f"Where is {kind}{number}?", "answer": place, "perturbed_answer": others})
    return rows


GENERAL = {"real_authors_perturbed": general("writer", 6), "world_facts_perturbed": general("fact", 7)}


def write_tofu(folder: Path) -> None:
    kept = [row for name in ("Ada", "Ben", "Cyd") for row in author(name)]
    files = {"forget10_perturbed": author("Zoe"), "retain90": kept, "retain_perturbed": kept[:40]} | GENERAL
    for name, rows in files.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    folder = tmp_path_factory.mktemp("tofu")
    write_tofu(folder)
    return carry_out(
        folder,
        "tofu_forget10.yaml",
        {"path": str(folder)},
        known=[QA(row["question"], row["answer"]) for rows in GENERAL.values() for row in rows],
        template="plain",
        methods=[{"name": "grad_diff", "learning_rate": 1e-3}],
        stop={"steps": 40, "forget_probability": "gold"},
        max_new_tokens=8,
    )


def test_tofu_leaves_its_own_metrics_in_evidence_that_verifies(tofu: Benchmark) -> None:
    assert verify(tofu.folder).ok
    definitions = {measure.key: measure.definition for measure in tofu.audit.measures}
    assert definitions["tofu/model_utility"].startswith("model_utility@tofu_paper:")
    assert definitions["tofu/forget_quality"].startswith("forget_quality@tofu_paper:")
    assert definitions["forget/truth_ratio"] == "truth_ratio@tofu_paper"
    rows = RunFolder(tofu.folder).read_scores()
    counts = {on: sum(row.measure == f"{on}/utility_truth_ratio" for row in rows) for on in
              ("tofu_retain", "tofu_real_authors", "tofu_world_facts")}  # fmt: skip
    assert list(counts.values()) == [4 * 40, 4 * 6, 4 * 7]
    authors = tofu.audit.model("gold").scores["tofu_retain/utility_probability"]
    assert (authors.n, authors.clusters) == (40, 2)
    for name in ("original", "gold", "sham", "grad_diff"):
        parts = [
            tofu.score(name, f"{on}/{part}")
            for on in counts
            for part in ("utility_probability", "rougeL_recall", "utility_truth_ratio")
        ]
        assert tofu.score(name, "tofu/model_utility") == pytest.approx(stats.hmean(parts), rel=1e-6)
        assert not any(key.startswith("tofu") for key in tofu.audit.model(name).against_gold)


def test_tofus_numbers_are_those_of_its_metrics(tofu: Benchmark) -> None:
    own, request = tofu.source.tofu, tofu.source.request
    assert own is not None
    sets = {"retain": own.retain, "real": own.real_authors, "world": own.world_facts}
    scores = [
        utility_scores(tofu.original, rows, offered=name != "retain", max_new_tokens=8) for name, rows in sets.items()
    ]
    assert tofu.score("original", "tofu/model_utility") == pytest.approx(model_utility(scores), rel=1e-5)
    forget = [row for row in request.forget if isinstance(row, QA)]
    ratios = [truth_ratio(model, forget) for model in (tofu.original, tofu.gold)]
    quality = stats.ks_2samp(*(ratio.numpy() for ratio in ratios)).pvalue
    assert tofu.score("original", "tofu/forget_quality") == pytest.approx(quality, rel=1e-6)


def test_tofus_forget_quality_tells_the_controls_apart(tofu: Benchmark) -> None:
    assert tofu.score("gold", "tofu/forget_quality") == 1
    assert tofu.score("original", "tofu/forget_quality") < 0.01
    assert tofu.score("grad_diff", "tofu/forget_quality") > tofu.score("original", "tofu/forget_quality")
    assert tofu.score("original", "tofu/model_utility") > 0.3 < tofu.score("gold", "tofu/model_utility")
    assert "Model Utility (TOFU)" in (tofu.folder / "report.md").read_text()


# A mistake.


def test_an_accuracy_to_stop_at_needs_a_benchmark_with_questions(tmp_path: Path) -> None:
    settings = yaml.safe_load((EXAMPLES / "tofu_forget10.yaml").read_text())
    with pytest.raises(SpecError, match="data of kind tofu has no multiple-choice questions"):
        make_spec(settings | {"stop": {"forget_accuracy": LEVEL}})
