"""Tokens whose residual streams are kept, each process its own, so that they can be gone over again."""

from collections.abc import Mapping, Sequence
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
        mine = range(workers.rank, len(rows), workers.count)
        found = read_layers(model, [rows[row] for row in mine])
        return Kept.joined(list(found), rows, readout, workers)

    @staticmethod
    def joined(hidden: Sequence[Hidden], rows: Sequence[Encoded], readout: Readout, workers: Workers) -> "Kept":
        """From what was read of this process's rows."""
        first = torch.tensor([0, *(len(row.ids) for row in rows)]).cumsum(0)
        row = torch.cat([some.row for some in hidden]) * workers.count + workers.rank
        place = first[row] + torch.cat([some.position for some in hidden])
        order = place.argsort()
        layers = torch.cat([some.layers for some in hidden], 1)[:, order].to(readout.precision)
        return Kept(layers[:-1], readout.teacher(layers[-1]), place[order], int(first[-1]), workers)

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
