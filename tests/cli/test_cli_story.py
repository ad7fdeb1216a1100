"""The commands as a person types them, one after the other: train, unlearn, audit, verify, report; and run at once."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from tests.tiny import TINY, bytes_of, invoke, tiny_cache

import palimpsest.run.pipeline
from palimpsest.audit.results import Audit, Audited, Verdict
from palimpsest.cli import output
from palimpsest.cli.app import app
from palimpsest.data.readers import read_records
from palimpsest.metrics.scores import Score
from palimpsest.models.language_model import load
from palimpsest.run.spec import Spec, make_spec
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.update import Update

TOFU_LOGS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tofu_eval_logs"
COMMAND = Path(sys.executable).with_name("palimpsest")

Words = list[object]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tiny_cache(tmp_path_factory) as folder:
        yield folder


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the story takes place."""
    room = tmp_path_factory.mktemp("story")
    (room / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return room


def typed(*arguments: object) -> tuple[int, str, str]:
    """The installed command, in a process of its own."""
    command = [str(part) for part in (COMMAND, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def organism(room: Path, cache: Path) -> Path:
    """`palimpsest train`."""
    code, out, err = typed("train", room / "organism", "--spec", room / "tiny.yaml", "--json")
    assert code == 0, err
    places = {"original": "full", "gold": "gold", "sham": "sham", "forget": "forget.jsonl", "retain": "retain.jsonl"}
    assert json.loads(out) == {name: str(room / "organism" / place) for name, place in places.items()}
    return room / "organism"


def rows_of(organism: Path) -> Words:
    return ["--forget", organism / "forget.jsonl", "--retain", organism / "retain.jsonl"]


@pytest.fixture(scope="module")
def unlearn(organism: Path, room: Path) -> Words:
    """The words of `palimpsest unlearn`."""
    how = ["--method", "grad_diff", "--set", "learning_rate=1e-3", "--gold", organism / "gold", "--steps", 20]
    out = ["--out", room / "change", "--save-model", room / "changed"]
    return ["unlearn", organism / "full", *rows_of(organism), *how, *out]


@pytest.fixture(scope="module")
def change(unlearn: Words, room: Path) -> Path:
    """`palimpsest unlearn`, once."""
    code, out, err = invoke(*unlearn, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert set(found) == {"update", "model", "stopped", "forget_probability", "retain_kl", "seconds"}
    assert (found["update"], found["model"]) == (str(room / "change"), str(room / "changed"))
    return room / "change"


@pytest.fixture(scope="module")
def audit(organism: Path, change: Path, room: Path) -> Words:
    """The words of `palimpsest audit`."""
    controls = [word for name in ("gold", "sham") for word in (f"--{name}", organism / name)]
    names = ["--original", organism / "full", *controls, *rows_of(organism)]
    return ["audit", change, *names, "--out", room / "run", "--max-new-tokens", 2]


@pytest.fixture(scope="module")
def audited(audit: Words, room: Path) -> Path:
    """`palimpsest audit`, once."""
    code, out, err = typed(*audit, "--json")
    found = json.loads(out)
    assert code == 1 and "Traceback" not in err and "error" not in err
    assert list(found["models"]) == ["original", "gold", "sham", "grad_diff"]
    assert found["report"] == str(room / "run" / "report.html") and Path(found["report"]).is_file()
    assert found["models"]["original"]["verdict"] == "remembered"
    assert found["models"]["grad_diff"]["verdict"] != "erased" and found["models"]["grad_diff"]["summary"]
    value, low, high = found["models"]["gold"]["scores"]["forget/nll"]
    assert low <= value <= high
    return room / "run"


# The story.


def test_train_writes_models_and_rows(organism: Path) -> None:
    files = {"train.json", "forget.jsonl", "retain.jsonl"}
    assert {path.name for path in organism.iterdir()} == {"full", "gold", "sham"} | files
    assert make_spec(json.loads((organism / "train.json").read_text())) == make_spec(TINY)
    forget, retain = (read_records(organism / f"{name}.jsonl") for name in ("forget", "retain"))
    assert (len(forget), len(retain)) == (3 * 5, 6 * 5)
    assert len({load(organism / name).fingerprint() for name in ("full", "gold", "sham")}) == 3


def test_train_again_writes_the_same(organism: Path, room: Path) -> None:
    before = bytes_of(organism)
    code, out, _ = invoke("train", organism, "--spec", room / "tiny.yaml")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == [
        *("original", "gold", "sham", "forget", "retain")
    ]
    assert bytes_of(organism) == before


def test_unlearn_writes_an_update_and_a_model_and_leaves_the_first_alone(
    organism: Path, change: Path, room: Path
) -> None:
    assert {path.name for path in change.iterdir()} == {"update.json", "delta.safetensors"}
    original = load(organism / "full")
    before = original.fingerprint()
    assert Update.load(change).provenance["base"] == before
    changed = Update.load(change).apply(original)
    assert load(room / "changed").fingerprint() == changed.fingerprint() != before
    assert not [path for path in room.iterdir() if path.name.startswith(".")]


def test_unlearn_again_finds_what_is_there(change: Path, unlearn: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Descent, "run", lambda *_, **__: pytest.fail("it ran again"))
    before = bytes_of(change)
    code, out, _ = invoke(*unlearn)
    assert code == 0 and bytes_of(change) == before
    lines = out.splitlines()
    assert lines[0].startswith("Stopped at step ") and lines[1].startswith("Forget set: answer probability 0.")
    assert lines[2].startswith("Held-out retain rows: KL ") and lines[3].startswith("Update: ")


def test_audit_for_people_shows_a_table_and_where_to_go_on(audited: Path, audit: Words) -> None:
    code, out, _ = invoke(*audit)
    assert code == 1
    assert all(word in out for word in ("original", "gold", "sham", "grad_diff", "unseen", "remembered"))
    assert out.splitlines()[-2:] == [
        f"Open the report: {audited / 'report.html'}",
        f"Check its evidence:  palimpsest verify {audited}",
    ]


def test_audit_of_a_model_folder_without_gold(organism: Path, change: Path, tmp_path: Path) -> None:
    model = change.with_name("changed")
    bare = ["audit", model, "--original", organism / "full", *rows_of(organism), "--max-new-tokens", 2]
    code, out, _ = invoke(*bare, "--out", tmp_path / "bare", "--json")
    found = json.loads(out)
    assert code == 1 and list(found["models"]) == ["original", "changed"]
    assert any(note.startswith("No gold") for note in found["notes"])
    assert found["models"]["changed"]["verdict"] in ("inconclusive", "suppressed", "broken", "remembered")


def test_the_layers_are_read_unless_told_otherwise(audited: Path, organism: Path, change: Path, tmp_path: Path) -> None:
    assert (audited / "lens" / "original" / "lens.json").exists()
    bare = ["audit", change, "--original", organism / "full", *rows_of(organism), "--max-new-tokens", 2]
    code, _, err = invoke(*bare, "--out", tmp_path / "bare", "--lens", "tunned")
    assert code == 2 and "--lens tunned: unknown; did you mean 'tuned'" in err and not (tmp_path / "bare").exists()
    assert invoke(*bare, "--out", tmp_path / "bare", "--lens", "none")[0] == 1
    keys = {measure["name"] for measure in json.loads((tmp_path / "bare" / "audit.json").read_text())["measures"]}
    assert not (tmp_path / "bare" / "lens").exists() and "legible_probability" not in keys


def test_a_verdict_of_erased_exits_with_0(audit: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = palimpsest.run.pipeline.audit_candidates

    def erased(*given: Any, **named: Any) -> Audit:
        found = whole(*given, **named)
        last = found.models[-1]
        assert last.verdict is not None
        verdict = replace(last.verdict, outcome="erased", where="")
        return replace(found, models=(*found.models[:-1], replace(last, verdict=verdict)))

    monkeypatch.setattr(palimpsest.run.pipeline, "audit_candidates", erased)
    assert invoke(*audit)[0] == 0


def test_verify_then_report_then_verify(audited: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(audited, run)
    code, out, _ = invoke("verify", run)
    assert code == 0 and out.splitlines()[-1].startswith("all ") and "run.json" in out
    page = run / "report.html"
    drawn = page.read_bytes()
    page.unlink()
    assert invoke("verify", run)[0] == 1
    code, out, _ = invoke("report", run)
    assert (code, out) == (0, f"{page}\n") and page.read_bytes() == drawn
    assert json.loads(invoke("report", run, "--json")[1]) == {"report": str(page)}
    assert invoke("verify", run)[0] == 0
    scores = run / "scores.parquet"
    scores.write_bytes(scores.read_bytes()[:-1])
    code, out, _ = invoke("verify", run, "--json")
    assert code == 1 and not json.loads(out)["ok"]


# All at once.


@pytest.mark.usefixtures("cache")
def test_run_does_it_all(room: Path) -> None:
    code, out, _ = invoke("run", room / "tiny.yaml", "--out", room / "all", "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found["models"]) == ["original", "gold", "sham", "grad_diff", "random_labels"]
    assert found["report"] == str(room / "all" / "report.html") and found["seconds"] > 0
    code, out, _ = invoke("run", room / "tiny.yaml", "--out", room / "all")
    assert code == 0 and f"palimpsest verify {room / 'all'}" in out
    assert invoke("verify", room / "all")[0] == 0


def test_run_without_out_takes_the_specifications_name(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Spec, Path]] = []

    def carry_out(spec: Spec, folder: Path) -> Audit:
        asked.append((spec, folder))
        return Audit("", (), (), (), {})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(palimpsest.run.pipeline, "run", carry_out)
    assert invoke("run", room / "tiny.yaml", "--json")[0] == 0
    assert invoke("demo", "--seed", 5, "--json")[0] == 0
    (tiny, first), (demo, second) = asked
    assert (first, second) == (Path("runs/tiny"), Path("runs/demo"))
    assert tiny.title == "Tiny"
    # Another seed makes other people, models and batches.
    assert demo.seed == demo.model.training.seed == 5  # type: ignore[union-attr]
    assert {method.seed for method in demo.methods} == {5}


# Benchmark numbers.


@pytest.mark.skipif(not TOFU_LOGS.is_dir(), reason="TOFU's logs are not beside the project")
def test_tofu_log_warns_when_the_logs_hold_different_questions() -> None:
    logs = {
        name: TOFU_LOGS / f"ft_epoch5_lr1e-05_llama2-7b_{name}_wd0.01.json" for name in ("full", "retain90", "retain95")
    }
    code, out, err = invoke("metrics", "tofu-log", logs["full"], "--retain", logs["retain90"])
    assert (code, err) == (0, "") and json.loads(out)
    code, out, err = invoke("metrics", "tofu-log", logs["full"], "--retain", logs["retain95"])
    assert code == 0 and set(json.loads(out)) >= {"forget_quality_geo", "forget_quality_arith"}
    assert err.startswith("warning: the logs share 100 forget questions of 300 and 200") and err.count("\n") == 1


# What is shown.


def commands(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for verb, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {verb}".strip())


VERBS = dict(commands(typer.main.get_command(app)))


def test_the_verbs() -> None:
    assert set(VERBS) - {""} == {
        *(
            "demo",
            "run",
            "compare",
            "train",
            "unlearn",
            "audit",
            "verify",
            "report",
            "doctor",
            "metrics",
            "metrics tofu-log",
            "metrics open-unlearning",
            "metrics membership",
        ),
        *("lens", "lens fit", "lens eval", "lens show", "lens detect"),
        *("concepts", "concepts find", "concepts evaluate", "concepts ablate"),
        *("exit", "exit fit", "exit classify", "exit bench", "exit compare", "exit generate"),
        *("rewards", "rewards run", "rewards relearn"),
        *("update", "update show", "update reapply", "update adapter"),
        *("studies", "studies run"),
        *(
            f"studies run {name}"
            for name in (
                "concept_vectors",
                "conjugate_prompting",
                "consistentee",
                "dissecting",
                "implicit_inference",
                "kfade",
                "recovery",
                "reward_relearning",
                "task_forgetting",
                "tuned_lens",
            )
        ),
    }


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_verb_and_every_option(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = invoke(*verb.split(), "--help")
    command = VERBS[verb]
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    told = " ".join(" ".join(line.strip("│ ") for line in out.splitlines()).split())
    assert command.help and " ".join(command.help.replace("`", "").split()).split(":")[0] in told.replace("`", "")
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{verb}: {parameter.name} is not explained"
        assert isinstance(parameter, click.Argument) or any(name in told for name in parameter.opts)


@pytest.fixture
def tall() -> Audit:
    """An audit with names and outcomes as long as they come."""
    score = Score(18.8542, 0, 1, 1, 1)
    scores = dict.fromkeys(output.COLUMNS, score)
    verdict = Verdict("suppressed", "in other words", "", ())
    names = ("original", "[/red]labels")
    models = tuple(Audited(name, "unlearned", "", "", scores, {}, verdict) for name in names)
    return Audit("[bold]A title[/x]", models, (), (), {})


@pytest.mark.parametrize(("width", "numbers"), [(120, 5), (80, 5), (79, 2), (60, 2), (40, 2)])
def test_the_table_of_verdicts_keeps_its_lines_whole_on_any_terminal(
    width: int, numbers: int, tall: Audit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    output.show_verdicts(tall)
    out = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    lines = [line for line in out.splitlines() if "[/red]labels" in line]
    assert len(lines) == 1 and lines[0].count("18.854") == numbers
    assert "[bold]A title[/x]" in out
    assert "suppressed" in out and "words" in out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= max(width, output.NARROWEST)


def test_in_a_file_the_table_is_as_wide_as_it_needs(
    tall: Audit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    output.show_verdicts(tall)
    assert "suppressed in other words" in capsys.readouterr().out
