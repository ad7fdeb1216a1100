"""Token-weighted gradient ascent: each token's push up the NLL is weighted by how sure the model is of it now."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict_unpadded
from palimpsest.unlearn.keeping import Keeping
from palimpsest.unlearn.losses import Objective, sampler
from palimpsest.unlearn.request import Request


@dataclass(frozen=True, kw_only=True)
class WeightedAscent(Keeping):
    """Minimise the mean of w(p) log p over the forget answers' tokens, w held fixed in a step, plus a retain term."""

    @abstractmethod
    def weights(self, probabilities: Tensor) -> Tensor:
        """[N] of tokens' probabilities [N]."""

    def forget_loss(self, model: LanguageModel, request: Request) -> Objective:
        """Weighted ascent, nats/token."""
        forget = sampler(self, model, request, request.forget)

        def loss(step: int) -> Tensor:
            logprobs = predict_unpadded(model, forget.at(step)).logprobs()
            return (self.weights(logprobs.detach().exp()) * logprobs).mean()

        return loss

    def _refuse_below_zero(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= 0:
                raise SpecError(f"{self.name}: {name} is {getattr(self, name)}; it cannot be below 0")


@dataclass(frozen=True, kw_only=True)
class WGA(WeightedAscent):
    """Weighted gradient ascent: w = p^beta, so that a token is let go as it is forgotten. 0 is plain ascent."""

    name: ClassVar[str] = "wga"
    source: ClassVar[str] = "Wang et al. 2025, arXiv 2502.19301 (its alpha is beta here, as in OpenUnlearning)"

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_below_zero("beta")

    def weights(self, probabilities: Tensor) -> Tensor:
        """p^beta."""
        return probabilities**self.beta


@dataclass(frozen=True, kw_only=True)
class SatImp(WeightedAscent):
    """w = p^saturation * (1 - p)^importance: neither what is forgotten already nor what is known beyond doubt.

    The authors' README and OpenUnlearning's file give the weights of the two terms the other way round; here both are
    1 until they are set.
    """

    name: ClassVar[str] = "satimp"
    source: ClassVar[str] = "Yang et al. 2025, arXiv 2505.11953 (its beta1 and beta2)"

    saturation: float = 5.0
    importance: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_below_zero("saturation", "importance")

    def weights(self, probabilities: Tensor) -> Tensor:
        """p^saturation * (1 - p)^importance."""
        return probabilities**self.saturation * (1 - probabilities) ** self.importance
