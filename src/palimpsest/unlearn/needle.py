"""Needle: noise on the MLP value vectors that are known to hold what must be forgotten, or those vectors taken out."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.along import go_along
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update


@dataclass(frozen=True, kw_only=True)
class Needle(Method):
    """v + e on the given value vectors, e Gaussian with deviation `noise`; nothing else changes.

    The noise's direction follows from the seed; where a level is asked for, its deviation is as large as it takes.
    `step` in its trace is the deviation. With `zero` it is the share of the vectors that is taken away, all of them
    where no level is asked for. Which vectors hold a concept must be known from elsewhere (`internals.concepts`,
    `internals.attribution`). Where others hold it too, the level is not reached, and the run ends where the forget set
    was lowest.
    """

    name: ClassVar[str] = "needle"
    source: ClassVar[str] = (
        "Hong et al. 2024 (ConceptVectors), arXiv 2406.11614: the formula; its code goes on to ascend"
    )

    vectors: tuple[tuple[int, int], ...] = ()
    """(layer, number of the value vector), both counted from 0."""
    noise: float = 0.1
    """Where the search for the deviation begins; the deviation itself where no level is asked for."""
    zero: bool = False
    """Take the vectors out in place of adding noise, which measures how hard a neuron fires as much as what it says."""

    def __post_init__(self) -> None:
        self._refuse_unless_positive("noise")
        try:
            vectors = tuple((int(layer), int(number)) for layer, number in self.vectors)
        except (TypeError, ValueError):
            raise SpecError(
                f"{self.name}: vectors is {self.vectors!r}; it is a list of pairs, layer and number of the value vector"
            ) from None
        object.__setattr__(self, "vectors", vectors)  # JSON gives lists back

    def run(
        self, model: LanguageModel, request: Request, stop: Stop | None = None, *, folder: str | Path | None = None
    ) -> Update:
        """Add noise, or take vectors away, until `stop`; see `Method.run`. The folder stays empty: it is quick.

        Raises:
            SpecError: no vectors are given, or the model has no such vector.
            ModelError: its experts are fused and have no value vectors.
        """
        started = time.monotonic()
        direction, stop = self._direction(model), stop or Stop()
        if self.zero:
            return go_along(direction, 1.0, self, model, request, stop, started=started, doublings=0)
        return go_along(direction, self.noise, self, model, request, stop, started=started)

    def _direction(self, model: LanguageModel) -> dict[str, Tensor]:
        """On the vectors standard normal, or what takes them away; 0 elsewhere, for every matrix that has one."""
        if not self.vectors:
            raise SpecError(f"{self.name}: vectors is empty; give at least one pair, layer and number of the vector")
        anatomy, generator = model.anatomy, torch.Generator().manual_seed(self.seed)
        names = {id(parameter): name for name, parameter in model.network.named_parameters()}
        direction: dict[str, Tensor] = {}
        for layer, number in sorted(set(self.vectors)):
            if not (0 <= layer < anatomy.n_layers and 0 <= number < anatomy.d_ff):
                raise SpecError(
                    f"{self.name}: there is no value vector {number} in layer {layer}; this {anatomy.family} has "
                    f"layers 0 to {anatomy.n_layers - 1} and vectors 0 to {anatomy.d_ff - 1}"
                )
            weight: Any = anatomy.value_matrices[layer].weight
            change = direction.setdefault(names[id(weight)], torch.zeros(weight.shape))
            vectors = anatomy.value_vectors(layer)
            vector = change[number] if vectors.stride() == weight.stride() else change[:, number]
            if self.zero:
                vector.copy_(-vectors[number].detach())
            else:
                vector.copy_(torch.randn(anatomy.d_model, generator=generator))
        return direction
