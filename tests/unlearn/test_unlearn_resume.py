"""A run that is killed outright goes on from its checkpoint to the same bytes."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from palimpsest.data.records import QA
from palimpsest.models.language_model import load
from palimpsest.unlearn import descent
from palimpsest.unlearn.methods import METHODS
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop

NAMES = ("npo", "random_labels")
STOP = Stop(60, measure_every=3)
PATIENCE = 120
"""Seconds for a process to import torch and take its first steps on a busy machine."""

SCRIPT = """
import json, sys, time, torch
from palimpsest.data.records import QA
from palimpsest.models.language_model import load
from palimpsest.unlearn import descent
from palimpsest.unlearn.methods import METHODS
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop

torch.set_num_threads(1)
step = descent._Run._step
descent._Run._step = lambda run: (time.sleep(0.05), step(run))  # so that the run cannot end before it is killed
model, rows, name, folder = sys.argv[1:]
sets = [tuple(QA(**row) for row in part) for part in json.load(open(rows))]
METHODS[name]().run(load(model, check=False), Request(*sets), Stop(60, measure_every=3), folder=folder)
"""


def plain(record: QA) -> dict:
    """What JSON gives back unchanged and the losses read."""
    return {key: value for key, value in asdict(record).items() if isinstance(value, str)}


@pytest.fixture(scope="module")
def request_and_file(trained, tmp_path_factory) -> tuple[Request, Path]:
    whole = trained.request
    sets = [
        [plain(record) for record in part]
        for part in (whole.forget, whole.retain, whole.retain_held_out, whole.retain_unseen)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(sets))
    return Request(*(tuple(QA(**row) for row in part) for part in sets)), path


@pytest.fixture(scope="module")
def killed(trained, request_and_file, tmp_path_factory) -> dict[str, Path]:
    """Checkpoint folders of runs that were killed on their way, both started at once."""
    room = tmp_path_factory.mktemp("killed")
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", SCRIPT, trained.folder / "full", request_and_file[1], name, room / name],
            stderr=subprocess.DEVNULL,
        )
        for name in NAMES
    }
    started = time.monotonic()
    try:
        waiting = set(running)
        while waiting:
            for name in sorted(waiting):
                if (room / name).exists():
                    running[name].send_signal(signal.SIGKILL)
                    waiting.remove(name)
                assert running[name].poll() in (None, -signal.SIGKILL), f"{name} ended before it was killed"
            assert time.monotonic() - started < PATIENCE, f"{waiting} wrote no checkpoint"
            time.sleep(0.002)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    assert {process.returncode for process in running.values()} == {-signal.SIGKILL}
    return {name: room / name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_ends_with_the_bytes_of_an_uninterrupted_one(
    name, trained, killed, request_and_file, tmp_path, monkeypatch
):
    request, model = request_and_file[0], load(trained.folder / "full", check=False)
    whole = METHODS[name]().run(model, request, STOP)

    step, taken = descent._Run._step, []
    monkeypatch.setattr(descent._Run, "_step", lambda run: (taken.append(run.step), step(run)))
    resumed = METHODS[name]().run(model, request, STOP, folder=killed[name])

    assert 3 <= taken[0] < 60 and taken == list(range(taken[0], 60)), "it did not go on from a checkpoint"
    one, other = whole.save(tmp_path / "whole"), resumed.save(tmp_path / "resumed")
    assert (one / "delta.safetensors").read_bytes() == (other / "delta.safetensors").read_bytes()
    assert resumed.provenance["trace"] == whole.provenance["trace"]
    assert resumed.identity == whole.identity
