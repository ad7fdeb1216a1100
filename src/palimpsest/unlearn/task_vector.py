"""Task vectors: learn the forget set further, and go the other way."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict_unpadded
from palimpsest.unlearn.along import go_along
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.losses import Objective, sampler, token_mean_nll
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update


@dataclass(frozen=True, kw_only=True)
class TaskVector(Method):
    """theta - alpha * (theta_tuned - theta), theta_tuned being the model trained further on the forget set.

    Alpha is as large as brings the forget set to the level that was asked for. Nothing keeps the retain rows but a
    budget. `step` in its trace is alpha.
    """

    name: ClassVar[str] = "task_vector"
    source: ClassVar[str] = "Ilharco et al. 2023, arXiv 2212.04089, section 3 (forgetting via negation)"

    alpha: float = 1.0
    """Where the search for alpha begins; alpha itself where no level is asked for."""
    tuning_steps: int = 50
    """Steps on the forget set, at most as many as the run may take."""
    learning_rate: float = 1e-4
    batch_size: int = 8
    clip: float = 1.0

    def __post_init__(self) -> None:
        self._refuse_unless_positive("alpha", "tuning_steps", "learning_rate", "batch_size", "clip")

    def run(
        self, model: LanguageModel, request: Request, stop: Stop | None = None, *, folder: str | Path | None = None
    ) -> Update:
        """Train on the forget set, then go the other way until `stop`; see `Method.run`."""
        started, stop = time.monotonic(), stop or Stop()
        tuning = _Tuning(seed=self.seed, learning_rate=self.learning_rate, batch_size=self.batch_size, clip=self.clip)
        tuned = tuning.run(model, request, Stop(min(self.tuning_steps, stop.steps)), folder=folder)
        away = {name: -change for name, change in tuned.delta.items()}
        return go_along(away, self.alpha, self, model, request, stop, started=started)


@dataclass(frozen=True, kw_only=True)
class _Tuning(Descent):
    name: ClassVar[str] = "task_vector"
    source: ClassVar[str] = TaskVector.source

    def objective(self, model: LanguageModel, request: Request) -> Objective:
        forget = sampler(self, model, request, request.forget)
        return lambda step: token_mean_nll(predict_unpadded(model, forget.at(step)))
