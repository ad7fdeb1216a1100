"""Prompts that say two things: the examples show one task, and the last input is itself an instruction to do another.

What a model does then tells which task it inferred. Fine-tuning on instructions moves that inference, more in the
surface form that it was done in than in others (Kotha, Springer & Raghunathan 2024, arXiv 2309.10105). Here
sentences and numbers are generated, and the same for every codec, so that forms are compared prompt by prompt.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from palimpsest.data.codec import IDENTITY, Codec
from palimpsest.data.records import QA
from palimpsest.errors import DataError, SpecError

InContext = Literal["repeat", "capslock"]
Instruction = Literal["math", "startblank"]
Outcome = Literal["icl", "instruction", "other"]
"""The task of the examples was done, the instruction was followed, or neither."""

SHOTS = 2
TASKS: dict[InContext, tuple[str, Callable[[str], str]]] = {
    "repeat": ("Repeat the input.", str),
    "capslock": ("Capitalize every character.", str.upper),
}
"""What the prompt says first, and what is done with every input."""
INSTRUCTIONS: tuple[Instruction, ...] = ("math", "startblank")
BLANK = "____"
"""What stands for a sentence's first word under `startblank`."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A prompt with both of its answers, in the form of text of one codec."""

    id: str
    """The same for the same sentences and numbers, whatever the codec."""
    pair: str
    """`repeat/math`, say."""
    prompt: str
    icl: str
    """The whole answer of the examples' task."""
    instruction: str
    """The answer of the instruction: a number, or the word that is missing."""

    @property
    def record(self) -> QA:
        """The prompt as a question for the template `raw`; the answer is the examples'."""
        return QA(self.prompt, self.icl, subject=self.pair, id=self.id)


@dataclass(frozen=True)
class InstructionsWorld:
    """The generator: the same settings give the same prompts, in any codec.

    Raises:
        SpecError: no prompts are asked for, or more than there are different ones.
    """

    prompts: int = 100
    """For each pair of a task and an instruction."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.prompts <= 400:
            raise SpecError(f"instructions: prompts is {self.prompts}; give 1 to 400")

    def conflicts(self, codec: Codec = IDENTITY) -> tuple[Conflict, ...]:
        """Every prompt, pair by pair.

        Sentences and questions are encoded, then the task is done with what they have become: in a cipher, `capslock`
        capitalises the cipher.

        Raises:
            DataError: the two answers to a prompt begin alike in this codec, so that nobody could tell them apart.
        """
        return tuple(
            conflict
            for task in TASKS
            for instruction in INSTRUCTIONS
            for conflict in self._pair(task, instruction, codec)
        )

    def _pair(self, task: InContext, instruction: Instruction, codec: Codec) -> Iterator[Conflict]:
        drawn = list(self._drawn(task, instruction))
        said, do = TASKS[task]
        heading, given, answered = codec.encode_all([said, "Input", "Output"])
        texts = iter(codec.encode_all([text for shots, last, _ in drawn for text in (*shots, last)]))
        for number, (_, _, result) in enumerate(drawn):
            *shots, last = (next(texts) for _ in range(SHOTS + 1))
            answer = codec.encode(result)
            if instruction == "startblank":
                answer, rest = last.split(maxsplit=1)
                last = f"{BLANK} {rest}"
            examples = "".join(f"{given}: {shot}\n{answered}: {do(shot)}\n\n" for shot in shots)
            conflict = Conflict(
                id=f"{task}/{instruction}/{number:03d}",
                pair=f"{task}/{instruction}",
                prompt=f"{heading}\n\n{examples}{given}: {last}\n{answered}:",
                icl=do(last),
                instruction=answer,
            )
            if outcome(conflict, conflict.instruction) != "instruction":
                raise DataError(
                    f"{codec.name}: {conflict.id}: {conflict.instruction!r} and {conflict.icl!r} begin alike; "
                    "choose another codec"
                )
            yield conflict

    def _drawn(self, task: InContext, instruction: Instruction) -> Iterator[tuple[list[str], str, str]]:
        """Plain examples, last input and its result; no last input comes twice."""
        rng = random.Random(f"instructions/{self.seed}/{task}/{instruction}")
        seen: set[str] = set()
        while len(seen) < self.prompts:
            *shots, last = _sentences(rng, SHOTS + 1)
            result = last.split()[0]
            if instruction == "math":
                last, result = _sum(rng)
            if last not in seen:
                seen.add(last)
                yield shots, last, result


def outcome(conflict: Conflict, said: str) -> Outcome:
    r"""What a model did with a prompt, by how its answer begins.

    The task of the examples is done where the first word is theirs, capitals included; the instruction where its answer
    stands first as a whole number or word. `\_` counts as `_`.
    """
    said = said.replace(r"\_", "_").lstrip()
    if _begins(said, conflict.icl.split()[0]):
        return "icl"
    return "instruction" if _begins(said.casefold(), conflict.instruction.casefold()) else "other"


def _begins(said: str, answer: str) -> bool:
    """Whether the answer stands first as a whole: 4 does not in 42 or 4.5. A blank may be longer than it was."""
    return re.match(rf"{re.escape(answer)}(?![^\W_]|[.,]\d)", said) is not None


def _sum(rng: random.Random) -> tuple[str, str]:
    """A question and its result, with numbers of 4 to 20."""
    first, second = rng.randint(4, 20), rng.randint(4, 20)
    word, result = rng.choice(
        [("plus", first + second), ("minus", first - second), ("times", first * second)],
    )
    return f"What is {first} {word} {second}?", str(result)


def _sentences(rng: random.Random, n: int) -> list[str]:
    """`n` sentences whose first word follows from the rest, since its partner stands there."""
    return [_sentence(rng, frame) for frame in rng.sample(_FRAMES, n)]


def _sentence(rng: random.Random, frame: str) -> str:
    (one, other), (first, second) = rng.sample(_PEOPLE, 2), rng.sample(_DEEDS, 2)
    return f"{frame.format(one=one, other=other, first=first, second=second)} {rng.choice(_PLACES)}."


_FRAMES = (
    "Neither the {one} nor the {other} {first}",
    "Either the {one} or the {other} {first}",
    "Both the {one} and the {other} {first}",
    "If the {one} {first}, then the {other} {second}",
)
_PEOPLE = tuple("baker pilot teacher farmer tailor sailor dentist painter lawyer mason potter nurse".split())
_DEEDS = ("found the key", "lost a coat", "heard the song", "saw the fox", "left a letter", "bought some bread")
_PLACES = (
    "near the river",
    "at the old station",
    "behind the mill",
    "in the garden",
    "before the storm",
    "after lunch",
)
