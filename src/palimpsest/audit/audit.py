"""The audit: every model through the same battery, every score beside its controls, a verdict with reasons."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from palimpsest.attacks.attack import ATTACKED
from palimpsest.audit.battery import Battery, Reading
from palimpsest.audit.environment import environment
from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.internals import RECOVERY, Internals
from palimpsest.audit.layers import Layers, Lenses
from palimpsest.audit.prediction import foretold
from palimpsest.audit.recovery import RELEARNED, TAUGHT, Recovery, Relearned, shares, why_no_recovery
from palimpsest.audit.results import Audit, Audited, Example, Recovered, Role, TracePoint
from palimpsest.audit.verdict import Evidence, judge, margin
from palimpsest.data.records import QA, Choice, Passage, Text
from palimpsest.errors import ModelError, SpecError
from palimpsest.metrics.collapse import Collapse, collapse
from palimpsest.metrics.scores import Equivalence, Row, Score
from palimpsest.metrics.statistics import clustered_mean, equivalence
from palimpsest.metrics.tofu import TofuSets
from palimpsest.models.language_model import LanguageModel
from palimpsest.progress import progress
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.update import Update

EXAMPLES_PER_SET = 400
"""The most facts of a set that the report lists; the scores are over all of them."""
EXCERPT = 300
"""Characters of a passage that the report shows."""
NOT_COMPARED = (RECOVERY, ATTACKED, RELEARNED, TAUGHT)
"""What is read between gold and the original, or beside sham, and is not tested for equality with gold."""
UNTAUGHT: dict[str, str] = {"broken": "it is broken", "remembered": "it still says what it should have forgotten"}
"""By the outcome without it, why teaching the model would tell nothing."""


@dataclass(frozen=True)
class Candidate:
    """A model to be audited: a control, or one that unlearned."""

    name: str
    role: Role
    how: str
    """One sentence: how it was made."""
    model: LanguageModel
    update: Update | None = None
    """What made it, if it is known: the report shows its path, time and reason to stop."""


def audit(
    request: Request,
    candidates: Sequence[Candidate],
    run: RunFolder,
    *,
    title: str,
    spec: Mapping[str, Any],
    max_new_tokens: int = 48,
    tofu: TofuSets | None = None,
    lenses: Lenses | None = None,
) -> Audit:
    """Measure every candidate, write rows and audit into the run folder, and give the audit back.

    Args:
        request: the forget set, its rewordings, and the unseen retain rows.
        candidates: the original (required), gold and sham (each optional), and the models that unlearned.
        run: where the evidence goes.
        title: the report's heading.
        spec: the resolved specification; its `seed` seeds the intervals.
        max_new_tokens: the longest greedy answer, in tokens.
        tofu: the sets of TOFU's own metrics, where those are wanted.
        lenses: with which the layers are read, of the original and of gold; without them no lens reads any.

    Raises:
        SpecError: there is no original, two of one control, or two candidates of one name.
        ModelError: a candidate's tokenizer is not the original's.
        EvidenceError: a model's score is not a finite number; nothing is written then.
    """
    controls = controls_among(candidates)
    original, gold = controls["original"].model, controls["gold"].model if "gold" in controls else None
    seed = int(spec.get("seed", 0))
    layers = Layers(lenses, request, original, gold) if lenses else None
    internals = Internals(request, original, gold)
    recovery = Recovery(request, original, gold, seed) if gold and not why_no_recovery(request, gold) else None
    battery = Battery(request, original, gold, max_new_tokens, tofu, layers, internals, recovery)
    readings = _read_all(battery, candidates)
    relearned = None
    if recovery:
        relearned = _relearn(recovery, candidates, _audited(candidates, controls, readings, None, seed=seed))
        more = relearned.rows(gold=controls["gold"].name, original=controls["original"].name)
        readings = {name: reading.with_rows(more.get(name, ())) for name, reading in readings.items()}
    # Before anything is computed from them: what is not a finite number is refused here, by model and item.
    run.write_scores([row for reading in readings.values() for row in reading.rows])
    found = Audit(
        title=title,
        models=_audited(candidates, controls, readings, relearned, seed=seed),
        measures=battery.measures,
        examples=tuple(_examples(battery, readings)),
        request=request.summary(),
        spec=dict(spec),
        environment=environment(),
        notes=tuple(_notes(controls, candidates, request, recovery)),
    )
    run.write_audit(found)
    return found


def unlearned(original: LanguageModel, update: Update, how: str) -> Candidate:
    """The candidate that an update makes of the original, under its method's name."""
    name = str(update.provenance["method"]["name"])
    return Candidate(name, "unlearned", how, update.apply(replace(original.copy(name), updates=[])), update)


