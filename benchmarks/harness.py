"""Two sides of a comparison, run in turn; the peer's packages; the one JSON object that every benchmark prints last."""

import hashlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from palimpsest.files import atomic_path
from palimpsest.models.organism import cache_folder


def in_turn(
    ours: Callable[[], float], peers: Callable[[], float], *, runs: int = 5
) -> tuple[list[float], list[float], float]:
    """Seconds of each run of both sides in turn, and the largest relative difference of their results."""
    seconds: tuple[list[float], list[float]] = ([], [])
    difference = 0.0
    for _ in range(runs):
        results = []
        for side, times in zip((ours, peers), seconds, strict=True):
            started = time.perf_counter()
            results.append(side())
            times.append(time.perf_counter() - started)
        difference = max(difference, abs(results[0] - results[1]) / max(abs(results[1]), 1e-12))
    return *seconds, difference


def report(what: str, peer: str, ours: list[float], peers: list[float], agreement: float, **more: object) -> None:
    """Print the comparison: `ratio` is the peer's time over ours, above 1 where we are faster."""
    ratios = [theirs / mine for mine, theirs in zip(ours, peers, strict=True)]
    print(
        json.dumps(
            {
                "what": what,
                "peer": peer,
                "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
                "agreement": agreement,
                "seconds": {"ours": statistics.median(ours), "peer": statistics.median(peers)},
                **more,
                "machine": {
                    "platform": platform.platform(),
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                },
            }
        )
    )


def peer_packages(requirements: str) -> Path:
    """A folder with the packages of a file beside this one, and nothing that they depend on; made once."""
    path = Path(__file__).with_name(requirements)
    folder = cache_folder() / "benchmarks" / f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    if not folder.exists():
        with atomic_path(folder) as temporary:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--target", str(temporary), "-r", str(path)], check=True)
    return folder
