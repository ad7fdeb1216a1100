"""A run's state between two steps, so that it can go on after a kill as though nothing had happened.

Batches and random numbers depend on the step alone, so the state is the step, the tensors and the optimisers' moments.
All of it is one safetensors file, so that what is read was written at one step; no pickle is written or read.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from palimpsest.errors import TrainingError
from palimpsest.files import atomic_path, refuse_foreign_folder

STATE = "state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What `Checkpoints.load` gives back."""

    step: int
    tensors: dict[str, Tensor]
    notes: dict[str, Any]


class Checkpoints:
    """The newest checkpoint of one run. `identity` is the run's hash: no other run's state is taken up.

    Raises:
        StorageError: the folder holds files that are no checkpoint.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        refuse_foreign_folder(folder, STATE)
        self.folder = Path(folder)
        self.identity = identity

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Replace the checkpoint, whole or not at all.

        Args:
            step: how many steps are done.
            tensors: by name.
            optimizers: what steps them.
            notes: JSON data to be given back.

        Raises:
            StorageError: the disk is full or the place cannot be written; the checkpoint before is untouched.
        """
        named = {f"tensors/{name}": tensor.detach().contiguous() for name, tensor in tensors.items()}
        moments, scalars = _optimizer_state(optimizers)
        state = {"identity": self.identity, "step": step, "scalars": scalars, "notes": dict(notes or {})}
        with atomic_path(self.folder) as temporary:
            temporary.mkdir()
            save_file({**named, **moments}, temporary / STATE, {"state": json.dumps(state)})

    def load(self, optimizers: Sequence[torch.optim.Optimizer]) -> Checkpoint | None:
        """Restore the optimisers and give the rest back; None when there is nothing of this run.

        Raises:
            TrainingError: the file was damaged.
        """
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["state"])
                if state["identity"] != self.identity:
                    return None
                stored = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{path}: this checkpoint cannot be read ({error}); remove {self.folder.name} to start from step 0"
            ) from error
        moments = {name: value for name, value in stored.items() if name.startswith("moments/")}
        tensors = {name.removeprefix("tensors/"): value for name, value in stored.items() if name not in moments}
        _restore_optimizers(optimizers, moments, state["scalars"])
        return Checkpoint(state["step"], tensors, state["notes"])

    def remove(self) -> None:
        """Delete the checkpoint: the run is finished, or cannot be."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _optimizer_state(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by `moments/optimizer/parameter/name`, and what is not a tensor under the same names."""
    tensors, scalars = {}, {}
    for number, optimizer in enumerate(optimizers):
        for parameter, moments in optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                key = f"moments/{number}/{parameter}/{name}"
                if isinstance(value, Tensor):
                    tensors[key] = value.contiguous()
                else:
                    scalars[key] = value
    return tensors, scalars


def _restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> None:
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**tensors, **scalars}.items():
            _, owner, parameter, name = key.split("/", 3)
            if int(owner) == number:
                state.setdefault(int(parameter), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
