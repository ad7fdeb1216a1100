"""How much memory curvature takes, and into how many passes it is parted where it does not fit at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from palimpsest.curvature.modules import Matrix
from palimpsest.errors import ModelError

Kind = Literal["kfac", "ekfac", "diagonal"]
SHARE = 0.8
"""Of the memory that is free; activations take the rest."""


@dataclass(frozen=True)
class Plan:
    """Groups of matrices, each measured in a pass of its own."""

    groups: tuple[tuple[Matrix, ...], ...]
    needs: tuple[int, ...]
    """Bytes that each group takes while it is measured."""
    room: int
    """Bytes there are for it."""

    def __str__(self) -> str:
        n_matrices = sum(len(group) for group in self.groups)
        passes = "at once" if len(self.groups) == 1 else f"in {len(self.groups)} groups, one after the other"
        return (
            f"curvature of {n_matrices} matrices takes {readable(max(self.needs))} of the {readable(self.room)} "
            f"there are, {passes}"
        )


def memory_plan(chosen: Sequence[Matrix], owners: Mapping[str, str], kind: Kind, itemsize: int, room: int) -> Plan:
    """Fill groups in the network's order; matrices that share their inputs stay together.

    Args:
        chosen: the matrices to measure.
        owners: the first matrix that reads the same inputs, by name (`shared_inputs`).
        kind: what is measured of them.
        itemsize: bytes a number.
        room: bytes that a group may take.

    Raises:
        ModelError: matrices that share inputs do not fit by themselves.
    """
    units: dict[str, list[Matrix]] = {}
    for matrix in chosen:
        units.setdefault(owners[matrix.name], []).append(matrix)
    groups: list[list[Matrix]] = [[]]
    for unit in units.values():
        if (alone := needed(unit, kind, itemsize, owners)) > room:
            raise ModelError(
                f"curvature of {unit[0].name} takes {readable(alone)}, but there are {readable(room)}; "
                "choose modules without it, or free some memory"
            )
        if groups[-1] and needed([*groups[-1], *unit], kind, itemsize, owners) > room:
            groups.append([])
        groups[-1] += unit
    return Plan(
        tuple(tuple(group) for group in groups),
        tuple(needed(group, kind, itemsize, owners) for group in groups),
        room,
    )


def needed(group: Sequence[Matrix], kind: Kind, itemsize: int, owners: Mapping[str, str]) -> int:
    """Bytes: the factors or their eigenvectors, the moments, and what the largest decomposition works in."""
    moments = sum(m * d for m, d in (matrix.shape for matrix in group))
    if kind == "diagonal":
        return itemsize * moments
    outputs = [matrix.shape[0] for matrix in group]
    inputs = [matrix.shape[1] for matrix in group if owners[matrix.name] == matrix.name]
    factors = sum(width**2 for width in (*outputs, *inputs))
    workspace = 3 * max((*outputs, *inputs), default=0) ** 2
    return itemsize * (factors + workspace + (moments if kind == "ekfac" else 0))


def free_memory(device: torch.device) -> int:
    """Bytes of the device's free memory that curvature may take."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(SHARE * free)


def readable(n_bytes: int) -> str:
    """For people."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
