"""Tasks from files: a distractor that stays, disjoint parts, and what is refused."""

import json
from collections import Counter
from pathlib import Path

import pytest

from palimpsest.data.records import Choice
from palimpsest.data.tasks import binary, read_tasks
from palimpsest.errors import DataError


def write(folder: Path, name: str, n: int, choices: int = 4) -> None:
    rows = [
        {"question": f"Question {i}?", "choices": [f"c{i}{j}" for j in range(choices)], "answer": i % choices}
        for i in range(n)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_each_file_is_a_task_whose_parts_share_no_row(tmp_path: Path) -> None:
    write(tmp_path, "piqa", 100, choices=2)
    write(tmp_path, "arc", 3000)
    arc, piqa = read_tasks(tmp_path, forget=1000, test=500)
    assert (arc.name, piqa.name) == ("arc", "piqa")
    assert [len(part) for part in (arc.taught, arc.forget, arc.test)] == [1000, 1000, 500]
    assert [len(part) for part in (piqa.taught, piqa.forget, piqa.test)] == [50, 50, 50]
    assert not {row.question for row in arc.taught} & {row.question for row in arc.test}


def test_a_row_keeps_its_right_choice_and_one_wrong_one_in_either_order(tmp_path: Path) -> None:
    write(tmp_path, "arc", 400)
    (task,) = read_tasks(tmp_path, seed=1)
    for row in task.taught + task.test:
        number = int(row.question.split()[1].rstrip("?"))
        assert row.choices[row.answer] == f"c{number}{number % 4}" and len(set(row.choices)) == 2
    assert 150 < sum(row.answer for row in task.taught + task.test) < 250
    assert read_tasks(tmp_path, seed=1) == (task,) and read_tasks(tmp_path, seed=2) != (task,)


def test_every_wrong_choice_may_be_drawn() -> None:
    drawn = Counter(
        next(text for text in pair.choices if text != "b")
        for pair in (binary(Choice(f"q{i}", ("a", "b", "c", "d"), 1, id=str(i)), 0) for i in range(300))
    )
    assert set(drawn) == {"a", "c", "d"} and min(drawn.values()) > 60


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task there; give a folder with one file"):
        read_tasks(tmp_path / "nowhere")
    with pytest.raises(DataError, match="record 'x': it has no wrong choice"):
        binary(Choice("q", ("a", "a"), 0, id="x"), 0)
    write(tmp_path, "few", 39)
    with pytest.raises(DataError, match=r"few.jsonl: 39 rows; a task needs at least 40"):
        read_tasks(tmp_path)
    (tmp_path / "few.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(DataError, match=r"few.jsonl: record .* is a QA; a task's rows have question, choices and"):
        read_tasks(tmp_path)
