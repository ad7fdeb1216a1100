"""Bringing one layer's map nearer to the model by natural-gradient steps down their KL.

The map is affine and the model its teacher, so the Gauss-Newton matrix is nearly the Kronecker product of two second
moments (Martens & Grosse 2015, arXiv 1503.05671): that of the inputs and that of the KL's gradient. Both are d wide, so
a step costs hardly more than its gradient, and goes where AdamW and Muon need many. Iterates are averaged from the
middle on (Polyak & Juditsky 1992), which takes out the noise of the batches.

What keeps a map from reading what merely goes along with the answer is a heavy damping and a number of steps: along
directions in which little varies it hardly moves. That is a sharper filter than a penalty towards the identity, which
also holds back the directions that matter (docs/log.md).

Shapes: N tokens, d the model's width. A map is [d, d + 1], what it adds to the identity and last its bias.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.curvature.factors import with_ones
from palimpsest.lens.readout import Readout, Teacher
from palimpsest.models.workers import Workers

RATE = 0.3
"""Of a full natural-gradient step; 1 overshoots where a layer has little left to gain."""


@dataclass(eq=False)
class LayerMap:
    """One layer's map while it is fitted."""

    map: Tensor
    """[d, d + 1] the latest."""
    inverse_input: Tensor
    """[d + 1, d + 1]"""
    inverse_output: Tensor
    """[d, d]"""
    summed: Tensor
    """[d, d + 1] of the iterates that are averaged."""
    n_summed: int = 0

    @staticmethod
    def start(
        map: Tensor,
        hidden: Tensor,
        readout: Readout,
        scores: Tensor,
        *,
        damping: float,
        workers: Workers | None = None,
    ) -> "LayerMap":
        """Measure both moments where the map stands.

        Args:
            map: [d, d + 1] to start from.
            hidden: [N, d] this process's tokens.
            readout: of the model.
            scores: [n, d] of the first n tokens, d log p(label) / dz for a label drawn from the model's prediction p.
                Exact would be the lens's own prediction; p is near it, and serves every layer.
            damping: of both moments, in their mean eigenvalues.
            workers: those who share the tokens.
        """
        inputs = with_ones(hidden)
        some = inputs[: len(scores)]
        residual = (some[:, :-1] + some @ map.T).requires_grad_()
        z = readout.z(residual)
        z.backward(scores)
        gradient = _gradient_of(residual)
        read, given = inputs.T @ inputs, gradient.T @ gradient
        counts = torch.tensor([len(inputs), len(some)]).to(inputs)
        (workers or Workers()).add([read, given, counts])
        n_read, n_given = counts.tolist()
        read, given = read / n_read, given / n_given
        return LayerMap(map, _inverse(read, damping), _inverse(given, damping), torch.zeros_like(map))

    @property
    def averaged(self) -> Tensor:
        """[d, d + 1] the mean of the iterates that are averaged; the latest where none is yet."""
        return self.summed / self.n_summed if self.n_summed else self.map

    def step(self, gradient: Tensor, *, average: bool) -> None:
        """Go down along the mean KL's gradient [d, d + 1]; `average` counts where that leads."""
        self.map = self.map - RATE * self.inverse_output @ gradient @ self.inverse_input
        if average:
            self.summed, self.n_summed = self.summed + self.map, self.n_summed + 1


def slope(map: Tensor, hidden: Tensor, readout: Readout, teacher: Teacher) -> Tensor:
    """[d, d + 1] the gradient, by the map, of KL(model || lens) summed over tokens [N, d]."""
    inputs = with_ones(hidden)
    residual = (hidden + inputs @ map.T).requires_grad_()
    z = readout.z(residual)
    _, gradient = readout.kl_and_slope(z.detach(), teacher)
    z.backward(gradient)
    return _gradient_of(residual).T @ inputs


def divergence(map: Tensor, hidden: Tensor, readout: Readout, teacher: Teacher) -> Tensor:
    """[N] KL(model || lens) at tokens [N, d], nats a token."""
    return readout.kl(readout.z(hidden + with_ones(hidden) @ map.T), teacher)


def _gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _inverse(moment: Tensor, damping: float) -> Tensor:
    exact = moment.double()
    damped = exact + damping * exact.diagonal().mean() * torch.eye(len(exact)).to(exact)
    return torch.linalg.inv(damped).to(moment)
