"""Tokens whose residual streams are kept, each process its own, so that they can be gone over again."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded
from palimpsest.lens.hidden import Hidden, read_layers
from palimpsest.lens.layer_map import divergence
from palimpsest.lens.readout import Readout, Teacher
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.workers import Workers


@dataclass(frozen=True, eq=False)
class Kept:
    """Tokens of this process, with their residual streams and the model's predictions."""

    layers: Tensor
    """[L, N, d]"""
    teacher: Teacher
    place: Tensor
    """[N] each token's number among those of all processes, ascending."""
    n_tokens: int
    """Of all processes."""
    workers: Workers

    @staticmethod
    def of(model: LanguageModel, rows: Sequence[Encoded], readout: Readout, workers: Workers) -> "Kept":
        """Read this process's rows, every `workers.count`-th of all."""
        return Kept.joined(read_layers(model, rows[workers.rank :: workers.count]), rows, readout, workers)

    @staticmethod
    def joined(hidden: Iterable[Hidden], rows: Sequence[Encoded], readout: Readout, workers: Workers) -> "Kept":
        """From what is read of this process's rows, each token put in its place as it comes."""
        first = torch.tensor([0, *(len(row.ids) for row in rows)]).cumsum(0)
        mine = range(workers.rank, len(rows), workers.count)
        place = torch.cat([torch.arange(int(first[row]), int(first[row + 1])) for row in mine])
        begins = torch.tensor([0, *(len(rows[row].ids) for row in mine)]).cumsum(0)
        layers = torch.empty(0)
        for some in hidden:
            if not len(layers):
                n, _, d = some.layers.shape
                layers = some.layers.new_empty(n, len(place), d, dtype=readout.precision)
            layers[:, begins[some.row] + some.position] = some.layers.to(readout.precision)
        return Kept(layers[:-1], readout.teacher(layers[-1]), place, int(first[-1]), workers)

    def kls(self, maps: Mapping[int, Tensor], readout: Readout) -> dict[int, float]:
        """Mean KL(model || lens) over all processes' tokens, of maps [d, d + 1] by layer."""
        found = [divergence(map, self.layers[layer], readout, self.teacher) for layer, map in maps.items()]
        sums = torch.stack([kl.double().sum() for kl in found])
        self.workers.add([sums])
        return dict(zip(maps, (sums / self.n_tokens).tolist(), strict=True))

    def here(self, places: Tensor) -> Tensor:
        """Where in this process's tokens those of `places` stand that it has."""
        found = torch.searchsorted(self.place, places).clamp(max=len(self.place) - 1)
        return found[self.place[found] == places]
