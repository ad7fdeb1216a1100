"""The tuned-lens package's own recipe, on our gradient of the KL: what our fit is measured beside.

As version 0.2.0 has it (Belrose et al. 2023, arXiv 2303.08112; `scripts/train_loop.py`, `scripts/ingredients.py`): maps
that start at the identity go down KL(model || lens), the mean over a step's tokens, by SGD with Nesterov momentum. One
norm over all layers' gradients is bounded, weight decay is added to the bounded gradient, and the rate falls to 0 in a
line. So from the same batches in the same order comes the same lens. Muon (Jordan 2024), which a later version of the
paper recommends, can take SGD's place on the matrices.

Shapes: L layers, d the model's width.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from palimpsest.data.batches import Encoded
from palimpsest.lens.hidden import read_layers
from palimpsest.lens.layer_map import slope
from palimpsest.lens.lens import Lens
from palimpsest.lens.readout import TOKENS, Readout
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.muon import muon

CLIP = 1.0
"""The largest norm of all layers' gradients together."""
BIAS_RATE = 1e-3
"""AdamW's, for the biases beside Muon."""


@dataclass(frozen=True)
class Recipe:
    """How the maps go down, beside the batches."""

    optimizer: Literal["sgd", "muon"] = "sgd"
    rate: float = 1.0
    """At the beginning. SGD's is times 1 - momentum, as upstream's `lr_scale` is."""
    momentum: float = 0.9
    """SGD's; Muon has torch's default."""
    weight_decay: float = 1e-3
    """Towards the identity: SGD's is added to the gradients of matrices and biases, Muon's shrinks the matrices."""

    def optimizers(self, weights: Sequence[nn.Parameter], biases: Sequence[nn.Parameter]) -> list[Optimizer]:
        """Over weights [d, d] and biases [d], one of each a layer."""
        if self.optimizer == "sgd":
            rate = self.rate * (1 - self.momentum)
            parameters = [*weights, *biases]
            return [SGD(parameters, rate, self.momentum, weight_decay=self.weight_decay, nesterov=True)]
        return [muon(weights, self.rate, self.weight_decay), AdamW(biases, BIAS_RATE, weight_decay=0.0)]


def fit_as_upstream(
    model: LanguageModel,
    batches: Sequence[Sequence[Encoded]],
    recipe: Recipe | None = None,
    *,
    products: torch.dtype | None = None,
) -> Lens:
    """Fit a lens to a model by upstream's recipe.

    Args:
        model: whose layers are to be read.
        batches: the rows of each step. Every token counts alike, as upstream's do, whose rows are all of one length.
        recipe: upstream's defaults, unless given.
        products: in which the vocabulary is multiplied for gradients (upstream: bf16); by default the readout's own.
    """
    started, readout, recipe = time.monotonic(), Readout.of(model), recipe or Recipe()
    quick, d = readout.with_products(products or readout.products), model.anatomy.d_model
    zeros = torch.zeros(model.anatomy.n_layers, d, d + 1, dtype=readout.precision, device=model.device)
    weights, biases = ([nn.Parameter(part.clone()) for part in parts] for parts in (zeros[..., :-1], zeros[..., -1]))
    optimizers = recipe.optimizers(weights, biases)
    schedules = [LambdaLR(optimizer, lambda step: 1 - step / len(batches)) for optimizer in optimizers]
    for batch in batches:
        maps = [torch.cat([weight, bias[:, None]], 1).detach() for weight, bias in zip(weights, biases, strict=True)]
        gradient = sum(_slopes(model, batch, maps, readout, quick), start=torch.zeros_like(zeros))
        gradient /= sum(len(row.ids) for row in batch)
        for weight, bias, part in zip(weights, biases, gradient, strict=True):
            weight.grad, bias.grad = part[:, :-1].clone(), part[:, -1].clone()
        nn.utils.clip_grad_norm_([*weights, *biases], CLIP)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    tokens = sum(len(row.ids) for batch in batches for row in batch)
    provenance = asdict(recipe) | {"steps": len(batches), "tokens": tokens, "seconds": time.monotonic() - started}
    changes, found = (torch.stack([part.detach() for part in parts]).float() for parts in (weights, biases))
    return Lens("tuned", len(changes), readout.hash(), changes, found, provenance)


def _slopes(
    model: LanguageModel, rows: Sequence[Encoded], maps: Sequence[Tensor], readout: Readout, quick: Readout
) -> Iterator[Tensor]:
    """[L, d, d + 1] the gradient of the KL summed over tokens, one a few rows."""
    together = max(1, TOKENS // max(len(row.ids) for row in rows))
    for hidden in read_layers(model, rows, batch_size=together):
        layers = hidden.layers.to(readout.precision)
        teacher = readout.teacher(layers[-1])
        yield torch.stack([slope(map, x, quick, teacher) for map, x in zip(maps, layers[:-1], strict=True)])
