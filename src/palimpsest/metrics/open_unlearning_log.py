"""Results of OpenUnlearning (Dorna et al. 2025), its `TOFU_EVAL.json` and `MUSE_EVAL.json`, item by item.

A file is one JSON object: by metric an `agg_value` and, for most, a `value_by_index` with one or more numbers an item.
Membership attacks hold two such objects, `forget` and `holdout`; they are read as `mia_min_k/forget` and so on.

Its numbers have definitions of its own: `extraction_strength@open_unlearning`, `truth_ratio@open_unlearning`,
`verbmem@open_unlearning`. They stand beside ours under these names only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.errors import DataError
from palimpsest.metrics.muse import privleak
from palimpsest.metrics.statistics import ForgetQuality, ks_forget_quality

TRUTH_RATIO, MIN_K = "forget_truth_ratio", "mia_min_k"
EXPECTED = "expected OpenUnlearning's TOFU_EVAL.json or MUSE_EVAL.json"


@dataclass(frozen=True)
class LoggedMetric:
    """One metric of one model."""

    name: str
    value: float | None
    """Over all items (`agg_value`), as OpenUnlearning aggregates it; None where it could not be computed."""
    items: dict[str, dict[str, float | None]]
    """By item and field; a list, one number a wrong answer, is read as its mean. Empty where none are kept."""

    def values(self, field: str = "score") -> dict[str, float]:
        """By item, a field's numbers; items without one are left out, as in OpenUnlearning's aggregates.

        Raises:
            DataError: no item has a number in this field.
        """
        found = {item: value for item, fields in self.items.items() if (value := fields.get(field)) is not None}
        if not found:
            known = sorted({name for fields in self.items.values() for name in fields})
            raise DataError(f"metric {self.name!r}: no item has field {field!r}; there is {', '.join(known) or 'none'}")
        return found


Log = dict[str, LoggedMetric]


def read_open_unlearning_log(path: str | Path) -> Log:
    """Every metric of an evaluation, by its name.

    Raises:
        DataError: no such file, not JSON, or a metric, item or field is not what OpenUnlearning writes.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); {EXPECTED}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give an evaluation's *_EVAL.json") from error
    if not isinstance(data, dict) or not data:
        raise DataError(f"{path}: holds no metrics by name; {EXPECTED}")
    log: Log = {}
    for name, fields in data.items():
        log[name] = _metric(fields, name, f"{path}: metric {name!r}")
        for side in ("forget", "holdout"):
            if side in fields:
                log[f"{name}/{side}"] = _metric(fields[side], f"{name}/{side}", f"{path}: metric {name!r}: {side!r}")
    return log


def logged_forget_quality(log: Log, retain: Log | None) -> ForgetQuality:
    """TOFU's Forget Quality of a logged model, recomputed from its truth ratios and a retain model's.

    OpenUnlearning tests the ratios' inverses, which the Kolmogorov-Smirnov test cannot tell from the ratios.

    Raises:
        DataError: there is no retain model's log, or one of them has no `forget_truth_ratio` item by item.
    """
    ours, theirs = _both(log, retain, TRUTH_RATIO, "Forget Quality")
    return ks_forget_quality(list(ours.values().values()), list(theirs.values().values()))


def logged_privleak(log: Log, retain: Log | None, *, attack: str = MIN_K) -> float:
    """MUSE's PrivLeak, in percent, of a logged model by the AUC of an attack; OpenUnlearning's AUC runs the other way.

    Raises:
        DataError: there is no retain model's log, one of them lacks the attack's AUC, or the retain model's is 1.
    """
    ours, theirs = _both(log, retain, attack, "PrivLeak")
    for metric in (ours, theirs):
        if metric.value is None:
            raise DataError(f"metric {attack!r} has no agg_value; run OpenUnlearning's evaluation again")
    assert ours.value is not None and theirs.value is not None
    return privleak(1 - ours.value, 1 - theirs.value)


def _both(log: Log, retain: Log | None, name: str, wanted: str) -> tuple[LoggedMetric, LoggedMetric]:
    if retain is None:
        raise DataError(
            f"{wanted} compares with a model trained without the forget set, but its log is missing; evaluate that "
            "model with OpenUnlearning and give its *_EVAL.json (retain_logs_path there)"
        )
    for whose, metrics in (("the model's", log), ("the retain model's", retain)):
        if name not in metrics:
            raise DataError(f"{wanted} needs metric {name!r}, which {whose} log lacks; run that metric too")
    return log[name], retain[name]


def _metric(fields: Any, name: str, where: str) -> LoggedMetric:
    if not isinstance(fields, dict) or "agg_value" not in fields:
        raise DataError(f"{where}: field 'agg_value' is missing; {EXPECTED}")
    rows = fields.get("value_by_index") or {}
    if not isinstance(rows, dict):
        raise DataError(f"{where}: field 'value_by_index' is a {type(rows).__name__}; expected an object by item")
    items = {}
    for item, row in rows.items():
        if not isinstance(row, dict):
            raise DataError(f"{where}: item {item!r} is {row!r:.40}; expected an object of numbers by field")
        # Questions, answers and other texts stand among the numbers.
        items[item] = {
            field: _number(value, f"{where}: item {item!r}: field {field!r}")
            for field, value in row.items()
            if not isinstance(value, str)
        }
    return LoggedMetric(name, _number(fields["agg_value"], f"{where}: field 'agg_value'"), items)


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    try:
        numbers = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.array([])
    if not numbers.size or isinstance(value, str | bool):
        raise DataError(f"{where} is {value!r:.40}; expected a number, a list of numbers or null")
    return float(numbers.mean())
