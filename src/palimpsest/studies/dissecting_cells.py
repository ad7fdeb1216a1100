"""What the study of fine-tuning-based unlearning measures of one seed's models, each by the same instruments.

Full, gold, sham and the models that methods made, each stopped at gold's forget level or after so many steps. Of each:
what it answers, what the original's activations and matrices bring back in it, how deep the facts are gone, what became
of the value vectors that wrote them, how far activations moved inside the forget set and outside, what a linear probe
still reads, and what it answers about some forgotten subjects once it relearns the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.records import QA, subject_of
from palimpsest.internals.attribution import attribution, most
from palimpsest.internals.concept_traces import vector_traces
from palimpsest.internals.depth import fact_rows, logprob_drops, unlearning_depth
from palimpsest.internals.patching import SETTINGS, Plan
from palimpsest.internals.probes import probe_layers
from palimpsest.internals.recovery import Recovery, patching_recovery
from palimpsest.internals.restoration import IN_BLOCKS, Group, Restoration, restoration_recovery
from palimpsest.internals.side_effects import activation_shifts
from palimpsest.internals.value_vectors import ValueVector
from palimpsest.metrics.divergence import kl_per_item
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.anatomy import Kind, Site
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import train_sham, untrained_like
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
TRACKED, NOISE = 3, 5.0
"""Value vectors that are traced, those to which the forgotten answers owe most. Needle's noise on them in deviations of
the value matrices: about what ConceptVectors' 0.1 is in LLaMA-2-7B."""
GROUPS: tuple[Group, ...] = (*IN_BLOCKS, "embedding", "unembedding")


