"""Wrong input, as it really comes: each is one line on standard error, exit code 2, and nothing half-written."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from tests.conftest import Organism
from tests.tiny import TINY, bytes_of, invoke

import palimpsest.run.pipeline
from palimpsest.data.readers import write_records
from palimpsest.data.records import QA
from palimpsest.models.organism import Architecture, new_model
from palimpsest.models.tokenizers import word_tokenizer

Words = list[object]


@pytest.fixture(autouse=True)
def _nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(palimpsest.run.pipeline, "train_controls", lambda *_: pytest.fail("models were trained"))
    monkeypatch.setattr(palimpsest.run.pipeline, "train_sham", lambda *_, **__: pytest.fail("sham was trained"))


@pytest.fixture
def room(trained: Organism, tmp_path: Path) -> Path:
    """A user's folder: a model, its gold, and rows to forget and to keep."""
    for name in ("full", "gold"):
        (tmp_path / name).symlink_to(trained.folder / name)
    request = trained.request
    write_records(request.forget, tmp_path / "forget.jsonl")
    write_records(request.all_retain, tmp_path / "retain.jsonl")
    return tmp_path


def unlearn(room: Path, **changed: object) -> Words:
    """`palimpsest unlearn` with two steps; None leaves an option out."""
    rows = {"forget": room / "forget.jsonl", "retain": room / "retain.jsonl"}
    options = rows | {"method": "npo", "out": room / "change", "steps": 2}
    model = changed.pop("model", room / "full")
    return ["unlearn", model, *spelled(options | changed)]


def audit(room: Path, **changed: object) -> Words:
    """`palimpsest audit` of gold."""
    rows = {"forget": room / "forget.jsonl", "retain": room / "retain.jsonl"}
    options = {"original": room / "full", **rows, "out": room / "run", "max_new_tokens": 1}
    model = changed.pop("model", room / "gold")
    return ["audit", model, *spelled(options | changed)]


def spelled(options: dict[str, object]) -> Words:
    return [
        word for name, value in options.items() if value is not None for word in (f"--{name.replace('_', '-')}", value)
    ]


def mistake(room: Path, words: Words) -> str:
    """The one line of error that these words give; nothing in the folder has changed."""
    before = bytes_of(room)
    code, out, err = invoke(*words)
    lines = err.splitlines()
    assert (code, out) == (2, ""), err
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
    assert "Traceback" not in err
    assert bytes_of(room) == before
    return lines[-1]


def only_line(room: Path, words: Words) -> str:
    """The same, where no work was begun: standard error holds nothing but that line."""
    before = bytes_of(room)
    code, out, err = invoke(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and bytes_of(room) == before
    return err.strip()


# Rows.


def rows_file(room: Path, name: str) -> Path:
    """A file of thirty good rows in `room`, in which something goes wrong below."""
    path = room / name
    write_records([QA(f"Who is {n}?", f"Person {n}", subject=f"s{n}") for n in range(30)], path)
    return path


def break_row_17(path: Path) -> None:
    lines = path.read_text().splitlines()
    lines[16] = lines[16][:-5]
    path.write_text("\n".join(lines) + "\n")


def rename_field(path: Path) -> None:
    path.write_text(path.read_text().replace('"question"', '"qestion"'))


def empty_answer(path: Path) -> None:
    lines = path.read_text().splitlines()
    lines[3] = json.dumps({"question": "Who?", "answer": "  "})
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda path: path.unlink(), "rows.jsonl: there is no such file"),
        (lambda path: path.write_text(""), "rows.jsonl: holds no records"),
        (lambda path: path.write_text("\n\n  \n"), "rows.jsonl: holds no records"),
        (break_row_17, "rows.jsonl: row 17: not valid JSON"),
        (rename_field, "rows.jsonl: row 1: "),
        (empty_answer, "rows.jsonl: row 4: "),
        (lambda path: path.write_bytes(b'{"question": "caf\xe9", "answer": "x"}\n'), "is not valid UTF-8"),
        (lambda path: path.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n'), "is a Preference; "),
        (lambda path: path.write_text("[1, 2]\n"), "rows.jsonl: row 1: a JSON int stands there"),
        (lambda path: (path.unlink(), path.mkdir()), "rows.jsonl: is a folder; name one file in it"),
    ],
)
@pytest.mark.parametrize("which", ["forget", "retain"])
def test_rows_that_cannot_be_used(room: Path, which: str, harm: object, says: str) -> None:
    path = rows_file(room, "rows.jsonl")
    harm(path)  # type: ignore[operator]
    assert says in only_line(room, unlearn(room, **{which: path}))
    assert says in only_line(room, audit(room, **{which: path}))


