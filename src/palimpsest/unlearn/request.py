"""What must be forgotten and what must be kept, each with rows held out of training to judge by."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, Choice, Record, Text, records_hash, reworded, subject_of
from palimpsest.errors import DataError
from palimpsest.files import content_hash


@dataclass(frozen=True)
class Request:
    """A forget set, a retain set, and retain rows that no method trains on.

    Rows are questions with answers or passages, and one set may hold other rows than the next. What needs a question
    (rewordings, greedy answers, truth ratios) is left out where there is none.

    The held-out side of the forget set is its rewordings (`forget_reworded`): the same facts, asked as never trained.
    """

    forget: tuple[Text, ...]
    retain: tuple[Text, ...]
    """Retain rows that methods may train on."""
    retain_held_out: tuple[Text, ...]
    """Retain rows that no method trains on, but that budgets and stopping look at."""
    retain_unseen: tuple[Text, ...]
    """Retain rows that nothing looks at before the audit: what forgetting cost elsewhere."""
    template: Template = "plain"
    choices: tuple[Choice, ...] = ()
    """Multiple-choice questions about what is to be forgotten. No method trains on them; stopping may look at them."""
    utility: tuple[Choice, ...] = ()
    """Multiple-choice questions about what is to be kept, for the audit alone."""

    def __post_init__(self) -> None:
        for name, rows in self._texts().items():
            if not rows:
                raise DataError(f"the request's {name} set is empty; nothing can be trained or measured without it")

    @staticmethod
    def split(
        forget: Sequence[Text], retain: Sequence[Text], *, template: Template = "plain", seed: int = 0
    ) -> "Request":
        """Part the retain set by subject (rows without one singly): half to train on, a sixth held out, a third unseen.

        Raises:
            DataError: the retain set has fewer than three subjects.
        """
        subjects = sorted({subject_of(record) for record in retain})
        n = len(subjects)
        if n < 3:
            raise DataError(
                f"the retain set has {n} {'subject' if n == 1 else 'subjects'}; at least 3 are needed, to train, to "
                "stop and to judge on"
            )
        random.Random(f"retain split/{seed}").shuffle(subjects)
        unseen, held_out = set(subjects[: max(1, n // 3)]), set(subjects[max(1, n // 3) : max(2, n // 2)])
        parts: dict[str, list[Text]] = {"unseen": [], "held_out": [], "train": []}
        for record in retain:
            subject = subject_of(record)
            parts["unseen" if subject in unseen else "held_out" if subject in held_out else "train"].append(record)
        return Request(tuple(forget), tuple(parts["train"]), tuple(parts["held_out"]), tuple(parts["unseen"]), template)

    @cached_property
    def forget_reworded(self) -> tuple[QA, ...]:
        """The forget set's held-out wordings; empty when the rows have none."""
        return tuple(reworded(self.forget))

    @property
    def all_retain(self) -> tuple[Text, ...]:
        """The whole retain set, however it was split."""
        return (*self.retain, *self.retain_held_out, *self.retain_unseen)

    @property
    def hash(self) -> str:
        """SHA-256 over every row and the template."""
        choices = {name: records_hash(rows) for name, rows in self._choices().items()}
        return content_hash(
            [*map(records_hash, self._texts().values()), self.template, *([choices] if choices else [])]
        )

    def summary(self) -> dict[str, Any]:
        """Row counts and hashes, for provenance."""
        return {
            name: {
                "rows": len(rows),
                "subjects": len({subject_of(row) for row in rows}),
                "sha256": records_hash(rows),
            }
            for name, rows in (self._texts() | self._choices()).items()
        } | {"template": self.template}

    def _texts(self) -> dict[str, Sequence[Record]]:
        return {
            "forget": self.forget,
            "retain": self.retain,
            "retain_held_out": self.retain_held_out,
            "retain_unseen": self.retain_unseen,
        }

    def _choices(self) -> dict[str, Sequence[Record]]:
        return {name: rows for name, rows in (("choices", self.choices), ("utility", self.utility)) if rows}
