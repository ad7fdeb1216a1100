"""How well the rows determine the curvature: rank and condition of every block, and a warning when tokens are few."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from palimpsest.curvature.blocks import Block
from palimpsest.curvature.modules import Matrix

ENOUGH = 4
"""Carrying positions for each input of the widest matrix, from which curvature is taken to be well determined."""


@dataclass(frozen=True)
class BlockSummary:
    """One block's spectrum."""

    name: str
    shape: tuple[int, int]
    rank: int
    """Eigenvalues above rounding, of out * in (numpy's rule: above width * eps * the largest); along the others only
    damping holds a step back."""
    condition: float
    """(largest + mean) / (smallest + mean): how unequally directions are held back at a damping of 1."""


def summarise(matrices: Sequence[Matrix], blocks: Mapping[str, Block], mean: float) -> list[BlockSummary]:
    """One a matrix; `mean` is the mean eigenvalue over all of them, the unit of damping."""
    return [_summary(matrix, blocks[matrix.name], mean) for matrix in matrices]


def too_few_tokens(matrices: Sequence[Matrix], n_carrying: int) -> str:
    """One line of warning; empty where there are enough."""
    widest = max(matrices, key=lambda matrix: matrix.shape[1])
    width = widest.shape[1]
    if n_carrying >= ENOUGH * width:
        return ""
    null = f"at least {width - n_carrying} of them were never seen and " if n_carrying < width else ""
    return (
        f"curvature was measured at {n_carrying} tokens, but {widest.name} reads {width} inputs: {null}"
        f"its factor is poorly known; give at least {ENOUGH * width} tokens of retain text, or raise the damping"
    )


def _summary(matrix: Matrix, block: Block, mean: float) -> BlockSummary:
    spectra = block.eigenvalues if isinstance(block.eigenvalues, tuple) else (block.eigenvalues,)
    rank, largest, smallest = 1, 1.0, 1.0
    for values in spectra:
        rank *= int((values > values.shape[-1] * torch.finfo(values.dtype).eps * values.max()).sum())
        largest *= values.max().item()
        smallest *= values.min().item()
    condition = (largest + mean) / (smallest + mean) if mean > 0 else float("inf")
    return BlockSummary(matrix.name, matrix.shape, rank, condition)
