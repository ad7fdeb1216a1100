"""What early exit saves of a classifier's time: predicted from its parts before anything is trained, and measured.

Blocks saved are not milliseconds saved: entering the network, asking the rule and moving rows together cost time, and a
block takes hardly less for four rows than for eight. So the parts are timed at several numbers of rows, and a batch is
gone through on paper as `classification` goes through it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from palimpsest.data.batches import Encoded, batches
from palimpsest.early_exit.classification import WORTH_MOVING
from palimpsest.early_exit.classifier import ExitClassifier
from palimpsest.early_exit.heads import pooled, read_at
from palimpsest.early_exit.rules import Fixed, Rule

REPEATS = 9


@dataclass(frozen=True)
class Costs:
    """Milliseconds of the parts, for a batch of these rows; medians."""

    enter: float
    """All but blocks and exits: reading the rows, the way to the first block, writing down what was said."""
    rows: tuple[int, ...]
    """At how many rows the other two were timed."""
    block: tuple[float, ...]
    """One block."""
    ask: tuple[float, ...]
    """One exit's head and rule."""

    def of_block(self, rows: int) -> float:
        """One block for so many rows, between what was timed."""
        return float(np.interp(rows, self.rows, self.block))

    def of_asking(self, rows: int) -> float:
        """One exit for so many rows."""
        return float(np.interp(rows, self.rows, self.ask))


@dataclass(frozen=True)
class Bench:
    """One operating point, beside the whole network."""

    batch_size: int
    threads: int
    full_ms: float
    """An example, through all blocks; median."""
    early_ms: float
    ratio: tuple[float, float, float]
    """full_ms / early_ms: the median over pairs of runs, the smallest, the largest."""
    predicted_ms: float
    """What `predicted` said of the same exits."""
    layers: float
    agreement: float
    """The share of examples that are told what the whole network tells."""


def costs(exits: ExitClassifier, rows: Sequence[Encoded], batch_size: int, *, rule: Rule | None = None) -> Costs:
    """Time the parts on the batch of median length; needs no training.

    Args:
        exits: trained or not.
        rows: what will be classified.
        batch_size: rows at a time.
        rule: the one that will be asked; a rule that costs nothing unless given.
    """
    every = list(batches(rows, batch_size=batch_size))
    batch = every[len(every) // 2].to(exits.model.network.device)
    median_rows = [rows[row] for row in batch.rows]
    rule, counts = rule or Fixed(), sorted({1, 2, 4, 8, len(batch.ids) // 2, len(batch.ids)} - {0})
    counts = [count for count in counts if count <= len(batch.ids)]
    stack = exits.stack
    block, ask = [], []
    with torch.inference_mode():
        hidden, given = stack.enter(batch)
        places = read_at(batch.attention, stack.is_decoder)
        for count in counts:
            some = torch.arange(count, device=hidden.device)
            few, besides = hidden[some], given.take(some, len(hidden))

            block.append(_milliseconds(partial(stack.run, stack.n_layers // 2, few, besides)))
            ask.append(_milliseconds(partial(_ask, exits, rule, few, places[some])))
    first = _milliseconds(partial(exits.classify, median_rows, rule=Fixed(0), batch_size=batch_size))
    enter = max(0.0, first - exits.layers[0] * block[-1] - ask[-1])
    return Costs(enter, tuple(counts), tuple(block), tuple(ask))


def predicted(parts: Costs, exit_layers: Sequence[int], left: Sequence[int], batch_size: int) -> float:
    """Milliseconds an example, if examples leave after so many blocks.

    Args:
        parts: of a batch of this size.
        exit_layers: after how many blocks the exits stand.
        left: [N] after how many blocks each example leaves, in the order in which they are batched.
        batch_size: rows at a time.
    """
    total = 0.0
    for first in range(0, len(left), batch_size):
        batch = np.array(left[first : first + batch_size])
        carried, going = len(batch), len(batch)
        total += parts.enter
        for layer in range(1, exit_layers[-1] + 1):
            total += parts.of_block(carried)
            if layer in exit_layers:
                total += parts.of_asking(carried)
                going = int((batch > layer).sum())
                if not going:
                    break
                if going <= (1 - WORTH_MOVING) * carried:
                    carried = going
    return total / len(left)


def break_even(parts: Costs, exit_layers: Sequence[int], batch_size: int) -> dict[int, float]:
    """How many times faster than the whole network it would be if every row left after so many blocks.

    The whole network is not asked at any exit but the last.
    """
    last = exit_layers[-1]
    full = predicted(parts, [last], [last] * batch_size, batch_size)
    return {layer: full / predicted(parts, exit_layers, [layer] * batch_size, batch_size) for layer in exit_layers}


def bench(
    exits: ExitClassifier,
    rows: Sequence[Encoded],
    *,
    rule: Rule | None = None,
    batch_size: int = 16,
    repeats: int = REPEATS,
) -> Bench:
    """Classify the rows in full and early, in turn, and compare with what was predicted.

    Args:
        exits: with a policy that is calibrated, unless a rule is given.
        rows: what is classified.
        rule: when to leave.
        batch_size: rows at a time.
        repeats: pairs of runs.
    """
    rule = rule or exits.rule
    whole = ExitClassifier.of(exits.model, exits.classes, [exits.stack.n_layers])
    whole.heads.norms[0], whole.heads.maps[0] = exits.heads.norms[-1], exits.heads.maps[-1]
    early = exits.classify(rows, rule=rule, batch_size=batch_size)
    full = whole.classify(rows, rule=Fixed(), batch_size=batch_size)
    order = [row for batch in batches(rows, batch_size=batch_size) for row in batch.rows]
    parts = costs(exits, rows, batch_size, rule=rule)
    pairs = []
    for _ in range(repeats):
        pairs.append(
            (
                _once(lambda: whole.classify(rows, rule=Fixed(), batch_size=batch_size)) / len(rows),
                _once(lambda: exits.classify(rows, rule=rule, batch_size=batch_size)) / len(rows),
            )
        )
    ratios = sorted(slow / fast for slow, fast in pairs)
    return Bench(
        batch_size,
        torch.get_num_threads(),
        median(slow for slow, _ in pairs),
        median(fast for _, fast in pairs),
        (median(ratios), ratios[0], ratios[-1]),
        predicted(parts, exits.layers, early.layers[order].tolist(), batch_size),
        float(early.layers.float().mean()),
        float((early.labels == full.labels).float().mean()),
    )


def _ask(exits: ExitClassifier, rule: Rule, hidden: Tensor, places: Tensor) -> None:
    states = pooled(hidden, places)
    rule(states, exits.heads.at(0, states)[:, None])


def _milliseconds(work: Callable[[], object]) -> float:
    """The median of several runs, the first being left out."""
    work()
    return median(_once(work) for _ in range(REPEATS))


def _once(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)
