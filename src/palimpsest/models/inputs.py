"""What a network's forward pass is given for a batch."""

import inspect
from typing import Any

from transformers import PreTrainedModel

from palimpsest.data.batches import Batch
from palimpsest.errors import DataError


def forward_inputs(network: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Keyword arguments for `network(...)`, such that padding on either side moves nothing.

    Raises:
        DataError: a row is longer than the positions that the model was made for.
    """
    longest, limit = int(batch.attention.sum(1).max()), getattr(network.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise DataError(f"a row has {longest} tokens, but the model has {limit} positions; shorten the row")
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.attention.long(), "use_cache": False}
    if "position_ids" in inspect.signature(network.forward).parameters:
        # Counted over real tokens, so that padding on the left moves nothing.
        inputs["position_ids"] = (batch.attention.long().cumsum(1) - 1).clamp(min=0)
    return inputs
