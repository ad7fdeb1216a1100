"""Classification in which rows leave the batch as they exit, so that what goes on gets smaller block by block.

Shapes: B rows, T tokens, d the model's width, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from palimpsest.data.batches import Batch, Encoded, batches
from palimpsest.early_exit.heads import ClassHeads, pooled, read_at
from palimpsest.early_exit.rules import Rule
from palimpsest.early_exit.stack import Stack
from palimpsest.errors import ModelError

WORTH_MOVING = 0.25
"""The share of the rows that must have left before the others are moved together, which costs a copy."""


@dataclass(frozen=True, eq=False)
class Classified:
    """What was said of N rows, in their order."""

    labels: Tensor
    """[N] the classes, counted from 0."""
    layers: Tensor
    """[N] after how many blocks each row left."""
    logits: Tensor
    """[N, C] of the exit where it did."""


def classify(
    stack: Stack,
    layers: Sequence[int],
    heads: ClassHeads,
    rule: Rule,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 16,
    compact: bool = True,
) -> Classified:
    """Classify rows, each as deep as the rule wants.

    Args:
        stack: the network, in eval mode.
        layers: after how many blocks each exit stands, rising; the last is the whole network.
        heads: one an exit.
        rule: when to leave.
        rows: N of them.
        batch_size: rows at a time, of like length; in fp32 it changes nothing but rounding.
        compact: move the rows that go on together; without it, all go on until the last has left.

    Raises:
        ModelError: a row's logits are not finite.
    """
    found = Classified(
        torch.zeros(len(rows), dtype=torch.long),
        torch.zeros(len(rows), dtype=torch.long),
        torch.zeros(len(rows), heads.n_classes),
    )
    with torch.inference_mode():
        for batch in batches(rows, batch_size=batch_size):
            logits, left = _batch(stack, layers, heads, rule, batch.to(stack.network.device), compact)
            lines = list(batch.rows)
            if not logits.isfinite().all():
                broken = lines[int((~logits.isfinite().all(1)).long().argmax())]
                raise ModelError(f"row {broken + 1}: its logits are not finite; the network or its heads are broken")
            found.labels[lines], found.layers[lines], found.logits[lines] = logits.argmax(-1), left, logits
    return found


def _batch(
    stack: Stack, layers: Sequence[int], heads: ClassHeads, rule: Rule, batch: Batch, compact: bool
) -> tuple[Tensor, Tensor]:
    """[B, C] each row's logits where it left, and after how many blocks [B] that was; on the CPU."""
    hidden, given = stack.enter(batch)
    places, n_rows = read_at(batch.attention, stack.is_decoder), len(batch.ids)
    said = torch.zeros(n_rows, heads.n_classes)
    left = torch.full((n_rows,), layers[-1])
    lines = torch.arange(n_rows)  # which rows of the batch are still carried along
    going = torch.ones(n_rows, dtype=torch.bool)  # which of those have not left yet
    heard = torch.zeros(n_rows, 0, heads.n_classes, device=hidden.device)  # of all exits so far, if the rule reads it
    for exit, (before, layer) in enumerate(pairwise((0, *layers))):
        for block in range(before, layer):
            hidden = stack.run(block, hidden, given)
        states = pooled(hidden, places)
        if rule.reads_logits:
            heard = torch.cat([heard, heads.at(exit, states)[:, None]], 1)
        is_last = layer == layers[-1]
        leaves = going if is_last else going & rule.leaves(exit, states, heard).cpu()
        if not leaves.any():
            continue
        logits = heard[leaves, -1] if rule.reads_logits else heads.at(exit, states[leaves])
        said[lines[leaves]], left[lines[leaves]] = logits.cpu(), layer
        going = going & ~leaves
        if not going.any():
            break
        if compact and going.sum() <= (1 - WORTH_MOVING) * len(going):
            stay = going.nonzero()[:, 0]
            hidden, places, heard = hidden[stay], places[stay], heard[stay]
            given, lines, going = given.take(stay, len(going)), lines[stay], going[stay]
    return said, left
