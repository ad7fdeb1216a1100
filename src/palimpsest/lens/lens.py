"""A lens: for every layer an affine map from what its block reads to what the final norm should read.

Layer l is the residual stream that block l reads, l = 0 to L - 1, as in the tuned-lens package (Belrose et al. 2023,
arXiv 2303.08112); layer L, what the final norm reads, is the model itself. Shapes: d the model's width.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from palimpsest.errors import ModelError
from palimpsest.lens.readout import Readout
from palimpsest.models.language_model import LanguageModel

Kind = Literal["logit", "ridge", "tuned", "jacobian"]


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

    def to(self, device: torch.device | str) -> "Lens":
        """The same lens with its maps on another device."""
        changes, biases = (part if part is None else part.to(device) for part in (self.changes, self.biases))
        return Lens(self.kind, self.n_layers, self.unembedding, changes, biases, self.provenance)
