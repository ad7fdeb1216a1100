"""Methods side by side: every seed has its controls, every method as many trials, and all meet one forget level.

What is measured is kept, one file a model and seed under the hash of all that it follows from, and not measured again.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_jsonable_python

from palimpsest.audit.audit import Candidate
from palimpsest.audit.comparison import Compared, Comparison
from palimpsest.errors import EvidenceError, SpecError
from palimpsest.files import content_hash, write_json
from palimpsest.metrics.divergence import kl_per_item
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.processes import CONTEXT, side_by_side
from palimpsest.progress import Report, console
from palimpsest.run.pipeline import controls_of, forget_level
from palimpsest.run.places import require_place
from palimpsest.run.sources import open_source
from palimpsest.run.spec import GivenModel, Spec, TrainedModel, make_spec
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.search import SPACES, Space, search

MARK = "comparison.json"
"""By this file a comparison's folder is known."""


def compare(
    spec: Spec, seeds: Sequence[int], trials: int, folder: str | Path, *, processes: int | None = None
) -> Comparison:
    """Measure what is missing, and write `comparison.json`.

    Args:
        spec: data, model, methods and stop; its seed is put aside for `seeds`.
        seeds: each makes its own data split, models, batches and proposals.
        trials: runs of every method in every seed; the first has the specification's settings, and the one of least
            harm to the held-out retain rows is kept.
        folder: keeps one file a model and seed, and the searches.
        processes: how many methods to run side by side, one thread and one copy of the model each. By default one for
            each core where the specification's model is a small one that it trains, and one in all where it is given.

    Raises:
        SpecError: there is no forget level to meet, or a method has no space to search.
        StorageError: the folder cannot be written, or holds something else.
    """
    folder = Path(folder)
    require_place(folder, MARK)
    _refuse_unless_comparable(spec, trials)
    specs = [with_seed(spec, seed) for seed in seeds]
    if (workers := processes or _cores(spec)) > 1:
        _tune_side_by_side(specs, trials, folder, workers)
    models = [model for each in specs for model in _OneSeed(each, trials, folder).all()]
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


def _cores(spec: Spec) -> int:
    """As many as there are for small models on the CPU; a given model may be too large to be there twice."""
    alone = isinstance(spec.model, GivenModel) or torch.cuda.is_available()
    return 1 if alone else len(os.sched_getaffinity(0))


def _tune_side_by_side(specs: Sequence[Spec], trials: int, folder: Path, processes: int) -> None:
    """Put every method's result on record, where it is not yet."""
    specs = [spec.model_copy(update={"sham": None}) for spec in specs]  # nothing is compared with it yet
    work = [
        (spec, method)
        for spec in specs
        for seed in [_OneSeed(spec, trials, folder)]
        for method in spec.methods
        if not seed.on_record(method)
    ]
    workers = min(processes, len(work))
    left = CONTEXT.SimpleQueue()
    for place in (*range(len(work)), *[None] * workers):
        left.put(place)
    side_by_side(
        {
            f"methods, {number} of {workers}": partial(_tune, work, left, trials, folder)
            for number in range(1, workers + 1)
        }
    )


def _tune(
    work: Sequence[tuple[Spec, Method]],
    left: "multiprocessing.queues.SimpleQueue[int | None]",
    trials: int,
    folder: Path,
    report: Report,
) -> None:
    """In one process: the next of the work that is left, again and again, until None is."""
    console.quiet = True  # whoever started this process shows how far it is
    seed: _OneSeed | None = None
    for place in iter(left.get, None):
        spec, method = work[place]
        report(place, len(work), f"seed {spec.seed}: {method.name}")
        if seed is None or seed.spec is not spec:
            seed = _OneSeed(spec, trials, folder)
        seed.tuned(method)
    report(len(work), len(work), "done")


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
            self.tuned(method) for method in self.spec.methods
        ]

    def tuned(self, method: Method) -> Compared:
        """The method's best trial, from the record or made now."""

        def make() -> Compared:
            console.print(f"seed {self.spec.seed}: {method.name}", highlight=False)
            asked = self._asked(method)
            found = search(
                method,
                self._space(method),
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

        return self._kept(self._path(method.name, self._asked(method)), make)

    def on_record(self, method: Method) -> bool:
        return self._path(method.name, self._asked(method)).exists()

    def _control(self, control: Candidate) -> Compared:
        def make() -> Compared:
            values = measured(control.model, self.request, self.original, self.gold)
            return Compared(control.name, control.role, self.spec.seed, True, values, {}, 0.0)

        return self._kept(self._path(control.name, {"model": control.model.fingerprint()}), make)

    def _space(self, method: Method) -> Space:
        return SPACES[method.name] if self.trials > 1 else {}

    def _asked(self, method: Method) -> dict[str, Any]:
        return {
            "method": method.settings(),
            "space": {name: to_jsonable_python(choice) for name, choice in self._space(method).items()},
            "stop": asdict(self.stop),
            "trials": self.trials,
        }

    def _path(self, name: str, asked: dict[str, Any]) -> Path:
        """Where the result stands that follows from all this."""
        return self.folder / f"{name}-{content_hash(self._models | asked)[:16]}.json"

    @cached_property
    def _models(self) -> dict[str, str]:
        models = {"request": self.request.hash, "original": self.original.fingerprint()}
        return models | ({"gold": self.gold.fingerprint()} if self.gold else {})

    def _kept(self, path: Path, make: Callable[[], Compared]) -> Compared:
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
