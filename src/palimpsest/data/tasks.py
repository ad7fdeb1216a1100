"""Binary tasks: what a model is taught, what of it is to be forgotten, and what tells how far forgetting reaches."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from palimpsest.data.readers import read_records
from palimpsest.data.records import Choice
from palimpsest.errors import DataError

FEWEST_TEST_ROWS = 20
"""Fewer rows say nothing about an accuracy."""


@dataclass(frozen=True)
class Task:
    """Questions with two choices each, so that chance is one half."""

    name: str
    family: str
    taught: tuple[Choice, ...]
    """What the model learns first."""
    forget: tuple[Choice, ...]
    """Of those, the rows whose labels are then taken away."""
    test: tuple[Choice, ...]
    """Rows that are never among `forget`. Those of a rule are new; facts have to be among `taught`."""


def read_tasks(folder: str | Path, *, seed: int = 0, forget: int = 1000, test: int = 1000) -> tuple[Task, ...]:
    """One task a file of multiple-choice rows, as lm-eval asks them: the question as it stands, then a choice.

    Each row keeps its right choice and one wrong one; which, and their order, follows from the seed and the row. Rows
    are shuffled and shared out: test rows first, at most half of the file, then forget rows.

    Args:
        folder: holds `NAME.jsonl` (or any other file of choices that `read_records` takes) for each task.
        seed: of the distractors and the split.
        forget: at most so many rows are taught and then forgotten.
        test: at most so many rows are kept for the test.

    Raises:
        DataError: no such folder, no file in it, a row that is no multiple choice, or too few rows.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise DataError(f"{folder}: no task there; give a folder with one file of multiple-choice rows for each task")
    return tuple(_task(path, seed, forget, test) for path in files)


def binary(choice: Choice, seed: int) -> Choice:
    """A question with its right choice and one wrong one, in an order and with a distractor that seed and id decide.

    Raises:
        DataError: it has no wrong choice.
    """
    wrong = [text for text in choice.choices if text != choice.choices[choice.answer]]
    if not wrong:
        raise DataError(f"record {choice.id!r}: it has no wrong choice; give two choices or more")
    draw = random.Random(f"distractor/{seed}/{choice.id}/{choice.question}")
    distractor, answer = draw.choice(wrong), draw.randrange(2)
    pair = (choice.choices[choice.answer], distractor)
    return replace(choice, choices=pair if answer == 0 else pair[::-1], answer=answer)


def _task(path: Path, seed: int, forget: int, test: int) -> Task:
    rows = []
    for record in read_records(path):
        if not isinstance(record, Choice):
            raise DataError(
                f"{path}: record {record.id!r} is a {type(record).__name__}; "
                "a task's rows have question, choices and answer"
            )
        rows.append(binary(record, seed))
    if len(rows) < 2 * FEWEST_TEST_ROWS:
        raise DataError(f"{path}: {len(rows)} rows; a task needs at least {2 * FEWEST_TEST_ROWS}")
    random.Random(f"split/{seed}/{path.stem}").shuffle(rows)
    n_test = min(test, len(rows) // 2)
    taught = tuple(rows[n_test : n_test + forget])
    return Task(path.stem, path.stem, taught, taught, tuple(rows[:n_test]))
