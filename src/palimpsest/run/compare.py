"""Methods side by side: every seed has its controls, every method as many trials, and all meet one forget level.

What is measured is kept, one file a model and seed under the hash of all that it follows from, and not measured again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from palimpsest.audit.audit import Candidate
from palimpsest.audit.comparison import Compared, Comparison
from palimpsest.errors import EvidenceError, SpecError
from palimpsest.files import content_hash, write_json
from palimpsest.metrics.divergence import kl_per_item
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel
from palimpsest.progress import console
from palimpsest.run.pipeline import controls_of, forget_level
from palimpsest.run.places import require_place
from palimpsest.run.sources import open_source
from palimpsest.run.spec import Spec, TrainedModel, make_spec
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.search import SPACES, search

MARK = "comparison.json"
"""By this file a comparison's folder is known."""


def compare(spec: Spec, seeds: Sequence[int], trials: int, folder: str | Path) -> Comparison:
    """Measure what is missing, and write `comparison.json`.

    Args:
        spec: data, model, methods and stop; its seed is put aside for `seeds`.
        seeds: each makes its own data split, models, batches and proposals.
        trials: runs of every method in every seed; the first has the specification's settings, and the one of least
            harm to the held-out retain rows is kept.
        folder: keeps one file a model and seed, and the searches.

    Raises:
        SpecError: there is no forget level to meet, or a method has no space to search.
        StorageError: the folder cannot be written, or holds something else.
    """
    folder = Path(folder)
    require_place(folder, MARK)
    _refuse_unless_comparable(spec, trials)
    models = [model for seed in seeds for model in _OneSeed(with_seed(spec, seed), trials, folder).all()]
    found = Comparison(spec.title, trials, tuple(models), spec.resolved())
    write_json(folder / MARK, found.to_json())
    return found


def with_seed(spec: Spec, seed: int) -> Spec:
    """The same specification with another seed, wherever it named none of its own."""
    plain, before = spec.resolved(), spec.seed
    parts = [plain, *plain["methods"]] + ([plain["model"]["training"]] if isinstance(spec.model, TrainedModel) else [])
    for part in parts:
        if part["seed"] == before:
            part["seed"] = seed
    return make_spec(plain)


def measured(
    model: LanguageModel, request: Request, original: LanguageModel, gold: LanguageModel | None
) -> dict[str, float]:
    """One model's numbers, by the names of `QUANTITIES`: means over rows, probabilities or nats/token."""
    template = request.template

    def said(rows: Any) -> float:
        return answer_probability(model, rows, template=template).mean().item()

    def apart(one: LanguageModel, rows: Any) -> float:
        return kl_per_item(one, model, rows, template=template).mean().item()

    found = {"forget": said(request.forget), "unseen": said(request.retain_unseen)}
    found["harm"] = apart(original, request.retain_unseen)
    if request.forget_reworded:
        found["reworded"] = said(request.forget_reworded)
    if gold:
        found["from_gold"] = apart(gold, request.forget)
    return found


class _OneSeed:
    """All models of one seed. Whatever is slow to make is made when something is missing."""

    def __init__(self, spec: Spec, trials: int, folder: Path) -> None:
        self.spec, self.trials, self.folder = spec, trials, folder / f"seed-{spec.seed}"
        source = open_source(spec)
        self.request = source.request
        self.controls = controls_of(spec, source)
        self.original = self.controls["original"].model
        self.gold = self.controls["gold"].model if "gold" in self.controls else None
        self.stop = spec.stop.stop(forget_level(self.gold, self.request) if self.gold else None)
        if self.stop.forget_probability is None:
            raise SpecError("compare: the model has no gold; give stop.forget_probability as a number")

    def all(self) -> list[Compared]:
        return [self._control(control) for control in self.controls.values()] + [
            self._tuned(method) for method in self.spec.methods
        ]

    def _control(self, control: Candidate) -> Compared:
        def make() -> Compared:
            values = measured(control.model, self.request, self.original, self.gold)
            return Compared(control.name, control.role, self.spec.seed, True, values, {}, 0.0)

        return self._kept(control.name, {"model": control.model.fingerprint()}, make)

    def _tuned(self, method: Method) -> Compared:
        space = SPACES[method.name] if self.trials > 1 else {}
        asked = {
            "method": method.settings(),
            "space": {name: to_jsonable_python(choice) for name, choice in space.items()},
            "stop": asdict(self.stop),
            "trials": self.trials,
        }

        def make() -> Compared:
            console.print(f"seed {self.spec.seed}: {method.name}", highlight=False)
            found = search(
                method,
                space,
                self.original,
                self.request,
                self.stop,
                self.trials,
                method.seed,
                folder=self.folder / f"search-{method.name}-{content_hash(asked)[:8]}",
            )
            model = found.update.apply(self.original.copy())
            values = measured(model, self.request, self.original, self.gold)
            seconds = sum(trial.seconds for trial in found.trials)
            best = found.best
            return Compared(
                method.name, "unlearned", self.spec.seed, best.reached, values, dict(best.settings), seconds
            )

        return self._kept(method.name, asked, make)

    def _kept(self, name: str, asked: dict[str, Any], make: Any) -> Compared:
        known = {"request": self.request.hash, "original": self.original.fingerprint(), **asked}
        if self.gold:
            known["gold"] = self.gold.fingerprint()
        path = self.folder / f"{name}-{content_hash(known)[:16]}.json"
        if not path.exists():
            write_json(path, asdict(made := make()))
            return made
        try:
            return Compared(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise EvidenceError(f"{path}: cannot be read ({error}); remove it, and it is measured again") from error


def _refuse_unless_comparable(spec: Spec, trials: int) -> None:
    if spec.stop.forget_probability is None:
        raise SpecError("compare: methods are compared at one forget level; give stop.forget_probability")
    for method in spec.methods:
        if trials > 1 and method.name not in SPACES:
            raise SpecError(f"compare: nothing is known of where to search {method.name}'s settings; ask for 1 trial")
