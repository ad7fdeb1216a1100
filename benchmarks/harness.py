"""Two sides of a comparison, run in turn, and the one JSON object that every benchmark prints last."""

import json
import platform
import statistics
import time
from collections.abc import Callable

import torch


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
