"""Activation patching: what a model predicts once another model's activations are put in place of its own.

Many plans are run for one batch: the donor is read once, the patched model once, and each plan begins at the first
block that it changes; plans that begin together are run together. The results are those of one plan at a time with
plain hooks, on a CPU to the last bit. Mixtures of experts are the exception: an expert multiplies the tokens of all
plans that are routed to it at once, and how many rows a product has may decide how it rounds.

Shapes: B rows, T tokens.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import groupby
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from palimpsest.data.batches import Batch
from palimpsest.errors import ModelError
from palimpsest.internals.recording import Recording
from palimpsest.models.anatomy import Anatomy, Kind, Site
from palimpsest.models.hooks import Patch, patched, stacked
from palimpsest.models.language_model import LanguageModel, evaluating, refuse_other_tokenizer
from palimpsest.models.scoring import Predictions, predict

Plan: TypeAlias = Set[Site]
"""The sites that are patched together."""
Positions: TypeAlias = Literal["all", "predicting"]
"""Where they are patched: at every token of a row, or only at those from which its targets are predicted."""

SETTINGS: Mapping[str, tuple[Kind, ...]] = {
    "coefficients": ("coef",),
    "attention": ("attn",),
    "coefficients and attention": ("coef", "attn"),
}
"""What Hong et al. 2024 (arXiv 2410.06606) patch in each window of layers."""

MEMORY = 2**30
"""Bytes that the activations and logits of plans run together may take, by estimate; one plan always runs."""


def patched_predictions(
    donor: Recording,
    recipient: Recording,
    plans: Sequence[Plan],
    *,
    positions: Positions | Sequence[Tensor] = "all",
    memory: int = MEMORY,
) -> Iterator[tuple[int, Predictions]]:
    """What the recipient predicts under each plan, as (the plan's place, its predictions); plans of deep layers last.

    Only logits that predict a target are computed, and those of a few plans held at a time.

    Args:
        donor: the recorded batch, with every site of the plans among its activations.
        recipient: the same batch, with its residual stream.
        plans: each at least one site.
        positions: where the plans' sites are patched; or where each plan's are, [B, T] bool.
        memory: bytes, see `MEMORY`. It changes nothing but the time.

    Raises:
        ModelError: a plan without sites, or with one that the model does not have.
    """
    anatomy = recipient.model.anatomy
    where = [_where(recipient.batch, positions)] * len(plans) if isinstance(positions, str) else positions
    for plan in plans:
        if not plan:
            raise ModelError("a plan has no sites, so it patches nothing; the recording has the unpatched predictions")
        for site in plan:
            anatomy.module(site)
    starts = [first_block(plan) for plan in plans]
    for start, together in groupby(sorted(range(len(plans)), key=starts.__getitem__), starts.__getitem__):
        for chunk in _chunks(list(together), plans, recipient, memory):
            patches = [
                {site: Patch.of(donor.activations[site].to(where[place].device), where[place]) for site in plans[place]}
                for place in chunk
            ]
            yield from zip(chunk, _run(recipient, start, patches), strict=True)


def first_block(plan: Plan) -> int:
    """The first block whose inside a plan changes: the block after, for what a block gives to the residual stream."""
    return min(site.layer + (site.kind == "resid") for site in plan)


def layer_windows(n_layers: int, width: int) -> list[range]:
    """For each layer the window of `width` layers around it, clipped where the layers end."""
    before = width // 2
    return [range(max(0, layer - before), min(n_layers, layer - before + width)) for layer in range(n_layers)]


def paper_width(n_layers: int) -> int:
    """As large a part of the layers as the five of 32 that Hong et al. 2024 patch together; odd, so it has a middle."""
    return 1 + 2 * max(0, round((5 * n_layers / 32 - 1) / 2))


def window_plans(anatomy: Anatomy, kinds: Sequence[Kind], width: int) -> list[Plan]:
    """For each layer a plan of all sites of these kinds in the window of `width` layers around it."""
    windows = layer_windows(anatomy.n_layers, width)
    return [frozenset(Site(kind, layer) for layer in window for kind in kinds) for window in windows]


def refuse_unlike(donor: LanguageModel, recipient: LanguageModel) -> None:
    """Refuse to put parts of one model into another that is not built alike or reads other tokens.

    Raises:
        ModelError: their parameters differ in name or shape, or their vocabularies differ.
    """
    theirs, ours = _built(donor), _built(recipient)
    if theirs != ours:
        name = min(name for name, _ in theirs.items() ^ ours.items())
        raise ModelError(
            f"{donor.name} is not built like {recipient.name}: {name} is {theirs.get(name, 'missing')} in one and "
            f"{ours.get(name, 'missing')} in the other; give models of one architecture"
        )
    refuse_other_tokenizer(recipient, donor)


def _built(model: LanguageModel) -> dict[str, str]:
    shapes = {name: str(list(parameter.shape)) for name, parameter in model.network.named_parameters()}
    return {"its architecture": model.anatomy.family, **shapes}


def _where(batch: Batch, positions: Positions) -> Tensor:
    """[B, T] bool, True where a plan's sites are patched."""
    if positions == "all":
        return batch.attention
    predicting = torch.zeros_like(batch.targets)
    predicting[:, :-1] = batch.targets[:, 1:]
    return predicting


def _run(recipient: Recording, start: int, plans: Sequence[Mapping[Site, Patch]]) -> list[Predictions]:
    """Every plan's predictions, from one pass over as many copies of the batch."""
    n, batch, own = len(plans), recipient.batch, recipient.predictions
    ids, attention, targets = (part.repeat(n, 1) for part in (batch.ids, batch.attention, batch.targets))
    with evaluating(recipient.model) as network, recipient.resumed(start, n):
        with patched(recipient.model.anatomy, stacked(plans)):
            logits = predict(network, Batch(ids, attention, targets, batch.rows * n)).logits
    return [Predictions(part, own.targets, own.row) for part in logits.chunk(n)]


def _chunks(places: Sequence[int], plans: Sequence[Plan], recipient: Recording, memory: int) -> Iterator[list[int]]:
    """The places in turn, as many at a time as the memory allows."""
    chunk, taken = list[int](), 0
    for place in places:
        needed = _bytes(plans[place], recipient)
        if chunk and taken + needed > memory:
            yield chunk
            chunk, taken = [], 0
        chunk, taken = [*chunk, place], taken + needed
    yield chunk


def _bytes(plan: Plan, recipient: Recording) -> int:
    """About what one plan takes: a block's activations, the patches with their copy, and the logits in fp32 twice."""
    anatomy, batch = recipient.model.anatomy, recipient.batch
    d_model, d_ff = anatomy.d_model, anatomy.d_ff if anatomy.value_matrices else 4 * anatomy.d_model
    patches = sum(2 * (d_ff if site.kind == "coef" else d_model) for site in plan)
    activations = batch.ids.numel() * (6 * d_model + 3 * d_ff + patches)
    return recipient.model.network.dtype.itemsize * activations + 2 * 4 * recipient.predictions.logits.numel()
