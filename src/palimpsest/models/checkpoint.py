"""A run's state between two steps, so that it can go on after a kill as though nothing had happened.

Batches and random numbers depend on the step alone, so the state is the step, the tensors and the optimisers' moments.
Tensors are safetensors, all else JSON; no pickle is written or read.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from palimpsest.files import atomic_path


@dataclass(frozen=True)
class Checkpoint:
    """What `Checkpoints.load` gives back."""

    step: int
    tensors: dict[str, Tensor]
    notes: dict[str, Any]


class Checkpoints:
    """The newest checkpoint of one run. `identity` is the run's hash: no other run's state is taken up."""

    def __init__(self, folder: str | Path, identity: str) -> None:
        self.folder = Path(folder)
        self.identity = identity

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Replace the checkpoint, whole or not at all."""
        moments, scalars = _optimizer_state(optimizers)
        with atomic_path(self.folder) as temporary:
            temporary.mkdir()
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
                temporary / "tensors.safetensors",
            )
            save_file(moments, temporary / "optimizer.safetensors")
            state = {"identity": self.identity, "step": step, "scalars": scalars, "notes": dict(notes or {})}
            (temporary / "state.json").write_text(json.dumps(state))

    def load(self, optimizers: Sequence[torch.optim.Optimizer]) -> Checkpoint | None:
        """Restore the optimisers and give the rest back; None when there is nothing of this run."""
        path = self.folder / "state.json"
        if not path.exists():
            return None
        state = json.loads(path.read_text())
        if state["identity"] != self.identity:
            return None
        _restore_optimizers(optimizers, load_file(self.folder / "optimizer.safetensors"), state["scalars"])
        return Checkpoint(state["step"], load_file(self.folder / "tensors.safetensors"), state["notes"])

    def remove(self) -> None:
        """Delete the checkpoint: the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _optimizer_state(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by `optimizer/parameter/name`, and what is not a tensor under the same names."""
    tensors, scalars = {}, {}
    for number, optimizer in enumerate(optimizers):
        for parameter, moments in optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                key = f"{number}/{parameter}/{name}"
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
            owner, parameter, name = key.split("/", 2)
            if int(owner) == number:
                state.setdefault(int(parameter), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
