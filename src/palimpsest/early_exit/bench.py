"""What early exit saves of a classifier's time: predicted before anything is trained, and measured.

Blocks saved are not milliseconds saved: entering the network, asking the rule and moving rows together cost time, a
block takes hardly less for four rows than for eight, and one block that is run over and over finds its weights in the
processor's cache. So it is timed how long a batch of some sizes takes until every exit, a rule that has learned nothing
being asked on the way; then any batch is gone through on paper as `classification` goes through it.

Shapes: R numbers of rows, E exits of which the last is the whole network.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from palimpsest.data.batches import Encoded, batches
from palimpsest.early_exit.classification import WORTH_MOVING
from palimpsest.early_exit.classifier import ExitClassifier
from palimpsest.early_exit.policy import Policy
from palimpsest.early_exit.rules import Fixed, Learned, Rule

Key = TypeVar("Key", bound=Hashable)
REPEATS = 15
"""Pairs of runs, and turns of timing."""
FEWEST, LONG_ENOUGH = 3, 20.0
"""A turn more than so many is not begun after so many seconds."""


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a batch; medians."""

    layers: tuple[int, ...]
    """[E] after how many blocks the exits stand."""
    rows: tuple[int, ...]
    """[R] how many rows were timed, the last being a whole batch."""
    whole: tuple[float, ...]
    """[R] through all blocks, nothing being asked on the way."""
    until: tuple[tuple[float, ...], ...]
    """[E][R] if all leave at an exit."""
    leave: float
    """Half of a whole batch leaves, and the others are moved together."""

    def to(self, exit: int, rows: int) -> float:
        """Until an exit, counted from 0, for so many rows, between what was timed."""
        return float(np.interp(rows, self.rows, self.until[exit]))


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
    predicted_ratio: float
    """What the parts say of the same exits."""
    layers: float
    agreement: float
    """The share of examples that are told what the whole network tells."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A rule is asked, but shares of the rows leave, whatever it says: what a rule costs, without what it decides."""

    rule: Rule
    shares: tuple[float, ...]
    """Of those that are still there, at the exits from the first on; at those not named, none."""

    @property
    def reads_logits(self) -> bool:
        """As the rule."""
        return self.rule.reads_logits

    def leaves(self, exit: int, states: Tensor, logits: Tensor) -> Tensor:
        """[N] bool; see `Rule`."""
        self.rule.leaves(exit, states, logits)
        share = dict(enumerate(self.shares)).get(exit, 0.0)
        return torch.arange(len(states), device=states.device) < round(share * len(states))


def costs(exits: ExitClassifier, rows: Sequence[Encoded], batch_size: int, *, rule: Rule | None = None) -> Costs:
    """Time the batch of median length; needs no training.

    Args:
        exits: trained or not.
        rows: what will be classified.
        batch_size: rows at a time.
        rule: the one that will be asked; a policy that has learned nothing unless given, which costs what others do.
    """
    rule, whole, n_exits = rule or _untrained(exits), exits.only_last(), len(exits.layers)
    every = list(batches(rows, batch_size=batch_size))
    some = [rows[row] for row in every[len(every) // 2].rows]
    counts = sorted({4**power for power in range(len(some)) if 4**power < len(some)} | {len(some)})
    halved = Planned(rule, (0.5, 1.0))
    runs: dict[tuple[str | int, int], Callable[[], object]] = {
        ("half", len(some)): partial(exits.classify, some, rule=halved, batch_size=len(some))
    }
    for count in counts:
        runs["whole", count] = partial(whole.classify, some[:count], rule=Fixed(), batch_size=count)
        for exit in range(n_exits):
            planned = Planned(rule, (*[0.0] * exit, 1.0))
            runs[exit, count] = partial(exits.classify, some[:count], rule=planned, batch_size=count)
    took = _milliseconds(runs)
    parts = Costs(
        exits.layers,
        tuple(counts),
        tuple(took["whole", count] for count in counts),
        tuple(tuple(took[exit, count] for count in counts) for exit in range(n_exits)),
        0.0,
    )
    if n_exits == 1 or len(some) == 1:
        return parts
    first_and_second = [exits.layers[place >= len(some) // 2] for place in range(len(some))]
    moved = took["half", len(some)] - predicted(parts, first_and_second, len(some)) * len(some)
    return replace(parts, leave=max(0.0, moved))


def predicted(parts: Costs, left: Sequence[int], batch_size: int) -> float:
    """Milliseconds an example, if examples leave after so many blocks.

    Args:
        parts: of a batch of this size.
        left: [N] after how many blocks each example leaves, in the order in which they are batched.
        batch_size: rows at a time.
    """
    total = 0.0
    for start in range(0, len(left), batch_size):
        batch = np.array(left[start : start + batch_size])
        carried = going = len(batch)
        total += parts.to(0, carried)
        for exit, layer in enumerate(parts.layers[:-1]):
            stayed, going = going, int((batch > layer).sum())
            if not going:
                break
            total += parts.leave if going < stayed else 0.0
            carried = going if going <= (1 - WORTH_MOVING) * carried else carried
            total += parts.to(exit + 1, carried) - parts.to(exit, carried)
    return total / len(left)


def break_even(parts: Costs) -> dict[int, float]:
    """How many times faster than the whole network it would be if every row left after so many blocks."""
    return {layer: parts.whole[-1] / until[-1] for layer, until in zip(parts.layers, parts.until, strict=True)}


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

    Raises:
        SpecError: no rule is given, and none is calibrated.
    """
    rule, whole = rule or exits.rule, exits.only_last()
    parts = costs(exits, rows, batch_size)
    early = exits.classify(rows, rule=rule, batch_size=batch_size)
    full = whole.classify(rows, rule=Fixed(), batch_size=batch_size)
    pairs = []
    for _ in range(repeats):
        pairs.append(
            (
                _once(lambda: whole.classify(rows, rule=Fixed(), batch_size=batch_size)) / len(rows),
                _once(lambda: exits.classify(rows, rule=rule, batch_size=batch_size)) / len(rows),
            )
        )
    ratios = sorted(slow / fast for slow, fast in pairs)
    order = [row for batch in batches(rows, batch_size=batch_size) for row in batch.rows]
    foretold = predicted(parts, early.layers[order].tolist(), batch_size)
    return Bench(
        batch_size,
        torch.get_num_threads(),
        median(slow for slow, _ in pairs),
        median(fast for _, fast in pairs),
        (median(ratios), ratios[0], ratios[-1]),
        parts.whole[-1] / parts.rows[-1] / foretold,
        float(early.layers.float().mean()),
        float((early.labels == full.labels).float().mean()),
    )


def _untrained(exits: ExitClassifier) -> Rule:
    return Learned(Policy(len(exits.layers), exits.stack.d_model), 1.0)


def _milliseconds(runs: Mapping[Key, Callable[[], object]]) -> dict[Key, float]:
    """The median of each over turns, each run finding the caches as a run of its own kind leaves them."""
    times: dict[Key, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for turn in range(REPEATS):
        if turn >= FEWEST and time.perf_counter() - started > LONG_ENOUGH:
            break
        for name, run in runs.items():
            run()
            times[name].append(_once(run))
    return {name: median(taken) for name, taken in times.items()}


def _once(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)
