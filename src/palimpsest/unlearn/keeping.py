"""What most methods are: a loss on forget rows, and beside it a term that keeps the retain rows."""

from abc import abstractmethod
from dataclasses import dataclass

from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.losses import Objective, RetainTerm, retain_loss
from palimpsest.unlearn.request import Request


@dataclass(frozen=True, kw_only=True)
class Keeping(Descent):
    """Minimise a forget loss plus `retain_weight` times the retain term."""

    retain_weight: float = 1.0
    """0 leaves the retain rows out."""
    retain_term: RetainTerm = "nll"

    @abstractmethod
    def forget_loss(self, model: LanguageModel, request: Request) -> Objective:
        """The loss on forget rows as a function of the step; whatever is computed once is computed here."""

    def objective(self, model: LanguageModel, request: Request) -> Objective:
        """The forget loss plus the weighted retain term."""
        forget = self.forget_loss(model, request)
        if not self.retain_weight:
            return forget
        keep = retain_loss(self.retain_term, self, model, request)
        return lambda step: forget(step) + self.retain_weight * keep(step)
