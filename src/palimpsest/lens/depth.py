"""How deep a fact lies: at which layer its answer can first be read, stays readable, or is taken back.

One layer alone would hide two things: whether the answer is never right or right only at the end, and whether it was
known on the way and then suppressed. So all of them are given together. Layers count as a lens's do: l is what block l
reads, L the model itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded
from palimpsest.lens.trajectory import Trajectory, first_of_last_run


@dataclass(frozen=True)
class Depth:
    """Of one token, or of an answer: the deepest of its tokens."""

    first_hit: int | None
    """The first layer whose likeliest token is right; None where none is."""
    memorised: int | None
    """The first layer from which on it is right to the end (Zeng et al. 2024, ConsistentEE); None where the model is
    wrong, so that no layer could be named."""
    predicted: int
    """The first layer from which on the prediction is the model's own, right or wrong (Baldock et al. 2021)."""
    suppressed: int | None
    """Where the model is wrong but a layer was right: the layer after the last that was."""


@dataclass(frozen=True)
class AnswerDepth:
    """How deep an answer lies, and each of its tokens."""

    answer: Depth
    """A layer has the answer where it has every token of it."""
    tokens: tuple[Depth, ...]


def answer_depth(trajectory: Trajectory, row: Encoded) -> AnswerDepth:
    """The depth of a row's targets.

    Args:
        trajectory: of the row.
        row: the question and its answer, whose tokens are the targets.
    """
    predicting = slice(row.start - 1, row.stop - 1)
    predicted = trajectory.predicted[:, predicting]
    right = predicted == trajectory.ids[row.start : row.stop]
    same = predicted == predicted[-1]
    tokens = tuple(_depth(right[:, token], same[:, token]) for token in range(right.shape[1]))
    return AnswerDepth(_depth(right.all(1), same.all(1)), tokens)


@dataclass(frozen=True, eq=False)
class DepthTable:
    """The depths of N answers at once; 0 stands for none. See `Depth` for what each is."""

    first_hit: Tensor
    """[N]"""
    memorised: Tensor
    """[N]"""
    predicted: Tensor
    """[N]"""
    suppressed: Tensor
    """[N]"""


def depth_table(right: Tensor, same: Tensor, layers: Sequence[int]) -> DepthTable:
    """The depths of N answers from what each of E layers says of them, the last being the model.

    Args:
        right: [N, E] bool, whether a layer is right.
        same: [N, E] bool, whether it says what the model says.
        layers: [E] which layers they are, rising from 1 or more.
    """
    names, last = torch.tensor([*layers, layers[-1] + 1]), right.shape[1]

    def from_then_on(agrees: Tensor) -> Tensor:
        return last - agrees.flip(1).long().cumprod(1).sum(1)

    def first(hits: Tensor) -> Tensor:
        return hits.long().argmax(1)

    none, hit, solved = torch.tensor(0), right.any(1), right[:, -1]
    after_last_hit = last - first(right.flip(1))
    return DepthTable(
        first_hit=torch.where(hit, names[first(right)], none),
        memorised=torch.where(solved, names[from_then_on(right).clamp(max=last - 1)], none),
        predicted=names[from_then_on(same)],
        suppressed=torch.where(hit & ~solved, names[after_last_hit.clamp(max=last)], none),
    )


def chance_of_a_hit(n_candidates: float, n_layers: int) -> float:
    """How likely some layer is right by luck, if each guesses among so many candidates by itself: 1 - (1 - 1/n)^L.

    Layers do not guess independently, so this is more than what luck gives.
    """
    return 1 - (1 - 1 / n_candidates) ** n_layers


def _depth(right: Tensor, same: Tensor) -> Depth:
    """From where a layer [L + 1] is right, and where it agrees with the model."""
    hits = right.nonzero()[:, 0].tolist()
    model_is_right = bool(right[-1])
    return Depth(
        first_hit=hits[0] if hits else None,
        memorised=int(first_of_last_run(right)) if model_is_right else None,
        predicted=int(first_of_last_run(same)),
        suppressed=hits[-1] + 1 if hits and not model_is_right else None,
    )