def controls_among(candidates: Sequence[Candidate]) -> dict[Role, Candidate]:
    """The controls by their roles, once it is sure that these models can be audited together.

    Raises:
        SpecError: there is no original, two of one control, or two candidates of one name.
        ModelError: a candidate's tokenizer is not the original's.
    """
    controls = [candidate for candidate in candidates if candidate.role != "unlearned"]
    by_role = {control.role: control for control in controls}
    if "original" not in by_role:
        raise SpecError("an audit needs a model in the role 'original': every score is read beside it")
    if len(by_role) < len(controls):
        raise SpecError("an audit takes one model in each of the roles original, gold and sham; two share one")
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SpecError(f"two audited models are called {twice!r}; give every model a name of its own")
    # Divergences compare predictions of the same tokens.
    vocabulary = by_role["original"].model.tokenizer.get_vocab()
    for candidate in candidates:
        if candidate.model.tokenizer.get_vocab() != vocabulary:
            raise ModelError(f"{candidate.name}: its tokenizer is not the original's; audit models that share one")
    return by_role


def _read_all(battery: Battery, candidates: Sequence[Candidate]) -> dict[str, Reading]:
    readings = {}
    with progress() as display:
        task = display.add_task("auditing", total=battery.steps * len(candidates), note="")
        for candidate in candidates:
            display.update(task, note=candidate.name)
            readings[candidate.name] = battery.read(candidate.name, candidate.model, lambda: display.advance(task))
        display.update(task, note="")
    return readings


def _relearn(recovery: Recovery, candidates: Sequence[Candidate], so_far: Sequence[Audited]) -> Relearned:
    """Teach the models in which something may be hidden: not those that still say it, nor those that say nothing."""
    outcomes = {model.name: model.verdict.outcome for model in so_far if model.verdict}
    unlearned = [candidate for candidate in candidates if candidate.role == "unlearned"]
    untaught = {each.name: UNTAUGHT[outcomes[each.name]] for each in unlearned if outcomes[each.name] in UNTAUGHT}
    models = {candidate.name: candidate.model for candidate in unlearned if candidate.name not in untaught}
    with progress() as display:
        task = display.add_task("relearning", total=None, note="")

        def report(done: int, of: int, note: str) -> None:
            display.update(task, completed=done, total=of, note=note)

        found = recovery.relearn(models, report=report)
    return replace(found, failed={**found.failed, **untaught})


def _audited(
    candidates: Sequence[Candidate],
    controls: Mapping[Role, Candidate],
    readings: Mapping[str, Reading],
    relearned: Relearned | None,
    *,
    seed: int,
) -> tuple[Audited, ...]:
    """Every candidate's scores beside those of the controls, and what follows from them."""
    scores = {name: _scores(reading.rows, seed) for name, reading in readings.items()}
    of_control = {role: scores[control.name] for role, control in controls.items()}
    original, gold = of_control["original"], controls["gold"].name if "gold" in controls else None
    margins = {key: margin(original[key], scores[gold][key]) for key in original if _to_compare(key)} if gold else {}
    audited = []
    for candidate in candidates:
        name = candidate.name
        compared = _against_gold(readings[name].rows, readings[gold].rows, margins) if gold and name != gold else {}
        recovered = None
        if relearned and gold and candidate.role != "original":
            own, floor, ceiling = (_by_measure(readings[each].rows) for each in (name, gold, controls["original"].name))
            recovered = Recovered(shares(own, floor, ceiling, seed=seed), *relearned.of(name, candidate.role))
            if candidate.role == "unlearned":
                recovered = replace(recovered, foretold=foretold(own, floor, ceiling, recovered.worst_attack))
        evidence = Evidence(
            scores=scores[name],
            original=original,
            gold=of_control.get("gold"),
            sham=of_control.get("sham"),
            against_gold=compared,
            collapse=_collapse(readings[name], readings[controls["original"].name]),
            recovered=recovered,
        )
        audited.append(
            Audited(
                name=name,
                role=candidate.role,
                how=candidate.how,
                fingerprint=candidate.model.fingerprint(),
                scores=scores[name],
                against_gold=compared,
                verdict=judge(evidence),
                recovered=recovered,
                **_path(candidate.update),
            )
        )
    return tuple(audited)


def _collapse(reading: Reading, original: Reading) -> Collapse:
    """Of the answers to unseen retain questions, beside the original's; passages have a likelihood alone."""
    on = "retain_unseen"
    said, before = reading.said.get(on, []), original.said.get(on)
    return collapse(said, reading.nll[on], control_answers=before, gold_nlls=original.nll[on])


