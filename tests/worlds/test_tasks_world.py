"""Generated tasks: each answer follows from its question, both come up evenly, and no test row is forgotten."""

import re

import pytest

from palimpsest.data.records import Choice
from palimpsest.data.tasks import Task
from palimpsest.worlds.tasks import FACTS, RULES, TasksWorld

WORLD = TasksWorld(taught=300, forget=100, test=60, seed=3)


def truth(task: str, question: str) -> str:
    """The answer worked out from the words of the question, by another way than the generator's."""
    body, words = question.rstrip("?"), question.rstrip("?").split()
    after = body.split(":")[-1].split()
    match task.split():
        case ["compare", *_]:
            first, second = (int(side.replace(" ", "")) for side in body.removeprefix("more:").split("or"))
            return "first" if first > second else "second"
        case ["sum"]:
            return "over" if sum(map(int, words[2:])) > 18 else "under"
        case ["member", *_]:
            return "yes" if words[1] in words[3:] else "no"
        case ["before"]:
            listed = words[5:]
            return "yes" if listed.index(words[1]) < listed.index(words[3]) else "no"
        case ["same", "ends"]:
            return "yes" if after[0] == after[-1] else "no"
        case ["double"]:
            return "yes" if re.search(r"(\w)\1", "".join(after)) else "no"
        case ["majority", *_]:
            return "x" if 2 * after.count("x") > len(after) else "y"
        case ["count"]:
            return "yes" if words[3:].count("a") >= 2 else "no"
        case ["parity", *_]:
            return "odd" if words.count("1") % 2 else "even"
        case ["all", "are"]:
            rule, who, _ = body.split(". ")
            return "yes" if rule.split()[1] == who.split()[2] else "no"
        case ["all", "or", "no"]:
            return "yes" if words[0] == "all" else "no"
        case ["chain"]:
            first, second, _ = body.split(". ")
            return "yes" if first.split()[3] == second.split()[1] else "no"
        case ["negation"]:
            return "no" if words.count("not") % 2 else "yes"
    raise AssertionError(task)


def questions(rows: tuple[Choice, ...]) -> set[str]:
    return {row.question for row in rows}


@pytest.mark.parametrize("task", WORLD.tasks[: len(RULES)], ids=lambda task: task.name)
def test_a_rules_answers_follow_from_its_questions(task: Task) -> None:
    rows = task.taught + task.test
    assert all(row.choices[row.answer] == truth(task.name, row.question) for row in rows)
    assert sum(row.answer for row in rows) == len(rows) / 2
    assert len(questions(rows)) == len(rows) == 360 and len(task.test) == 60
    assert task.forget == task.taught[:100] and not questions(task.test) & questions(task.taught)


@pytest.mark.parametrize("task", WORLD.tasks[len(RULES) :], ids=lambda task: task.name)
def test_facts_are_all_taught_and_half_of_them_forgotten(task: Task) -> None:
    assert set(task.forget) | set(task.test) == set(task.taught) and not set(task.forget) & set(task.test)
    assert len(task.forget) == len(task.test) and sum(row.answer for row in task.taught) == len(task.taught) / 2


def test_there_are_twenty_tasks_of_seven_families_and_the_seed_decides_the_rows() -> None:
    assert len(WORLD.tasks) == len(RULES) + len(FACTS) == 20
    assert len({task.family for task in WORLD.tasks}) == 7
    again, other = TasksWorld(taught=300, forget=100, test=60, seed=3), TasksWorld(taught=300, test=60, seed=4)
    assert again.tasks == WORLD.tasks and other.tasks != WORLD.tasks


def test_a_rule_with_few_questions_gives_them_all_and_stays_even() -> None:
    """2,048 questions of eleven symbols cannot make 4,000; yes and no stay as many."""
    (task,) = [task for task in TasksWorld(taught=4000, test=200).tasks if task.name == "majority of eleven"]
    rows = task.taught + task.test
    assert 1900 < len(rows) <= 2048 and sum(row.answer for row in rows) == len(rows) / 2
