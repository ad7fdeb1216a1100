"""Negative preference optimisation: ascent that slows down as an answer falls below where it started."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict_unpadded, row_logprobs
from palimpsest.unlearn.keeping import Keeping
from palimpsest.unlearn.losses import Objective, row_sum_logprobs, sampler
from palimpsest.unlearn.request import Request


@dataclass(frozen=True, kw_only=True)
class NPO(Keeping):
    """Minimise -(2/beta) * mean log sigmoid(-beta * log(p / p_start)) on forget answers, plus a retain term.

    p is the probability of the whole answer (log-probabilities summed over its tokens, as in the paper). Those of the
    start model are computed once, before the first step; no second model is held for them.
    """

    name: ClassVar[str] = "npo"
    source: ClassVar[str] = "Zhang et al. 2024, arXiv 2404.05868, equation 3"

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unless_positive("beta")

    def forget_loss(self, model: LanguageModel, request: Request) -> Objective:
        """NPO's loss."""
        forget = sampler(self, model, request, request.forget)
        start = row_logprobs(model, forget.encoded).to(model.device)

        def loss(step: int) -> Tensor:
            batch = forget.at(step)
            logprobs = row_sum_logprobs(predict_unpadded(model, batch), len(batch.rows))
            return self._loss(logprobs, start[list(batch.rows)], batch.targets.sum(1))

        return loss

    def _loss(self, logprobs: Tensor, start: Tensor, n_tokens: Tensor) -> Tensor:
        """From log-probabilities of whole answers, now and at the start, and the answers' lengths; all [B]."""
        return npo_loss(logprobs, start, self.beta)


@dataclass(frozen=True, kw_only=True)
class NPOTokenMean(NPO):
    """NPO whose p is the geometric mean over all answer tokens of a batch, which is then one row of the loss.

    So it is in code that goes by the name of NPO on WMDP (Unlearn-Simple, Unlearn-Smooth), where a model's own loss
    takes the place of the answer's log-probability: beta then counts nats/token and no answer saturates by itself.
    """

    name: ClassVar[str] = "npo_tokenmean"
    source: ClassVar[str] = (
        "OPTML-Group/Unlearn-Simple and Unlearn-Smooth, WMDP; not the equation of the paper they cite"
    )

    def _loss(self, logprobs: Tensor, start: Tensor, n_tokens: Tensor) -> Tensor:
        n = n_tokens.sum()
        return npo_loss(logprobs.sum() / n, start.sum() / n, self.beta)


def npo_loss(logprobs: Tensor, start: Tensor, beta: float) -> Tensor:
    """-(2/beta) * mean log sigmoid(-beta * (logprobs - start)) over rows; both [B], nats summed over each answer."""
    return -(2 / beta) * nn.functional.logsigmoid(-beta * (logprobs - start)).mean()
