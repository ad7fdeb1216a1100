"""The tuned-lens package's own training, for tuned_lens.py, which starts this with the package's requirements alone.

It is `Train(...).execute()` as it stands. Looked at, not changed, are the batches, as it sends each to the device, and
the time and memory from where the lens is made, which is after model and texts were loaded. With --fp32 the autocast to
bf16 that its loop opens is switched off.
"""

import argparse
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tuned_lens import TunedLens
from tuned_lens.scripts import ingredients
from tuned_lens.scripts.train_loop import Train
from usage import Stopwatch, peak_memory

TAKEN = "fit"
WARM = 16
"""Tokens of the run before, so that nothing is made ready in what is measured."""


@dataclass
class Listening(ingredients.Distributed):
    """Notes every batch that goes to the device, and when."""

    batches: list[Tensor] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)

    def send_to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As theirs does."""
        self.batches.append(batch["input_ids"])
        self.marks.append(time.process_time())
        return super().send_to_device(batch)


class Measured(Train):
    """Notes what is taken from where the lens is made."""

    def get_lens(self, model: Any) -> TunedLens:
        """As theirs does."""
        self.clock, self.rest = Stopwatch(), ExitStack()
        self.memory = self.rest.enter_context(peak_memory())
        self.rest.enter_context(self.clock.profile(TAKEN))
        return super().get_lens(model)


def main() -> None:
    """Train a lens; its folder and its batches go into the folder, what it took to standard output as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="JSON lines with a field text")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tokens-per-step", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--fp32", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.fp32:
        torch.autocast = partial(torch.autocast, enabled=False)  # type: ignore[misc]
    _train(arguments, arguments.folder / "warm", steps=1, tokens_per_step=WARM, max_length=WARM)
    train = _train(arguments, arguments.folder / "lens", arguments.steps, arguments.tokens_per_step)
    listening: Any = train.dist
    rows = torch.cat(listening.batches)
    save_file({"rows": rows}, arguments.folder / "batches.safetensors")
    between = listening.marks[-1] - listening.marks[0]
    print(
        json.dumps(
            {
                "seconds": train.clock.wall[TAKEN],
                "cpu": train.clock.cpu[TAKEN],
                "memory": train.memory,
                "tokens_per_cpu_second": rows[:-1].numel() / between,
            }
        )
    )


def _train(
    arguments: argparse.Namespace, folder: Path, steps: int, tokens_per_step: int, max_length: int = 2048
) -> Measured:
    train = Measured(
        ingredients.Model(str(arguments.model)),
        ingredients.Data([str(arguments.texts)], max_length=max_length),
        ingredients.Optimizer(),
        Listening(),
        folder,
        num_steps=steps,
        tokens_per_step=tokens_per_step,
    )
    train.execute()
    train.rest.close()
    return train


if __name__ == "__main__":
    main()
