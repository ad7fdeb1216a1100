"""The models that studies of internals look into: controls, and what each method makes of the same original.

Full, gold, sham and the models that methods made, each stopped at gold's forget level or after so many steps; and one
in which noise was put on chosen value vectors alone (Needle). What is measured of them is each study's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from palimpsest.data.batches import Encoded
from palimpsest.data.records import QA, subject_of
from palimpsest.internals.attribution import attribution, most
from palimpsest.internals.depth import fact_rows
from palimpsest.internals.value_vectors import ValueVector
from palimpsest.metrics.divergence import kl_per_item
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import train_sham
from palimpsest.studies.cells import Cell, kept
from palimpsest.studies.regimes import Setting
from palimpsest.unlearn.gradient_ascent import GradientAscent, GradientDifference
from palimpsest.unlearn.kfade import KFade
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.needle import Needle
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.preference import DPO
from palimpsest.unlearn.random_labels import RandomLabels
from palimpsest.unlearn.rmu import RMU
from palimpsest.unlearn.simnpo import SimNPO
from palimpsest.unlearn.stopping import Stop

_KEEP: dict[str, Any] = {"retain_term": "kl", "retain_weight": 10.0, "batch_size": 16}
METHODS: tuple[Method, ...] = (
    GradientAscent(batch_size=16),
    GradientDifference(**_KEEP),
    NPO(**_KEEP),
    SimNPO(**_KEEP),
    DPO(**_KEEP | {"retain_weight": 0.5, "learning_rate": 1e-3}),
    RandomLabels(**_KEEP),
    KFade(),
    RMU(alpha=20.0, batch_size=16),
)
"""Each at one plain setting: how well a method can be tuned is another study's question. DPO's loss is not divided by
beta, so half a retain weight there is NPO's 10, and at the others' rate it does not come down to gold's level."""
CONTROLS = ("full", "gold", "sham")
CELLS = (*CONTROLS, *(method.name for method in METHODS), Needle.name)
"""What is measured, by the names of the files that keep it."""
STEPS = 300
"""The most that a method may take."""
SHAM_STEPS, RELEARNING_STEPS, RATE = 100, 20, 3e-4
"""Of training on retain rows, and on half of the forgotten subjects."""
NOISE = 5.0
"""Needle's, in deviations of the value matrices: about what ConceptVectors' 0.1 is in LLaMA-2-7B."""


TRACKED = 3
"""Value vectors, unless a study has its own."""


def fine_tuning() -> list[str]:
    """The methods that may move every weight, which is what papers say of fine-tuning; RMU moves value matrices."""
    return [method.name for method in METHODS if method.name != RMU.name]


class UnlearnedModels(ABC):
    """One seed's models; what stands in the folder is not measured again."""

    def __init__(self, setting: Callable[[int], Setting], seed: int, folder: Path) -> None:
        self._setting, self.seed, self.folder = setting, seed, folder

    @abstractmethod
    def measured(self, model: LanguageModel) -> Cell:
        """What the study wants to know of a model."""

    @cached_property
    def tracked(self) -> list[ValueVector]:
        """The value vectors on which Needle puts its noise: those to which the forgotten answers owe most."""
        return most(attribution(self.setting.original, self.rows), TRACKED)

    def measure(self, wanted: Sequence[str]) -> dict[str, Cell]:
        """The cell of each model that is wanted."""
        return {
            name: kept(self.folder / f"{name}.json", f"seed {self.seed}: {name}", make)
            for name, make in self.work().items()
            if name in wanted
        }

    def work(self) -> Mapping[str, Callable[[], Cell]]:
        """How each cell is made."""
        return {
            "full": lambda: self.measured(self.setting.original),
            "gold": lambda: self.measured(self.setting.gold),
            "sham": lambda: self.measured(self.trained(self.setting.original, self.setting.request.retain, SHAM_STEPS)),
            **{method.name: partial(self._unlearned, method) for method in METHODS},
            Needle.name: self._needled,
        }

    @cached_property
    def setting(self) -> Setting:
        """Made or loaded only once something has to be measured."""
        return self._setting(self.seed)

    @cached_property
    def forget(self) -> list[QA]:
        """The forgotten facts, which these studies take as questions."""
        return [record for record in self.setting.request.forget if isinstance(record, QA)]

    @cached_property
    def rows(self) -> list[Encoded]:
        """Their answers' tokens."""
        request = self.setting.request
        return fact_rows(self.forget, self.setting.original.tokenizer, template=request.template)

    @cached_property
    def level(self) -> float:
        """Gold's answer probability on the forget set."""
        return self.probability(self.setting.gold, self.forget)

    def made(self, method: Method, stop: Stop) -> Cell:
        """What a method made of the original, and what it took."""
        update = method.run(self.setting.original, self.setting.request, stop)
        model = update.apply(self.setting.original.copy(method.name))
        took = {"steps": update.provenance["trace"][-1]["step"], "seconds": update.provenance["seconds"]}
        return self.measured(model) | took

    def behaviour(self, model: LanguageModel) -> Cell:
        """What it answers, and what became of rows that nothing was trained on."""
        request = self.setting.request
        unseen, template = request.retain_unseen, request.template
        return {
            "forget": self.probability(model, self.forget),
            "unseen": answer_probability(model, unseen, template=template).mean().item(),
            "kl_unseen": kl_per_item(self.setting.original, model, unseen, template=template).mean().item(),
        }

    def relearned(self, model: LanguageModel) -> Cell:
        """Train on half of the forgotten subjects, ask about the others (Deeb & Roger 2024, arXiv 2410.08827)."""
        subjects = sorted({subject_of(record) for record in self.forget})
        taught = [record for record in self.forget if subject_of(record) in subjects[::2]]
        held_out = [record for record in self.forget if subject_of(record) in subjects[1::2]]
        after = self.trained(model, taught, RELEARNING_STEPS)
        return {
            name: {"before": self.probability(model, rows), "after": self.probability(after, rows)}
            for name, rows in (("taught", taught), ("held_out", held_out))
        }

    def trained(self, model: LanguageModel, records: Sequence[Any], steps: int) -> LanguageModel:
        """A copy that was trained on records a little further."""
        template = self.setting.request.template
        return train_sham(model, records, template=template, steps=steps, learning_rate=RATE, seed=self.seed)

    def probability(self, model: LanguageModel, records: Sequence[QA]) -> float:
        """The mean probability of the true answers."""
        return answer_probability(model, records, template=self.setting.request.template).mean().item()

    def _unlearned(self, method: Method) -> Cell:
        cell = self.made(replace(method, seed=self.seed), Stop(STEPS, self.level))
        return cell | {"reached": cell["forget"] <= self.level + 1e-6}

    def _needled(self) -> Cell:
        """Noise of a fixed size: what an intrinsic score says of it, whatever the model still answers."""
        matrices = self.setting.original.anatomy.value_matrices
        deviation = torch.cat([matrix.get_parameter("weight").detach().flatten() for matrix in matrices]).std().item()
        vectors = tuple((vector.layer, vector.column) for vector in self.tracked)
        return self.made(Needle(vectors=vectors, noise=NOISE * deviation, seed=self.seed), Stop())
