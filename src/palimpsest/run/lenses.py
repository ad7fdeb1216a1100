"""The lenses of an audit: fitted to the original and to gold on retain rows, kept in the run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from palimpsest.audit.audit import Candidate
from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.layers import Lenses
from palimpsest.audit.results import Role
from palimpsest.data.overlap import told_of
from palimpsest.data.records import records_hash
from palimpsest.errors import ModelError
from palimpsest.lens.fit import fit
from palimpsest.lens.lens import Lens
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.request import Request

LensKind = Literal["tuned", "ridge", "jacobian", "logit"]


def lenses_of(
    kind: LensKind, controls: Mapping[Role, Candidate], request: Request, evidence: RunFolder, *, seed: int
) -> Lenses:
    """A lens for the original and one for gold if there is one, from the run folder where they are there already."""
    fitted = {role: candidate.model for role, candidate in controls.items() if role in ("original", "gold")}
    found = {role: _lens(kind, model, request, evidence, role, seed) for role, model in fitted.items()}
    return Lenses(found["original"], found.get("gold"))


def _lens(kind: LensKind, model: LanguageModel, request: Request, evidence: RunFolder, role: str, seed: int) -> Lens:
    if kind == "logit":
        return Lens.logit(model)
    secret = set(told_of(request.retain, request.forget))
    texts = [record for record in request.retain if record.id not in secret]
    folder = evidence.path / "lens" / role
    lens = _kept(folder)
    asked = {"kind": kind, "seed": seed, "texts": records_hash(texts), "model": model.fingerprint()}
    if lens is None or any(lens.provenance.get(name) != value for name, value in asked.items()):
        lens = fit(
            model,
            texts,
            kind=kind,
            forget=request.forget,
            template=request.template,
            seed=seed,
            folder=folder.with_name(f".{role}.unfinished"),
        )
        lens.save(folder)
    evidence.add_folder(folder, f"lens fitted to {role}")
    return lens


def _kept(folder: Path) -> Lens | None:
    try:
        return Lens.load(folder)
    except ModelError:
        return None
