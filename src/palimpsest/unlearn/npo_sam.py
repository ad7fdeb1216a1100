"""NPO with sharpness-aware minimisation: the forget loss is gone down where it is worst within reach."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.losses import Objective
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.weights import copied, put


@dataclass(frozen=True, kw_only=True)
class NPOSAM(NPO):
    """NPO whose forget loss is taken at theta + rho * g / |g|, g its own gradient; the retain term stays at theta.

    Costs a second forward and backward pass on the forget rows and a copy of the weights.
    """

    name: ClassVar[str] = "npo_sam"
    source: ClassVar[str] = "Fan et al. 2025, arXiv 2502.05374; SAM: Foret et al. 2021, arXiv 2010.01412"

    rho: float = 0.1
    """The radius, in the norm of all parameters together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unless_positive("rho")

    def forget_loss(self, model: LanguageModel, request: Request) -> Objective:
        """NPO's loss, and its gradient, at the perturbed weights."""
        return sharpness_aware(super().forget_loss(model, request), self.parameters(model), self.rho)


def sharpness_aware(objective: Objective, parameters: Mapping[str, Tensor], radius: float) -> Objective:
    """A loss whose value and gradient are those of `objective` at the worst point within a radius, to first order."""
    live = list(parameters.values())

    def gradient(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, live, allow_unused=True, materialize_grads=True)

    def worst(step: int) -> Tensor:
        uphill = gradient(objective(step))
        norm = torch.stack([value.float().norm() for value in uphill]).norm().clamp(min=1e-12)
        start = copied(parameters)
        try:
            moved = zip(parameters, live, uphill, strict=True)
            put(parameters, {name: value + radius / norm * along for name, value, along in moved})
            loss = objective(step)
            slopes = gradient(loss)
        finally:
            put(parameters, start)
        # Linear in the present weights: its value is the loss there, its gradient the gradient there.
        linear = [((value - value.detach()) * slope).sum() for value, slope in zip(live, slopes, strict=True)]
        return loss.detach() + torch.stack(linear).sum()

    return worst
