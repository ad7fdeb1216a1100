"""Causal basis extraction (Belrose et al. 2023, §4): the directions that a lens's prediction depends on most.

Greedily, each direction is the one whose mean ablation changes the lens's prediction most, among those orthogonal to
the ones before. A lens is *calibrated* if the model depends on them as much: one that reads what merely goes along with
the answer has directions that move it and leave the model alone.

Shapes: N tokens, d the model's width, k directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from palimpsest.data.batches import Encoded
from palimpsest.lens.intervention import influence_in_the_model, mean_ablated, streams
from palimpsest.lens.lens import Lens
from palimpsest.lens.readout import Readout, Teacher
from palimpsest.models.language_model import LanguageModel

EVALUATIONS = 100
"""Of the influence, at most, for one direction."""
LABELS = 8
"""Drawn for every token when the search's start is chosen."""


@dataclass(frozen=True, eq=False)
class CausalBasis:
    """Orthonormal directions, the most influential first."""

    vectors: Tensor
    """[k, d]"""
    influence: Tensor
    """[k, N] KL(lens || lens with the direction mean-ablated) at every token, nats."""
    mean: Tensor
    """[d] of the states, which an ablation puts in."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the lens's directions do to the lens and to the model."""

    in_lens: Tensor
    """[k, N] at every token."""
    in_model: Tensor
    """[k, N]"""
    row: Tensor
    """[N] the text each token stands in."""

    @property
    def ratio(self) -> float:
        """Influence in the lens over influence in the model, summed over the directions; 1 is calibrated."""
        return (self.in_lens.sum() / self.in_model.sum()).item()

    @property
    def spearman(self) -> float:
        """Rank correlation of the directions' mean influences; with few directions a coarse number."""
        return float(spearmanr(self.in_lens.mean(1).numpy(), self.in_model.mean(1).numpy()).statistic)

    def interval(self, *, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
        """95 % bootstrap interval of the ratio over texts; the directions stay those that were found."""
        _, row = self.row.unique(return_inverse=True)
        sums = np.stack([np.bincount(row, weights=part.sum(0).numpy()) for part in (self.in_lens, self.in_model)])
        drawn = np.random.default_rng(seed).integers(sums.shape[1], size=(resamples, sums.shape[1]))
        in_lens, in_model = sums[:, drawn].sum(2)
        low, high = np.percentile(in_lens / in_model, [2.5, 97.5])
        return float(low), float(high)


def calibration(
    lens: Lens, model: LanguageModel, rows: Sequence[Encoded], layer: int, *, k: int = 10, seed: int = 0
) -> Calibration:
    """Extract a causal basis of the lens at a layer and ablate the same directions in the model.

    Args:
        lens: for this model's readout.
        model: whose layer it is.
        rows: texts, other than those that the lens was fitted to.
        layer: where.
        k: how many directions.
        seed: of the labels that choose where each search starts.
    """
    readout = lens.readout(model)
    read = [(stream.hidden, stream.row) for stream in streams(model, rows, layer)]
    hidden, row = (torch.cat(parts) for parts in zip(*read, strict=True))
    basis = causal_basis(lens, readout, hidden, layer, k=k, seed=seed)
    in_model = influence_in_the_model(model, readout, rows, layer, basis.vectors, basis.mean)
    return Calibration(basis.influence, in_model, row)


def causal_basis(
    lens: Lens, readout: Readout, hidden: Tensor, layer: int, *, k: int = 10, seed: int = 0
) -> CausalBasis:
    """The k directions on which the lens's prediction at these states [N, d] depends most.

    Each is found by L-BFGS, begun where the lens is steep (its Gauss-Newton matrix) and the states vary.
    """
    search = _Search(lens, readout, hidden.to(readout.precision), layer, seed)
    vectors = search.hidden.new_zeros(0, search.hidden.shape[1])
    for _ in range(min(k, search.hidden.shape[1])):
        vectors = torch.cat([vectors, search.best_direction(vectors)[None]])
    influence = torch.stack([search.influence(vector) for vector in vectors]).double().cpu()
    order = influence.mean(1).argsort(descending=True)
    return CausalBasis(vectors.cpu()[order], influence[order], search.mean.cpu())


class _Search:
    """The lens's predictions at some states, and how they depend on a direction."""

    def __init__(self, lens: Lens, readout: Readout, hidden: Tensor, layer: int, seed: int) -> None:
        self.lens, self.readout, self.hidden, self.layer = lens.to(hidden.device), readout, hidden, layer
        self.mean = hidden.mean(0)
        self.teacher: Teacher = readout.teacher(self.lens.translate(hidden, layer))
        self.spread = torch.cov(hidden.double().T)
        self.steep = self._gauss_newton(seed)

    def influence(self, vector: Tensor) -> Tensor:
        """[N] of one direction at every token."""
        return self.readout.kl(self._z(vector).detach(), self.teacher)

    def best_direction(self, earlier: Tensor) -> Tensor:
        """[d] of norm 1, orthogonal to the earlier ones [j, d], with the most influence that the search finds."""
        free = self._start(earlier).clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [free], max_iter=EVALUATIONS, max_eval=EVALUATIONS, line_search_fn="strong_wolfe", tolerance_change=1e-7
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            z = self._z(_on_sphere(free, earlier))
            kl, gradient = self.readout.kl_and_slope(z.detach(), self.teacher)
            z.backward(-gradient / len(z))
            return -kl.mean()

        optimizer.step(closure)
        return _on_sphere(free.detach(), earlier)

    def _z(self, vector: Tensor) -> Tensor:
        changed = mean_ablated(self.hidden, vector[None], self.mean)
        return self.readout.z(self.lens.translate(changed, self.layer))

    def _start(self, earlier: Tensor) -> Tensor:
        """[d] the direction in which spread and steepness together are largest, the earlier ones left out."""
        rest = torch.eye(len(self.spread)).to(self.spread) - earlier.double().T @ earlier.double()
        values, vectors = torch.linalg.eigh(rest @ self.spread @ rest)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        _, directions = torch.linalg.eigh(root @ self.steep @ root)
        return directions[:, -1].to(self.hidden)

    def _gauss_newton(self, seed: int) -> Tensor:
        """[d, d] mean of J' C J, with C the covariance of the predicted labels, from a few drawn ones."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros_like(self.spread)
        for _ in range(LABELS):
            hidden = self.hidden.clone().requires_grad_()
            z = self.readout.z(self.lens.translate(hidden, self.layer))
            uniform = torch.rand(len(z), generator=generator).to(z.device)
            (gradient,) = torch.autograd.grad(z, hidden, self.readout.sampled(z.detach(), uniform))
            total += gradient.double().T @ gradient.double()
        return total / (LABELS * len(self.hidden))


def _on_sphere(vector: Tensor, earlier: Tensor) -> Tensor:
    """The vector's part that is orthogonal to the earlier ones [j, d], at norm 1."""
    for _ in range(2):  # once more, for what rounding leaves
        vector = vector - vector @ earlier.T @ earlier
    return vector / vector.norm()
