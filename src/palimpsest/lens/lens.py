"""A lens: for every layer an affine map from what its block reads to what the final norm should read.

Layer l is the residual stream that block l reads, l = 0 to L - 1, as in the tuned-lens package (Belrose et al. 2023,
arXiv 2303.08112); layer L, what the final norm reads, is the model itself. Shapes: d the model's width.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from palimpsest.errors import ModelError
from palimpsest.files import atomic_path, refuse_foreign_folder
from palimpsest.lens.readout import Readout
from palimpsest.models.language_model import LanguageModel

Kind = Literal["logit", "ridge", "tuned", "jacobian"]
MAPS, DESCRIPTION = "lens.safetensors", "lens.json"


@dataclass(frozen=True, eq=False)
class Lens:
    """One affine map a layer; the logit lens (nostalgebraist 2020) has none."""

    kind: Kind
    n_layers: int
    unembedding: str
    """Hash of the readout that it was made for."""
    changes: Tensor | None = None
    """[L, d, d] what each map adds to the identity, as a Linear's weight; None: nothing."""
    biases: Tensor | None = None
    """[L, d]"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What it was fitted to, how, and how well it does."""

    @staticmethod
    def logit(model: LanguageModel) -> "Lens":
        """The logit lens: every layer read as though it were the last."""
        return Lens("logit", model.anatomy.n_layers, Readout.of(model).hash())

    def translate(self, hidden: Tensor, layer: int) -> Tensor:
        """[..., d] what the final norm would read; at layer L, and in a logit lens, `hidden` itself. Gradients flow.

        This is what TransformerLens's `logit_lens` takes as its `lens`: it counts layers alike.

        Raises:
            ModelError: there is no such layer.
        """
        if not 0 <= layer <= self.n_layers:
            raise ModelError(f"layer {layer}: this lens has layers 0 to {self.n_layers}, the last being the model")
        if layer == self.n_layers:
            return hidden
        moved = hidden
        if self.changes is not None:
            moved = moved + hidden @ self.changes[layer].to(hidden).T
        if self.biases is not None:
            moved = moved + self.biases[layer].to(hidden)
        return moved

    def readout(self, model: LanguageModel) -> Readout:
        """The model's readout, if it is the one that this lens was made for.

        Raises:
            ModelError: it is another.
        """
        readout = Readout.of(model)
        if (found := readout.hash()) != self.unembedding:
            raise ModelError(
                f"{model.name}: this lens was made for another unembedding ({self.unembedding[:12]}, here "
                f"{found[:12]}); fit one for this model, or read it with the readout of the lens's own"
            )
        return readout

    def save(self, folder: str | Path) -> Path:
        """Write the lens as safetensors and JSON, whole or not at all; a lens that stands there is replaced.

        Raises:
            StorageError: the folder holds other files, or cannot be written.
        """
        refuse_foreign_folder(folder, DESCRIPTION)
        named = {"changes": self.changes, "biases": self.biases}
        about = {
            "format": 1,
            "kind": self.kind,
            "n_layers": self.n_layers,
            "unembedding": self.unembedding,
            "provenance": self.provenance,
        }
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            save_file({name: part for name, part in named.items() if part is not None}, temporary / MAPS)
            (temporary / DESCRIPTION).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return Path(folder)

    @staticmethod
    def load(folder: str | Path) -> "Lens":
        """Read a lens that `save` wrote.

        Raises:
            ModelError: there is none, or it is damaged.
        """
        path = Path(folder) / DESCRIPTION
        if not path.exists():
            raise ModelError(
                f"{folder}: no {DESCRIPTION} there, so it is no lens of ours; see `read_tuned_lens` for others"
            )
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            maps = load_file(Path(folder) / MAPS)
            lens = Lens(
                about["kind"],
                about["n_layers"],
                about["unembedding"],
                maps.get("changes"),
                maps.get("biases"),
                about["provenance"],
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(f"{folder}: this lens cannot be read ({error}); fit it again") from error
        if any(part is not None and len(part) != lens.n_layers for part in (lens.changes, lens.biases)):
            raise ModelError(f"{folder}: its maps are not those of {lens.n_layers} layers; fit it again")
        return lens

    def to(self, device: torch.device | str) -> "Lens":
        """The same lens with its maps on another device."""
        changes, biases = (part if part is None else part.to(device) for part in (self.changes, self.biases))
        return Lens(self.kind, self.n_layers, self.unembedding, changes, biases, self.provenance)
