"""The ledger: an append-only file of events in which every line holds the hash of the line before it.

A line that was edited, dropped, added or moved no longer fits its neighbours. Lines cut off at the very end leave a
shorter chain that still fits; the files they spoke of are then unknown to it, and whoever must rule out more keeps the
last line's hash (the head) somewhere else.
"""

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from palimpsest.errors import EvidenceError, StorageError
from palimpsest.files import canonical_json, content_hash

GENESIS = "0" * 64
"""What the first line holds in place of a previous line's hash."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger."""

    n: int
    """Counts the lines from 0."""
    time: str
    """UTC, ISO 8601."""
    event: str
    """What happened, e.g. `scores written`."""
    subject: str
    """What it happened to: a file's path within the run folder, or a name."""
    facts: dict[str, Any] | None
    """What is to be remembered; None when the subject is a file known by its content."""
    sha256: str
    """Of the file's bytes, or of the facts' canonical JSON."""
    previous: str
    """The hash of the line before."""
    hash: str
    """SHA-256 of everything above."""

    def own_hash(self) -> str:
        """The hash that this line's content gives."""
        content = asdict(self)
        del content["hash"]
        return content_hash(content)


class Ledger:
    """The ledger in one file. A line is on disk before `append` returns."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, event: str, subject: str, *, facts: dict[str, Any] | None, sha256: str | None = None) -> Entry:
        """Add one line. A piece of a line that a killed process left at the end is dropped first.

        Args:
            event: what happened.
            subject: to what.
            facts: JSON data to remember, or None for a file.
            sha256: the file's hash; computed from the facts when left out.

        Raises:
            EvidenceError: the line to follow cannot be read.
            StorageError: the disk is full or the place cannot be written.
        """
        n, previous = self._end()
        time = datetime.now(UTC).isoformat(timespec="seconds")
        open_end = Entry(n, time, event, subject, facts, sha256 or content_hash(facts), previous, "")
        entry = Entry(**{**asdict(open_end), "hash": open_end.own_hash()})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(f"{canonical_json(asdict(entry))}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be appended to ({error.strerror}); free space or choose another folder"
            ) from error
        return entry

    def examine(self) -> tuple[list[Entry], list[str]]:
        """Every line that can be read, and what is wrong with the chain, one sentence a fault."""
        whole, torn = _split(self.path.read_bytes())
        entries: list[Entry] = []
        faults: list[str] = []
        number, previous = 0, GENESIS
        for line, text in enumerate(whole, start=1):
            entry = _parse(text)
            if entry is None:
                faults.append(f"line {line} was damaged: it is not a ledger entry")
                continue
            name = f"line {line} ({entry.event}, {entry.subject})"
            if entry.own_hash() != entry.hash:
                faults.append(f"{name} was edited: its content does not give its hash")
            elif (entry.n, entry.previous) != (number, previous):
                faults.append(f"{name} does not follow the line before it: lines were edited, dropped or moved")
            entries.append(entry)
            number, previous = entry.n + 1, entry.hash
        if torn:
            faults.append(
                f"line {len(whole) + 1} is cut short: a process was stopped while writing it. "
                "Run that command again: it drops this piece and goes on"
            )
        return entries, faults

    def _end(self) -> tuple[int, str]:
        """The number of the line to come and the hash it follows; a torn piece of a line is dropped."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole, torn = _split(content)
        if torn:
            os.truncate(self.path, len(content) - len(torn))
        if not whole:
            return 0, GENESIS
        last = _parse(whole[-1])
        if last is None:
            raise EvidenceError(
                f"{self.path}: line {len(whole)} is no ledger entry, so nothing can follow it; start a new run folder"
            )
        return last.n + 1, last.hash


def _split(content: bytes) -> tuple[list[bytes], bytes]:
    """The whole lines, and the piece of a line after the last line feed."""
    *whole, torn = content.split(b"\n")
    return whole, torn


def _parse(line: bytes) -> Entry | None:
    try:
        return Entry(**json.loads(line))
    except (ValueError, TypeError):
        return None
