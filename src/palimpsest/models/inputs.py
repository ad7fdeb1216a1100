"""What a network's forward pass is given for a batch."""

import inspect
from typing import Any

from transformers import PreTrainedModel

from palimpsest.data.batches import Batch


def forward_inputs(network: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Keyword arguments for `network(...)`, such that padding on either side moves nothing."""
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.attention.long(), "use_cache": False}
    if "position_ids" in inspect.signature(network.forward).parameters:
        # Counted over real tokens, so that padding on the left moves nothing.
        inputs["position_ids"] = (batch.attention.long().cumsum(1) - 1).clamp(min=0)
    return inputs
