"""Files written whole or not at all, and the hashes by which content is known."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from palimpsest.errors import StorageError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, a file or a folder to be; it takes `path`'s name only if all went well.

    A folder that stands at `path` is replaced. On any failure the temporary file or folder is removed.

    Raises:
        StorageError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _storage_error(path, error) from error
    try:
        yield room / path.name
        _replace(room / path.name, path)
    except OSError as error:
        raise _storage_error(path, error) from error
    except Exception as error:
        # safetensors and duckdb wrap a full disk in exceptions of their own.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise _storage_error(path, error) from error
        raise
    finally:
        shutil.rmtree(room, ignore_errors=True)


def refuse_foreign_folder(folder: str | Path, mark: str) -> None:
    """Refuse to replace a folder that holds files, but not the one that shows that Palimpsest wrote it.

    Raises:
        StorageError: there are other files in the folder.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).exists():
        raise StorageError(f"{folder}: holds other files, which would be lost; choose a new or an empty folder")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def canonical_json(value: Any) -> str:
    """The one spelling of `value` that is hashed: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical spelling."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(source: Path, target: Path) -> None:
    if not (target.is_dir() and source.is_dir()):
        os.replace(source, target)
        return
    aside = source.with_name(source.name + ".old")
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except OSError:
        os.rename(aside, target)
        raise


def _storage_error(path: Path, error: BaseException) -> StorageError:
    if "No space left" in str(error) or "os error 28" in str(error):
        return StorageError(f"{path}: the disk is full; nothing was written there. Free some space and run again.")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return StorageError(f"{path}: cannot be written ({reason}). Choose a folder that you may write to.")
