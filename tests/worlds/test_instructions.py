"""Prompts with two tasks: both answers follow from the prompt, in every codec, and outcomes are told apart."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.data.codec import IDENTITY, TextCodec, WordTable
from palimpsest.data.prompts import render
from palimpsest.errors import DataError, SpecError
from palimpsest.worlds.instructions import Conflict, InstructionsWorld, outcome

WORLD = InstructionsWorld(prompts=60, seed=3)
PLAIN = WORLD.conflicts()


def mirror(text: str) -> str:
    return re.sub(r"\S+", lambda word: word[0][::-1], text)


MIRRORED = TextCodec("mirrored", True, mirror, mirror)
FRENCH = WordTable("french", {"What": "Combien", "plus": "et", "Neither": "Ni", "Input": "Saisir", "Output": "Sortir"})
CODECS = (IDENTITY, MIRRORED, FRENCH)
IN = {codec.name: WORLD.conflicts(codec) for codec in CODECS}


def parts(prompt: str) -> tuple[list[tuple[str, str]], str, str]:
    """The examples, what the last input is, and the first line."""
    heading, *blocks = prompt.split("\n\n")
    pairs = [tuple(line.split(":", 1)[1].strip() for line in block.split("\n")) for block in blocks]
    return [(pair[0], pair[1]) for pair in pairs[:-1]], pairs[-1][0], heading


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_both_answers_follow_from_the_prompt(codec) -> None:
    for conflict in IN[codec.name]:
        shots, last, heading = parts(conflict.prompt)
        task, instruction, _ = conflict.id.split("/")
        do = {"repeat": str, "capslock": str.upper}[task]
        assert len({shot for shot, _ in shots}) == 2 and all(answer == do(shot) for shot, answer in shots)
        assert conflict.icl == do(last) and conflict.prompt.endswith(f"{codec.encode('Output')}:")
        assert heading == codec.encode("Repeat the input." if task == "repeat" else "Capitalize every character.")
        if instruction == "math":
            words = codec.decode(last).removeprefix("What is ").rstrip("?").split()
            first, word, second = words
            by = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}[word]
            assert codec.decode(conflict.instruction) == str(by(int(first), int(second)))
        else:
            assert last.startswith("____ ")
            whole = codec.decode(f"{conflict.instruction}{last[4:]}")
            first, partner = re.fullmatch(r"(\w+) the \w+ (?:\w+ .+, )?(\w+) the \w+ .+\.", whole).groups()
            assert {"Neither": "nor", "Either": "or", "Both": "and", "If": "then"}[first] == partner


def test_prompts_are_the_same_in_every_codec_and_the_seed_decides_them() -> None:
    french = IN["french"]
    assert [row.id for row in french] == [row.id for row in PLAIN] and len({row.id for row in PLAIN}) == len(
        PLAIN
    ) == 240
    for there, plain in zip(french, PLAIN, strict=True):
        if there.pair.startswith("repeat"):  # in the other task the words of the codec are capitalised too
            assert FRENCH.decode(there.prompt) == plain.prompt and FRENCH.decode(there.icl) == plain.icl
    assert InstructionsWorld(prompts=60, seed=3).conflicts() == PLAIN != InstructionsWorld(prompts=60).conflicts()
    for pair in {row.pair for row in PLAIN}:
        lasts = [parts(row.prompt)[1] for row in PLAIN if row.pair == pair]
        assert len(lasts) == 60
    assert InstructionsWorld(prompts=400).conflicts()[-1].id == "capslock/startblank/399"


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@given(
    place=st.integers(0, 239),
    rest=st.sampled_from(["", " and more", ".", "\nInput: x"]),
    space=st.sampled_from(["", " "]),
)
def test_each_answer_is_known_for_what_it_is(codec, place: int, rest: str, space: str) -> None:
    conflict = IN[codec.name][place]
    assert outcome(conflict, space + conflict.icl + rest) == "icl"
    assert outcome(conflict, space + conflict.instruction + rest) == "instruction"
    assert outcome(conflict, space + "I cannot do that" + rest) == "other" == outcome(conflict, rest)


@pytest.mark.parametrize(
    ("icl", "instruction", "said", "expected"),
    [
        ("What is 2 plus 2?", "4", "4", "instruction"),
        ("What is 2 plus 2?", "4", " 42", "other"),
        ("What is 2 plus 2?", "4", "4.5", "other"),
        ("What is 2 plus 2?", "4", "4. Input", "instruction"),
        ("WHAT IS 2 PLUS 2?", "4", "What is", "other"),
        ("What is 2 plus 2?", "4", "Whatever", "other"),
        ("____ the cat", "Ni", "Niño the cat", "other"),
        ("____ the cat", "Ni", "ni le chat", "instruction"),
        ("____ the cat", "Ni", r"\_\_\_\_\_\_ the cat", "icl"),
        ("____ the cat", "Ni", "", "other"),
    ],
)
def test_no_answer_is_the_beginning_of_another(icl: str, instruction: str, said: str, expected: str) -> None:
    assert outcome(Conflict("i", "p", "…", icl, instruction), said) == expected


def test_a_conflict_is_a_record_that_ends_where_the_answer_begins() -> None:
    conflict = PLAIN[0]
    assert render(conflict.record, None, "raw") == (conflict.prompt, f" {conflict.icl}")
    assert (conflict.record.id, conflict.record.subject) == (conflict.id, "repeat/math")


def test_what_cannot_be_told_apart_or_made_is_refused() -> None:
    same = TextCodec("all alike", False, lambda text: "word word", str)
    with pytest.raises(DataError, match="all alike: repeat/math/000: 'word word' and 'word word' begin alike"):
        InstructionsWorld(prompts=1).conflicts(same)
    with pytest.raises(SpecError, match="give 1 to 400"):
        InstructionsWorld(prompts=0)
