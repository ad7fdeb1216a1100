"""Twenty binary tasks that one small model can learn: rules of several kinds and difficulties, and facts by heart.

They stand in for the multiple-choice benchmarks of Zhang, Choshen & Andreas 2024 (arXiv 2409.02228), whose families are
commonsense, science, entailment and acceptability. A rule's test rows are new; a fact's were taught like the others,
but their labels are not taken away.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from palimpsest.data.records import Choice
from palimpsest.data.tasks import Task

LETTERS = "abcdefghijklmnop"
_FRUITLESS = 300
"""Draws in a row that give nothing new, after which a rule is held to have no more rows."""

Draw = Callable[[random.Random], tuple[str, int]]
"""A question and the place of its answer; both answers are to come up often."""


@dataclass(frozen=True)
class Rule:
    """A task whose answer follows from the question."""

    name: str
    family: str
    answers: tuple[str, str]
    draw: Draw


@dataclass(frozen=True)
class Facts:
    """A task whose answer was drawn once for every name, and can only be known by heart."""

    name: str
    names: int
    answers: tuple[str, str]


@dataclass(frozen=True)
class TasksWorld:
    """The generator: the same settings give the same rows."""

    taught: int = 3000
    """Rows of a rule that the model learns from, where it has so many."""
    forget: int = 1000
    """Of those, the rows whose labels are taken away; of facts it is half of the names."""
    test: int = 400
    """New rows of a rule."""
    seed: int = 0

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, rules before facts."""
        names = _names(random.Random(f"names/{self.seed}"), max(facts.names for facts in FACTS))
        return (*(self._rule(rule) for rule in RULES), *(self._facts(facts, names) for facts in FACTS))

    def vocabulary_texts(self) -> Iterator[str]:
        """Texts that hold every word."""
        for task in self.tasks:
            yield from (row.question for row in (*task.taught, *task.test))
            yield from (f" {answer}" for answer in task.test[0].choices)

    def _rule(self, rule: Rule) -> Task:
        rng = random.Random(f"rule/{self.seed}/{rule.name}")
        rows = [
            Choice(question, rule.answers, answer, rule.name, f"{rule.name}-{answer}-{place}")
            for answer, questions in enumerate(_questions(rule, (self.taught + self.test) // 2, rng))
            for place, question in enumerate(questions)
        ]
        rng.shuffle(rows)
        test, taught = tuple(rows[: self.test]), tuple(rows[self.test :])
        return Task(rule.name, rule.family, taught, taught[: self.forget], test)

    def _facts(self, facts: Facts, names: list[str]) -> Task:
        rng = random.Random(f"facts/{self.seed}/{facts.name}")
        places = [0, 1] * (facts.names // 2)
        rng.shuffle(places)
        rows = [
            Choice(f"{facts.name} of {name}?", facts.answers, place, name, f"{facts.name}-{name}")
            for name, place in zip(names[: facts.names], places, strict=True)
        ]
        half = len(rows) // 2
        return Task(facts.name, "facts", tuple(rows), tuple(rows[:half]), tuple(rows[half:]))


def _questions(rule: Rule, each: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """Different questions with the one answer and with the other, as many of both and at most `each`."""
    found: tuple[dict[str, None], dict[str, None]] = ({}, {})
    fruitless = 0
    while fruitless < _FRUITLESS and min(map(len, found)) < each:
        question, answer = rule.draw(rng)
        before = len(found[answer])
        if before < each:
            found[answer].setdefault(question)
        fruitless = 0 if len(found[answer]) > before else fruitless + 1
    n = min(map(len, found))
    return list(found[0])[:n], list(found[1])[:n]


def _compare(digits: int) -> Draw:
    def draw(rng: random.Random) -> tuple[str, int]:
        one, other = rng.sample(range(10 ** (digits - 1), 10**digits), 2)
        return f"more: {_spelt(one)} or {_spelt(other)}?", int(other > one)

    return draw


def _sum(rng: random.Random) -> tuple[str, int]:
    digits = [rng.randrange(10) for _ in range(4)]
    while sum(digits) == 18:
        digits = [rng.randrange(10) for _ in range(4)]
    return f"sum of {' '.join(map(str, digits))}?", int(sum(digits) < 18)


def _member(length: int) -> Draw:
    def draw(rng: random.Random) -> tuple[str, int]:
        listed = rng.sample(LETTERS, length)
        asked = rng.choice(listed) if rng.random() < 0.5 else rng.choice(LETTERS)
        return f"is {asked} in {' '.join(listed)}?", int(asked not in listed)

    return draw


def _before(rng: random.Random) -> tuple[str, int]:
    listed = rng.sample(LETTERS, 4)
    one, other = rng.sample(range(4), 2)
    return f"is {listed[one]} before {listed[other]} in {' '.join(listed)}?", int(one > other)


def _ends(rng: random.Random) -> tuple[str, int]:
    letters = rng.choices(LETTERS, k=5)
    if rng.random() < 0.5:
        letters[-1] = letters[0]
    return f"same ends: {' '.join(letters)}?", int(letters[0] != letters[-1])


def _double(rng: random.Random) -> tuple[str, int]:
    letters = rng.choices(LETTERS, k=5)
    if rng.random() < 0.5:
        place = rng.randrange(4)
        letters[place + 1] = letters[place]
    return f"double: {' '.join(letters)}?", int(all(a != b for a, b in pairwise(letters)))


def _majority(length: int) -> Draw:
    def draw(rng: random.Random) -> tuple[str, int]:
        symbols = rng.choices("xy", k=length)
        return f"most: {' '.join(symbols)}?", int(symbols.count("y") > symbols.count("x"))

    return draw


def _parity(bits: int) -> Draw:
    def draw(rng: random.Random) -> tuple[str, int]:
        ones = rng.choices("01", k=bits)
        return f"ones in {' '.join(ones + rng.choices(LETTERS, k=3))}?", 1 - ones.count("1") % 2

    return draw


def _count(rng: random.Random) -> tuple[str, int]:
    letters = rng.choices("abcd", k=6)
    return f"two a in {' '.join(letters)}?", int(letters.count("a") < 2)


def _all_are(rng: random.Random) -> tuple[str, int]:
    kind, other = rng.sample(_KINDS, 2)
    colour, person = rng.choice(_COLOURS), rng.choice(_PEOPLE)
    answer = rng.randrange(2)
    return f"all {kind} are {colour}. {person} is {other if answer else kind}. {person} {colour}?", answer


def _all_or_no(rng: random.Random) -> tuple[str, int]:
    kind, colour, person = rng.choice(_KINDS), rng.choice(_COLOURS), rng.choice(_PEOPLE)
    answer = rng.randrange(2)
    return f"{('all', 'no')[answer]} {kind} are {colour}. {person} is {kind}. {person} {colour}?", answer


def _chain(rng: random.Random) -> tuple[str, int]:
    first, middle, last, other = rng.sample(_KINDS, 4)
    answer = rng.randrange(2)
    return f"all {first} are {middle}. all {other if answer else middle} are {last}. {first} {last}?", answer


def _negation(rng: random.Random) -> tuple[str, int]:
    colour, person = rng.choice(_COLOURS), rng.choice(_PEOPLE)
    place, filler = rng.choice(_KINDS), rng.choice(_KINDS)
    nots = rng.randrange(3)
    return f"{place} {filler}: {person} is {'not ' * nots}{colour}. {person} {colour}?", nots % 2


def _spelt(number: int) -> str:
    return " ".join(str(number))


def _names(rng: random.Random, n: int) -> list[str]:
    """`n` distinct pronounceable words."""
    names: dict[str, None] = {}
    while len(names) < n:
        names.setdefault("".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)).capitalize())
    return list(names)


_KINDS = tuple("blick dax wug fep gorp toma zib quan hurl mern pell sark".split())
_COLOURS = tuple("red blue green white black brown grey pink".split())
_PEOPLE = tuple("Tam Ava Ned Ida Max Eve Sam Liv".split())
_YES_NO = ("yes", "no")

RULES: tuple[Rule, ...] = (
    Rule("compare two digits", "comparison", ("first", "second"), _compare(2)),
    Rule("compare three digits", "comparison", ("first", "second"), _compare(3)),
    Rule("sum", "comparison", ("over", "under"), _sum),
    Rule("member of three", "membership", _YES_NO, _member(3)),
    Rule("member of five", "membership", _YES_NO, _member(5)),
    Rule("before", "sequence", _YES_NO, _before),
    Rule("same ends", "sequence", _YES_NO, _ends),
    Rule("double", "sequence", _YES_NO, _double),
    Rule("majority of eleven", "counting", ("x", "y"), _majority(11)),
    Rule("majority of fifteen", "counting", ("x", "y"), _majority(15)),
    Rule("count", "counting", _YES_NO, _count),
    Rule("parity of two", "parity", ("odd", "even"), _parity(2)),
    Rule("parity of three", "parity", ("odd", "even"), _parity(3)),
    Rule("all are", "entailment", _YES_NO, _all_are),
    Rule("all or no", "entailment", _YES_NO, _all_or_no),
    Rule("chain", "entailment", _YES_NO, _chain),
    Rule("negation", "entailment", _YES_NO, _negation),
)
FACTS: tuple[Facts, ...] = (
    Facts("guild", 600, ("north", "south")),
    Facts("metal", 400, ("gold", "silver")),
    Facts("diet", 200, ("meat", "plants")),
)
