"""What every exit would say of every example, worked out once: heads, policies, rules and depths are all read off it.

One full pass over N examples keeps one hidden state an exit. Everything that is then trained or compared costs
milliseconds a step, because no block is run again.

Shapes: N examples, E exits of which the last is the whole network, d the model's width, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from palimpsest.data.batches import Batch
from palimpsest.early_exit.examples import Examples
from palimpsest.early_exit.heads import ClassHeads, pooled, read_at
from palimpsest.early_exit.stack import Stack
from palimpsest.progress import Report


@dataclass(frozen=True, eq=False)
class ExitTable:
    """Every exit's state and logits of every example, on the CPU."""

    layers: tuple[int, ...]
    """After how many blocks each exit stands."""
    states: Tensor
    """[N, E, d] what its head reads."""
    logits: Tensor
    """[N, E, C]"""
    labels: Tensor
    """[N]"""

    @cached_property
    def losses(self) -> Tensor:
        """[N, E] cross-entropy of the label, nats."""
        log_p = self.logits.log_softmax(-1)
        return -log_p.gather(-1, self.labels[:, None, None].expand(-1, log_p.shape[1], 1))[..., 0]

    @cached_property
    def said(self) -> Tensor:
        """[N, E] the class that each exit says."""
        return self.logits.argmax(-1)

    @cached_property
    def right(self) -> Tensor:
        """[N, E] bool, whether it is the label."""
        return self.said == self.labels[:, None]

    def accuracy(self, exits: Tensor) -> float:
        """The share of right answers if each example leaves at its exit [N], counted from 0."""
        return float(self.right.gather(1, exits[:, None]).float().mean())

    def mean_layers(self, exits: Tensor) -> float:
        """Blocks run for an example on average, if each leaves at its exit [N]."""
        return float(torch.tensor(self.layers)[exits].float().mean())


def exit_states(
    stack: Stack, layers: Sequence[int], examples: Examples, *, batch_size: int = 64, report: Report | None = None
) -> Tensor:
    """[N, E, d] what each exit's head reads, fp32 on the CPU, in the examples' order; no gradients.

    Args:
        stack: the network.
        layers: after how many blocks each exit stands, rising.
        examples: N of them.
        batch_size: rows at a time; in fp32 it changes nothing but rounding.
        report: told (examples done, of how many, nothing).
    """
    states = torch.empty(len(examples), len(layers), stack.d_model)
    done, was_training = 0, stack.network.training
    stack.network.eval()
    try:
        for batch in examples.batches(batch_size):
            with torch.no_grad():
                states[list(batch.rows)] = batch_states(stack, layers, batch.to(stack.network.device)).float().cpu()
            done += len(batch.rows)
            if report:
                report(done, len(examples), "")
    finally:
        stack.network.train(was_training)
    return states


def batch_states(stack: Stack, layers: Sequence[int], batch: Batch) -> Tensor:
    """[B, E, d] the same of one batch. Gradients flow if they are enabled."""
    hidden, given = stack.enter(batch)
    kept, places = [], read_at(batch.attention, stack.is_decoder)
    for layer in range(max(layers)):
        hidden = stack.run(layer, hidden, given)
        if layer + 1 in layers:
            kept.append(pooled(hidden, places))
    return torch.stack(kept, 1)


def tabulated(layers: Sequence[int], states: Tensor, heads: ClassHeads, labels: Tensor) -> ExitTable:
    """The table of examples whose states [N, E, d] are known."""
    with torch.no_grad():
        device = heads.maps[0].get_parameter("weight").device
        pieces = [heads(piece.to(device)).cpu() for piece in states.split(4096)]
    return ExitTable(tuple(layers), states, torch.cat(pieces), labels)
