"""What TRL's trainers have in common here: on a CPU, in silence, and without a trace. Needs TRL and datasets."""

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.trainer_callback import PrinterCallback

from palimpsest.errors import SpecError
from palimpsest.rewards.randomness import drawing_from

try:
    import datasets  # type: ignore[import-not-found,import-untyped]
    from trl import (  # type: ignore[import-not-found,import-untyped]
        GRPOConfig,
        GRPOTrainer,
        RewardConfig,
        RewardTrainer,
    )
except ImportError as error:
    raise SpecError(f"language rewards need {error.name}; pip install 'palimpsest[lm]'") from None

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "ON_CPU",
    "RewardConfig",
    "RewardTrainer",
    "rows",
    "train_in_silence",
    "trainers_folder",
]

ON_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
}
"""Settings of a trainer; TRL's defaults are bf16 and recomputed activations."""


@contextmanager
def trainers_folder(seed: int) -> Iterator[str]:
    """A folder that is gone afterwards; global draws follow from the seed, and no bar is drawn.

    TRL still uses names that transformers calls deprecated, which no user can mend.
    """
    drawn = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with drawing_from(seed), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield folder
    finally:
        if drawn:
            datasets.enable_progress_bars()


def rows(columns: Mapping[str, Sequence[Any]]) -> Any:
    """Columns as a data set."""
    return datasets.Dataset.from_dict(dict(columns))


def train_in_silence(trainer: Any) -> list[dict[str, Any]]:
    """Train, and return the logs, which would otherwise go to standard output too."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs: list[dict[str, Any]] = trainer.state.log_history
    return logs
