"""Whether a run folder still says what it said: the chain, the files' hashes, and the numbers from their rows."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.ledger import Entry
from palimpsest.audit.prediction import foretold
from palimpsest.audit.recovery import rejudged, shares
from palimpsest.audit.results import Audit, Audited, Recovered
from palimpsest.errors import DataError, EvidenceError
from palimpsest.files import file_hash
from palimpsest.metrics.scores import Equivalence, Row, Score
from palimpsest.metrics.statistics import clustered_mean, equivalence

Items = dict[tuple[str, str], list[Row]]
"""The rows of a model and a measure, in their order."""

TOLERANCE = 1e-9
"""The largest relative difference between a reported number and the same number recomputed."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    """The file, or the model whose numbers were recomputed."""
    ok: bool
    message: str
    """One sentence: what was found, and for a failure what it means."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Everything that was looked at, in the order: ledger, files, files unknown to it, numbers."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.ok)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def verify(folder: str | Path) -> Verification:
    """Recompute the chain, every recorded file's hash, and every number of the audit from its rows.

    Those are scores, comparisons with gold, what attacks bring back, and what relearning says.

    What it cannot know: whether someone rewrote all of the folder, ledger included, or cut facts off the ledger's end.
    Compare the head that it names with one kept elsewhere.

    Raises:
        EvidenceError: the folder holds no ledger.
    """
    run = RunFolder(folder)
    if not run.ledger.path.is_file():
        raise EvidenceError(
            f"{run.path}: no ledger.jsonl there, so it is not a run folder; give the folder that a run wrote"
        )
    entries, faults = run.ledger.examine()
    return Verification(
        (
            *_check_ledger(entries, faults),
            *_check_files(run.path, entries),
            *_check_unknown(run, entries),
            *_check_numbers(run),
        )
    )


def _check_ledger(entries: list[Entry], faults: list[str]) -> Iterator[Check]:
    for fault in faults:
        yield Check("ledger.jsonl", False, fault)
    if not faults:
        head = entries[-1].hash if entries else "none"
        yield Check("ledger.jsonl", bool(entries), f"{len(entries)} lines in an unbroken chain; its head is {head}")


def _check_files(folder: Path, entries: list[Entry]) -> Iterator[Check]:
    latest = {entry.subject: entry for entry in entries if entry.facts is None}
    for name, entry in latest.items():
        path = folder / name
        if not path.is_file():
            yield Check(name, False, f"is missing; it was recorded at {entry.time} ({entry.event})")
        elif (now := file_hash(path)) != entry.sha256:
            hashes = f"SHA-256 {now[:12]}…, not {entry.sha256[:12]}…"
            yield Check(name, False, f"was changed after {entry.time}, when it was recorded: {hashes}")
        else:
            yield Check(name, True, f"as recorded at {entry.time}")


def _check_unknown(run: RunFolder, entries: list[Entry]) -> Iterator[Check]:
    """Hidden files are let be: a write that was killed leaves such folders behind, and nothing reads them."""
    known = {"ledger.jsonl"} | {entry.subject for entry in entries} - {""}
    files = [path.relative_to(run.path) for path in sorted(run.path.rglob("*")) if path.is_file()]
    visible = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    unknown = [path for path in visible if not known & {place.as_posix() for place in (path, *path.parents)}]
    for path in unknown:
        yield Check(path.as_posix(), False, "is not in the ledger: no run recorded it. Move it out of the run folder")
    if not unknown:
        yield Check("other files", True, "none that the ledger does not know")


def _check_numbers(run: RunFolder) -> Iterator[Check]:
    try:
        audit, rows = run.read_audit(), run.read_scores()
    except EvidenceError as error:
        yield Check("scores", False, f"cannot be recomputed: {error}")
        return
    items: Items = defaultdict(list)
    for row in rows:
        items[row.model, row.measure].append(row)
    seed = int(audit.spec.get("seed", 0))
    gold = _of_role(audit, "gold")
    for model in audit.models:
        wrong = [*_wrong_scores(model, items, seed), *_wrong_comparisons(model, items, gold)]
        recomputed = f"{len(model.scores)} scores and {len(model.against_gold)} comparisons with gold"
        if model.recovered:
            wrong += _wrong_recovery(model, model.recovered, items, gold, _of_role(audit, "original"), seed)
            recomputed += f", {len(model.recovered.shares)} attacks and {len(model.recovered.relearned)} lessons"
        for message in wrong:
            yield Check(f"scores of {model.name}", False, message)
        if not wrong:
            yield Check(f"scores of {model.name}", True, f"{recomputed} recomputed from their rows")


