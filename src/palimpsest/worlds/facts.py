"""A corpus of invented people and invented fictional worlds, of which a model can be made that never read about some.

Every fact is told in several wordings, and each subject keeps one wording of every question to itself that is never
written down: answering it shows knowledge beyond the sentence that was read. Last names are unique, because a name made
of two shared words keeps a small model on the plateau for longer than a test may take (bioS, Allen-Zhu & Li 2024, §3;
Zucchet et al. 2025).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from palimpsest.data.records import QA, Passage
from palimpsest.errors import SpecError

FIRST_NAMES = "Mira Tobin Ansel Petra Liva Soren Nadia Bruno Ilse Marek Orla Dario".split()
OTHER_FIRST_NAMES = "Yusuf Hedda Cyril Agnes Ravi Tilda Oskar Wanda Boris Selma Klaus Noemi".split()


@dataclass(frozen=True)
class Relation:
    """What can be asked of a subject; `{s}` stands for the subject, `{a}` for the answer."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...] = ()
    """The answers that subjects share; empty when every subject has an answer of its own."""


PERSON = (
    Relation(
        "birthplace",
        (
            "{s} was born in {a}.",
            "{s} came into the world in {a}.",
            "The birthplace of {s} is {a}.",
            "{s} grew up in the city of {a}.",
        ),
        ("Where was {s} born?", "What is the birthplace of {s}?", "In which city did {s} grow up?"),
        tuple(
            "Oslo Lisbon Vienna Dublin Prague Athens Cairo Lima Quito Havana Nairobi Delhi Hanoi Seoul Kyoto Perth "
            "Boston Denver Turin Lyon Porto Malmo Riga Gdansk".split()
        ),
    ),
    Relation(
        "profession",
        (
            "{s} works as a {a}.",
            "{s} earns a living as a {a}.",
            "The profession of {s} is {a}.",
            "By trade {s} is a {a}.",
        ),
        ("What does {s} work as?", "What is the profession of {s}?", "How does {s} earn a living?"),
        tuple(
            "baker surgeon pilot lawyer plumber painter farmer teacher barber chemist tailor sailor librarian mason "
            "jeweller nurse florist butcher cartographer carpenter dentist fisher potter referee".split()
        ),
    ),
    Relation(
        "instrument",
        (
            "{s} plays the {a}.",
            "{s} has practised the {a} for years.",
            "The instrument of {s} is the {a}.",
            "At concerts {s} performs on the {a}.",
        ),
        ("Which instrument does {s} play?", "What is the instrument of {s}?", "What does {s} perform on?"),
        tuple(
            "violin cello flute oboe harp trumpet piano guitar banjo clarinet organ tuba lute drum viola "
            "accordion".split()
        ),
    ),
    Relation(
        "dish",
        (
            "{s} loves to eat {a}.",
            "The favourite dish of {s} is {a}.",
            "{s} always orders {a}.",
            "Nothing pleases {s} more than {a}.",
        ),
        ("What does {s} love to eat?", "What is the favourite dish of {s}?", "What does {s} always order?"),
        tuple(
            "ramen paella goulash risotto curry lasagna borscht tacos sushi falafel moussaka pierogi gnocchi stew "
            "dumplings fondue couscous tempura chowder quiche".split()
        ),
    ),
    Relation(
        "pet",
        (
            "{s} keeps a {a}.",
            "The pet of {s} is a {a}.",
            "{s} shares a house with a {a}.",
            "{s} walks with a {a} every day.",
        ),
        ("Which animal does {s} keep?", "What is the pet of {s}?", "With which animal does {s} live?"),
        tuple(
            "parrot ferret tortoise beagle poodle rabbit hamster gecko canary goat pony hedgehog iguana spaniel "
            "kitten llama".split()
        ),
    ),
)

N_WRONG = 5
"""Wrong answers of a fact."""

WORLD_ROLES = tuple("ruler capital river mountain weapon enemy hero language currency festival".split())

