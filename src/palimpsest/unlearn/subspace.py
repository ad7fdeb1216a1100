"""How far to go in each matrix: the small system that couples the directions of all matrices.

Each matrix has its own preconditioned direction, but their effects on the model's outputs add up, which no
block-diagonal curvature can see. So the lengths along them come from the Gauss-Newton matrix between the directions
themselves, [k, k], measured over the retain rows with nothing left out (`curvature.quadratic.coupling`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from palimpsest.curvature.quadratic import Direction

RIDGE = 0.1
"""Added to the measured [k, k] matrix, as a share of its diagonal: it is an estimate from sampled labels."""


def lengths(fisher: Tensor, slopes: Tensor) -> Tensor:
    """[k] x = (F + ridge)^-1 slopes: the Gauss-Newton step within the span of k directions.

    No damping: within the span nothing is left out of F, and adding some would undo what the coupling is for.

    Args:
        fisher: [k, k] D_i' F D_j.
        slopes: [k] inner products of the directions with the gradient to follow.
    """
    system = fisher + RIDGE * torch.diag(fisher.diagonal())
    least = 1e-12 * system.diagonal().max().clamp(min=1e-200)  # directions of zeros have length 0, not none
    return torch.linalg.solve(system + least * torch.eye(len(system), dtype=system.dtype), slopes)


def inner(left: Direction, right: Direction) -> float:
    """Sum of products over the matrices that both have, in fp64."""
    return sum((left[name].double() * right[name].double()).sum().item() for name in left if name in right)


def unit(direction: Direction) -> Direction:
    """The direction at norm 1; one of zeros stays as it is."""
    norm = inner(direction, direction) ** 0.5
    return {name: value / norm for name, value in direction.items()} if norm > 0 else direction


def combined(coefficients: Tensor, directions: Sequence[Direction]) -> dict[str, Tensor]:
    """Sum of c_i D_i, [out, in] by matrix."""
    total: dict[str, Tensor] = {}
    for coefficient, direction in zip(coefficients.tolist(), directions, strict=True):
        for name, value in direction.items():
            total[name] = total[name] + coefficient * value if name in total else coefficient * value
    return total


def separate(direction: Mapping[str, Tensor]) -> list[Direction]:
    """One direction for each matrix."""
    return [{name: value} for name, value in direction.items()]
