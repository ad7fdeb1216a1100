"""What the study of fine-tuning-based unlearning measures of one seed's models, each by the same instruments.

Of each: what it answers, what the original's activations and matrices bring back in it, how deep the facts are gone,
what became of the value vectors that wrote them, how far activations moved inside the forget set and outside, what a
linear probe still reads, and what it answers about some forgotten subjects once it relearns the others.
"""

from collections.abc import Mapping
from functools import cached_property
from statistics import median

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.records import QA
from palimpsest.internals.concept_traces import vector_traces
from palimpsest.internals.depth import logprob_drops, unlearning_depth
from palimpsest.internals.patching import SETTINGS, Plan
from palimpsest.internals.probes import probe_layers
from palimpsest.internals.recovery import KnowledgeRecovery, patching_recovery
from palimpsest.internals.restoration import IN_BLOCKS, Group, Restoration, restoration_recovery
from palimpsest.internals.side_effects import activation_shifts
from palimpsest.models.anatomy import Kind, Site
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import untrained_like
from palimpsest.studies.cells import Cell
from palimpsest.studies.unlearned_models import UnlearnedModels

GROUPS: tuple[Group, ...] = (*IN_BLOCKS, "embedding", "unembedding")


class Bench(UnlearnedModels):
    """Measures one seed's models."""

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

    def measured(self, model: LanguageModel) -> Cell:
        """By every instrument."""
        return self.behaviour(model) | {
            "recovered": self._recovered(model),
            "depth": self._depth(model),
            "vectors": self._traced(model),
            "moved": self._moved(model),
            "probe": self._probed(model),
            "relearned": self.relearned(model),
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


def at_layer(name: str, layer: int) -> str:
    """What a recovery is called that was made in one layer alone."""
    return f"{name} at layer {layer}"


def _forms(recovery: KnowledgeRecovery) -> Mapping[str, float | None]:
    """The four forms of the Knowledge Recovery Score."""
    return {form: getattr(recovery, form) for form in ("krs", "krs_of_sums", "krs_kl", "lpr")}
