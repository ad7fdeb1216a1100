"""A change of weights as a thing of its own: applied, undone, scaled, saved, loaded."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from palimpsest.errors import UpdateError
from palimpsest.files import atomic_path, content_hash, refuse_foreign_folder
from palimpsest.models.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class Update:
    """`delta[name]` is added to the parameter of that name; `provenance` says from what and by what it was made."""

    delta: dict[str, Tensor]
    provenance: dict[str, Any]
    factor: float = 1.0
    """The scale at which it is applied."""
    _originals: WeakKeyDictionary[LanguageModel, dict[str, Tensor]] = field(
        default_factory=WeakKeyDictionary, repr=False
    )

    @property
    def identity(self) -> str:
        """A hash of where it came from and its scale: the name under which a model remembers it.

        How long the making took is no part of it: made again from the same seed, it is the same update.
        """
        made = {key: value for key, value in self.provenance.items() if key != "seconds"}
        return content_hash([made, self.factor])[:16]

    @staticmethod
    def between(before: Mapping[str, Tensor], after: Mapping[str, Tensor], provenance: dict[str, Any]) -> "Update":
        """What leads from one set of weights to another; parameters that did not change are left out."""
        delta = {
            name: (after[name] - before[name]).detach().cpu()
            for name in before
            if not torch.equal(before[name], after[name])
        }
        return Update(delta, provenance)

    def apply(self, model: LanguageModel) -> LanguageModel:
        """Add the change to the model's weights, in place.

        A model that has other updates in it may take this one too; whether it was made for that sum is not checked.

        Raises:
            UpdateError: it is in the weights already, or was made for another model.
        """
        if self.identity in model.updates:
            raise UpdateError(
                f"update {self.identity} ({self._method}) is already in {model.name!r}; undo it before applying it"
            )
        parameters = self._parameters(model)
        if not model.updates and model.weights_hash() != self.provenance["base_weights"]:
            raise UpdateError(
                f"update {self.identity} ({self._method}) was made for other weights than those of {model.name!r}; "
                "apply it to the model it was made from"
            )
        self._originals[model] = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(self._change(name, parameter))
        model.updates.append(self.identity)
        return model

    def undo(self, model: LanguageModel) -> LanguageModel:
        """Take the change out again: bit for bit where the weights are as this object left them, else to rounding.

        Raises:
            UpdateError: it is not in the weights.
        """
        if self.identity not in model.updates:
            raise UpdateError(
                f"update {self.identity} ({self._method}) is not in {model.name!r}, so it cannot be undone"
            )
        parameters = self._parameters(model)
        originals = self._originals.pop(model, {})
        with torch.no_grad():
            for name, parameter in parameters.items():
                change, original = self._change(name, parameter), originals.get(name)
                if original is not None and torch.equal(original + change, parameter):
                    parameter.copy_(original)
                else:
                    parameter.sub_(change)
        model.updates.remove(self.identity)
        return model

    @contextmanager
    def applied(self, model: LanguageModel) -> Iterator[LanguageModel]:
        """The model with the change in it, for as long as the context lasts."""
        self.apply(model)
        try:
            yield model
        finally:
            self.undo(model)

    def scale(self, factor: float) -> "Update":
        """The same change, `factor` times as large."""
        return replace(self, factor=self.factor * factor, _originals=WeakKeyDictionary())

    def save(self, folder: str | Path) -> Path:
        """Write `delta.safetensors` and `update.json` into a folder, whole or not at all; an update there is replaced.

        Raises:
            StorageError: the folder holds files that are no update, or cannot be written.
        """
        folder = Path(folder)
        refuse_foreign_folder(folder, "update.json")
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            save_file({name: value.contiguous() for name, value in self.delta.items()}, temporary / "delta.safetensors")
            note = {"provenance": self.provenance, "factor": self.factor}
            (temporary / "update.json").write_text(json.dumps(note, indent=2), encoding="utf-8")
        return folder

    @staticmethod
    def load(folder: str | Path) -> "Update":
        """Read what `save` wrote.

        Raises:
            UpdateError: the folder does not hold a whole update.
        """
        folder = Path(folder)
        try:
            note = json.loads((folder / "update.json").read_text(encoding="utf-8"))
            delta = load_file(folder / "delta.safetensors")
            provenance, factor = dict(note["provenance"]), float(note["factor"])
            if "base_weights" not in provenance:
                raise ValueError("update.json does not say which weights it was made from (base_weights)")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = f"update.json has no {error}" if isinstance(error, KeyError) else error
            raise UpdateError(
                f"{folder}: not a whole update (update.json and delta.safetensors): {reason}; make it again"
            ) from error
        return Update(delta, provenance, factor)

    @property
    def _method(self) -> str:
        return str(self.provenance.get("method", {}).get("name", "unknown method"))

    def _change(self, name: str, parameter: Tensor) -> Tensor:
        return (self.delta[name] * self.factor).to(parameter.device, parameter.dtype)

    def _parameters(self, model: LanguageModel) -> dict[str, torch.nn.Parameter]:
        parameters = dict(model.network.named_parameters())
        for name, change in self.delta.items():
            if name not in parameters or parameters[name].shape != change.shape:
                found = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise UpdateError(
                    f"update {self.identity} changes {name} {tuple(change.shape)}, but {model.name!r} has {found}"
                )
        return {name: parameters[name] for name in self.delta}
