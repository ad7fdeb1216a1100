"""The residual stream at every token of many texts, batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded, batches, encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import Record
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capture
from palimpsest.models.language_model import LanguageModel

LONGEST = 512
"""Tokens of a text that are read together, unless the model takes fewer."""
TOGETHER = 1024
"""Tokens read at a time, at most, where a text is not longer by itself."""


@dataclass(frozen=True, eq=False)
class Hidden:
    """The residual stream at N tokens. L layers, width d."""

    layers: Tensor
    """[L + 1, N, d]: what each block reads, and last what the final norm reads."""
    row: Tensor
    """[N] the text each token stands in."""
    position: Tensor
    """[N] its place there, from 0."""


def read_layers(model: LanguageModel, encoded: Sequence[Encoded], *, batch_size: int = 16) -> Iterator[Hidden]:
    """Every token of every row, rows of like length together; padding is left out.

    Args:
        model: whose layers are read.
        encoded: the rows.
        batch_size: rows at a time, at most; fewer where they are long (`TOGETHER`). It changes nothing.
    """
    longest = max((len(row.ids) for row in encoded), default=1)
    batch_size = min(batch_size, max(1, TOGETHER // longest))
    sites = [Site("resid", layer) for layer in range(-1, model.anatomy.n_layers)]
    for batch in batches(encoded, batch_size=batch_size):
        store = capture(model, batch.to(model.device), sites)
        line, place = batch.attention.nonzero().unbind(1)
        rows = torch.tensor(batch.rows)[line]
        yield Hidden(torch.stack([store[site][line, place] for site in sites]), rows, place)


def windows(texts: Sequence[Record], model: LanguageModel, template: Template = "plain") -> list[Encoded]:
    """Every text's tokens, prompt and completion alike, in rows that the model can read; every token counts."""
    widest = getattr(model.network.config, "max_position_embeddings", None) or LONGEST
    length, rows = min(LONGEST, widest), []
    for text in encode(texts, model.tokenizer, template=template):
        for start in range(0, len(text.ids) - 1, length):
            ids = text.ids[start : start + length]
            if len(ids) > 1:
                rows.append(Encoded(ids, 1, len(ids)))
    return rows
