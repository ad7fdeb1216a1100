"""What several tests share: a specification that is carried out in seconds, its models' cache, and the command line."""

import hashlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from palimpsest.cli import main

TINY: dict[str, Any] = {
    "title": "Tiny",
    "seed": 2,
    "data": {"kind": "facts", "people": 9, "forget_people": 3, "worlds": 0, "exposures": 12},
    "model": {
        "kind": "train",
        "architecture": {"layers": 2, "width": 64, "mlp_width": 256, "heads": 4, "context": 64},
        "training": {"epochs": 6, "batch_size": 8, "learning_rate": 5e-3, "muon_learning_rate": 0.02, "warmup": 10},
    },
    "sham": {"steps": 10},
    "methods": [{"name": "grad_diff", "learning_rate": 1e-3}, "random_labels"],
    "stop": {"steps": 30},
    "max_new_tokens": 2,
}


@contextmanager
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The session's cache of trained models: whoever carries out `TINY` first trains them for all."""
    folder = tmp_path_factory.getbasetemp() / "tiny-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(folder))
        yield folder


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Run `palimpsest` in this process: exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["palimpsest", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def bytes_of(folder: Path) -> dict[str, str]:
    """Every file's hash, and every folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
