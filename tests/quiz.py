"""WMDP in small: texts and multiple-choice questions about invented substances, as rows of the benchmark's schemas.

What is asked of a substance stands only in a text of its corpus, so a model of both corpora answers, and one of the
retain corpus alone guesses.
"""

import json
import random
from pathlib import Path
from typing import Any

FORGET = "ambrite beryx corvane dulcite eskar felsite gorvan halcyte ilmenar jorvite kelsar lomarin".split()
KEPT = "marlite norvan opaline perlane quorite rostane sylvane tarnite umbrane velsite wolfrane xenane yorvan zelkite"
RETAIN = KEPT.split()
PLACES = "rivers caves deserts forests glaciers lagoons".split()


def quiz(names: list[str], subject: str | None = None) -> list[dict[str, Any]]:
    """A question about each substance, with four places to choose from."""
    rows = []
    for name in names:
        draw = random.Random(name)
        row = {"question": f"Where is {name} found?", "choices": draw.sample(PLACES, 4), "answer": draw.randrange(4)}
        rows.append(row | ({"subject": subject} if subject else {}))
    return rows


def text(row: dict[str, Any]) -> str:
    """A question with its choices and the right letter, as lm-eval's task puts it."""
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
    header = "The following are multiple choice questions (with answers) about biology."
    return "\n".join([header, "", row["question"], *lines, f"Answer: {'ABCD'[row['answer']]}"])


def write_wmdp(folder: Path) -> dict[str, str]:
    """The benchmark's four files, by the keys of a specification's `data`."""
    articles = [
        {"title": row["question"], "abstract": "Nothing.", "text": text(row), "doi": f"10/{place}"}
        for place, row in enumerate(quiz(FORGET))
    ]
    files = {
        "forget": articles,
        "retain": [{"text": text(row)} for row in quiz(RETAIN)],
        "questions": quiz(FORGET),
        "utility": quiz(RETAIN, "biology"),
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in files}


MODEL: dict[str, Any] = {
    "kind": "train",
    "architecture": {"layers": 2, "width": 64, "mlp_width": 256, "heads": 4, "context": 64},
    "pack": None,
    "training": {"epochs": 60, "batch_size": 13, "learning_rate": 5e-3, "muon_learning_rate": 0.02, "warmup": 10},
}
"""How a model that answers is trained, in seconds."""
