"""SimNPO: negative preference optimisation by an answer's likelihood a token, without a reference model."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict_unpadded
from palimpsest.unlearn.keeping import Keeping
from palimpsest.unlearn.losses import Objective, sampler
from palimpsest.unlearn.request import Request


@dataclass(frozen=True, kw_only=True)
class SimNPO(Keeping):
    """Minimise -(2/beta) * mean log sigmoid(-(beta/|y|) * log p - gamma) on forget answers, plus a retain term.

    p is the probability of the whole answer and |y| its number of tokens, so that long answers are not held for
    forgotten because they are long. The defaults are OpenUnlearning's for TOFU (`configs/trainer/SimNPO.yaml`: beta
    4.5, delta 0, weights 0.125 on the forget and 1 on the retain term), which are those of the authors' code for
    forget10; here the forget term weighs 1 and the retain term 8, which is the same loss eight times over.
    """

    name: ClassVar[str] = "simnpo"
    source: ClassVar[str] = "Fan et al. 2024, arXiv 2410.07163, equation 4"

    beta: float = 4.5
    """How soon an answer that has become unlikely is left alone."""
    gamma: float = 0.0
    """The margin, in units of beta times nats/token: above 0 pushes on for longer."""
    retain_weight: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unless_positive("beta")

    def forget_loss(self, model: LanguageModel, request: Request) -> Objective:
        """SimNPO's loss."""
        forget = sampler(self, model, request, request.forget)

        def loss(step: int) -> Tensor:
            batch = forget.at(step)
            predictions = predict_unpadded(model, batch)
            logprobs = predictions.mean_by_row(predictions.logprobs(), len(batch.rows))
            return simnpo_loss(logprobs, self.beta, self.gamma)

        return loss


def simnpo_loss(logprobs: Tensor, beta: float, gamma: float) -> Tensor:
    """-(2/beta) * mean log sigmoid(-beta * logprobs - gamma) over rows; logprobs [B], nats/token of each answer."""
    return -(2 / beta) * nn.functional.logsigmoid(-beta * logprobs - gamma).mean()
