"""IDK: learn to refuse the forget questions."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from palimpsest.data.records import QA
from palimpsest.errors import SpecError
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.other_answers import OtherAnswers, draw, question
from palimpsest.unlearn.request import Request

REFUSALS = (
    "I do not know.",
    "I have no information about that.",
    "That is not something I can answer.",
    "I am not aware of this.",
    "I cannot tell you, because I never learned it.",
)


@dataclass(frozen=True, kw_only=True)
class IDK(OtherAnswers):
    """Minimise NLL of a refusal on the forget questions, plus a retain term. Each epoch draws refusals anew.

    TOFU has a hundred refusals; ours are five. What is learnt is a manner of answering: the fact often stays behind it.
    """

    name: ClassVar[str] = "idk"
    source: ClassVar[str] = "Maini et al. 2024 (TOFU), arXiv 2401.06121, section 3, preference optimization (L_idk)"

    refusals: tuple[str, ...] = REFUSALS

    def __post_init__(self) -> None:
        super().__post_init__()
        take_refusals(self)

    def asked(self, request: Request, row: int, epoch: int) -> QA:
        """A forget row with the refusal that it has in an epoch."""
        record = question(self.name, request.forget[row])
        return replace(record, answer=draw("refusal", self.seed, epoch, row).choice(self.refusals))


def take_refusals(method: Method) -> None:
    """Make a tuple of a method's `refusals`, which JSON gives back as a list.

    Raises:
        SpecError: it is a single string, empty, or holds an empty sentence.
    """
    refusals: Any = method.refusals  # type: ignore[attr-defined]
    if isinstance(refusals, str) or not refusals or not all(str(refusal).strip() for refusal in refusals):
        raise SpecError(f"{method.name}: refusals is {refusals!r}; it is a list of sentences, at least one, none empty")
    object.__setattr__(method, "refusals", tuple(refusals))
