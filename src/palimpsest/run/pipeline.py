"""From a specification to a report: data, controls, sham, methods, audit. What is done already is not done again."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palimpsest.audit.audit import Candidate, audit, unlearned
from palimpsest.audit.environment import environment
from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.results import Audit
from palimpsest.errors import SpecError, UpdateError
from palimpsest.files import content_hash
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel, load
from palimpsest.models.organism import Controls, train_controls, train_sham
from palimpsest.report.draw import draw
from palimpsest.run.sources import Source, open_source
from palimpsest.run.spec import GivenModel, Spec, TrainedModel
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update


def run(spec: Spec, folder: str | Path) -> Audit:
    """Carry out a specification; evidence and report are in `folder` when it returns.

    A run that was killed goes on where it was: models come from the cache, finished updates from the run folder, and a
    method that was interrupted from its last measurement.

    Raises:
        SpecError: the folder holds another run.
    """
    evidence = RunFolder(folder)
    _refuse_other_run(evidence, spec)
    source = open_source(spec)
    controls = controls_of(spec, source)
    described = {"original": controls["original"].model.fingerprint(), "request": source.request.hash}
    evidence.write_run(spec.resolved(), seeds={"run": spec.seed}, environment=environment(), hashes=described)
    for control in controls.values():
        evidence.record("control", control.name, how=control.how, fingerprint=control.model.fingerprint())
    original = controls["original"].model
    stop = spec.stop.stop(forget_level(controls["gold"].model, source.request) if "gold" in controls else None)
    candidates = list(controls.values())
    for method in spec.methods:
        update = _update(method, original, source.request, stop, evidence)
        candidates.append(unlearned(original, update, describe(method)))
    found = audit(
        source.request,
        candidates,
        evidence,
        title=spec.title,
        spec=spec.resolved(),
        max_new_tokens=spec.max_new_tokens,
    )
    draw(evidence)
    return found


def controls_of(spec: Spec, source: Source) -> dict[str, Candidate]:
    """Original, and gold and sham where they can be had, by name."""
    match spec.model:
        case TrainedModel():
            trained = train_controls(source.corpus, spec.model.recipe())
            found = _trained(trained)
        case GivenModel():
            found = _given(spec.model.path, spec.model.gold, spec.model.sham)
    if spec.sham and "sham" not in found:
        sham = train_sham(
            found["original"].model,
            source.request.retain,
            template=spec.template,
            steps=spec.sham.steps,
            learning_rate=spec.sham.learning_rate,
            seed=spec.seed,
        )
        how = f"The original, trained for {spec.sham.steps} more steps on retain rows alone; it unlearned nothing."
        found["sham"] = Candidate("sham", "sham", how, sham)
    return found


def load_candidates(model: str, *, original: str, gold: str | None, sham: str | None) -> list[Candidate]:
    """Controls from their folders, then the model to judge: a folder or hub id of its own, or an update's folder."""
    controls = list(_given(original, gold, sham).values())
    name = Path(model).name
    if (Path(model) / "update.json").exists():
        how = f"The update in {name}, applied to the original."
        return [*controls, unlearned(controls[0].model, Update.load(model), how)]
    if name in {control.name for control in controls}:
        name = "unlearned"
    return [*controls, Candidate(name, "unlearned", f"Loaded from {Path(model).name}.", load(model))]


def forget_level(gold: LanguageModel, request: Request) -> float:
    """Gold's mean answer probability on the forget set: what matched forgetting means."""
    return answer_probability(gold, request.forget, template=request.template).mean().item()


def describe(method: Method) -> str:
    """One sentence: which method, from which paper, with which settings."""
    settings = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in method.settings().items()
        if key != "name"
    )
    return f"{type(method).__name__} ({method.source}) with {settings}."


def _trained(controls: Controls) -> dict[str, Candidate]:
    return {
        "original": Candidate("original", "original", "Trained from scratch on everything.", controls.original),
        "gold": Candidate(
            "gold", "gold", "Trained from scratch by the same recipe and seed without the forget set.", controls.gold
        ),
    }


def _given(original: str, gold: str | None, sham: str | None) -> dict[str, Candidate]:
    paths: Mapping[Any, str | None] = {"original": original, "gold": gold, "sham": sham}
    return {
        role: Candidate(role, role, f"Loaded from {Path(path).name}.", load(path))
        for role, path in paths.items()
        if path
    }


def _update(method: Method, original: LanguageModel, request: Request, stop: Stop, evidence: RunFolder) -> Update:
    """The method's update: from the run folder when it is there already, otherwise made now and kept there."""
    folder = evidence.path / "update" / method.name
    made = _finished(folder, method, original, request)
    if made is None:
        unfinished = folder.with_name(f".{method.name}.checkpoint")
        made = method.run(original, request, stop, folder=unfinished)
        made.save(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
    evidence.add_folder(folder, f"update by {method.name}")
    return made


def _finished(folder: Path, method: Method, original: LanguageModel, request: Request) -> Update | None:
    try:
        update = Update.load(folder)
    except UpdateError:
        return None
    made = update.provenance
    same = (
        made["method"] == method.settings()
        and made["request"] == request.hash
        and made["base"] == original.fingerprint()
    )
    return update if same else None


def _refuse_other_run(evidence: RunFolder, spec: Spec) -> None:
    if (evidence.path / "run.json").exists() and content_hash(evidence.read_run()["spec"]) != content_hash(
        spec.resolved()
    ):
        raise SpecError(f"{evidence.path}: holds a run of another specification; choose another folder with --out")
