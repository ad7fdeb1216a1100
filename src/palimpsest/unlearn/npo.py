"""Negative preference optimisation: ascent that slows down as an answer falls below where it started."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict, score_rows
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.losses import Objective, RetainTerm, retain_loss, row_sum_logprobs, sampler
from palimpsest.unlearn.request import Request


@dataclass(frozen=True, kw_only=True)
class NPO(Descent):
    """Minimise -(2/beta) * mean log sigmoid(-beta * log(p / p_start)) on forget answers, plus a retain term.

    p is the probability of the whole answer (log-probabilities summed over its tokens, as in the paper). Those of the
    start model are computed once, before the first step; no second model is held for them.
    """

    name: ClassVar[str] = "npo"
    source: ClassVar[str] = "Zhang et al. 2024, arXiv 2404.05868, equation 3"

    beta: float = 0.1
    retain_weight: float = 1.0
    retain_term: RetainTerm = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unless_positive("beta")

    def objective(self, model: LanguageModel, request: Request) -> Objective:
        """NPO's loss plus the weighted retain term."""
        forget = sampler(self, model, request, request.forget)
        start = score_rows(model, forget.encoded, row_sum_logprobs).to(model.device)
        keep = retain_loss(self.retain_term, self, model, request) if self.retain_weight else None

        def loss(step: int) -> Tensor:
            batch = forget.at(step)
            logprobs = row_sum_logprobs(predict(model.network, batch), len(batch.rows))
            npo = npo_loss(logprobs, start[list(batch.rows)], self.beta)
            return npo + self.retain_weight * keep(step) if keep else npo

        return loss


def npo_loss(logprobs: Tensor, start: Tensor, beta: float) -> Tensor:
    """-(2/beta) * mean log sigmoid(-beta * (logprobs - start)) over rows; both [B], nats summed over each answer."""
    return -(2 / beta) * nn.functional.logsigmoid(-beta * (logprobs - start)).mean()
