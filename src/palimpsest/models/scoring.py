"""Logits at the scored positions only: the hidden states are gathered before the unembedding.

The full [B, T, V] logits of a batch are what exhausts memory; a loss or a score needs the few rows that predict a
target.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palimpsest.data.batches import Batch, Encoded, batches
from palimpsest.models.inputs import forward_inputs
from palimpsest.models.language_model import LanguageModel, evaluating


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
    predicting = torch.zeros_like(batch.targets)
    predicting[:, :-1] = batch.targets[:, 1:]
    head = network.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][predicting].unsqueeze(0), *inputs[1:]))
    try:
        output = network(**forward_inputs(network, batch))
    finally:
        handle.remove()
    return Predictions(output.logits.squeeze(0).float(), batch.ids[batch.targets], predicting.nonzero()[:, 0])


def score_rows(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    score: Callable[[Predictions, int], Tensor],
    *,
    batch_size: int = 64,
) -> Tensor:
    """[n] one number a record, in the records' order, in fp32 on the CPU.

    Args:
        model: the model to score with.
        encoded: n encoded records.
        score: predictions and the number of rows in the batch to one value a row, [B].
        batch_size: rows at a time; it never changes a score.
    """
    values = torch.empty(len(encoded), dtype=torch.float32)
    with evaluating(model) as network:
        for batch in batches(encoded, batch_size=batch_size):
            batch = batch.to(model.device)
            values[list(batch.rows)] = score(predict(network, batch), len(batch.rows)).float().cpu()
    return values
