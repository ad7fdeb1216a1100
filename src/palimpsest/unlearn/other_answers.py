"""Methods that answer forget questions with something else: which answer a row has when it comes up."""

import random
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from palimpsest.data.batches import collate, encode, epoch_order
from palimpsest.data.records import QA, Text
from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict_unpadded
from palimpsest.unlearn.keeping import Keeping
from palimpsest.unlearn.losses import Objective, token_mean_nll
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.request import Request


@dataclass(frozen=True, kw_only=True)
class OtherAnswers(Keeping):
    """Minimise NLL of other answers to the forget questions, plus a retain term."""

    @abstractmethod
    def asked(self, request: Request, row: int, epoch: int) -> QA:
        """A forget row with the answer that it has in an epoch; it follows from the seed, the row and the epoch."""

    def forget_loss(self, model: LanguageModel, request: Request) -> Objective:
        """NLL(other answers), nats/token."""
        n = len(questions(self, request.forget))
        size = min(self.batch_size, n)

        def loss(step: int) -> Tensor:
            visited = visits(n, step, batch_size=size, seed=self.seed)
            asked = [self.asked(request, row, epoch) for row, epoch in visited]
            encoded = encode(asked, model.tokenizer, template=request.template)
            batch = collate(encoded, [row for row, _ in visited]).to(model.device)
            return token_mean_nll(predict_unpadded(model, batch))

        return loss


def visits(n: int, step: int, *, batch_size: int, seed: int) -> list[tuple[int, int]]:
    """The (row, epoch) of each line of a step's batch: the rows of `batch_at`, each with how often it came before."""
    places = [divmod(place, n) for place in range(step * batch_size, (step + 1) * batch_size)]
    return [(epoch_order(n, epoch, seed)[place], epoch) for epoch, place in places]


def draw(what: str, seed: int, epoch: int, row: int) -> random.Random:
    """A generator of its own for each row and epoch, so that a resumed run draws the same."""
    return random.Random(f"{what}/{seed}/{epoch}/{row}")


def questions(method: Method, records: Iterable[Text]) -> list[QA]:
    """The records, once it is sure that each is a question.

    Raises:
        SpecError: a record is a passage.
    """
    return [question(method.name, record) for record in records]


def question(name: str, record: Text) -> QA:
    """The record, if it is a question.

    Raises:
        SpecError: it is a passage; `name` is the method that cannot take it.
    """
    if isinstance(record, QA):
        return record
    raise SpecError(
        f"{name}: forget row {record.id!r} is a passage, which has no answer to replace; "
        "choose a method that takes running text"
    )
