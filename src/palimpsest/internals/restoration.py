"""Parameter restoration: the original's matrices put into an unlearned model, a window of layers and a group at a time.

What comes back with them was taken by their change. Hong et al. 2024 (arXiv 2410.06606) restore the value matrices, a
third of a gated MLP; a method that moves other matrices then looks as if it had changed nothing that matters.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from palimpsest.data.batches import Encoded
from palimpsest.errors import ModelError
from palimpsest.internals.patching import layer_windows, refuse_unlike
from palimpsest.internals.recording import Recording
from palimpsest.internals.recovery import KnowledgeRecovery, recoveries
from palimpsest.models.anatomy import Anatomy, Site
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.models.scoring import Predictions, predict
from palimpsest.progress import Report

Group = Literal["value", "mlp_in", "attention", "embedding", "unembedding"]
"""Matrices with their biases: an MLP's last (`down_proj`), the others of the MLP (`gate_proj` and `up_proj`, or what
stands for them), all of attention's, and the two at the ends, which are one where they are tied. Norms and embeddings
of positions are in none."""

IN_BLOCKS: tuple[Group, ...] = ("value", "mlp_in", "attention")


@dataclass(frozen=True, slots=True)
class Restoration:
    """What is restored together.

    Raises:
        ModelError: no group, or a group inside the blocks and no layer.
    """

    groups: frozenset[Group]
    layers: tuple[int, ...] = ()
    """Of the groups inside the blocks; the embeddings have no layer."""

    def __post_init__(self) -> None:
        inside = sorted(self.groups & set(IN_BLOCKS))
        if not self.groups or (inside and not self.layers):
            raise ModelError(f"a restoration of {', '.join(inside) or 'nothing'} in no layer; name groups and layers")

    def first_block(self, anatomy: Anatomy) -> int:
        """The first block that it changes: 0 for the embedding, the number of layers for the unembedding alone."""
        if "embedding" in self.groups or (anatomy.tied and "unembedding" in self.groups):
            return 0
        return min(self.layers) if self.groups & set(IN_BLOCKS) else anatomy.n_layers


def restoration_windows(anatomy: Anatomy, group: Group, width: int) -> list[Restoration]:
    """For each layer, the group in the window of `width` layers around it."""
    return [Restoration(frozenset([group]), tuple(window)) for window in layer_windows(anatomy.n_layers, width)]


def matrices_of(anatomy: Anatomy, group: Group, layer: int) -> list[nn.Module]:
    """The modules of a group; `layer` means nothing for the embeddings.

    Raises:
        ModelError: no such layer, or an MLP's matrices in a mixture of fused experts.
    """
    if group in ("embedding", "unembedding"):
        return [anatomy.embedding if group == "embedding" else anatomy.unembedding]
    output = anatomy.module(Site("attn", layer))
    block = anatomy.blocks[layer]
    part = next(child for child in block.children() if output in child.modules())
    attention = _linear_maps(part)
    if group == "attention":
        return attention
    value = anatomy.module(Site("mlp", layer))
    if group == "value":
        return [value]
    return [module for module in _linear_maps(block) if module is not value and module not in attention]


@contextmanager
def restored(original: LanguageModel, unlearned: LanguageModel, restoration: Restoration) -> Iterator[None]:
    """Give the unlearned model the original's matrices inside; its own are put back, whatever happened to the copies.

    Raises:
        ModelError: the models are not built alike, or have no such matrices.
    """
    refuse_unlike(original, unlearned)
    with _swapped(original, unlearned, restoration):
        yield


def restoration_recovery(
    original: LanguageModel,
    unlearned: LanguageModel,
    rows: Sequence[Encoded],
    restorations: Sequence[Restoration],
    *,
    batch_size: int = 16,
    report: Report | None = None,
) -> list[KnowledgeRecovery]:
    """What each restoration recovers.

    Args:
        original: whose matrices are put in, and whose predictions are the goal.
        unlearned: the model that gets them for a while.
        rows: n rows whose targets are the answers.
        restorations: see `restoration_windows`.
        batch_size: rows at a time; it changes nothing.
        report: called with (restorations done, of how many, a note), a restoration once for every batch.

    Raises:
        ModelError: the models are not built alike, or have no such matrices.
        DataError: a row is longer than the positions that the model was made for.
    """

    def restore(goal: Recording, before: Recording) -> Iterator[tuple[int, Predictions]]:
        for place, restoration in enumerate(restorations):
            yield place, restored_predictions(original, before, restoration)

    return recoveries(original, unlearned, rows, len(restorations), restore, batch_size=batch_size, report=report)


def restored_predictions(original: LanguageModel, before: Recording, restoration: Restoration) -> Predictions:
    """What a recorded model predicts with a restoration, from the first block that it changes on.

    Args:
        original: whose matrices are put in, built like the recorded model.
        before: of the model that gets them, with its residual stream.
        restoration: what is put in.
    """
    first = restoration.first_block(before.model.anatomy)
    with _swapped(original, before.model, restoration), before.resumed(first):
        with evaluating(before.model) as network:
            return predict(network, before.batch)


@contextmanager
def _swapped(original: LanguageModel, unlearned: LanguageModel, restoration: Restoration) -> Iterator[None]:
    given, own = _parameters(original, restoration), _parameters(unlearned, restoration)
    kept = [parameter.data for parameter in own]
    try:
        # Another tensor in place of its own, which is then untouched by whatever is done inside.
        for parameter, theirs in zip(own, given, strict=True):
            parameter.data = theirs.data.to(parameter, copy=True)
        yield
    finally:
        for parameter, values in zip(own, kept, strict=True):
            parameter.data = values


def _parameters(model: LanguageModel, restoration: Restoration) -> list[nn.Parameter]:
    inside = restoration.groups & set(IN_BLOCKS)
    layers = [(group, layer) for group in sorted(inside) for layer in restoration.layers]
    ends = [(group, 0) for group in sorted(restoration.groups - inside)]
    modules = [module for group, layer in [*layers, *ends] for module in matrices_of(model.anatomy, group, layer)]
    return [parameter for module in modules for parameter in module.parameters(recurse=False)]


def _linear_maps(part: nn.Module) -> list[nn.Module]:
    return [module for module in part.modules() if isinstance(module, nn.Linear | Conv1D)]