def test_a_wrong_field_is_named_with_what_was_expected(room: Path) -> None:
    path = rows_file(room, "rows.jsonl")
    rename_field(path)
    line = only_line(room, unlearn(room, forget=path))
    assert "qestion" in line or "question" in line


def test_forget_and_retain_are_the_same(room: Path) -> None:
    line = only_line(room, unlearn(room, retain=room / "forget.jsonl"))
    assert "hold the same 25 rows" in line and "given twice?" in line


def test_a_retain_set_of_two_subjects(room: Path) -> None:
    write_records([QA(f"Who {n}?", "x", subject=f"s{n % 2}") for n in range(8)], room / "few.jsonl")
    assert "the retain set has 2 subjects; at least 3 are needed" in only_line(
        room, unlearn(room, retain=room / "few.jsonl")
    )


# Options.


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"method": "npoo"}, "method npoo: unknown method 'npoo'; did you mean 'npo'?"),
        ({"set": "betta=1"}, "method npo has no setting 'betta'; did you mean 'beta'?"),
        ({"set": "beta=high"}, "beta: input should be a valid number, not 'high'"),
        ({"set": "beta"}, "write it as NAME=VALUE, e.g. --set beta=0.2"),
        ({"set": "learning_rate=-1"}, "learning_rate is -1.0; it must be above 0"),
        ({"set": "batch_size=0"}, "batch_size is 0; it must be above 0"),
        ({"template": "chatt"}, "--template chatt: unknown; did you mean 'chat'?"),
        ({"template": "chat"}, "template 'chat': this tokenizer has no chat template; use template 'plain'"),
        ({"format": "tofuu"}, "tofuu"),
    ],
)
def test_options_that_mean_nothing(room: Path, changed: dict[str, object], says: str) -> None:
    assert says in only_line(room, unlearn(room, **changed))


@pytest.mark.parametrize(("option", "value"), [("steps", 0), ("max_new_tokens", 0)])
def test_numbers_out_of_range_are_refused_by_their_option(room: Path, option: str, value: int) -> None:
    words = unlearn(room, **{option: value}) if option == "steps" else audit(room, **{option: value})
    code, out, err = invoke(*words)
    assert (code, out) == (2, "") and f"--{option.replace('_', '-')}" in err and "Traceback" not in err


# Models.