def _scores(rows: Sequence[Row], seed: int) -> dict[str, Score]:
    return {key: clustered_mean(*_columns(group), seed=seed) for key, group in _by_measure(rows).items()}


def _against_gold(
    rows: Sequence[Row], gold_rows: Sequence[Row], margins: Mapping[str, float]
) -> dict[str, Equivalence]:
    gold = _by_measure(gold_rows)
    compared = {}
    for key, group in _by_measure(rows).items():
        if _to_compare(key):
            values, clusters = _columns(group)
            compared[key] = equivalence(values, _columns(gold[key])[0], clusters, margin=margins[key])
    return compared


def _to_compare(key: str) -> bool:
    """Only the forget side is compared with gold: elsewhere the original is what a model should be like.

    Nor is what parts of the original bring back, since gold reads them in another basis, and what attacks and lessons
    do, which is read as a share of what they do to the original.
    """
    return key.startswith("forget") and not key.endswith("kl_from_gold") and not key.startswith(NOT_COMPARED)


def _by_measure(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.measure, []).append(row)
    return groups


def _columns(rows: Sequence[Row]) -> tuple[list[float], list[str]]:
    return [row.value for row in rows], [row.cluster for row in rows]


def _path(update: Update | None) -> dict[str, Any]:
    if update is None:
        return {}
    made = update.provenance
    return {
        # A run ends where its level is met, part of the way through a step: that step is named.
        "trace": tuple(
            TracePoint(math.ceil(point["step"]), point["forget_probability"], point["retain_kl"])
            for point in made["trace"]
        ),
        "seconds": made["seconds"],
        "stopped": made["stopped"] + _slowed(made),
    }


def _slowed(made: Mapping[str, Any]) -> str:
    if "last_rate" not in made:  # not every method has a learning rate, and not every run came to its first step
        return ""
    begun, last = made["method"]["learning_rate"], made["last_rate"]
    return f"; it went too fast at a learning rate of {begun:g}, which came down to {last:.2g}" if last < begun else ""


def _examples(battery: Battery, readings: Mapping[str, Reading]) -> list[Example]:
    return [
        Example(
            id=record.id,
            subject=record.subject or "",
            on=on,
            question="" if isinstance(record, Passage) else record.question,
            answer=_truth(record),
            said={name: reading.said[on][place] for name, reading in readings.items() if on in reading.said},
            probability={name: reading.probability[on][place] for name, reading in readings.items()},
        )
        for on, records in (battery.sets | battery.choices).items()
        for place, record in enumerate(records[:EXAMPLES_PER_SET])
    ]


def _truth(record: Text | Choice) -> str:
    """The true answer, the right choice, or how a passage begins."""
    match record:
        case QA():
            return record.answer
        case Choice():
            return record.choices[record.answer]
        case Passage():
            return record.text if len(record.text) <= EXCERPT else f"{record.text[:EXCERPT]}…"


def _notes(
    controls: Mapping[Role, Candidate], candidates: Sequence[Candidate], request: Request, recovery: Recovery | None
) -> list[str]:
    notes = []
    if recovery is None:
        gold = controls["gold"].model if "gold" in controls else None
        notes.append(f"Recovery was not tried: {why_no_recovery(request, gold)}.")
    elif why_not := recovery.why_not_relearned:
        notes.append(f"Relearning was not tried: {why_not}.")
    if recovery:
        notes.extend(f"The attack {name} was left out: {why}." for name, why in recovery.left_out.items())
    if "gold" not in controls:
        notes.append(
            "No gold: uncalibrated. Nobody can say how a model that never read the forget set would score here, nor "
            "how deep anything is unlearned."
        )
    if "sham" not in controls:
        notes.append(
            "No sham: uncalibrated. What further training does to a score by itself is not known here, nor what parts "
            "of the original bring back in a model that unlearned nothing."
        )
    for candidate in candidates:
        if candidate.update and candidate.update.provenance["request"] != request.hash:
            notes.append(
                f"{candidate.name} was made for other rows or another split of them (files, template or seed), "
                "so the retain rows called unseen may have been trained on."
            )
    if not request.forget_reworded:
        notes.append(
            "The forget rows have no held-out wordings: forgetting is known only for the wording that was trained."
        )
    if request.choices:
        notes.append(
            f"Accuracy on the {len(request.choices)} multiple-choice questions about the forget set stands among the "
            "scores; the verdict does not weigh it."
        )
    if any(isinstance(record, Passage) for record in (*request.forget, *request.retain_unseen)):
        notes.append(
            "Some rows are passages, which ask nothing: where the verdict speaks of answers and questions, it goes by "
            "how likely the text is, and what the model says by itself was not looked at there."
        )
    return notes
