"""The residual stream at every token of many texts, batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded, batches
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capture
from palimpsest.models.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class Hidden:
    """The residual stream at N tokens. L layers, width d."""

    layers: Tensor
    """[L + 1, N, d]: what each block reads, and last what the final norm reads."""
    row: Tensor
    """[N] the text each token stands in."""
    position: Tensor
    """[N] its place there, from 0."""


def hidden_states(model: LanguageModel, encoded: Sequence[Encoded], *, batch_size: int = 16) -> Iterator[Hidden]:
    """Every token of every row, rows of like length together; padding is left out."""
    sites = [Site("resid", layer) for layer in range(-1, model.anatomy.n_layers)]
    for batch in batches(encoded, batch_size=batch_size):
        store = capture(model, batch.to(model.device), sites)
        line, place = batch.attention.nonzero().unbind(1)
        rows = torch.tensor(batch.rows)[line]
        yield Hidden(torch.stack([store[site][line, place] for site in sites]), rows, place)
