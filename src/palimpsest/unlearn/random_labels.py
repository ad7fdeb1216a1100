"""Random-label forgetting: learn wrong answers in place of the true ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from palimpsest.data.records import QA
from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.losses import Objective
from palimpsest.unlearn.other_answers import OtherAnswers, draw, question, questions
from palimpsest.unlearn.request import Request

Labels = Literal["fixed", "resampled", "flipped"]


@dataclass(frozen=True, kw_only=True)
class RandomLabels(OtherAnswers):
    """Minimise NLL of random answers on the forget set, plus a retain term.

    An answer is drawn from the row's own plausible wrong answers, or, where it has none, from the answers of the other
    forget and retain rows; never the true one, unless there is no other. `fixed` draws once, so that the model can
    memorise the noise; `resampled` draws anew each epoch, so that it can only learn the answers' distribution;
    `flipped` draws nothing: it is the first of the row's own wrong answers, the opposite label where there are two.
    """

    name: ClassVar[str] = "random_labels"
    source: ClassVar[str] = "Zhang et al. 2024 (forgetting by random labels); answers in place of class labels are ours"

    labels: Labels = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels not in get_args(Labels):
            raise SpecError(f"{self.name}: labels {self.labels!r} is unknown; choose fixed, resampled or flipped")

    def forget_loss(self, model: LanguageModel, request: Request) -> Objective:
        """NLL(random answers), nats/token."""
        if self.labels == "flipped":
            for record in questions(self, request.forget):
                flipped(record)  # refused before the first step
        return super().forget_loss(model, request)

    def asked(self, request: Request, row: int, epoch: int) -> QA:
        """A forget row with the wrong answer that it has in an epoch."""
        if self.labels == "flipped":
            return flipped(question(self.name, request.forget[row]))
        return relabelled(request, row, epoch if self.labels == "resampled" else 0, self.seed)


def relabelled(request: Request, row: int, epoch: int, seed: int) -> QA:
    """A forget row with a random answer, the same for the same row, epoch and seed.

    Raises:
        SpecError: the row is a passage.
    """
    record = question(RandomLabels.name, request.forget[row])
    return replace(record, answer=draw("label", seed, epoch, row).choice(_wrong_answers(record, request)))


def flipped(record: QA) -> QA:
    """A question with the first of its own wrong answers.

    Raises:
        SpecError: it has none.
    """
    own = _own_wrong(record)
    if not own:
        raise SpecError(
            f"{RandomLabels.name}: forget row {record.id!r} has no wrong answer to flip to; give its `wrong`, or "
            "choose labels fixed or resampled"
        )
    return replace(record, answer=own[0])


def _wrong_answers(record: QA, request: Request) -> Sequence[str]:
    known = [other for other in (*request.forget, *request.retain) if isinstance(other, QA)]
    others = {other.answer for other in known} - {record.answer}
    return _own_wrong(record) or sorted(others) or [record.answer]


def _own_wrong(record: QA) -> list[str]:
    return [answer for answer in record.wrong if answer != record.answer]
