"""Preference methods: another answer is preferred to the true one, by how far each has moved from the start model."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from palimpsest.data.batches import Batch, collate, encode
from palimpsest.data.records import QA
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict_unpadded, row_logprobs
from palimpsest.unlearn.idk import REFUSALS, take_refusals
from palimpsest.unlearn.keeping import Keeping
from palimpsest.unlearn.losses import Objective, row_sum_logprobs
from palimpsest.unlearn.other_answers import draw, questions, visits
from palimpsest.unlearn.request import Request


@dataclass(frozen=True, kw_only=True)
class Preferring(Keeping):
    """Minimise -mean log sigmoid(beta * [log(p/p_start)(preferred) - log(p/p_start)(true)]), plus a retain term.

    p is the probability of the whole answer. The start model's are computed once, before the first step, for every
    answer that may be preferred; no second model is held for them. This is DPO's own scale: 2/beta before the loss, as
    in OpenUnlearning, is the same as a `retain_weight` of beta/2 here.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unless_positive("beta")

    @abstractmethod
    def preferred(self, model: LanguageModel, request: Request) -> list[list[QA]]:
        """For each forget row, its question with the answers that may be preferred; one is drawn each epoch."""

    def forget_loss(self, model: LanguageModel, request: Request) -> Objective:
        """The preference loss."""
        true = questions(self, request.forget)
        options = self.preferred(model, request)
        records = [*true, *(option for row in options for option in row)]
        encoded = encode(records, model.tokenizer, template=request.template)
        start = row_logprobs(model, encoded).to(model.device)
        firsts = [len(true) + sum(map(len, options[:row])) for row in range(len(true))]
        size = min(self.batch_size, len(true))

        def batch_of(places: list[int]) -> Batch:
            return collate([encoded[place] for place in places], places).to(model.device)

        def log_ratios(batch: Batch) -> Tensor:
            return row_sum_logprobs(predict_unpadded(model, batch), len(batch.rows)) - start[list(batch.rows)]

        def loss(step: int) -> Tensor:
            visited = visits(len(true), step, batch_size=size, seed=self.seed)
            drawn = [
                firsts[row] + draw("preferred", self.seed, epoch, row).randrange(len(options[row]))
                for row, epoch in visited
            ]
            preferred = log_ratios(batch_of(drawn))
            return dpo_loss(preferred, log_ratios(batch_of([row for row, _ in visited])), self.beta)

        return loss


@dataclass(frozen=True, kw_only=True)
class DPO(Preferring):
    """Direct preference optimisation with a refusal as the preferred answer; see `Preferring`. Also called IdkDPO."""

    name: ClassVar[str] = "dpo"
    source: ClassVar[str] = (
        "Rafailov et al. 2023, arXiv 2305.18290, equation 7; refusals preferred as in Zhang et al. 2024, "
        "arXiv 2404.05868, and TOFU's code"
    )

    refusals: tuple[str, ...] = REFUSALS

    def __post_init__(self) -> None:
        super().__post_init__()
        take_refusals(self)

    def preferred(self, model: LanguageModel, request: Request) -> list[list[QA]]:
        """Every refusal, for every row."""
        return [
            [replace(record, answer=refusal) for refusal in self.refusals] for record in questions(self, request.forget)
        ]


def dpo_loss(preferred: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-mean log sigmoid(beta * (preferred - rejected)) over rows; both [B], log(p/p_start) of whole answers, nats."""
    return -nn.functional.logsigmoid(beta * (preferred - rejected)).mean()
