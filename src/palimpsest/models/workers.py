"""Several processes that share one pass over rows: each takes every n-th row, and sums are added once at the end.

Under `torchrun` or `accelerate launch` the environment says who is who; otherwise there is one worker.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from palimpsest.data.batches import Batch, Encoded, collate


@dataclass(frozen=True)
class Workers:
    """This process among all."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def here() -> "Workers":
        """As the launcher says; the process group is made if nobody has made it yet."""
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return Workers(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Workers()

    def batches(self, encoded: Sequence[Encoded], batch_size: int) -> Iterator[Batch]:
        """This worker's rows once, rows of like length together; `Batch.rows` counts over all workers' rows."""
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row].ids))[self.rank :: self.count]
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            yield collate([encoded[row] for row in rows], rows)

    def all(self, here: bool) -> bool:
        """Whether it is so at every worker."""
        if self.count == 1:
            return here
        answers = [False] * self.count
        dist.all_gather_object(answers, here)
        return all(answers)

    def add(self, sums: Iterable[Tensor]) -> None:
        """Replace each worker's sums by those of all, in place: one reduction a tensor."""
        if self.count > 1:
            for tensor in sums:
                dist.all_reduce(tensor)