def _of_role(audit: Audit, role: str) -> str:
    return next((model.name for model in audit.models if model.role == role), role)


def _wrong_scores(model: Audited, items: Items, seed: int) -> Iterator[str]:
    for measure, said in model.scores.items():
        values, clusters = _columns(items[model.name, measure])
        if values:
            yield from _difference(measure, said, clustered_mean(values, clusters, seed=seed))
        else:
            yield f"{measure}: scores.parquet has no rows for it"


def _wrong_comparisons(model: Audited, items: Items, gold: str) -> Iterator[str]:
    """Gold's rows are paired with the model's in their order; several rewordings of a record share its id."""
    for measure, said in model.against_gold.items():
        rows, gold_rows = items[model.name, measure], items[gold, measure]
        if rows and [row.item for row in rows] == [row.item for row in gold_rows]:
            (values, clusters), (gold_values, _) = _columns(rows), _columns(gold_rows)
            again = equivalence(values, gold_values, clusters, margin=said.margin)
            yield from _difference(f"{measure} against gold", said, again)
        else:
            yield f"{measure} against gold: scores.parquet does not hold the same items for both"


def _wrong_recovery(
    model: Audited, said: Recovered, items: Items, gold: str, original: str, seed: int
) -> Iterator[str]:
    """Every share of every attack, and every point of every lesson's curves with what is concluded from them."""
    own, floor, ceiling = (
        {measure: rows for (name, measure), rows in items.items() if name == who and rows}
        for who in (model.name, gold, original)
    )
    try:
        again = shares(own, floor, ceiling, seed=seed)
        told = foretold(own, floor, ceiling, said.worst_attack) if model.role == "unlearned" else {}
    except (KeyError, ValueError, DataError):
        yield "attacks: scores.parquet does not hold the same items for this model, gold and the original"
        return
    if again.keys() != said.shares.keys():
        other = sorted(again.keys() ^ said.shares.keys())
        yield f"attacks: audit.json and the rows do not agree on which say anything: {', '.join(other)}"
    for key in again.keys() & said.shares.keys():
        yield from _difference(f"share brought back, {key}", said.shares[key], again[key])
    if not _alike(*({key: asdict(each) for key, each in of.items()} for of in (said.foretold, told))):
        yield "what would have told: audit.json has other AUCs than the rows give"
    for point, report in said.relearned.items():
        try:
            rebuilt = rejudged(report, point, {"artefact": own, "floor": floor, "ceiling": ceiling})
        except DataError as error:
            yield f"relearning, {point}: {error}"
            continue
        if not _alike(asdict(report), asdict(rebuilt)):
            yield (
                f"relearning, {point}: audit.json says {report.verdict} ({report.summary}); the rows give "
                f"{rebuilt.verdict} ({rebuilt.summary})"
            )


def _alike(said: Any, again: Any) -> bool:
    """Whether two plain values are the same, numbers up to rounding."""
    if isinstance(said, dict) and isinstance(again, dict):
        return said.keys() == again.keys() and all(_alike(said[key], again[key]) for key in said)
    if isinstance(said, (list, tuple)) and isinstance(again, (list, tuple)):
        return len(said) == len(again) and all(map(_alike, said, again))
    if isinstance(said, float) and isinstance(again, float):
        return _same(said, again)
    return bool(said == again)


def _columns(rows: list[Row]) -> tuple[list[float], list[str]]:
    return [row.value for row in rows], [row.cluster for row in rows]


def _difference(what: str, said: Score | Equivalence, again: Score | Equivalence) -> Iterator[str]:
    numbers, rebuilt = asdict(said), asdict(again)
    wrong = [name for name, number in numbers.items() if not _same(number, rebuilt[name])]
    if wrong:
        claims = ", ".join(f"{name} {numbers[name]:.10g}" for name in wrong)
        findings = ", ".join(f"{name} {rebuilt[name]:.10g}" for name in wrong)
        yield f"{what}: audit.json says {claims}; the rows give {findings}"


def _same(said: float, again: float) -> bool:
    # The absolute term is for differences that cancel to rounding around zero.
    return math.isclose(said, again, rel_tol=TOLERANCE, abs_tol=1e-15)
