"""What must be forgotten and what must be kept, each with rows held out of training to judge by."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, records_hash, reworded
from palimpsest.errors import DataError
from palimpsest.files import content_hash


@dataclass(frozen=True)
class Request:
    """A forget set, a retain set, and retain rows that no method trains on.

    The held-out side of the forget set is its rewordings (`forget_reworded`): the same facts, asked as never trained.
    """

    forget: tuple[QA, ...]
    retain: tuple[QA, ...]
    """Retain rows that methods may train on."""
    retain_held_out: tuple[QA, ...]
    """Retain rows that no method trains on, but that budgets and stopping look at."""
    retain_unseen: tuple[QA, ...]
    """Retain rows that nothing looks at before the audit: what forgetting cost elsewhere."""
    template: Template = "plain"

    def __post_init__(self) -> None:
        for name, rows in self._sets().items():
            if not rows:
                raise DataError(f"the request's {name} set is empty; nothing can be trained or measured without it")

    @staticmethod
    def split(forget: Sequence[QA], retain: Sequence[QA], *, template: Template = "plain", seed: int = 0) -> "Request":
        """Part the retain set by subject (rows without one singly): half to train on, a sixth held out, a third unseen.

        Raises:
            DataError: the retain set has fewer than three subjects.
        """
        subjects = sorted({_subject(record) for record in retain})
        n = len(subjects)
        if n < 3:
            raise DataError(
                f"the retain set has {n} {'subject' if n == 1 else 'subjects'}; at least 3 are needed, to train, to "
                "stop and to judge on"
            )
        random.Random(f"retain split/{seed}").shuffle(subjects)
        unseen, held_out = set(subjects[: max(1, n // 3)]), set(subjects[max(1, n // 3) : max(2, n // 2)])
        parts: dict[str, list[QA]] = {"unseen": [], "held_out": [], "train": []}
        for record in retain:
            subject = _subject(record)
            parts["unseen" if subject in unseen else "held_out" if subject in held_out else "train"].append(record)
        return Request(tuple(forget), tuple(parts["train"]), tuple(parts["held_out"]), tuple(parts["unseen"]), template)

    @cached_property
    def forget_reworded(self) -> tuple[QA, ...]:
        """The forget set's held-out wordings; empty when the rows have none."""
        return tuple(reworded(list(self.forget)))

    @property
    def all_retain(self) -> tuple[QA, ...]:
        """The whole retain set, however it was split."""
        return (*self.retain, *self.retain_held_out, *self.retain_unseen)

    @property
    def hash(self) -> str:
        """SHA-256 over every row and the template."""
        return content_hash([*(records_hash(list(rows)) for rows in self._sets().values()), self.template])

    def summary(self) -> dict[str, Any]:
        """Row counts and hashes, for provenance."""
        return {
            name: {
                "rows": len(rows),
                "subjects": len({_subject(row) for row in rows}),
                "sha256": records_hash(list(rows)),
            }
            for name, rows in self._sets().items()
        } | {"template": self.template}

    def _sets(self) -> dict[str, tuple[QA, ...]]:
        return {
            "forget": self.forget,
            "retain": self.retain,
            "retain_held_out": self.retain_held_out,
            "retain_unseen": self.retain_unseen,
        }


def _subject(record: QA) -> str:
    """Whom or what a row is about; a row without a subject is its own."""
    return record.subject or record.id or record.question
