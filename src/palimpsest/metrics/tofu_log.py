"""Model Utility and Forget Quality from the evaluation logs that the TOFU authors publish (Maini et al. 2024, §2.2).

A log is one JSON object of four sub-logs; each holds, by field and question index, the mean loss per token of the
answer, of its paraphrase and of several perturbed (wrong) answers, and the ROUGE-L recall of the greedy answer.

Two truth ratios are in use and their numbers differ, so every result names its own: `arith` divides the arithmetic mean
of the wrong answers' probabilities by the paraphrase's (the paper and `utils.py`), `geo` the geometric mean
(`aggregate_eval_stat.py` and OpenUnlearning).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from palimpsest.errors import DataError
from palimpsest.metrics.statistics import Floats, ks_forget_quality

FORGET = "eval_log_forget.json"
RETAIN = "eval_log.json"
GENERAL = ("eval_real_author_wo_options.json", "eval_real_world_wo_options.json")
"""Real authors and world facts: what the model knew before TOFU."""

Kind = Literal["geo", "arith"]
KINDS: tuple[Kind, ...] = ("geo", "arith")


@dataclass(frozen=True)
class SubLog:
    """One set of n questions with w wrong answers each; losses in nats per token."""

    questions: tuple[str, ...]
    """The question indices; each log counts its own set from 0."""
    prompts: tuple[str, ...]
    """The questions as the model read them, where the log has them."""
    loss: Floats
    """[n] of the answer."""
    paraphrase_loss: Floats
    """[n] of the paraphrased answer."""
    wrong_loss: Floats
    """[n, w] of the perturbed answers."""
    rouge: Floats
    """[n] ROUGE-L recall of the greedy answer, with stemming."""

    def truth_ratio(self, kind: Kind) -> Floats:
        """[n] wrong over right: 0 when only the right answer is likely, 1 when the model cannot tell."""
        if kind == "geo":
            return np.exp(self.paraphrase_loss - self.wrong_loss.mean(1))
        return np.exp(-self.wrong_loss).mean(1) / np.exp(-self.paraphrase_loss)


@dataclass(frozen=True, slots=True)
class ForgetQuestions:
    """How many forget questions each log holds, and how many the two have in common by their wording."""

    n: int
    n_retain: int
    shared: int


def tofu_log_metrics(log_path: str | Path, retain_path: str | Path | None = None) -> dict[str, float]:
    """Model Utility and forget truth ratio of a model's log and, with a retain model's log, Forget Quality.

    Model Utility is the harmonic mean of nine: probability, ROUGE-L recall and truth ratio (mean of max(0, 1 - R)) on
    retain, real authors and world facts. On retain, probability is exp(-loss); on the other two it is the right
    answer's share of the probabilities of all answers offered. The forget truth ratio is the mean of min(R, 1/R).

    Forget Quality compares *all* forget questions of each log with an unpaired test, as the authors do. Their logs are
    cut at 300 questions and each forget set counts from 0, so two logs may hold different questions:
    `forget_questions` says how many are the same.

    Returns:
        `model_utility_{geo,arith}`, `forget_truth_ratio_{geo,arith}`, and with `retain_path` the p-values
        `forget_quality_{geo,arith}`.

    Raises:
        DataError: no such file, not JSON, a sub-log or field missing, or no forget question index in both logs.
    """
    log = read_tofu_log(log_path)
    metrics = {f"model_utility_{kind}": model_utility(log, kind) for kind in KINDS}
    for kind in KINDS:
        ratio = log[FORGET].truth_ratio(kind)
        metrics[f"forget_truth_ratio_{kind}"] = float(np.minimum(ratio, 1 / ratio).mean())
    if retain_path is not None:
        forget, retain = log[FORGET], read_tofu_log(retain_path)[FORGET]
        if not set(forget.questions) & set(retain.questions):
            raise DataError(f"{log_path} and {retain_path}: they share no forget question index; use logs of one set")
        for kind in KINDS:
            quality = ks_forget_quality(forget.truth_ratio(kind), retain.truth_ratio(kind))
            metrics[f"forget_quality_{kind}"] = quality.p
    return metrics


def model_utility(log: dict[str, SubLog], kind: Kind) -> float:
    """The harmonic mean of the nine utilities of a log."""
    parts: list[float] = []
    for name in (RETAIN, *GENERAL):
        part = log[name]
        probability = np.exp(-part.loss)
        if name in GENERAL:
            probability = probability / (probability + np.exp(-part.wrong_loss).sum(1))
        truth = np.maximum(0, 1 - part.truth_ratio(kind))
        parts += [float(probability.mean()), float(part.rouge.mean()), float(truth.mean())]
    return float(stats.hmean(parts))


def forget_questions(log_path: str | Path, retain_path: str | Path) -> ForgetQuestions:
    """How many forget questions each log holds and how many are the same question.

    The authors' full-model log has 300 questions of forget10, so it shares 300 with retain90's, 100 of 200 with
    retain95's and none of 40 with retain99's.
    """
    prompts, retain = (read_tofu_log(path)[FORGET].prompts for path in (log_path, retain_path))
    return ForgetQuestions(len(prompts), len(retain), len(set(prompts) & set(retain)))


def read_tofu_log(path: str | Path) -> dict[str, SubLog]:
    """The four sub-logs of an aggregated TOFU evaluation log, by their file names.

    Raises:
        DataError: no such file, not JSON, or a sub-log or field is missing or not made of numbers.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error}); expected TOFU's eval_log_aggregated.json") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a TOFU eval_log_aggregated.json") from error
    log = {}
    for name in (FORGET, RETAIN, *GENERAL):
        if not isinstance(data, dict) or not isinstance(data.get(name), dict):
            raise DataError(f"{path}: sub-log {name!r} is missing; expected TOFU's eval_log_aggregated.json")
        log[name] = _sub_log(data[name], f"{path}: {name}")
    return log


def _sub_log(fields: dict[str, Any], where: str) -> SubLog:
    questions = tuple(fields.get("avg_gt_loss") or ())
    if not questions:
        raise DataError(f"{where}: field 'avg_gt_loss' holds no questions; run the evaluation again")

    def numbers(field: str, ndim: int) -> Floats:
        try:
            # Every field in the order of one, so that rows belong together.
            values = np.array([fields[field][question] for question in questions], dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: field {field!r} lacks a number for each of {len(questions)} questions"
            ) from error
        if values.ndim != ndim or not np.isfinite(values).all():
            raise DataError(f"{where}: field {field!r} is not made of finite numbers of {ndim} dimension(s)")
        return values

    return SubLog(
        questions=questions,
        prompts=tuple(said[0] for said in (fields.get("generated_text") or {}).values()),
        loss=numbers("avg_gt_loss", 1),
        paraphrase_loss=numbers("avg_paraphrased_loss", 1),
        wrong_loss=numbers("average_perturb_loss", 2),
        rouge=numbers("rougeL_recall", 1),
    )
