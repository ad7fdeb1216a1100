"""Rows that begin alike as a prefix tree: what they share stands there once and is computed once.

A tree's tokens are in depth-first order, so what continues token j is the stretch from j + 1 to `ends[j]`, and token i
stands behind token j on a row exactly where j <= i < ends[j] (tree attention: Miao et al. 2024, arXiv 2305.09781).

Shapes: B trees, T tokens, N targets, M tokens that predict them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palimpsest.data.batches import Batch, Encoded

PADDED = 1.2
"""How many tokens a batch of trees may have for each that is not padding."""


@dataclass(frozen=True, slots=True)
class Branching:
    """When a row becomes a branch of the tree before it, not a tree of its own.

    Every token of a branching tree is compared with all others of it, also with those that it does not see. So a branch
    must save more in tokens than it costs in comparisons.
    """

    widest: int
    """Tokens in a tree that branches; 0 lets none branch."""
    token_cost: int
    """How many comparisons of two tokens cost as much as one token more."""


@dataclass(slots=True)
class PrefixTree:
    """The tokens that some rows read, each shared beginning once."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """How many tokens stand before each on its row."""
    paths: dict[int, list[int]] = field(default_factory=dict)
    """Where in `ids` the tokens of a row are, by the row's place in the sequence it comes from."""

    @property
    def branches(self) -> bool:
        """Whether it is more than one row with beginnings of it."""
        return len(self.ids) > 1 + max(self.positions, default=-1)

    @property
    def ends(self) -> list[int]:
        """One past the last token that continues each."""
        ends = [0] * len(self.ids)
        for path in self.paths.values():
            for token in path:
                ends[token] = path[-1] + 1
        return ends

    def add(self, place: int, ids: Sequence[int], shared: int) -> None:
        """Put in a row whose first `shared` tokens are those of the row that was put in last."""
        last = next(reversed(self.paths.values()), [])
        width = len(self.ids)
        self.ids += ids[shared:]
        self.positions += range(shared, len(ids))
        self.paths[place] = last[:shared] + list(range(width, len(self.ids)))


def prefix_trees(encoded: Sequence[Encoded], branching: Branching) -> list[PrefixTree]:
    """Every row once. A row's last token is only predicted, never read, and so in no tree."""
    read = [row.ids[: row.stop - 1] for row in encoded]
    trees: list[PrefixTree] = []
    before: tuple[int, ...] = ()
    for place in sorted(range(len(read)), key=read.__getitem__):
        ids = read[place]
        shared = _shared(before, ids)
        if not (trees and _joins(trees[-1], len(before), len(ids), shared, branching)):
            trees.append(PrefixTree())
            shared = 0
        trees[-1].add(place, ids, shared)
        before = ids
    return trees


def _joins(tree: PrefixTree, last: int, length: int, shared: int, branching: Branching) -> bool:
    """Whether a row of this length goes into the tree, `shared` tokens being those of the last row in it."""
    if shared == last and not tree.branches:
        return True  # it repeats or continues the only row, and a row is what any model can read
    width = len(tree.ids)
    wider = width + length - shared
    more_comparisons = wider**2 - width**2 - length**2
    return wider <= branching.widest and more_comparisons <= shared * branching.token_cost


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees padded on the right to the widest, and the targets of their rows."""

    ids: Tensor
    """[B, T] token ids."""
    positions: Tensor
    """[B, T] tokens before each on its row; 0 at padding."""
    ends: Tensor
    """[B, T] one past the last token that continues each; 0 at padding."""
    branches: bool
    """Whether any tree does. If not, a token sees all that stand before it."""
    predicting: Tensor
    """[M] the tokens that predict a target, each once, as places in the flattened [B, T]."""
    predicted_by: Tensor
    """[N] which of `predicting` predicts each target."""
    targets: Tensor
    """[N] token ids."""
    rows: Tensor
    """[N] the row each target is of, as its place in the sequence that was batched."""

    def to(self, device: torch.device | str) -> "Forest":
        """The same forest on another device."""
        return Forest(
            self.ids.to(device),
            self.positions.to(device),
            self.ends.to(device),
            self.branches,
            self.predicting.to(device),
            self.predicted_by.to(device),
            self.targets.to(device),
            self.rows.to(device),
        )

    def visible(self) -> Tensor:
        """[B, T, T] bool, whether the first token attends to the second; padding attends to itself alone."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        behind = (place[:, None] >= place) & (place[:, None] < self.ends[:, None, :])
        return behind | (place[:, None] == place)


def end_to_end(batch: Batch) -> Forest:
    """A batch's rows behind one another as one tree that shares nothing; the targets stand in the batch's order."""
    read = batch.attention[:, :-1] & batch.attention[:, 1:]  # all but padding and each row's last token
    row = read.nonzero()[:, 0]
    lengths = read.sum(1)
    ends = lengths.cumsum(0)[row]
    place = torch.arange(len(row), device=row.device)
    predicting = batch.targets[:, 1:][read].nonzero()[:, 0]
    return Forest(
        batch.ids[:, :-1][read][None],
        (place - ends + lengths[row])[None],
        ends[None],
        len(batch.rows) > 1,
        predicting,
        place[: len(predicting)],
        batch.ids[batch.targets],
        row[predicting],
    )


def forests(encoded: Sequence[Encoded], branching: Branching, *, batch_size: int) -> Iterator[Forest]:
    """Every row once, trees of like width together, as many as hold `batch_size` rows without much padding, or one."""
    trees = sorted(prefix_trees(encoded, branching), key=lambda tree: (tree.branches, len(tree.ids)))
    together: list[PrefixTree] = []
    for tree in trees:
        if together and not _fits(tree, together, batch_size):
            yield _collate(encoded, together)
            together = []
        together.append(tree)
    if together:
        yield _collate(encoded, together)


def _fits(tree: PrefixTree, together: Sequence[PrefixTree], batch_size: int) -> bool:
    """Whether a batch of trees with one more has few enough rows and little enough padding."""
    batch = [*together, tree]
    widths = [len(each.ids) for each in batch]
    return sum(len(each.paths) for each in batch) <= batch_size and max(widths) * len(batch) <= PADDED * sum(widths)


def _collate(encoded: Sequence[Encoded], trees: Sequence[PrefixTree]) -> Forest:
    def padded(values: Sequence[Sequence[int]]) -> Tensor:
        return pad_sequence([torch.tensor(each) for each in values], batch_first=True)

    ids = padded([tree.ids for tree in trees])
    predicting: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    for line, tree in enumerate(trees):
        for place, path in tree.paths.items():
            row = encoded[place]
            predicting += [line * ids.shape[1] + token for token in path[row.start - 1 :]]
            targets += row.ids[row.start : row.stop]
            rows += [place] * row.n_targets
    each_once, predicted_by = torch.tensor(predicting).unique(return_inverse=True)
    return Forest(
        ids,
        padded([tree.positions for tree in trees]),
        padded([tree.ends for tree in trees]),
        any(tree.branches for tree in trees),
        each_once,
        predicted_by,
        torch.tensor(targets),
        torch.tensor(rows),
    )