def own_model(room: Path) -> Path:
    """A copy of the model that may be harmed."""
    return Path(shutil.copytree(room / "full", room / "model"))


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def other_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (shutil.rmtree, "model: there is no such model folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json there"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded as a causal language model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors weights in this folder"),
        (pickle_weights, "the weights are a pickle (pytorch_model.bin), which can run code"),
        (cut_weights, "cannot be loaded as a causal language model"),
        (other_size, "weights are missing or not of the shape that config.json asks for"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "its tokenizer cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_used(room: Path, harm: object, says: str) -> None:
    model = own_model(room)
    harm(model)  # type: ignore[operator]
    for words in (unlearn(room, model=model), unlearn(room, gold=model), audit(room, model=model)):
        assert says in mistake(room, words)


def test_a_file_where_a_model_should_be(room: Path) -> None:
    assert "but this is a file" in mistake(room, unlearn(room, model=room / "forget.jsonl"))


def test_a_model_of_another_vocabulary(room: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = word_tokenizer(["Question: who?\nAnswer: nobody"])
    other = new_model(Architecture(1, 16, 16, 2, 32), tokenizer, seed=0).save(tmp_path_factory.mktemp("m") / "other")
    assert "its tokenizer is not the original's; audit models that share one" in mistake(room, audit(room, model=other))


def test_an_update_of_another_model_and_one_that_is_cut_short(room: Path) -> None:
    assert invoke(*unlearn(room))[0] == 0
    assert "was made for other weights" in mistake(room, audit(room, model=room / "change", original=room / "gold"))
    weights = room / "change" / "delta.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "not a whole update" in mistake(room, audit(room, model=room / "change"))


# Numbers that run away.


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("method", ["grad_ascent", "npo"])
def test_a_loss_that_is_not_a_number(room: Path, method: str, steps: int) -> None:
    words = unlearn(room, method=method, set="learning_rate=1e30", steps=steps)
    line = mistake(room, words)
    assert "nothing was saved" in line and "Lower the learning rate (now 1e+30)" in line


def test_a_model_whose_weights_are_not_numbers(room: Path, trained: Organism) -> None:
    damaged = trained.full.copy("damaged")
    with torch.no_grad():
        damaged.network.get_input_embeddings().weight.fill_(torch.nan)
    damaged.save(room / "damaged")
    for words in (unlearn(room, model=room / "damaged"), audit(room, model=room / "damaged")):
        before = bytes_of(room)
        code, out, err = invoke(*words)
        assert (code, out) == (2, "") and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
        assert not {"change", "run/scores.parquet", "run/audit.json"} & (set(bytes_of(room)) - set(before))


# Places.


@pytest.mark.parametrize("verb", [unlearn, audit])
def test_a_place_that_cannot_be_written(room: Path, verb: object) -> None:
    for out in (room / "forget.jsonl", room / "forget.jsonl" / "deeper"):
        assert "forget.jsonl is a file; choose another folder" in only_line(room, verb(room, out=out))  # type: ignore[operator]


def test_a_place_that_is_not_ours_to_replace(room: Path) -> None:
    (room / "thesis").mkdir()
    (room / "thesis" / "thesis.tex").write_text("years of work")
    (room / "spec.yaml").write_text(yaml.safe_dump(TINY))
    for words in (
        unlearn(room, out=room / "thesis"),
        unlearn(room, out=room),
        unlearn(room, save_model=room / "thesis"),
        audit(room, out=room / "thesis"),
        ["train", room / "thesis"],
        ["train", room],
        ["run", room / "spec.yaml", "--out", room],
    ):
        assert "holds other files, which would be lost" in only_line(room, words)


def test_the_model_to_start_from_is_not_written_over(room: Path) -> None:
    assert "which would be lost" in only_line(room, unlearn(room, save_model=room / "full"))


def test_a_run_folder_of_another_audit(room: Path) -> None:
    assert invoke(*audit(room))[0] == 1
    assert "holds a run of another specification" in mistake(room, audit(room, seed=1))


# Specifications.


@pytest.mark.parametrize("verb", [["run"], ["train", "--spec"]])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (yaml.safe_dump(TINY | {"metods": ["npo"]}), "spec.yaml: unknown key 'metods'; did you mean 'methods'?"),
        (yaml.safe_dump(TINY | {"methods": ["npoo"]}), "spec.yaml: methods.0: unknown method 'npoo'"),
        (yaml.safe_dump(TINY | {"data": {"kind": "tofu", "path": "no/such/folder"}}), "there is no such file"),
        (yaml.safe_dump(TINY | {"model": {"kind": "load", "path": "no/such/model"}}), "there is no such model folder"),
        ("data: [", "spec.yaml: is not valid YAML"),
        ("", "spec.yaml: a specification is a mapping"),
    ],
)
def test_a_specification_with_a_mistake(room: Path, verb: list[str], text: str, says: str) -> None:
    (room / "spec.yaml").write_text(text)
    words = ["run", room / "spec.yaml", "--out", room / "new"]
    if verb[0] == "train":
        words = ["train", room / "new", "--spec", room / "spec.yaml"]
    assert says in only_line(room, words)


def test_a_specification_that_is_not_there_and_data_it_has_no_place_for(room: Path) -> None:
    assert "spec.yaml: cannot be read (No such file" in only_line(room, ["run", room / "spec.yaml"])
    (room / "spec.yaml").write_text(yaml.safe_dump(TINY))
    assert "has no path" in only_line(room, ["run", room / "spec.yaml", "--data", "x", "--out", room / "new"])


# A full disk.


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of 200 kB."""
    place = tmp_path_factory.mktemp("disk")
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("what", ["update", "checkpoint", "model", "audit"])
def test_a_full_disk(room: Path, small_disk: Path, what: str) -> None:
    words = {
        "update": unlearn(room, out=small_disk / "change"),
        "checkpoint": unlearn(room, out=small_disk / "change", steps=6),
        "model": unlearn(room, save_model=small_disk / "changed"),
        "audit": audit(room, out=small_disk / "run"),
    }[what]
    if what == "audit":
        (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 8192))
    code, out, err = invoke(*words)
    lines = err.splitlines()
    assert (code, out) == (2, "") and lines[-1].startswith("error: ") and "Traceback" not in err
    assert "disk is full" in lines[-1] or "No space left" in lines[-1] or "free space" in lines[-1]
    left = {name for name in bytes_of(small_disk) if name != "filler"}
    assert not [name for name in left if "change" in name]
    # What the run folder holds is whole: it can be gone on with.
    assert left <= {
        "run",
        "run/lens",
        *(f"run/{name}" for name in ("run.json", "ledger.jsonl", "scores.parquet", "audit.json")),
    }
