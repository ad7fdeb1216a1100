"""What is still inside, by patching: how deep the forgotten facts are gone, and what parts of the original bring back.

Depth asks what a model's states still tell the original; original and gold are the ends of its scale. Recovery asks
what the original's activations and matrices do in a model. They carry the answers in, so a model that unlearned nothing
recovers much too: recovery is read beside sham, and never compared with gold, which speaks in another basis.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.records import QA, subject_of
from palimpsest.errors import ModelError
from palimpsest.internals.depth import THRESHOLD, UnlearningDepth, fact_rows, logprob_drops
from palimpsest.internals.patching import SETTINGS, Plan, patched_predictions, refuse_unlike
from palimpsest.internals.recording import Recording
from palimpsest.internals.recovery import recoveries
from palimpsest.internals.restoration import IN_BLOCKS, Group, Restoration, matrices_of, restored_predictions
from palimpsest.metrics.scores import Measure, Row
from palimpsest.models.anatomy import Kind, Site
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import Predictions
from palimpsest.unlearn.request import Request

DEPTH = "forget/unlearning_depth"
"""The measure of how deep the facts are gone."""
RECOVERY = "forget_recovery"
"""The set of what parts of the original bring back, all layers together; its rows are the forget set's."""
DEPTH_BY_LAYER = "forget_depth_layers"
"""The set under which the depth's layers stand one by one."""
RECOVERY_BY_LAYER = "forget_recovery_layers"
"""The set under which the recovery's sites stand one by one."""

LPR = "share of the log-probability that the fact's tokens lost that comes back (sum over sum)"
KRS = "1 - sum of KL(original || patched) / sum of KL(original || model)"
SITES: dict[Kind, str] = {"coef": "MLP coefficients", "attn": "attention outputs"}
"""What the map has a row each of."""
FACTS = 32
"""The most facts whose recovery is measured: it takes some twenty forward passes, where depth takes a few."""
GROUPS: dict[Group, str] = {
    "value": "MLP value matrices",
    "mlp_in": "MLP input matrices",
    "attention": "attention matrices",
}