class Bench:
    """Measures one seed's models; what stands in its folder is not measured again."""

    def __init__(self, setting: Callable[[int], Setting], seed: int, folder: Path) -> None:
        self._setting, self.seed, self.folder = setting, seed, folder

    def measure(self, wanted: Sequence[str]) -> dict[str, Cell]:
        """The cell of each model that is wanted."""
        work: dict[str, Callable[[], Cell]] = {
            "full": lambda: self._measured(self.setting.original),
            "gold": lambda: self._measured(self.setting.gold),
            "sham": self._sham,
            **{method.name: partial(self._unlearned, method) for method in METHODS},
            Needle.name: self._needled,
        }
        return {
            name: kept(self.folder / f"{name}.json", f"seed {self.seed}: {name}", make)
            for name, make in work.items()
            if name in wanted
        }

    @cached_property
    def setting(self) -> Setting:
        """Made or loaded only once something has to be measured."""
        return self._setting(self.seed)

    @cached_property
    def forget(self) -> list[QA]:
        """The forgotten facts, which this study takes as questions."""
        return [record for record in self.setting.request.forget if isinstance(record, QA)]

    @cached_property
    def rows(self) -> list[Encoded]:
        """Their answers' tokens."""
        request = self.setting.request
        return fact_rows(self.forget, self.setting.original.tokenizer, template=request.template)

    @cached_property
    def level(self) -> float:
        """Gold's answer probability on the forget set."""
        return self._probability(self.setting.gold, self.forget)

    @cached_property
    def gold_drops(self) -> Tensor:
        """[n, L] the scale of every depth."""
        return logprob_drops(self.setting.gold, self.setting.original, self.rows)

    @cached_property
    def unseen_rows(self) -> list[Encoded]:
        """Of rows that nothing was trained on."""
        request = self.setting.request
        return encode(request.retain_unseen, self.setting.original.tokenizer, template=request.template)

    @cached_property
    def untrained(self) -> LanguageModel:
        """Of the original's size: what a probe reads off the words alone."""
        return untrained_like(self.setting.original, self.seed)

    @cached_property
    def tracked(self) -> list[ValueVector]:
        """The original's value vectors to which the forgotten answers owe most."""
        return most(attribution(self.setting.original, self.rows), TRACKED)

    def _sham(self) -> Cell:
        return self._measured(self._trained(self.setting.original, self.setting.request.retain, SHAM_STEPS))

    def _unlearned(self, method: Method) -> Cell:
        cell = self._made(replace(method, seed=self.seed), Stop(STEPS, self.level))
        return cell | {"reached": cell["forget"] <= self.level + 1e-6}

    def _needled(self) -> Cell:
        """Noise of a fixed size: what the benchmark's intrinsic score says of it, whatever the model still answers."""
        matrices = self.setting.original.anatomy.value_matrices
        deviation = torch.cat([matrix.get_parameter("weight").detach().flatten() for matrix in matrices]).std().item()
        vectors = tuple((vector.layer, vector.column) for vector in self.tracked)
        return self._made(Needle(vectors=vectors, noise=NOISE * deviation, seed=self.seed), Stop())

    def _made(self, method: Method, stop: Stop) -> Cell:
        update = method.run(self.setting.original, self.setting.request, stop)
        model = update.apply(self.setting.original.copy(method.name))
        made = {"steps": update.provenance["trace"][-1]["step"], "seconds": update.provenance["seconds"]}
        return self._measured(model) | made

    def _measured(self, model: LanguageModel) -> Cell:
        original, unseen = self.setting.original, self.setting.request.retain_unseen
        return {
            "forget": self._probability(model, self.forget),
            "unseen": answer_probability(model, unseen, template=self.setting.request.template).mean().item(),
            "kl_unseen": kl_per_item(original, model, unseen, template=self.setting.request.template).mean().item(),
            "recovered": self._recovered(model),
            "depth": self._depth(model),
            "vectors": self._traced(model),
            "moved": self._moved(model),
            "probe": self._probed(model),
            "relearned": self._relearned(model),
        }

    def _recovered(self, model: LanguageModel) -> Cell:
        """By what is put back: activations or a group of matrices, in all layers or a single one."""
        original, n_layers = self.setting.original, model.anatomy.n_layers
        plans: dict[str, Plan] = {}
        for name, kinds in SETTINGS.items():
            plans[name] = frozenset(model.anatomy.sites(*kinds))
            plans |= {at_layer(name, layer): {Site(kind, layer) for kind in kinds} for layer in range(n_layers)}
        restorations = {group: Restoration(frozenset([group]), tuple(range(n_layers))) for group in GROUPS}
        patched = patching_recovery(original, model, self.rows, list(plans.values()))
        restored = restoration_recovery(original, model, self.rows, list(restorations.values()))
        names = (*plans, *restorations)
        return {name: _forms(recovery) for name, recovery in zip(names, (*patched, *restored), strict=True)}

    def _depth(self, model: LanguageModel) -> Cell:
        depth = unlearning_depth(self.gold_drops, model, self.setting.original, self.rows)
        return {
            "score": depth.score,
            "unclipped_median": depth.unclipped_median,
            "excluded": depth.excluded,
            "encoding": depth.encoding.float().mean(0).tolist(),
            "gold_drops": depth.gold_drops.mean(0).tolist(),
            "drops": depth.drops.mean(0).tolist(),
        }

    def _traced(self, model: LanguageModel) -> Cell:
        changes = [trace.change for trace in vector_traces(self.setting.original, model, self.tracked, top=())]
        deviations = [change.z for change in changes if change.z is not None]
        return {
            "cosine": median(change.cosine for change in changes),
            "relative_l2": median(change.relative_l2 for change in changes),
            "z": median(deviations) if deviations else None,
            "at": [[vector.layer, vector.column] for vector in self.tracked],
        }

    def _moved(self, model: LanguageModel) -> Cell:
        """By kind of site: mean relative change of activations, on the forgotten and on unseen rows."""
        original, n_layers = self.setting.original, model.anatomy.n_layers
        kinds: tuple[Kind, ...] = ("coef", "attn")
        sites = [Site(kind, layer) for kind in kinds for layer in range(n_layers)]
        moved: Cell = {kind: {} for kind in kinds}
        for where, rows in (("forget", self.rows), ("unseen", self.unseen_rows)):
            shifts = activation_shifts(original, model, rows, sites)
            for kind in kinds:
                of_kind = [shift.relative_l2 for site, shift in zip(sites, shifts, strict=True) if site.kind == kind]
                moved[kind][where] = torch.stack(of_kind).mean().item()
        return moved

    def _probed(self, model: LanguageModel) -> list[Cell]:
        """Layer by layer, how often a probe fitted to retain questions tells forgotten answers from wrong ones."""
        request = self.setting.request
        taught = [record for record in request.retain if isinstance(record, QA)]
        layers = probe_layers(model, self.untrained, taught, self.forget, template=request.template, seed=self.seed)
        return [{"accuracy": layer.accuracy, "lead": layer.lead} for layer in layers]

    def _relearned(self, model: LanguageModel) -> Cell:
        """Train on half of the forgotten subjects, ask about the others (Deeb & Roger 2024, arXiv 2410.08827)."""
        subjects = sorted({subject_of(record) for record in self.forget})
        taught = [record for record in self.forget if subject_of(record) in subjects[::2]]
        held_out = [record for record in self.forget if subject_of(record) in subjects[1::2]]
        after = self._trained(model, taught, RELEARNING_STEPS)
        return {
            name: {"before": self._probability(model, rows), "after": self._probability(after, rows)}
            for name, rows in (("taught", taught), ("held_out", held_out))
        }

    def _trained(self, model: LanguageModel, records: Sequence[Any], steps: int) -> LanguageModel:
        template = self.setting.request.template
        return train_sham(model, records, template=template, steps=steps, learning_rate=RATE, seed=self.seed)

    def _probability(self, model: LanguageModel, records: Sequence[QA]) -> float:
        return answer_probability(model, records, template=self.setting.request.template).mean().item()


def at_layer(name: str, layer: int) -> str:
    """What a recovery is called that was made in one layer alone."""
    return f"{name} at layer {layer}"


def _forms(recovery: Recovery) -> Mapping[str, float | None]:
    """The four forms of the Knowledge Recovery Score."""
    return {form: getattr(recovery, form) for form in ("krs", "krs_of_sums", "krs_kl", "lpr")}