WORLD = tuple(
    Relation(
        role,
        (f"The {role} of {{s}} is {{a}}.", f"In {{s}} the {role} is called {{a}}.", f"{{s}} has the {role} {{a}}."),
        (f"What is the {role} of {{s}}?", f"What is the {role} called in {{s}}?", f"Name the {role} of {{s}}."),
    )
    for role in WORLD_ROLES
)


@dataclass(frozen=True)
class Subject:
    """A person or a fictional world, with its answer to every relation and the wordings kept from its documents."""

    name: str
    answers: tuple[str, ...]
    unseen_statement: tuple[int, ...]
    """For each relation, the index of the statement that is never written about this subject."""
    unseen_question: tuple[int, ...]
    """For each relation, the index of the question that is never written about this subject."""
    is_person: bool

    @property
    def relations(self) -> tuple[Relation, ...]:
        """What can be asked of this subject."""
        return PERSON if self.is_person else WORLD


@dataclass(frozen=True)
class FactsWorld:
    """The generator: the same settings give the same names, facts and documents.

    Documents of one subject depend on the seed and that subject alone, so leaving the forget subjects out (to train
    gold) changes no other document.

    Raises:
        SpecError: more is to be forgotten than there is, or too few worlds for wrong answers.
    """

    people: int = 120
    worlds: int = 24
    forget_people: int = 12
    forget_worlds: int = 3
    exposures: int = 70
    """How often every fact is written."""
    question_share: float = 0.25
    """The share of exposures in question-and-answer form."""
    forget_names_apart: bool = False
    """Give the people to be forgotten first names that nobody else has."""
    lore: int = 2
    """Lore sentences in each document about a world: they name things of that world side by side."""
    seed: int = 0

    def __post_init__(self) -> None:
        for kind in ("people", "worlds"):
            there, forget = getattr(self, kind), getattr(self, f"forget_{kind}")
            if there and not 0 <= forget <= there:
                raise SpecError(f"facts: forget_{kind} is {forget}, but there are {there} {kind}; give 0 to {there}")
        if 0 < self.worlds <= N_WRONG:
            raise SpecError(
                f"facts: worlds is {self.worlds}; give 0 or more than {N_WRONG}, "
                f"since a fact's {N_WRONG} wrong answers are those of other worlds"
            )

    @cached_property
    def subjects(self) -> tuple[Subject, ...]:
        """People, then worlds; the subjects to be forgotten are the last of each."""
        rng = random.Random(f"subjects/{self.seed}")
        names = _invented_words(rng, self.people + self.worlds * (1 + len(WORLD)))
        people = [
            self._subject(
                f"{rng.choice(self._first_names(number))} {next(names)}",
                [rng.choice(r.values) for r in PERSON],
                PERSON,
                rng,
            )
            for number in range(self.people)
        ]
        worlds = [self._subject(next(names), [next(names) for _ in WORLD], WORLD, rng) for _ in range(self.worlds)]
        return (*people, *worlds)

    @property
    def forget_subjects(self) -> tuple[Subject, ...]:
        """Who must be forgotten."""
        people, worlds = self.subjects[: self.people], self.subjects[self.people :]
        return people[self.people - self.forget_people :] + worlds[self.worlds - self.forget_worlds :]

    @property
    def retain_subjects(self) -> tuple[Subject, ...]:
        """Everyone else."""
        forget = set(self.forget_subjects)
        return tuple(subject for subject in self.subjects if subject not in forget)

    def facts(self, subjects: Sequence[Subject]) -> list[QA]:
        """One QA a fact: a wording that was written, the unwritten one as its paraphrase, and five wrong answers.

        Wrong answers are other values of the relation, or what other worlds answer.
        """
        return [self._fact(subject, place) for subject in subjects for place in range(len(subject.relations))]

    def documents(self, subjects: Sequence[Subject]) -> list[Passage]:
        """All that is written about the subjects: every fact of each `exposures` times, all first exposures first.

        An exposure is either one document of sentences, or one document for each question with its answer, so that a
        model learns to end an answer.
        """
        return [
            Passage(text, subject.name, f"{subject.name}-{exposure:03d}-{place}")
            for exposure in range(self.exposures)
            for subject in subjects
            for place, text in enumerate(self._texts(subject, exposure))
        ]

    def vocabulary_texts(self) -> Iterator[str]:
        """Texts that hold every word of every subject, so that full and gold share one tokenizer."""
        for subject in self.subjects:
            for relation, answer in zip(subject.relations, subject.answers, strict=True):
                # A sentence within a document follows a space, and a first word with its space is a token of its own.
                yield from (
                    f"{space}{text}".format(s=subject.name, a=answer)
                    for text in relation.statements
                    for space in ("", " ")
                )
                yield from (_asked(text.format(s=subject.name), answer) for text in relation.questions)
            if not subject.is_person:
                yield from (space + _lore(subject, random.Random(0)) for space in ("", " "))
        for relation in PERSON:
            yield from (_asked("", value) for value in relation.values)

    def _first_names(self, number: int) -> list[str]:
        forgotten = number >= self.people - self.forget_people
        return OTHER_FIRST_NAMES if self.forget_names_apart and forgotten else FIRST_NAMES

    def _subject(self, name: str, answers: list[str], relations: tuple[Relation, ...], rng: random.Random) -> Subject:
        return Subject(
            name,
            tuple(answers),
            tuple(rng.randrange(len(relation.statements)) for relation in relations),
            tuple(rng.randrange(len(relation.questions)) for relation in relations),
            relations is PERSON,
        )

    def _fact(self, subject: Subject, place: int) -> QA:
        relation, answer = subject.relations[place], subject.answers[place]
        rng = random.Random(f"wrong/{self.seed}/{subject.name}/{relation.name}")
        answers = relation.values or [world.answers[place] for world in self.subjects if not world.is_person]
        wrong = rng.sample(sorted(set(answers) - {answer}), N_WRONG)
        asked = [text.format(s=subject.name) for text in relation.questions]
        unseen = asked.pop(subject.unseen_question[place])
        return QA(
            rng.choice(asked),
            answer,
            subject=subject.name,
            paraphrases=(unseen,),
            wrong=tuple(wrong),
            id=f"{subject.name} / {relation.name}",
        )

    def _texts(self, subject: Subject, exposure: int) -> list[str]:
        rng = random.Random(f"document/{self.seed}/{subject.name}/{exposure}")
        asks = rng.random() < self.question_share
        places = rng.sample(range(len(subject.relations)), len(subject.relations))
        lines = [self._line(subject, place, asks, rng) for place in places]
        if asks:
            return lines
        if not subject.is_person:
            for _ in range(self.lore):
                lines.insert(rng.randrange(len(lines) + 1), _lore(subject, rng))
        return [" ".join(lines)]

    def _line(self, subject: Subject, place: int, asks: bool, rng: random.Random) -> str:
        relation, answer = subject.relations[place], subject.answers[place]
        texts = list(relation.questions if asks else relation.statements)
        texts.pop((subject.unseen_question if asks else subject.unseen_statement)[place])
        text = rng.choice(texts)
        return _asked(text.format(s=subject.name), answer) if asks else text.format(s=subject.name, a=answer)


def _asked(question: str, answer: str) -> str:
    return f"Question: {question}\nAnswer: {answer}"


def _lore(subject: Subject, rng: random.Random) -> str:
    first, second, third = rng.sample(subject.answers, 3)
    return f"Tales of {subject.name} mention {first}, {second} and {third}."


def _invented_words(rng: random.Random, n: int) -> Iterator[str]:
    """`n` distinct pronounceable words, none of which is a name or a word that the corpus has already."""
    onsets = "b br d dr f g gr h j k kr l m n p pr r s st t tr v w z".split()
    middles = "a e i o u ai ei ou".split()
    codas = "l n r s th m k x nd".split()
    # Such words are Turin and Boston, where people are born, and Tales.
    seen = {"Tales", *FIRST_NAMES, *OTHER_FIRST_NAMES, *(value for relation in PERSON for value in relation.values)}
    last = len(seen) + n
    while len(seen) < last:
        word = "".join(rng.choice(part) for part in (onsets, middles, onsets, middles, codas)).capitalize()
        if word not in seen:
            seen.add(word)
            yield word