@dataclass(frozen=True)
class Internals:
    """The forgotten facts, and the models that they are patched from and into."""

    request: Request
    original: LanguageModel
    gold: LanguageModel | None

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Of the facts as a whole, then site by site and layer by layer."""
        depth = [_DEPTH, *map(_depth_at, range(self.original.anatomy.n_layers))] if self._is_calibrated else []
        patched = [_patched(setting, score) for score in ("lpr", "krs") for setting in self._settings]
        return (*depth, *patched, *map(_restored, self._groups), *map(_recovered_at, self._sites))

    def rows(self, name: str, model: LanguageModel) -> Iterator[Row]:
        """What is measured of one model, row by row; nothing of a model that is not built like the original.

        Rows in which nothing can be measured are left out: facts that no layer of gold has lost, answers that the model
        gives as readily as the original.
        """
        if not _alike(model, self.original):
            return
        if self._is_calibrated:
            depth = UnlearningDepth(self._gold_drops, self._drops(model))
            everywhere, all_count = range(len(self._encoded)), torch.ones_like(depth.counted)
            yield from self._rows(name, DEPTH, everywhere, depth.by_row, depth.counted)
            for layer, drops in enumerate(depth.drops.T):
                yield from self._rows(name, f"{DEPTH_BY_LAYER}/{_layer(layer)}", everywhere, drops, all_count)
        if model is not self.original:  # in the original there is nothing to recover
            yield from self._recovered(name, model)

    def _recovered(self, name: str, model: LanguageModel) -> Iterator[Row]:
        """Settings, sites and groups of matrices in turn, by one recording of either model a batch."""
        anatomy = self.original.anatomy
        plans: list[Plan] = [frozenset(anatomy.sites(*SETTINGS[setting])) for setting in self._settings]
        plans += [frozenset([site]) for site in self._sites]
        layers = tuple(range(anatomy.n_layers))
        groups = [group for group in self._groups if not self._is_all_that_changed(group, model)]
        restorations = [Restoration(frozenset([group]), layers) for group in groups]

        def change(goal: Recording, before: Recording) -> Iterator[tuple[int, Predictions]]:
            yield from patched_predictions(goal, before, plans)
            for place, restoration in enumerate(restorations, len(plans)):
                yield place, restored_predictions(self.original, before, restoration)

        found = recoveries(
            self.original,
            model,
            [self._encoded[place] for place in self._sampled],
            len(plans) + len(restorations),
            change,
            sites=self._sites,
        )
        keys = [_patched(setting, "lpr").key for setting in self._settings]
        keys += [measure.key for measure in (*map(_recovered_at, self._sites), *map(_restored, groups))]
        for key, recovery in zip(keys, found, strict=True):
            yield from self._rows(name, key, self._sampled, recovery.logprob.weighted_by_row, recovery.logprob.counted)
        for setting, recovery in zip(self._settings, found, strict=False):
            key = _patched(setting, "krs").key
            yield from self._rows(name, key, self._sampled, recovery.kl.weighted_by_row, recovery.kl.counted)

    def _rows(self, name: str, key: str, places: Sequence[int], values: Tensor, counted: Tensor) -> Iterator[Row]:
        """The values that count, [n] of the facts at n places."""
        for place, value, counts in zip(places, values.tolist(), counted.tolist(), strict=True):
            if counts:
                record = self.request.forget[place]
                yield Row(name, key, record.id, subject_of(record), value)

    def _drops(self, model: LanguageModel) -> Tensor:
        """[n, L] what the original loses with this model's states."""
        if model is self.original:
            return torch.zeros_like(self._gold_drops)
        if model is self.gold:
            return self._gold_drops
        return logprob_drops(model, self.original, self._encoded)

    @cached_property
    def _encoded(self) -> list[Encoded]:
        """The tokens that carry the facts, where they are marked; of passages all."""
        rows, tokenizer, template = self.request.forget, self.original.tokenizer, self.request.template
        questions = [row for row in rows if isinstance(row, QA)]
        if len(questions) == len(rows):
            return fact_rows(questions, tokenizer, template=template)
        return encode(rows, tokenizer, template=template)

    @property
    def _sampled(self) -> list[int]:
        """The places of the facts whose recovery is measured, spread evenly over the forget set."""
        n = len(self.request.forget)
        return [place * n // FACTS for place in range(FACTS)] if n > FACTS else list(range(n))

    @cached_property
    def _gold_drops(self) -> Tensor:
        """[n, L] what the original loses with gold's states."""
        assert self.gold is not None
        return logprob_drops(self.gold, self.original, self._encoded)

    @cached_property
    def _is_calibrated(self) -> bool:
        """Whether there is a gold whose states have lost a fact that the original's tell."""
        if self.gold is None or not _alike(self.gold, self.original):
            return False
        return bool((self._gold_drops > THRESHOLD).any())

    @property
    def _settings(self) -> list[str]:
        """What is patched in all layers together; in a mixture of experts, which has no coefficients, attention."""
        return [name for name, kinds in SETTINGS.items() if set(kinds) <= set(self.original.anatomy.kinds)]

    @property
    def _groups(self) -> tuple[Group, ...]:
        return IN_BLOCKS if self.original.anatomy.value_matrices else ("attention",)

    def _is_all_that_changed(self, group: Group, model: LanguageModel) -> bool:
        """Whether a model differs from the original in a group of matrices alone: then restoring it undoes everything.

        That brings every answer back and says nothing.
        """
        anatomy = model.anatomy
        restored = {
            parameter
            for layer in range(anatomy.n_layers)
            for matrix in matrices_of(anatomy, group, layer)
            for parameter in matrix.parameters(recurse=False)
        }
        pairs = zip(model.network.parameters(), self.original.network.parameters(), strict=True)
        return all(own in restored or torch.equal(own, theirs) for own, theirs in pairs)

    @property
    def _sites(self) -> list[Site]:
        anatomy = self.original.anatomy
        return [site for kind in SITES if kind in anatomy.kinds for site in anatomy.sites(kind)]


_DEPTH = Measure(
    "unlearning_depth",
    "forget",
    f"unlearning_depth@before_norm: share of gold's drop in each layer where that is over {THRESHOLD} nats/token",
    "share",
    "Unlearning depth (UDS)",
    "How much of the fact the model's states no longer tell the original: 0 is the original, 1 gold, in every layer.",
    "toward gold",
)


def _depth_at(layer: int) -> Measure:
    return Measure(
        _layer(layer),
        DEPTH_BY_LAYER,
        f"unlearning_depth@before_norm: drop of the log-probability with the model's states after layer {layer}",
        "nats/token",
        f"Drop at layer {layer}",
        f"What the original loses of the fact's tokens when it goes on from this model's states after layer {layer}.",
        "toward gold",
    )


def _patched(setting: str, score: str) -> Measure:
    definition, label = {"lpr": (LPR, "log-probability"), "krs": (KRS, "predictions (KL)")}[score]
    return Measure(
        f"patch_{setting.replace(' ', '_')}_{score}",
        RECOVERY,
        f"{score}@patching: {definition}, the original's {setting} patched in at every layer and token",
        "share of the loss",
        f"Original's {setting} patched in, {label}",
        "How much of what it lost comes back; sham's value is what any further training gives, not gold's.",
        "lower",
    )


def _restored(group: Group) -> Measure:
    return Measure(
        f"restore_{group}_lpr",
        RECOVERY,
        f"lpr@restoration: {LPR}, with the original's {GROUPS[group]} in every layer",
        "share of the loss",
        f"Original's {GROUPS[group]} restored, log-probability",
        "How much of what it lost comes back when these matrices alone are the original's again, beside sham's value.",
        "lower",
    )


def _recovered_at(site: Site) -> Measure:
    return Measure(
        f"{site.kind}_{site.layer}",
        RECOVERY_BY_LAYER,
        f"lpr@patching: {LPR}, the original's {SITES[site.kind]} patched in at layer {site.layer} and every token",
        "share of the loss",
        f"Original's {SITES[site.kind]} at layer {site.layer}, log-probability",
        "How much of what it lost comes back from this place alone, beside sham's value.",
        "lower",
    )


def _layer(layer: int) -> str:
    return f"layer_{layer}"


def _alike(model: LanguageModel, original: LanguageModel) -> bool:
    try:
        refuse_unlike(model, original)
    except ModelError:
        return False
    return True
