"""From a specification to a report: data, controls, sham, methods, audit. What is done already is not done again."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from palimpsest.audit.audit import Candidate, audit, controls_among, unlearned
from palimpsest.audit.environment import environment
from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.results import Audit
from palimpsest.data.records import records_hash
from palimpsest.errors import SpecError, UpdateError
from palimpsest.files import content_hash
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel, load
from palimpsest.models.organism import Controls, cache_folder, train_controls, train_sham
from palimpsest.report.draw import draw
from palimpsest.run.lenses import LensKind, lenses_of
from palimpsest.run.places import require_place
from palimpsest.run.sources import Source, open_source
from palimpsest.run.spec import GivenModel, Sham, Spec, TrainedModel
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
        StorageError: the folder cannot be written, or holds other files.
    """
    evidence = open_run(folder, spec.resolved())
    source = open_source(spec)
    controls = controls_of(spec, source)
    by_role = controls_among(list(controls.values()))  # refuses what cannot be audited before anything is written
    _describe(evidence, spec.resolved(), controls.values(), source.request)
    lenses = lenses_of(spec.lens, by_role, source.request, evidence, seed=spec.seed) if spec.lens else None
    original = controls["original"].model
    stop = spec.stop.stop(forget_level(controls["gold"].model, source.request) if "gold" in controls else None)
    candidates = list(controls.values())
    for method in spec.methods:
        place = evidence.path / "update" / method.name
        update = make_update(method, original, source.request, stop, place)
        evidence.add_folder(place, f"update by {method.name}")
        candidates.append(unlearned(original, update, describe(method)))
    found = audit(
        source.request,
        candidates,
        evidence,
        title=spec.title,
        spec=spec.resolved(),
        max_new_tokens=spec.max_new_tokens,
        tofu=source.tofu,
        lenses=lenses,
    )
    draw(evidence)
    return found


def audit_candidates(
    request: Request,
    candidates: Sequence[Candidate],
    folder: str | Path,
    *,
    title: str,
    spec: Mapping[str, Any],
    lens: LensKind | None = "tuned",
) -> Audit:
    """Audit models that exist; evidence and report are in `folder` when it returns.

    Args:
        request: what was to be forgotten and kept.
        candidates: the controls that there are, then the models to judge.
        folder: the run folder.
        title: the report's heading.
        spec: plain data that says what was asked, `seed` and `max_new_tokens` among it.
        lens: with which kind the layers are read; None leaves them unread.

    Raises:
        SpecError: the folder holds another run, or the candidates cannot be audited together.
        ModelError: a candidate's tokenizer is not the original's.
        StorageError: the folder cannot be written, or holds other files.
    """
    controls = controls_among(candidates)  # refuses what cannot be audited before anything is written
    evidence = open_run(folder, spec)
    _describe(evidence, spec, candidates, request)
    lenses = lenses_of(lens, controls, request, evidence, seed=spec["seed"]) if lens else None
    found = audit(
        request, candidates, evidence, title=title, spec=spec, max_new_tokens=spec["max_new_tokens"], lenses=lenses
    )
    draw(evidence)
    return found


def open_run(folder: str | Path, spec: Mapping[str, Any]) -> RunFolder:
    """The run folder for a specification: a new one, or that of the same specification, to go on with.

    Raises:
        SpecError: the folder holds a run of another specification.
        StorageError: the folder cannot be written, or holds other files.
    """
    require_place(folder, "run.json")
    evidence = RunFolder(folder)
    if (evidence.path / "run.json").exists():
        run = evidence.read_run()
        before = run.get("spec") if isinstance(run, dict) else None
        if content_hash(before) != content_hash(dict(spec)):
            raise SpecError(f"{evidence.path}: holds a run of another specification; choose another folder with --out")
    return evidence


def controls_of(spec: Spec, source: Source) -> dict[str, Candidate]:
    """Original, and gold and sham where they can be had, by name."""
    match spec.model:
        case TrainedModel():
            trained = train_controls(source.corpus, spec.model.recipe())
            found = _trained(trained)
        case GivenModel():
            found = _given(spec.model.path, spec.model.gold, spec.model.sham)
    if spec.sham and "sham" not in found:
        how = f"The original, trained for {spec.sham.steps} more steps on retain rows alone; it unlearned nothing."
        found["sham"] = Candidate("sham", "sham", how, _sham(spec.sham, spec, found["original"].model, source.request))
    return found


def load_candidates(model: str, *, original: str, gold: str | None, sham: str | None) -> list[Candidate]:
    """Controls from their folders, then the model to judge: a folder or hub id of its own, or an update's folder."""
    controls = list(_given(original, gold, sham).values())
    name = _name(model)
    if (Path(model) / "update.json").exists():
        how = f"The update in {name}, applied to the original."
        return [*controls, unlearned(controls[0].model, Update.load(model), how)]
    how, taken = f"Loaded from {name}.", {control.name for control in controls}
    return [*controls, Candidate("unlearned" if name in taken else name, "unlearned", how, load(model))]


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
        role: Candidate(role, role, f"Loaded from {_name(path)}.", load(path)) for role, path in paths.items() if path
    }


def make_update(method: Method, original: LanguageModel, request: Request, stop: Stop, folder: Path) -> Update:
    """The method's update: from its folder when it is there already, otherwise made now and kept there.

    While it is being made, its state is in a hidden folder beside; a run that was killed goes on from there.

    Raises:
        StorageError: the folder cannot be written, or holds other files.
        TrainingError: a loss that is not finite.
    """
    made = _finished(folder, method, original, request, stop)
    if made is None:
        unfinished = folder.with_name(f".{folder.name}.checkpoint")
        made = method.run(original, request, stop, folder=unfinished)
        made.save(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
    return made


def _finished(folder: Path, method: Method, original: LanguageModel, request: Request, stop: Stop) -> Update | None:
    try:
        update = Update.load(folder)
    except UpdateError:
        return None
    asked = {"method": method.settings(), "stop": asdict(stop), "request": request.hash, "base": original.fingerprint()}
    return update if all(update.provenance.get(key) == value for key, value in asked.items()) else None


def _sham(settings: Sham, spec: Spec, original: LanguageModel, request: Request) -> LanguageModel:
    """From the cache, or trained now and kept there."""
    recipe = {"template": spec.template, **settings.model_dump(), "seed": spec.seed}
    known = content_hash([original.fingerprint(), records_hash(request.retain), recipe, torch.__version__])
    folder = cache_folder() / "shams" / known[:16]
    if not (folder / "config.json").exists():
        train_sham(original, request.retain, **recipe).save(folder)
    sham = load(folder, check=False)
    sham.name = "sham"
    return sham


def _describe(
    evidence: RunFolder, spec: Mapping[str, Any], candidates: Collection[Candidate], request: Request
) -> None:
    """Write what is asked and of which models, before anything is made of them."""
    prints = {candidate.name: candidate.model.fingerprint() for candidate in candidates}
    evidence.write_run(
        spec, seeds={"run": spec["seed"]}, environment=environment(), hashes={"request": request.hash, **prints}
    )
    for candidate in candidates:
        evidence.record(
            "model described",
            candidate.name,
            role=candidate.role,
            how=candidate.how,
            fingerprint=prints[candidate.name],
        )


def _name(path_or_id: str) -> str:
    """A model's name: its folder's, or the hub id's last part."""
    path = Path(path_or_id)
    return path.resolve().name if path.exists() else path.name
