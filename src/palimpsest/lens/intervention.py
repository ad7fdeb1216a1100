"""Taking directions out of the residual stream, in a lens and in the model, and what that changes.

Shapes: N tokens, d the model's width, k directions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.data.batches import Batch, Encoded, batches
from palimpsest.lens.readout import Readout
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import Patch, capture, capturing, patched
from palimpsest.models.inputs import forward_inputs
from palimpsest.models.language_model import LanguageModel, evaluating


def mean_ablated(hidden: Tensor, vectors: Tensor, mean: Tensor) -> Tensor:
    """[N, d] the states with what they have along orthonormal vectors [k, d] replaced by what the mean [d] has."""
    return hidden + (mean - hidden) @ vectors.T @ vectors


def resampled(hidden: Tensor, vectors: Tensor, seed: int) -> Tensor:
    """[N, d] the states with what they have along orthonormal vectors [k, d] replaced by what another token has."""
    other = hidden[derangement(len(hidden), seed).to(hidden.device)]
    return hidden + (other - hidden) @ vectors.T @ vectors


def derangement(n: int, seed: int) -> Tensor:
    """[n] a permutation, evenly drawn from those in which nothing stays where it is; n is at least 2."""
    generator = torch.Generator().manual_seed(seed)
    while True:  # a permutation has no fixed point in about 1/e of all cases
        drawn = torch.randperm(n, generator=generator)
        if not (drawn == torch.arange(n)).any():
            return drawn


@dataclass(frozen=True, eq=False)
class Stream:
    """The residual stream at one layer of a batch, and what the model makes of it if it is changed there."""

    model: LanguageModel
    batch: Batch
    site: Site
    hidden: Tensor
    """[N, d] what the layer reads at every token that is no padding."""
    last: Tensor
    """[N, d] what the final norm reads."""

    @property
    def row(self) -> Tensor:
        """[N] the text each token stands in."""
        line, _ = self.batch.attention.nonzero().unbind(1)
        return torch.tensor(self.batch.rows)[line.cpu()]

    def after(self, changed: Tensor) -> Tensor:
        """[N, d] what the final norm would read, had the layer read `changed` [N, d]."""
        end = Site("resid", self.model.anatomy.n_layers - 1)
        if self.site == end:
            return changed
        with evaluating(self.model) as network, torch.inference_mode(False), torch.no_grad():
            with patched(self.model.anatomy, {self.site: Patch(self.batch.attention, changed)}):
                with capturing(self.model.anatomy, [end], self.batch.ids.shape) as store:
                    network(**forward_inputs(network, self.batch))
        return store[end][self.batch.attention]


def streams(model: LanguageModel, rows: Sequence[Encoded], layer: int, *, batch_size: int = 16) -> Iterator[Stream]:
    """The residual stream that a layer reads, batch by batch; layer L is what the final norm reads."""
    site, end = Site("resid", layer - 1), Site("resid", model.anatomy.n_layers - 1)
    for batch in batches(rows, batch_size=batch_size):
        batch = batch.to(model.device)
        store = capture(model, batch, [site, end])
        yield Stream(model, batch, site, store[site][batch.attention], store[end][batch.attention])


def influence_in_the_model(
    model: LanguageModel, readout: Readout, rows: Sequence[Encoded], layer: int, vectors: Tensor, mean: Tensor
) -> Tensor:
    """[k, N] KL(model || model with one direction mean-ablated where the layer reads it), nats, in `streams`' order."""
    found = []
    for stream in streams(model, rows, layer):
        teacher, mean = readout.teacher(stream.last), mean.to(stream.hidden)
        changed = (mean_ablated(stream.hidden, vector[None].to(stream.hidden), mean) for vector in vectors)
        found.append(torch.stack([readout.kl(readout.z(stream.after(states)), teacher) for states in changed]))
    return torch.cat(found, 1).double().cpu()
