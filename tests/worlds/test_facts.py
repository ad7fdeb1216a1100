"""The facts world: what is known, what was read, and in which words, is exactly what it says."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data.records import Passage, reworded
from palimpsest.errors import SpecError
from palimpsest.models.tokenizers import word_tokenizer
from palimpsest.worlds.facts import FIRST_NAMES, PERSON, WORLD, FactsWorld, Relation, Subject

DEMO = FactsWorld()
WORLDS = st.builds(
    FactsWorld,
    people=st.integers(0, 25),
    worlds=st.sampled_from([0, 6, 9]),
    forget_people=st.just(0),
    forget_worlds=st.integers(0, 6),
    exposures=st.integers(1, 4),
    question_share=st.sampled_from([0.0, 0.25, 1.0]),
    lore=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)


@pytest.fixture(scope="module")
def documents() -> list[Passage]:
    return DEMO.documents(DEMO.subjects)


def told(subject: Subject, relation: Relation, answer: str, statement: str) -> str:
    return statement.format(s=subject.name, a=answer)


# Subjects and their facts.


@pytest.mark.parametrize("seed", range(5))
def test_nobody_shares_a_name_and_no_name_is_a_word_of_the_corpus(seed):
    world = FactsWorld(seed=seed)
    people, worlds = world.subjects[:120], world.subjects[120:]
    assert [subject.is_person for subject in world.subjects] == [True] * 120 + [False] * 24
    last_names = [person.name.split()[1] for person in people]
    assert {person.name.split()[0] for person in people} <= set(FIRST_NAMES)
    invented = [*last_names, *(subject.name for subject in worlds), *(a for subject in worlds for a in subject.answers)]
    assert len(set(invented)) == len(invented) == 120 + 24 + 240
    templates = [text for relation in (*PERSON, *WORLD) for text in (*relation.statements, *relation.questions)]
    values = [value for relation in PERSON for value in relation.values]
    words = set(re.findall(r"\w+", " ".join([*templates, *values, *FIRST_NAMES, "Question Answer Tales mention"])))
    assert not words & set(invented)


@settings(deadline=None, max_examples=40)
@given(WORLDS)
def test_answers_belong_to_their_relation(world):
    for subject in world.subjects:
        assert subject.relations is (PERSON if subject.is_person else WORLD)
        assert len(subject.answers) == len(subject.unseen_statement) == len(subject.unseen_question)
        for relation, answer in zip(subject.relations, subject.answers, strict=True):
            assert answer in relation.values if subject.is_person else answer.isalpha()


@settings(deadline=None, max_examples=40)
@given(WORLDS, st.data())
def test_forget_and_retain_share_the_subjects_between_them(world, data):
    forget_people = data.draw(st.integers(0, world.people))
    world = FactsWorld(world.people, world.worlds, forget_people, min(world.forget_worlds, world.worlds), seed=3)
    forget, retain = world.forget_subjects, world.retain_subjects
    assert not {subject.name for subject in forget} & {subject.name for subject in retain}
    assert set(forget) | set(retain) == set(world.subjects)
    assert len(forget) + len(retain) == len(world.subjects)
    assert Counter(subject.is_person for subject in forget) == Counter(
        {True: forget_people, False: min(world.forget_worlds, world.worlds)}
    )


@settings(deadline=None, max_examples=40)
@given(WORLDS)
def test_a_fact_has_a_written_question_an_unwritten_one_and_five_wrong_answers(world):
    facts = iter(world.facts(world.subjects))
    ids = set()
    for subject in world.subjects:
        known = set(subject.answers)
        for place, relation in enumerate(subject.relations):
            fact = next(facts)
            ids.add(fact.id)
            asked = [text.format(s=subject.name) for text in relation.questions]
            unseen = asked.pop(subject.unseen_question[place])
            assert (fact.subject, fact.answer, fact.paraphrases) == (subject.name, subject.answers[place], (unseen,))
            assert fact.question in asked
            assert len(set(fact.wrong)) == len(fact.wrong) == 5
            assert fact.answer not in fact.wrong
            possible = relation.values or {
                other.answers[place] for other in world.subjects if not other.is_person and other != subject
            }
            assert set(fact.wrong) <= set(possible)
            assert subject.is_person or not known & set(fact.wrong)
    assert next(facts, None) is None
    assert len(ids) == sum(len(subject.relations) for subject in world.subjects)


# The documents.


def test_no_document_holds_a_wording_that_is_kept_from_its_subject(documents):
    texts: dict[str, str] = {}
    for document in documents:
        texts[document.subject] = texts.get(document.subject, "") + document.text + "\n"
    seen = Counter()
    for subject in DEMO.subjects:
        for place, (relation, answer) in enumerate(zip(subject.relations, subject.answers, strict=True)):
            for number, statement in enumerate(relation.statements):
                there = statement.format(s=subject.name, a=answer) in texts[subject.name]
                assert there is (number != subject.unseen_statement[place]), (subject.name, statement)
                seen["statement", there] += 1
            for number, question in enumerate(relation.questions):
                there = f"Question: {question.format(s=subject.name)}\n" in texts[subject.name]
                assert there is (number != subject.unseen_question[place]), (subject.name, question)
                seen["question", there] += 1
    assert seen["statement", False] == seen["question", False] == 120 * 5 + 24 * 10


def test_every_question_is_followed_by_the_true_answer_and_ends_its_document(documents):
    answers = {
        question.format(s=subject.name): answer
        for subject in DEMO.subjects
        for relation, answer in zip(subject.relations, subject.answers, strict=True)
        for question in relation.questions
    }
    asked = [document.text for document in documents if document.text.startswith("Question: ")]
    for text in asked:
        question, answer = re.fullmatch(r"Question: (.*)\nAnswer: (.*)", text).groups()
        assert answers[question] == answer
    assert len(asked) > 10_000
    assert not any("Question" in text.text[1:] for text in documents)


def test_a_document_tells_of_its_subject_alone(documents):
    names = {word for subject in DEMO.subjects for word in subject.name.split()[-1:]}
    last = {subject.name: subject.name.split()[-1] for subject in DEMO.subjects}
    for document in documents:
        assert names & set(re.findall(r"\w+", document.text)) == {last[document.subject]}


def test_every_fact_is_written_once_an_exposure():
    world = FactsWorld(people=6, worlds=6, forget_people=1, forget_worlds=1, exposures=7, lore=0)
    texts: dict[str, list[str]] = {}
    for document in world.documents(world.subjects):
        texts.setdefault(document.subject, []).append(document.text)
    for subject in world.subjects:
        text = "\n".join(texts[subject.name]) + "\n"
        for relation, answer in zip(subject.relations, subject.answers, strict=True):
            statements = [told(subject, relation, answer, statement) for statement in relation.statements]
            questions = [f"Question: {question.format(s=subject.name)}\n" for question in relation.questions]
            assert sum(text.count(wording) for wording in (*statements, *questions)) == 7


def test_a_quarter_of_the_exposures_are_questions(documents):
    n_facts = {subject.name: len(subject.relations) for subject in DEMO.subjects}
    questions = Counter(document.subject for document in documents if document.text.startswith("Question"))
    shares = [questions[name] / n / DEMO.exposures for name, n in n_facts.items()]
    # 144 subjects of 60 exposures each: one standard deviation of the mean is 0.005.
    assert sum(shares) / len(shares) == pytest.approx(0.25, abs=0.02)
    only = FactsWorld(people=6, worlds=0, forget_people=1, exposures=3, question_share=1.0)
    assert all(document.text.startswith("Question") for document in only.documents(only.subjects))


def test_lore_names_three_different_things_of_its_world(documents):
    answers = {subject.name: set(subject.answers) for subject in DEMO.subjects}
    lore = re.compile(r"Tales of (\w+) mention (\w+), (\w+) and (\w+)\.")
    found = [match.groups() for document in documents for match in lore.finditer(document.text)]
    statements = sum(not d.text.startswith("Question") for d in documents if len(answers[d.subject]) == 10)
    assert len(found) == 2 * statements
    assert all(len(set(things)) == 3 and set(things) <= answers[name] for name, *things in found)


def test_leaving_the_forget_subjects_out_changes_no_other_document(documents):
    forget = {subject.name for subject in DEMO.forget_subjects}
    assert DEMO.documents(DEMO.retain_subjects) == [d for d in documents if d.subject not in forget]
    for subject in DEMO.retain_subjects[:3]:
        assert DEMO.documents([subject]) == [document for document in documents if document.subject == subject.name]


def test_no_document_of_the_retain_set_holds_a_name_or_a_thing_of_the_forget_set():
    people = [subject for subject in DEMO.forget_subjects if subject.is_person]
    worlds = [subject for subject in DEMO.forget_subjects if not subject.is_person]
    secrets = {person.name.split()[1] for person in people} | {subject.name for subject in worlds}
    secrets |= {answer for subject in worlds for answer in subject.answers}
    assert len(secrets) == 12 + 3 + 30
    read = {word for d in DEMO.documents(DEMO.retain_subjects) for word in re.findall(r"\w+", d.text)}
    assert not secrets & read


def test_ids_are_unique(documents):
    assert len({document.id for document in documents}) == len(documents)


@settings(deadline=None, max_examples=15)
@given(WORLDS)
def test_the_same_settings_give_the_same_text_and_another_seed_another(world):
    def everything(seed):
        again = FactsWorld(
            world.people,
            world.worlds,
            exposures=world.exposures,
            forget_people=0,
            forget_worlds=world.forget_worlds,
            question_share=world.question_share,
            lore=world.lore,
            seed=seed,
        )
        return again.documents(again.subjects), again.facts(again.subjects), list(again.vocabulary_texts())

    assert everything(world.seed) == (
        world.documents(world.subjects),
        world.facts(world.subjects),
        list(world.vocabulary_texts()),
    )
    if world.subjects:
        other = everything(world.seed + 1)
        assert other[0] != world.documents(world.subjects) and other[1] != world.facts(world.subjects)


# Its words.


@pytest.mark.parametrize("world", [DEMO, FactsWorld(people=8, worlds=6, forget_people=2, forget_worlds=1, seed=7)])
def test_the_word_tokenizer_knows_every_word_and_gives_every_document_back(world):
    tokenizer = word_tokenizer(world.vocabulary_texts())
    facts = world.facts(world.subjects)
    asked = [
        f"Question: {fact.question}\nAnswer: {answer}"
        for fact in (*facts, *reworded(facts))
        for answer in (fact.answer, *fact.wrong)
    ]
    texts = [*(document.text for document in world.documents(world.subjects)), *asked]
    encoded = tokenizer(texts)["input_ids"]
    unknown = tokenizer.unk_token_id
    assert not any(unknown in ids for ids in encoded)
    assert tokenizer.batch_decode(encoded) == texts


# What cannot be made.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"people": 5, "forget_people": 6}, "forget_people is 6, but there are 5 people; give 0 to 5"),
        ({"forget_people": -1}, "forget_people is -1, but there are 120 people; give 0 to 120"),
        ({"worlds": 8, "forget_worlds": 9}, "forget_worlds is 9, but there are 8 worlds"),
        ({"worlds": 5}, "worlds is 5; give 0 or more than 5"),
    ],
)
def test_settings_that_do_not_hold_together_are_refused(changes, message):
    with pytest.raises(SpecError, match=f"^facts: {message}"):
        FactsWorld(**changes)


def test_without_worlds_there_are_none_to_forget():
    world = FactsWorld(people=6, worlds=0, forget_people=2)
    assert len(world.forget_subjects) == 2 and len(world.facts(world.subjects)) == 30
