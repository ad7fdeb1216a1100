"""A change of weights as a thing of its own: applied, undone, scaled, composed, saved, loaded."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
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

        How long the making took is no part of it: made again from the same seed, it is the same update. Where the
        change is another update's (scaled, composed or reapplied), `:` and the `origins` follow, joined by `+`.
        """
        own = self._hash(self.factor)
        return own if self.origins == (own,) else f"{own}:{'+'.join(self.origins)}"

    @property
    def origins(self) -> tuple[str, ...]:
        """The identities of the updates, as they were made, whose changes this one is made of; often itself alone."""
        return tuple(self.provenance.get("origins", ())) or (self._hash(1.0),)

    @staticmethod
    def between(before: Mapping[str, Tensor], after: Mapping[str, Tensor], provenance: dict[str, Any]) -> "Update":
        """What leads from one set of weights to another; parameters that did not change are left out."""
        delta = {
            name: (after[name] - before[name]).detach().cpu()
            for name in before
            if not torch.equal(before[name], after[name])
        }
        return Update(delta, provenance)

    @staticmethod
    def compose(updates: Sequence["Update"]) -> "Update":
        """The sum of updates that were made from the same weights; their order does not matter.

        To apply it is to apply one after the other, to rounding. `parts` of its provenance keeps theirs.

        Raises:
            UpdateError: there are none, one stands there twice, they were made from different weights, or a parameter
                has two shapes.
        """
        parts = sorted(updates, key=lambda update: update.identity)
        _refuse_what_is_no_sum(parts)
        delta: dict[str, Tensor] = {}
        for part in parts:
            for name in part.delta:
                change = part.change(name)
                if name in delta and delta[name].shape != change.shape:
                    raise UpdateError(
                        f"the updates change {name} in two shapes, {tuple(delta[name].shape)} and "
                        f"{tuple(change.shape)}; compose updates of one model"
                    )
                delta[name] = delta[name] + change if name in delta else change
        return Update(delta, _composed_provenance(parts))

    def change(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """What it adds to one parameter: the delta at its scale, in fp32 or what is finer."""
        delta = self.delta[name].to(device)
        return delta.to(torch.promote_types(delta.dtype, torch.float32)) * self.factor

    def added(self, name: str, weight: Tensor) -> Tensor:
        """What a weight of that name becomes: the change is added in fp32, the sum rounded to the weight's type."""
        return (weight + self.change(name, weight.device)).to(weight.dtype)

    def apply(self, model: LanguageModel) -> LanguageModel:
        """Add the change to the model's weights, in place.

        A model that has other updates in it may take this one too; whether it was made for that sum is not checked.

        Raises:
            UpdateError: it is in the weights already, or was made for another model.
        """
        parameters = self.applicable(model)
        self._originals[model] = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.added(name, parameter))
        model.updates.append(self.identity)
        return model

    def applicable(self, model: LanguageModel) -> dict[str, torch.nn.Parameter]:
        """The model's live parameters that it would change, by name, once it is sure that it may be applied.

        Raises:
            UpdateError: it is in the weights already, or was made for another model.
        """
        if self.identity in model.updates:
            raise UpdateError(
                f"update {self.identity} ({self.method}) is already in {model.name!r}; undo it before applying it"
            )
        parameters = self.parameters(model)
        if not model.updates and model.weights_hash() != self.provenance["base_weights"]:
            raise UpdateError(
                f"update {self.identity} ({self.method}) was made for other weights than those of {model.name!r}; "
                "apply it to the model it was made from"
            )
        return parameters

    def parameters(self, model: LanguageModel) -> dict[str, torch.nn.Parameter]:
        """The model's live parameters that it changes, by name, whatever weights it was made for.

        Raises:
            UpdateError: the model has no such parameter, or one of another shape.
        """
        parameters = dict(model.network.named_parameters())
        for name, change in self.delta.items():
            if name not in parameters or parameters[name].shape != change.shape:
                found = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise UpdateError(
                    f"update {self.identity} changes {name} {tuple(change.shape)}, but {model.name!r} has {found}"
                )
        return {name: parameters[name] for name in self.delta}

    def undo(self, model: LanguageModel) -> LanguageModel:
        """Take the change out again: bit for bit where the weights are as this object left them, else to rounding.

        Raises:
            UpdateError: it is not in the weights.
        """
        if self.identity not in model.updates:
            raise UpdateError(
                f"update {self.identity} ({self.method}) is not in {model.name!r}, so it cannot be undone"
            )
        parameters = self.parameters(model)
        originals = self._originals.pop(model, {})
        with torch.no_grad():
            for name, parameter in parameters.items():
                original = originals.get(name)
                if original is not None and torch.equal(self.added(name, original), parameter):
                    parameter.copy_(original)
                else:
                    parameter.copy_(parameter - self.change(name, parameter.device))
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
    def method(self) -> str:
        """The name of the method that made it."""
        return str(self.provenance.get("method", {}).get("name", "unknown method"))

    def _hash(self, factor: float) -> str:
        return content_hash([_without_seconds(self.provenance), factor])[:16]


def origins_in(model: LanguageModel) -> set[str]:
    """The origins of every update that is in the model's weights."""
    return {origin for identity in model.updates for origin in identity.split(":")[-1].split("+")}


def _refuse_what_is_no_sum(parts: Sequence[Update]) -> None:
    if not parts:
        raise UpdateError("there are no updates to compose; give at least one")
    for one, other in pairwise(parts):
        if one.identity == other.identity:
            raise UpdateError(f"update {one.identity} ({one.method}) stands there twice; scale it to have more of it")
        if one.provenance["base_weights"] != other.provenance["base_weights"]:
            raise UpdateError(
                f"updates {one.identity} ({one.method}) and {other.identity} ({other.method}) were made from different "
                "weights; compose updates that were made, or reapplied, on the same model"
            )


def _composed_provenance(parts: Sequence[Update]) -> dict[str, Any]:
    made = [part.provenance for part in parts]
    requests = sorted({str(provenance.get("request")) for provenance in made})
    return {
        "method": {"name": "+".join(sorted(part.method for part in parts))},
        "request": requests[0] if len(requests) == 1 else content_hash(requests),
        **{key: made[0][key] for key in ("base_weights", "base") if key in made[0]},
        "origins": sorted({origin for part in parts for origin in part.origins}),
        "parts": [{"identity": part.identity, "factor": part.factor, "provenance": part.provenance} for part in parts],
        "stopped": f"it is the sum of {len(parts)} updates",
        "trace": [],
        "seconds": sum(provenance.get("seconds", 0.0) for provenance in made),
    }


def _without_seconds(made: Any) -> Any:
    match made:
        case dict():
            return {key: _without_seconds(value) for key, value in made.items() if key != "seconds"}
        case list():
            return [_without_seconds(value) for value in made]
    return made
