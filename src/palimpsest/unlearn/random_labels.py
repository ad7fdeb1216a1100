"""Random-label forgetting: learn answers drawn at random in place of the true ones."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from torch import Tensor

from palimpsest.data.batches import collate, encode, epoch_order
from palimpsest.data.records import QA, Text
from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.losses import Objective, RetainTerm, retain_loss, token_mean_nll
from palimpsest.unlearn.request import Request

Labels = Literal["fixed", "resampled"]


@dataclass(frozen=True, kw_only=True)
class RandomLabels(Descent):
    """Minimise NLL of random answers on the forget set, plus a retain term.

    An answer is drawn from the row's own plausible wrong answers, or, where it has none, from the answers of the other
    forget and retain rows; never the true one, unless there is no other. `fixed` draws once, so that the model can
    memorise the noise; `resampled` draws anew each epoch, so that it can only learn the answers' distribution.
    """

    name: ClassVar[str] = "random_labels"
    source: ClassVar[str] = "Zhang et al. 2024 (forgetting by random labels); answers in place of class labels are ours"

    labels: Labels = "fixed"
    retain_weight: float = 1.0
    retain_term: RetainTerm = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels not in get_args(Labels):
            raise SpecError(f"{self.name}: labels {self.labels!r} is unknown; choose fixed or resampled")

    def objective(self, model: LanguageModel, request: Request) -> Objective:
        """NLL(random answers) plus the weighted retain term, nats/token."""
        for record in request.forget:
            _question(record)  # refused before the first step
        n = len(request.forget)
        size = min(self.batch_size, n)
        keep = retain_loss(self.retain_term, self, model, request) if self.retain_weight else None

        def loss(step: int) -> Tensor:
            # Rows and answers follow from the step alone, so that a resumed run sees the same ones.
            places = [divmod(place, n) for place in range(step * size, (step + 1) * size)]
            rows = [epoch_order(n, epoch, self.seed)[place] for epoch, place in places]
            epochs = [epoch if self.labels == "resampled" else 0 for epoch, _ in places]
            asked = [relabelled(request, row, epoch, self.seed) for row, epoch in zip(rows, epochs, strict=True)]
            batch = collate(encode(asked, model.tokenizer, template=request.template), rows).to(model.device)
            forget = token_mean_nll(predict(model.network, batch))
            return forget + self.retain_weight * keep(step) if keep else forget

        return loss


def relabelled(request: Request, row: int, epoch: int, seed: int) -> QA:
    """A forget row with a random answer, the same for the same row, epoch and seed.

    Raises:
        SpecError: the row is a passage.
    """
    record = _question(request.forget[row])
    rng = random.Random(f"label/{seed}/{epoch}/{row}")
    return replace(record, answer=rng.choice(_wrong_answers(record, request)))


def _question(record: Text) -> QA:
    if isinstance(record, QA):
        return record
    raise SpecError(
        f"random_labels: forget row {record.id!r} is a passage, which has no answer to replace; "
        "choose a method that takes running text"
    )


def _wrong_answers(record: QA, request: Request) -> Sequence[str]:
    own = [answer for answer in record.wrong if answer != record.answer]
    questions = [other for other in (*request.forget, *request.retain) if isinstance(other, QA)]
    others = {other.answer for other in questions} - {record.answer}
    return own or sorted(others) or [record.answer]
