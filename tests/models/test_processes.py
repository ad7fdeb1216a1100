"""Work in processes of its own: it ends with whoever started it, and one line says why."""

import os
import re
import signal
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import pytest

from palimpsest.errors import TrainingError
from palimpsest.models.processes import side_by_side
from palimpsest.progress import Report


class Task:
    """What a worker is to do, found by its name in this module."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder

    def __call__(self, report: Report) -> None:
        (self.folder / f"{self.kind}-began").touch()
        report(1, 5, "began")
        if self.kind == "fails":
            while not (self.folder / "never ends-began").exists():
                time.sleep(0.01)
            raise TrainingError("step 2 of 5: the loss is nan")
        if self.kind == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "never ends":
            self._go_on(report)
        report(5, 5, "finished")
        (self.folder / f"{self.kind}-ended").touch()

    def _go_on(self, report: Report) -> None:
        try:
            while True:
                time.sleep(0.01)
                report(2, 5, "still there")
        except BrokenPipeError as error:
            raise TrainingError("this one fails too, and nobody listens") from error


@pytest.fixture(autouse=True)
def _nobody_stays() -> Iterator[None]:
    yield
    assert active_children() == []


def test_one_that_fails_stops_the_others_and_its_own_error_is_raised(tmp_path, capfd):
    started = time.monotonic()
    with pytest.raises(TrainingError, match=r"^step 2 of 5: the loss is nan$"):
        side_by_side({f"training {kind}": Task(kind, tmp_path) for kind in ("never ends", "fails")})
    assert time.monotonic() - started < 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fails-began", "never ends-began"]
    said = capfd.readouterr().err
    assert "training fails" in said and "Traceback" not in said


def test_one_that_dies_is_said_so_and_one_that_ends_has_ended(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    message = "training is killed: its process died with exit code -9 (-9: killed, often for want of memory); run again"
    with pytest.raises(TrainingError, match="^" + re.escape(message)):
        side_by_side({"training is killed": Task("is killed", tmp_path)})
    side_by_side({"training ends": Task("ends", tmp_path)})
    assert (tmp_path / "ends-ended").exists() and not (tmp_path / "is killed-ended").exists()
    assert signal.getsignal(signal.SIGINT) is before
