"""What early exit saves of a classifier's time: predicted before anything is trained, and measured.

Blocks saved are not milliseconds saved: entering the network, asking the rule and moving rows together cost time, a
block takes hardly less for four rows than for eight, and one block that is run over and over finds its weights in the
processor's cache. So it is timed how long a batch of some sizes takes until some exits, a rule that has learned nothing
being asked on the way; then any batch is gone through on paper as `classification` goes through it.

Shapes: R numbers of rows, E exits of which the last is the whole network, T of them timed.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.data.batches import Encoded, batches
from palimpsest.early_exit.classification import WORTH_MOVING
from palimpsest.early_exit.classifier import ExitClassifier
from palimpsest.early_exit.policy import Policy
from palimpsest.early_exit.rules import Fixed, Learned, Rule

Key = TypeVar("Key", bound=Hashable)
REPEATS = 9
"""Pairs of runs, and turns of timing."""
MOST_EXITS = 6
"""So many are timed at most, and the others lie between them."""
IN_A_ROW = 200.0
"""Milliseconds of whole passes that are timed together, so that they find the caches as their own kind leaves them."""
FEWEST, LONG_ENOUGH = 2, 5.0
"""A turn more than so many is not begun after so many seconds."""


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a batch; medians."""

    layers: tuple[int, ...]
    """[E] after how many blocks the exits stand."""
    rows: tuple[int, ...]
    """[R] how many rows were timed, from one to a whole batch."""
    timed: tuple[int, ...]
    """[T] until which of the exits, by their blocks, from the first to the last."""
    whole: tuple[float, ...]
    """[R] through all blocks, nothing being asked on the way."""
    until: tuple[tuple[float, ...], ...]
    """[T][R] if all leave at an exit."""
    leave: float
    """Half of a whole batch leaves, and the others are moved together."""

    def to(self, exit: int, rows: int) -> float:
        """Until an exit, counted from 0, for so many rows; between what was timed on a straight line."""
        return float(self._table[exit, rows])

    @cached_property
    def _table(self) -> NDArray[np.float64]:
        """[E, rows + 1]."""
        counts = np.arange(self.rows[-1] + 1)
        at_timed = np.stack([np.interp(counts, self.rows, until) for until in self.until])
        return np.stack([np.interp(self.layers, self.timed, column) for column in at_timed.T], 1)


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
    parts: Costs


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
    some = [rows[row] for row in every[(len(every) - 1) // 2].rows]  # never the last of several, which may be short
    counts = sorted({round(len(some) ** (step / 3)) for step in range(4)})
    timed = sorted({round(place) for place in np.linspace(0, n_exits - 1, min(n_exits, MOST_EXITS)).tolist()})
    runs: dict[tuple[str | int, int], Callable[[], float]] = {}
    for count in counts:
        one_pass = _in_a_row(whole, Fixed(), rows=some[:count], times=2)
        in_a_row = partial(_in_a_row, rows=some[:count], times=round(max(1, IN_A_ROW / one_pass)))
        runs["whole", count] = partial(in_a_row, whole, Fixed())
        for exit in timed:
            runs[exit, count] = partial(in_a_row, exits, Planned(rule, (*[0.0] * exit, 1.0)))
    runs["half leaves", len(some)] = partial(in_a_row, exits, Planned(rule, (0.5, 1.0)))
    took = _medians(runs)

    def of(what: str | int) -> tuple[float, ...]:
        return tuple(took[what, count] for count in counts)

    parts = Costs(
        exits.layers,
        tuple(counts),
        tuple(exits.layers[exit] for exit in timed),
        of("whole"),
        tuple(of(exit) for exit in timed),
        0.0,
    )
    if n_exits == 1:
        return parts
    n_first = round(0.5 * len(some))
    left = [exits.layers[0]] * n_first + [exits.layers[1]] * (len(some) - n_first)
    return replace(
        parts, leave=max(0.0, took["half leaves", len(some)] - len(some) * predicted(parts, left, len(some)))
    )


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
    n_rows = parts.rows[-1]
    return {layer: parts.whole[-1] / parts.to(exit, n_rows) for exit, layer in enumerate(parts.layers)}


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
    parts = costs(exits, rows, batch_size, rule=rule)
    rule, whole = rule or exits.rule, exits.only_last()
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
        parts,
    )


def _untrained(exits: ExitClassifier) -> Rule:
    return Learned(Policy(len(exits.layers), exits.stack.d_model), 1.0)


def _in_a_row(exits: ExitClassifier, rule: Rule, *, rows: Sequence[Encoded], times: int) -> float:
    """Milliseconds of one batch of these rows, among so many."""
    return _once(lambda: exits.classify([*rows] * times, rule=rule, batch_size=len(rows))) / times


def _medians(runs: Mapping[Key, Callable[[], float]]) -> dict[Key, float]:
    """The median of what each returns over turns, the first being left out."""
    times: dict[Key, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for turn in range(REPEATS + 1):
        if turn > FEWEST and time.perf_counter() - started > LONG_ENOUGH:
            break
        for name, run in runs.items():
            times[name].append(run())
    return {name: median(taken[1:]) for name, taken in times.items()}


def _once(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)
