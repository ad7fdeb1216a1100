"""What a network's forward pass is given for a batch."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palimpsest.data.batches import Batch
from palimpsest.data.prefix_trees import Forest
from palimpsest.errors import DataError


def forward_inputs(network: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Keyword arguments for `network(...)`, such that padding on either side moves nothing.

    Raises:
        DataError: a row is longer than the positions that the model was made for.
    """
    # Counted over real tokens, so that padding on the left moves nothing.
    positions = (batch.attention.long().cumsum(1) - 1).clamp(min=0)
    return _inputs(network, batch.ids, batch.attention.long(), positions)


def forest_inputs(network: PreTrainedModel, forest: Forest) -> dict[str, Any]:
    """Keyword arguments for `network(...)`, such that a token sees only what stands before it on its row.

    Raises:
        DataError: a row is longer than the positions that the model was made for.
    """
    attention = (forest.ends > 0).long()
    if forest.branches:
        hidden = ~forest.visible()[:, None]  # [B, 1, T, T], the same for every head
        attention = torch.zeros_like(hidden, dtype=network.dtype).masked_fill(hidden, torch.finfo(network.dtype).min)
    return _inputs(network, forest.ids, attention, forest.positions)


def _inputs(network: PreTrainedModel, ids: Tensor, attention: Tensor, positions: Tensor) -> dict[str, Any]:
    longest, limit = int(positions.max()) + 1, getattr(network.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise DataError(f"a row has {longest} tokens, but the model has {limit} positions; shorten the row")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": attention, "use_cache": False}
    if "position_ids" in inspect.signature(network.forward).parameters:
        inputs["position_ids"] = positions
    return inputs
