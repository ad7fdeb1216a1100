"""PDU: flatten the forget answers' logits, while a dual variable holds the retain rows to a limit."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict_unpadded, row_logprobs
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.losses import Objective, Sampler, sampler, token_mean_nll
from palimpsest.unlearn.request import Request


@dataclass(frozen=True, kw_only=True)
class PDU(Descent):
    """Minimise the mean of (max z - mean z)² over forget answers' tokens, subject to NLL(retain) <= limit.

    The loss is that mean plus dual * (NLL(retain) - limit). After `warmup_epochs` on the forget set, each step raises
    the dual by `dual_step` times what the retain batch is over the limit, or lowers it, not below 0.
    """

    name: ClassVar[str] = "pdu"
    source: ClassVar[str] = "Entesari et al. 2025, arXiv 2506.05314; update of the dual at each step as in its code"

    limit: float | None = None
    """On the mean NLL of retain answers, nats/token; what it is at the start when None."""
    dual: float = 1.0
    """To begin with."""
    dual_step: float = 1.0
    warmup_epochs: int = 5
    """Passes through the forget set before the dual moves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unless_positive("dual_step")
        for setting in ("dual", "warmup_epochs"):
            if not getattr(self, setting) >= 0:
                raise SpecError(f"{self.name}: {setting} is {getattr(self, setting)}; it cannot be below 0")
        if self.limit is not None:
            self._refuse_unless_positive("limit")

    def objective(self, model: LanguageModel, request: Request) -> Objective:
        """The Lagrangian, whose dual variable moves with every step."""
        forget = sampler(self, model, request, request.forget)
        retain = sampler(self, model, request, request.retain, salt=1)
        limit = _mean_nll(model, retain) if self.limit is None else self.limit
        return _Lagrangian(self, model, forget, retain, limit)


class _Lagrangian:
    def __init__(self, method: PDU, model: LanguageModel, forget: Sampler, retain: Sampler, limit: float) -> None:
        self.method, self.model, self.forget, self.retain, self.limit = method, model, forget, retain, limit
        self.warmup = math.ceil(method.warmup_epochs * len(forget.encoded) / forget.batch_size)
        self.memory = {"dual": method.dual}

    def __call__(self, step: int) -> Tensor:
        flat = flatness(predict_unpadded(self.model, self.forget.at(step)).logits)
        over = token_mean_nll(predict_unpadded(self.model, self.retain.at(step))) - self.limit
        dual = self.memory["dual"]
        if step >= self.warmup:
            self.memory["dual"] = max(0.0, dual + self.method.dual_step * over.item())
        return flat + dual * over


def flatness(logits: Tensor) -> Tensor:
    """Mean of (max z - mean z)² over tokens, logits [N, V]; 0 where every logit is the same."""
    return (logits.amax(-1) - logits.mean(-1)).square().mean()


def _mean_nll(model: LanguageModel, rows: Sampler) -> float:
    return -row_logprobs(model, rows.encoded).sum().item() / sum(row.n_targets for row in rows.encoded)
