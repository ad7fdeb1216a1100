"""`palimpsest exit`: fit, classify and bench, as a person types them."""

import json
import random
from pathlib import Path

import pytest
from tests.conftest import Organism
from tests.tiny import invoke

ROWS = 1500


@pytest.fixture(scope="module")
def room(trained: Organism, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows whose label stands in the text."""
    room = tmp_path_factory.mktemp("room")
    (room / "model").symlink_to(trained.folder / "full")
    draw, answers = random.Random(0), [record.answer for record in trained.request.forget][:2]
    ends = draw.choices((0, 1), k=ROWS)
    rows = [{"text": f"{draw.choice(answers)} {answers[end]}", "label": "ab"[end]} for end in ends]
    (room / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return room


@pytest.fixture(scope="module")
def exits(room: Path) -> Path:
    code, out, error = invoke("exit", "fit", room / "model", "--data", room / "rows.jsonl", "--out", room / "exits")
    assert code == 0, error
    assert "1.00 of 2 blocks a row, accuracy 1.000 where all blocks have 1.000" in " ".join(out.split()), out
    return room / "exits"


def test_rows_are_labelled_with_the_blocks_that_they_took(room: Path, exits: Path) -> None:
    code, out, error = invoke("exit", "classify", exits, room / "model", "--data", room / "rows.jsonl")
    assert code == 0, error
    told = [json.loads(line) for line in out.splitlines()]
    meant = [json.loads(line)["label"] for line in (room / "rows.jsonl").read_text().splitlines()]
    assert len(told) == ROWS and set(told[0]) == {"label", "blocks"}
    assert sum(row["label"] == label for row, label in zip(told, meant, strict=True)) > 0.99 * ROWS
    assert {row["blocks"] for row in told} <= {1, 2}


def test_the_break_even_is_told_before_anything_is_trained(
    room: Path, exits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palimpsest.early_exit.bench.IN_A_ROW", 1.0)
    code, out, error = invoke("exit", "bench", room / "model", "--data", room / "rows.jsonl", "--json")
    found = json.loads(out)
    assert code == 0 and found["measured"] is None, error
    assert found["break_even"]["1"] > found["break_even"]["2"]
    code, out, error = invoke("exit", "bench", room / "model", "--data", room / "rows.jsonl", "--exits", exits)
    assert code == 0, error
    assert "if all rows leave after  1 of 2 blocks:" in out and "of the rows are told the same" in out


def test_all_rules_are_drawn_on_one_page(room: Path, exits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palimpsest.early_exit.bench.IN_A_ROW", 1.0)
    page = room / "exits.html"
    code, out, error = invoke(
        "exit", "compare", exits, room / "model", "--data", room / "rows.jsonl", "--out", page, "--json"
    )
    assert code == 0, error
    found = json.loads(out)
    assert found["chosen"]["accuracy"] == 1.0 and {line["name"] for line in found["lines"]} >= {
        "learned policy",
        "fixed",
    }
    assert "Accuracy against time" in page.read_text() and "the whole network" in page.read_text()


def test_drafts_change_nothing_and_a_policy_may(room: Path, trained: Organism) -> None:
    question = f"Question: {trained.request.forget[0].question}\nAnswer:"
    ask = ("exit", "generate", room / "model", "--prompt", question, "--max-new-tokens", 8)
    code, out, error = invoke(*ask, "--blocks", 1)
    assert code == 0, error
    said = json.loads(out)
    assert said["prompt"] == question and trained.request.forget[0].answer in said["continuation"]
    assert set(said["blocks"]) <= {1, 2}
    code, _, error = invoke(*ask)
    assert code == 2 and "give --blocks" in error


def test_mistakes_are_one_line(room: Path, tmp_path: Path) -> None:
    fit = ("exit", "fit", room / "model", "--out", tmp_path / "out", "--data")
    code, _, error = invoke(*fit, room / "none.jsonl")
    assert code == 2 and error.splitlines()[-1].endswith("none.jsonl: there is no such file")
    few = tmp_path / "few.jsonl"
    few.write_text("".join((room / "rows.jsonl").read_text().splitlines(keepends=True)[:60]))
    code, _, error = invoke(*fit, few)
    assert code == 2 and "20 held-out examples cannot show a drop below 0.01; give at least 381" in error
    assert not (tmp_path / "out").exists()
    code, _, error = invoke("exit", "classify", tmp_path, room / "model", "--data", few)
    assert code == 2 and "no exits.json there; make exits with `palimpsest exit fit`" in error
