"""Gradient ascent on the forget set, alone or with a term that keeps the retain set."""

from dataclasses import dataclass
from typing import ClassVar

from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict_unpadded
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.keeping import Keeping
from palimpsest.unlearn.losses import Objective, RetainTerm, sampler, token_mean_nll
from palimpsest.unlearn.request import Request


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Descent):
    """Minimise -NLL(forget): uphill on the forget set and nothing else. It destroys the model unless it is stopped."""

    name: ClassVar[str] = "grad_ascent"
    source: ClassVar[str] = "Jang et al. 2023, arXiv 2210.01504; Maini et al. 2024 (TOFU), arXiv 2401.06121, section 3"

    def objective(self, model: LanguageModel, request: Request) -> Objective:
        """-NLL(forget), nats/token."""
        forget = sampler(self, model, request, request.forget)
        return lambda step: -token_mean_nll(predict_unpadded(model, forget.at(step)))


@dataclass(frozen=True, kw_only=True)
class GradientDifference(Keeping):
    """Minimise -forget_weight * NLL(forget) + retain_weight * retain term."""

    name: ClassVar[str] = "grad_diff"
    source: ClassVar[str] = "Liu et al. 2022, arXiv 2203.12817; Maini et al. 2024 (TOFU), arXiv 2401.06121, section 3"

    forget_weight: float = 1.0

    def forget_loss(self, model: LanguageModel, request: Request) -> Objective:
        """-forget_weight * NLL(forget), nats/token."""
        forget = sampler(self, model, request, request.forget)
        return lambda step: -self.forget_weight * token_mean_nll(predict_unpadded(model, forget.at(step)))


@dataclass(frozen=True, kw_only=True)
class KLMinimization(GradientDifference):
    """Gradient difference that keeps by KL(start model || model) on retain rows.

    TOFU averages the KL over a row's tokens, the question's among them, and its code over padding too; here it is the
    answers' tokens, as in every other loss.
    """

    name: ClassVar[str] = "kl_min"
    source: ClassVar[str] = "Maini et al. 2024 (TOFU), arXiv 2401.06121, section 3, KL minimization"

    retain_term: RetainTerm = "kl"
