"""The closed form: the affine map of every layer nearest, in least squares, to what the final norm reads.

One pass over the texts gathers second moments; no vocabulary is touched. A token counts by the inverse mean square of
its target, since that is what the final norm divides by (ours; without it the KL is a twentieth higher). Din et al.
2023 (arXiv 2303.09435) map layers to layers by least squares.

Shapes: L layers, N tokens, d the model's width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.models.language_model import LanguageModel
from palimpsest.models.workers import Workers


@dataclass(eq=False)
class Moments:
    """Weighted sums over tokens, in fp64, of what each layer reads (x), of the target (y), and of their products."""

    weight: Tensor
    """[]"""
    sums: Tensor
    """[L + 1, d], the last the target's."""
    inputs: Tensor
    """[L, d, d] of x x'."""
    crossed: Tensor
    """[L, d, d] of x y'."""

    @staticmethod
    def of(model: LanguageModel) -> "Moments":
        """Empty sums."""
        n, d = model.anatomy.n_layers, model.anatomy.d_model
        empty = torch.zeros(n, d, d, dtype=torch.float64, device=model.device)
        rows = torch.zeros(n + 1, d, dtype=torch.float64, device=model.device)
        return Moments(rows.new_zeros(()), rows, empty, empty.clone())

    def add(self, layers: Tensor) -> None:
        """Count tokens: what each layer reads and last what the final norm reads, [L + 1, N, d]."""
        target = layers[-1].double()
        weights = 1 / target.square().mean(-1).clamp(min=1e-30)
        target = target * weights[:, None]
        self.weight += weights.sum()
        self.sums[-1] += target.sum(0)
        for layer, states in enumerate(layers[:-1]):
            x = states.double()
            weighted = x * weights[:, None]
            self.sums[layer] += weighted.sum(0)
            self.inputs[layer].addmm_(weighted.T, x)
            self.crossed[layer].addmm_(x.T, target)

    def share(self, workers: Workers) -> None:
        """Add the sums of all processes."""
        workers.add([self.weight, self.sums, self.inputs, self.crossed])


def ridge(moments: Moments, penalty: float) -> tuple[Tensor, Tensor]:
    """Changes [L, d, d] and biases [L, d] with the least squared error plus a penalty on the squared change.

    Args:
        moments: of the texts.
        penalty: in mean variances of a coordinate: 0 is least squares, infinity the logit lens with its mean put right.
    """
    means = moments.sums / moments.weight
    changes, biases = [], []
    for layer, (inputs, crossed) in enumerate(zip(moments.inputs, moments.crossed, strict=True)):
        x, y = means[layer], means[-1]
        covariance = inputs / moments.weight - torch.outer(x, x)
        shared = crossed / moments.weight - torch.outer(x, y)
        damped = covariance + penalty * covariance.diagonal().mean() * torch.eye(len(x)).to(covariance)
        change = torch.linalg.solve(damped, shared - covariance).T
        changes.append(change)
        biases.append(y - x - change @ x)
    return torch.stack(changes), torch.stack(biases)
