"""What a piece of work takes: seconds on the clock and of the processor, by stage, and memory above what was held."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Stopwatch:
    """Seconds of named stages on the clock and of the processor; kronfluence takes it for its profiler."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextmanager
    def profile(self, stage: str) -> Iterator[None]:
        """Add what happens inside to the stage's seconds."""
        started, worked = now(), time.process_time()
        yield
        self.wall[stage] = self.wall.get(stage, 0.0) + now() - started
        self.cpu[stage] = self.cpu.get(stage, 0.0) + time.process_time() - worked

    def summary(self) -> str:
        """Nothing to be written to a file."""
        return ""


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """MiB: the peak of what happens inside, above what was held before it (`fit`) and in all (`process`)."""
    memory: dict[str, float] = {}
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is now
    before = _memory("VmRSS")
    yield memory
    peak = _memory("VmHWM")
    memory |= {"fit": (peak - before) / 2**20, "process": peak / 2**20}


def now() -> float:
    """Seconds on the clock, after all that was started."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(which: str) -> int:
    """Bytes held now (VmRSS) or at most so far (VmHWM)."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated() if which == "VmRSS" else torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024
