"""Logits at the scored positions only: the hidden states are gathered before the unembedding.

The full [B, T, V] logits of a batch are what exhausts memory; a loss or a score needs the few rows that predict a
target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palimpsest.data.batches import Batch, Encoded
from palimpsest.data.prefix_trees import Branching, end_to_end, forests
from palimpsest.models.families import FAMILIES
from palimpsest.models.inputs import forest_inputs, forward_inputs
from palimpsest.models.language_model import LanguageModel, evaluating

WIDEST = 2048
"""Tokens in a branching tree, whose mask has the square of them."""


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at every target of a batch; N targets in all."""

    logits: Tensor
    """[N, V] in fp32."""
    targets: Tensor
    """[N] the token ids that were to be predicted."""
    row: Tensor
    """[N] the line of the batch each target stands in."""

    def logprobs(self) -> Tensor:
        """[N] log-probability of each target, nats."""
        return -nn.functional.cross_entropy(self.logits, self.targets, reduction="none")

    def sum_by_row(self, values: Tensor, n_rows: int) -> Tensor:
        """[B] sums over each row's targets of `values` [N]."""
        return values.new_zeros(n_rows).index_add(0, self.row, values)

    def mean_by_row(self, values: Tensor, n_rows: int) -> Tensor:
        """[B] means over each row's targets of `values` [N]."""
        return self.sum_by_row(values, n_rows) / self.sum_by_row(torch.ones_like(values), n_rows)


def predict(network: PreTrainedModel, batch: Batch) -> Predictions:
    """Run the network once and keep the logits that predict the batch's targets. Gradients flow if they are enabled."""
    row, place = batch.targets[:, 1:].nonzero().unbind(1)
    logits = _logits(network, row * batch.ids.shape[1] + place, forward_inputs(network, batch))
    return Predictions(logits, batch.ids[batch.targets], row)


def predict_unpadded(model: LanguageModel, batch: Batch) -> Predictions:
    """As `predict`, with the rows on one line, so that no padding is computed; for training, where rows are shuffled.

    It is `predict` where the comparisons with other rows would cost more than the padding does, or where the model
    cannot be told that a token sees its own row alone.
    """
    line, branching = end_to_end(batch), _branching(model)
    (n_rows, longest), width = batch.ids.shape, line.ids.shape[1]
    more_comparisons = width**2 - n_rows * longest**2
    if width > branching.widest or more_comparisons > (n_rows * longest - width) * branching.token_cost:
        return predict(model.network, batch)
    logits = _logits(model.network, line.predicting, forest_inputs(model.network, line))
    return Predictions(logits, line.targets, line.rows)


def row_logprobs(model: LanguageModel, encoded: Sequence[Encoded], *, batch_size: int = 64) -> Tensor:
    """[n] log-probability of each row's targets, nats in all, in the rows' order, fp32 on the CPU.

    Rows that begin alike, as the answers to one question do, are read as one prefix tree, where the model can be told
    what a token sees. Then what they share is computed once.

    Args:
        model: the model to score with.
        encoded: n encoded records.
        batch_size: rows at a time; it never changes a score.

    Raises:
        DataError: a row is longer than the positions that the model was made for.
    """
    found = torch.zeros(len(encoded), dtype=torch.float64)
    with evaluating(model) as network:
        for forest in forests(encoded, _branching(model), batch_size=batch_size):
            rows, forest = forest.rows, forest.to(model.device)
            logits = _logits(network, forest.predicting, forest_inputs(network, forest))
            logprobs = logits.log_softmax(-1)[forest.predicted_by, forest.targets]
            found.index_add_(0, rows, logprobs.cpu().double())
    return found.float()


def _logits(network: PreTrainedModel, places: Tensor, inputs: dict[str, Any]) -> Tensor:
    """[N, V] fp32 logits at places of the flattened [B, T]."""
    head = network.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, given: (given[0].flatten(0, 1)[places].unsqueeze(0), *given[1:]))
    try:
        output = network(**inputs)
    finally:
        handle.remove()
    logits: Tensor = output.logits.squeeze(0).float()
    return logits


def _branching(model: LanguageModel) -> Branching:
    """Which trees a network can read: those where a mask and positions of our own say all that a token sees."""
    config = model.network.config
    masked = config.model_type in FAMILIES and config._attn_implementation in ("eager", "sdpa")
    counted = config.model_type == "bloom" or getattr(config, "alibi", False)  # ALiBi counts the tokens between two
    # A local window is counted over the tree's tokens and not the row's, but in a tree that is no wider it hides
    # nothing; and a family may keep a mask that is as wide as its positions.
    limits = (getattr(config, name, None) for name in ("sliding_window", "window_size", "max_position_embeddings"))
    widest = min([WIDEST, *(limit for limit in limits if limit is not None)])
    # A block's matrices take some 12 d² multiplications a token, a comparison of two takes 2 d, which run slower.
    return Branching(widest if masked and not counted else 0, 4 * model.anatomy.d_model)
