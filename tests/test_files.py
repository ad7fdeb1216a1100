"""Files are written whole or not at all: on a full disk, in a forbidden place, and when the writer fails half way."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.errors import StorageError
from palimpsest.files import atomic_path, canonical_json, content_hash, file_hash, write_json, write_text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=10,
)


def write_folder(path: Path, **files: str) -> None:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_text(errors="replace")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# The atomic path.


def test_a_file_appears_whole_and_takes_the_old_ones_place(tmp_path):
    target = tmp_path / "new" / "deep" / "file.txt"
    for text in ("first", "second"):
        with atomic_path(target) as temporary:
            temporary.write_text(text[:2])
            assert not target.exists() or target.read_text() == "first"
            temporary.write_text(text)
        assert contents(tmp_path) == {"new/deep/file.txt": text}


def test_a_folder_takes_the_place_of_the_whole_old_one(tmp_path):
    target = tmp_path / "folder"
    write_folder(target, stale="old", both="old")
    with atomic_path(target) as temporary:
        write_folder(temporary, both="new", fresh="new")
        assert contents(target) == {"stale": "old", "both": "old"}
    assert contents(tmp_path) == {"folder/both": "new", "folder/fresh": "new"}


class Enough(BaseException):
    """Like KeyboardInterrupt, no Exception."""


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, Enough])
@pytest.mark.parametrize("before", ["nothing", "file", "folder"])
def test_a_failure_half_way_leaves_what_was_there(before, failure, tmp_path):
    target = tmp_path / "target"
    if before == "file":
        target.write_text("old")
    elif before == "folder":
        write_folder(target, inside="old")
    held = contents(tmp_path)
    with pytest.raises(failure), atomic_path(target) as temporary:
        write_folder(temporary, half="new")
        raise failure
    assert contents(tmp_path) == held
    assert [path.name for path in tmp_path.iterdir()] == ([] if before == "nothing" else ["target"])


def test_a_folder_does_not_take_a_files_place_nor_a_file_a_folders(tmp_path):
    (tmp_path / "file").write_text("old")
    write_folder(tmp_path / "folder", inside="old")
    held = contents(tmp_path)
    with pytest.raises(StorageError, match=r"file: cannot be written \(Not a directory\)"):
        with atomic_path(tmp_path / "file") as temporary:
            write_folder(temporary, inside="new")
    with pytest.raises(StorageError, match=r"folder: cannot be written \(Is a directory\)"):
        write_text(tmp_path / "folder", "new")
    with pytest.raises(StorageError, match=r"below: cannot be written \((File exists|Not a directory)\)"):
        write_text(tmp_path / "file" / "below", "new")
    assert contents(tmp_path) == held
    assert len(list(tmp_path.iterdir())) == 2


def test_a_writer_that_writes_nothing_is_told_so(tmp_path):
    with pytest.raises(StorageError, match="No such file"), atomic_path(tmp_path / "target"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_when_the_new_folder_cannot_be_put_in_place_the_old_one_is_put_back(tmp_path, monkeypatch):
    target = tmp_path / "target"
    write_folder(target, inside="old")
    rename = os.rename

    def fail_at_the_second(source, to):
        if Path(to) == target and Path(source).name == "target":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, to)

    monkeypatch.setattr(os, "rename", fail_at_the_second)
    with pytest.raises(StorageError, match="Input/output error"), atomic_path(target) as temporary:
        write_folder(temporary, inside="new")
    assert contents(tmp_path) == {"target/inside": "old"}


def test_a_link_to_a_folder_is_replaced_and_what_it_points_to_stays(tmp_path):
    write_folder(tmp_path / "elsewhere", inside="old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with atomic_path(tmp_path / "link") as temporary:
        write_folder(temporary, inside="new")
    assert contents(tmp_path) == {"elsewhere/inside": "old", "link/inside": "new"}
    assert not (tmp_path / "link").is_symlink()


KILLED = """
import os, signal, sys
from palimpsest.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.mkdir()
    (temporary / "inside").write_text("ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_half_way_leaves_what_was_there(tmp_path):
    target = tmp_path / "target"
    write_folder(target, inside="old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert killed.returncode == -9
    assert contents(target) == {"inside": "old"}


# Places that cannot be written.


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here, so no disk can be made that is full or read-only")
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not allowed here ({mounted.stderr.strip()})")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
    else:  # root may write everywhere but on a disk that is mounted read-only
        mount(folder, "ro")
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_read_only_folder_is_named_with_the_reason(read_only):
    for path in (read_only / "file", read_only / "deeper" / "file"):
        with pytest.raises(StorageError) as error:
            write_text(path, "text")
        message = str(error.value)
        assert message.startswith(f"{path}: cannot be written (") and "\n" not in message
        assert message.endswith("). Choose a folder that you may write to.")
    assert list(read_only.iterdir()) == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=512k")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Fill a disk up to `leave` bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(b"0" * (free - leave))


def refuses(write: Callable[[], object], path: Path, disk: Path) -> None:
    """`write` fails as it should on a full disk, and what is on the disk stays as it was."""
    held = contents(disk)
    with pytest.raises(StorageError) as error:
        write()
    assert str(error.value) == (f"{path}: the disk is full; nothing was written there. Free some space and run again.")
    assert contents(disk) == held
    assert not list(disk.rglob(f".{path.name}.*"))


def test_text_on_a_full_disk(disk):
    write_text(disk / "text", "old")
    fill(disk, leave=8192)
    refuses(lambda: write_text(disk / "text", "new" * 10_000), disk / "text", disk)
    refuses(lambda: write_json(disk / "json", ["new"] * 10_000), disk / "json", disk)
    write_text(disk / "text", "short")  # there is room for this
    assert (disk / "text").read_text() == "short"


def tiny_llama():
    from palimpsest.models.organism import Architecture, new_model
    from palimpsest.models.tokenizers import word_tokenizer

    tokenizer = word_tokenizer(["Where was Mira born? Oslo"])
    return new_model(Architecture(layers=1, width=32, mlp_width=128, heads=2), tokenizer, 0)


@pytest.mark.parametrize("leave", [0, 8192, 40_000])  # too little for the folder, the weights, the tokenizer
def test_a_model_on_a_full_disk(leave, disk):
    from palimpsest.models.language_model import load

    model = tiny_llama()
    before = model.fingerprint()
    model.save(disk / "model")
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.zero_()
    fill(disk, leave)
    refuses(lambda: model.save(disk / "model"), disk / "model", disk)
    refuses(lambda: model.save(disk / "another"), disk / "another", disk)
    assert load(disk / "model").fingerprint() == before


def test_a_checkpoint_on_a_full_disk(disk):
    from palimpsest.models.checkpoint import Checkpoints

    weights = {"weight": torch.arange(10_000.0)}
    checkpoints = Checkpoints(disk / "state", "run")
    checkpoints.save(1, weights, [])
    fill(disk, leave=16_384)
    refuses(lambda: checkpoints.save(2, weights, []), disk / "state", disk)
    found = checkpoints.load([])
    assert found.step == 1 and torch.equal(found.tensors["weight"], weights["weight"])


def test_scores_on_a_full_disk(disk):
    from palimpsest.audit.evidence import RunFolder
    from palimpsest.metrics.scores import Row

    run = RunFolder(disk / "run")
    rows = [Row("gold", "probability", f"item {number}", "Mira", number / 3) for number in range(20_000)]
    run.write_scores(rows[:10])
    fill(disk, leave=16_384)
    refuses(lambda: run.write_scores(rows), disk / "run" / "scores.parquet", disk)
    assert run.read_scores() == rows[:10]


def test_a_full_disk_without_a_disk(tmp_path, monkeypatch):
    """For where no small disk can be mounted."""
    write_text(tmp_path / "text", "old")

    def full(*_args, **_keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="the disk is full"):
        write_text(tmp_path / "text", "new")
    assert contents(tmp_path) == {"text": "old"}


# Hashes.


@given(JSON)
def test_equal_values_have_one_spelling_whatever_the_order_of_their_keys(value):
    def turned(part):
        if isinstance(part, dict):
            return {key: turned(part[key]) for key in reversed(list(part))}
        return [turned(item) for item in part] if isinstance(part, list) else part

    assert canonical_json(turned(value)) == canonical_json(value)
    assert content_hash([value]) != content_hash([value, value])


def test_known_hashes(tmp_path):
    # sha256sum of "abc", and of the nine bytes {"a":1.5} without a line feed.
    write_text(tmp_path / "abc", "abc")
    assert file_hash(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert canonical_json({"b": [1, None], "a": "ü"}) == '{"a":"ü","b":[1,null]}'
    write_text(tmp_path / "json", canonical_json({"a": 1.5}))
    assert content_hash({"a": 1.5}) == file_hash(tmp_path / "json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_have_is_never_written(value, tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "json", {"a": value})
    assert list(tmp_path.iterdir()) == []
