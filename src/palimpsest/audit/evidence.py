"""A run folder: what was asked, every item's score, the audit drawn from them, and the ledger that vouches for it all.

run.json        the specification, seeds, package versions, hashes of model, data and code
scores.parquet  one row an item, measure and model
audit.json      the audit as data
report.html     the audit for people
ledger.jsonl    the hash chain
update/METHOD/  what unlearning changed
models/NAME/    models, known by their fingerprints
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import duckdb

from palimpsest.audit.ledger import Entry, Ledger
from palimpsest.audit.results import Audit
from palimpsest.errors import EvidenceError
from palimpsest.files import atomic_path, file_hash, write_json
from palimpsest.metrics.scores import Row

COLUMNS = ", ".join(field.name for field in fields(Row))
ROWS_FROM_JSON = """
    SELECT * FROM read_json($1, format = 'newline_delimited', columns = {
        model: 'VARCHAR', measure: 'VARCHAR', item: 'VARCHAR', cluster: 'VARCHAR', value: 'DOUBLE'})
"""


class RunFolder:
    """The evidence of one run. The folder is made when the first thing is written; all that is written is recorded."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.ledger = Ledger(self.path / "ledger.jsonl")

    def record(self, event: str, subject: str = "", **facts: Any) -> Entry:
        """Remember JSON facts, e.g. `record("model saved", "models/gold", fingerprint=...)`.

        Files under a folder so recorded count as known, though not by their content.
        """
        return self.ledger.append(event, subject, facts=facts)

    def add_file(self, path: str | Path, event: str) -> Entry:
        """Record a file by its content; a newer record of it takes the older one's place.

        Args:
            path: relative to the run folder, or with the run folder in front.
            event: what happened, e.g. `report written`.
        """
        path = Path(path)
        name = path.relative_to(self.path) if path.is_relative_to(self.path) else path
        return self.ledger.append(event, name.as_posix(), facts=None, sha256=file_hash(self.path / name))

    def add_folder(self, path: str | Path, event: str) -> list[Entry]:
        """Record every file under a folder, in the order of their paths."""
        path = Path(path)
        folder = path if path.is_relative_to(self.path) else self.path / path
        return [self.add_file(file, event) for file in sorted(folder.rglob("*")) if file.is_file()]

    def write_run(
        self,
        spec: Mapping[str, Any],
        *,
        seeds: Mapping[str, int],
        environment: Mapping[str, str],
        hashes: Mapping[str, str],
    ) -> Path:
        """Write `run.json`: what is needed to make this run again.

        Args:
            spec: the resolved specification.
            seeds: by what they were used for.
            environment: `palimpsest.audit.environment.environment()`.
            hashes: of models (fingerprints) and data, by name.
        """
        run = {"spec": dict(spec), "seeds": dict(seeds), "environment": dict(environment), "hashes": dict(hashes)}
        return self._write_json("run.json", run, "run described")

    def read_run(self) -> dict[str, Any]:
        """What `write_run` wrote.

        Raises:
            EvidenceError: it is missing or is not JSON.
        """
        run: dict[str, Any] = self._read_json("run.json")
        return run

    def write_scores(self, rows: Sequence[Row]) -> Path:
        """Write `scores.parquet`, the rows in their order.

        Raises:
            EvidenceError: a value is not finite.
        """
        path = self.path / "scores.parquet"
        with atomic_path(path) as temporary, tempfile.TemporaryDirectory() as room:
            lines = Path(room) / "rows.jsonl"
            lines.write_text("".join(f"{_json_row(row)}\n" for row in rows), encoding="utf-8")
            with duckdb.connect() as connection:
                connection.execute(
                    f"COPY ({ROWS_FROM_JSON}) TO $2 (FORMAT parquet, COMPRESSION zstd)", [str(lines), str(temporary)]
                )
        self.add_file(path, "scores written")
        return path

    def read_scores(self) -> list[Row]:
        """The rows of `scores.parquet` in the order in which they were written.

        Raises:
            EvidenceError: the file is missing, is not a table of scores, or holds a value that is not finite.
        """
        path = self._existing("scores.parquet")
        try:
            with duckdb.connect() as connection:
                found = connection.execute(f"SELECT {COLUMNS} FROM read_parquet($1)", [str(path)]).fetchall()
        except duckdb.Error as error:
            raise EvidenceError(f"{path}: cannot be read as a table of scores: {str(error).splitlines()[0]}") from error
        rows = [Row(*values) for values in found]
        for row in rows:
            _require_finite(row)
        return rows

    def write_audit(self, audit: Audit) -> Path:
        """Write `audit.json`."""
        return self._write_json("audit.json", audit.to_json(), "audit written")

    def read_audit(self) -> Audit:
        """What `write_audit` wrote.

        Raises:
            EvidenceError: the file is missing or does not hold an audit.
        """
        data = self._read_json("audit.json")
        try:
            return Audit.from_json(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise EvidenceError(f"{self.path / 'audit.json'}: does not hold an audit ({error!r})") from error

    def _write_json(self, name: str, value: Any, event: str) -> Path:
        path = self.path / name
        write_json(path, value)
        self.add_file(path, event)
        return path

    def _read_json(self, name: str) -> Any:
        path = self._existing(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise EvidenceError(
                f"{path}: is not JSON ({error}); it was changed or cut short after it was written"
            ) from error

    def _existing(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise EvidenceError(f"{path}: there is no such file; give the folder of a finished run")
        return path


def _json_row(row: Row) -> str:
    _require_finite(row)
    return json.dumps(asdict(row))


def _require_finite(row: Row) -> None:
    if not (isinstance(row.value, (int, float)) and math.isfinite(row.value)):
        raise EvidenceError(
            f"scores.parquet: model {row.model!r}, measure {row.measure!r}, item {row.item!r}: "
            f"the value is {row.value}, and a score must be a finite number"
        )
