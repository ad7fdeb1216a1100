"""AltPO: preference optimisation whose preferred answers are alternates that the model itself made up."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from palimpsest.data.records import QA
from palimpsest.errors import SpecError
from palimpsest.metrics.generation import generate_answers
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.other_answers import questions
from palimpsest.unlearn.preference import Preferring
from palimpsest.unlearn.request import Request

INSTRUCTION = "Make up another plausible answer to the question, one that contradicts every fact of the answer above."
TRIES = 20
"""Rounds of sampling in which a row may give nothing but its true answer, or silence, before it is refused."""


@dataclass(frozen=True, kw_only=True)
class AltPO(Preferring):
    """The preference loss (`Preferring`) with alternate answers sampled from the start model as the preferred ones.

    The model is shown the question, the true answer and an instruction to make up another; what it says at this
    temperature is an alternate. One that repeats the true answer, or says nothing, is sampled again. The wording of the
    instruction is ours. A model that follows no instructions still gives alternates, but not good ones.
    """

    name: ClassVar[str] = "altpo"
    source: ClassVar[str] = "Mekala et al. 2025, arXiv 2409.13474; five alternates at temperature 1 as in its code"

    alternates: int = 5
    """Of each forget row."""
    temperature: float = 1.0
    max_new_tokens: int = 64
    """The longest alternate."""
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unless_positive("alternates", "temperature", "max_new_tokens")

    def preferred(self, model: LanguageModel, request: Request) -> list[list[QA]]:
        """Sample alternates until each row has its number of them.

        Raises:
            SpecError: a row gave none in `TRIES` rounds.
        """
        records = questions(self, request.forget)
        asked = [replace(record, question=self._prompt(record)) for record in records]
        found: list[list[QA]] = [[] for _ in records]
        for number in range(self.alternates * TRIES):
            wanting = [row for row, alternates in enumerate(found) if len(alternates) < self.alternates]
            if not wanting:
                break
            with sampling(model, self.temperature, 1_000_003 * (self.seed + 1) + number):
                said = generate_answers(
                    model,
                    [asked[row] for row in wanting],
                    template=request.template,
                    max_new_tokens=self.max_new_tokens,
                )
            for row, answer in zip(wanting, said, strict=True):
                if answer and answer != records[row].answer.strip():
                    found[row].append(replace(records[row], answer=answer))
        for record, alternates in zip(records, found, strict=True):
            if not alternates:
                raise SpecError(
                    f"{self.name}: the model gave no alternate to forget row {record.id!r} in "
                    f"{self.alternates * TRIES} tries, only its true answer or none; raise the temperature"
                )
        return found

    def _prompt(self, record: QA) -> str:
        return f"{record.question}\nAnswer: {record.answer}\n{self.instruction}"


@contextmanager
def sampling(model: LanguageModel, temperature: float, seed: int) -> Iterator[None]:
    """Greedy decoding is sampling meanwhile: Gumbel noise on the logits, whose largest is then drawn from the softmax.

    (Gumbel 1954.) The noise is drawn on the CPU, so that it is the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def add_noise(_network: nn.Module, _inputs: object, output: Any) -> None:
        exponential = torch.empty(output.logits.shape).exponential_(generator=generator)
        output.logits = output.logits.float() - temperature * exponential.log().to(output.logits.device)

    handle = model.network.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
