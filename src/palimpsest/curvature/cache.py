"""Curvature kept on disk: what was measured for a model and its rows is there for the next request and after a crash.

One file for each group of matrices, named after a hash of all that decides its content.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from palimpsest.curvature.blocks import Block
from palimpsest.curvature.modules import Matrix
from palimpsest.data.batches import Encoded
from palimpsest.errors import StorageError
from palimpsest.files import atomic_path, content_hash
from palimpsest.models.language_model import LanguageModel

FORMAT = 1
"""Changes whenever the same key would mean other numbers."""


class BlockCache:
    """The blocks of one model, one set of rows and one way to measure them."""

    def __init__(
        self, folder: str | Path, model: LanguageModel, encoded: Sequence[Encoded], how: Mapping[str, Any]
    ) -> None:
        rows = content_hash([[row.ids, row.start, row.stop] for row in encoded])
        self.folder = Path(folder)
        self.key = {"format": FORMAT, "model": model.fingerprint(), "rows": rows, **how}

    def path(self, group: Sequence[Matrix]) -> Path:
        """The group's file."""
        return self.folder / f"{content_hash(self.key | {'matrices': _names(group)})[:32]}.safetensors"

    def has(self, group: Sequence[Matrix]) -> bool:
        """Whether the group was measured before."""
        return self.path(group).exists()

    def load(self, group: Sequence[Matrix], device: torch.device) -> dict[str, Block]:
        """The group's blocks.

        Raises:
            StorageError: the file is damaged.
        """
        path = self.path(group)
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                places = json.loads((file.metadata() or {})["places"])
            return {
                matrix.name: _block({part: tensors[at] for part, at in places[matrix.name].items()}) for matrix in group
            }
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StorageError(f"{path}: a damaged file of curvature; delete it, and it is measured again") from error

    def save(self, group: Sequence[Matrix], blocks: Mapping[str, Block]) -> None:
        """Keep the group's blocks; eigenvectors that several matrices share are written once."""
        tensors: dict[str, Tensor] = {}
        places: dict[str, dict[str, str]] = {}
        written: dict[int, str] = {}
        for matrix in group:
            places[matrix.name] = {}
            for part, tensor in _parts(blocks[matrix.name]).items():
                at = written.setdefault(id(tensor), f"{matrix.name}/{part}")
                tensors[at], places[matrix.name][part] = tensor.contiguous(), at
        with atomic_path(self.path(group)) as temporary:
            save_file(tensors, temporary, {"places": json.dumps(places), "of": json.dumps(self.key)})


def _names(group: Sequence[Matrix]) -> list[str]:
    return [matrix.name for matrix in group]


def _parts(block: Block) -> dict[str, Tensor]:
    basis = {"q_out": block.q_out, "q_in": block.q_in}
    parts = {name: tensor for name, tensor in basis.items() if tensor is not None}
    if isinstance(block.eigenvalues, tuple):
        return parts | {"out_values": block.eigenvalues[0], "in_values": block.eigenvalues[1]}
    return parts | {"eigenvalues": block.eigenvalues}


def _block(parts: Mapping[str, Tensor]) -> Block:
    together = parts.get("eigenvalues")
    values = (parts["out_values"], parts["in_values"]) if together is None else together
    return Block(parts.get("q_out"), parts.get("q_in"), values)
