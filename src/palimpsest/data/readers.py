"""Users' files as records, and records as a file: JSON lines, JSON, CSV, Parquet, plain text, the Hugging Face hub.

A row is numbered from 1: the line of a JSON-lines or text file as an editor shows it, the element of a JSON array, the
data row of a table (a CSV's header is not counted), the paragraph of a text.
"""

import csv
import glob
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import duckdb

from palimpsest.data.records import QA, Record
from palimpsest.data.schemas import LISTS, Fields, Format, check_format, to_record
from palimpsest.errors import DataError
from palimpsest.files import write_text

Rows = Iterator[tuple[int, Fields]]
"""Each row's number with its fields."""


def read_records(path_or_hub_id: str | Path, format: Format | None = None) -> list[Record]:
    """Read a file of records, or a data set from the hub.

    The container is known by the suffix (`.jsonl`, `.json`, `.csv`, `.parquet`, `.txt`), the schema by each row's
    fields. A `.json` file may hold an array or JSON lines. A `.txt` file gives a passage a paragraph, paragraphs being
    separated by blank lines; with `format="text"` a `.jsonl` or `.json` file of raw lines gives a passage a line, and a
    JSON array of texts (MUSE's files) a passage each. A CSV spells a list as JSON.

    A record's id is the row's own `id`, else the file's stem and the row's number: `forget10-00017`.

    Args:
        path_or_hub_id: a file, or `owner/name`, `owner/name:config`, `owner/name:config/split` on the hub; the split is
            `train` unless named.
        format: the schema that every row must keep to.

    Raises:
        DataError: no such file, a container or row that cannot be read, two rows of one id, no rows at all. The message
            names file, row and field.
    """
    check_format(format)
    name = str(path_or_hub_id)
    path = Path(path_or_hub_id)
    if path.exists():
        return _records(name, path.stem, file_rows(path, format), format)
    hub_id = _HUB_ID.fullmatch(name)
    if path.suffix.lower() in CONTAINERS or not hub_id:
        raise DataError(f"{name}: there is no such file; give a file, or a hub id such as owner/name")
    dataset, config, split = hub_id.groups()
    stem = "-".join(part for part in (dataset.split("/")[1], config, split) if part)
    return _records(name, stem, _hub_rows(name, dataset, config, split or "train"), format)


def write_records(records: Iterable[Record], path: str | Path) -> None:
    """Write records as JSON lines that `read_records` gives back exactly, as long as every record has an id of its own.

    Raises:
        DataError: `path` does not end in .jsonl.
        StorageError: the file cannot be written; what stood there is untouched.
    """
    if Path(path).suffix != ".jsonl":
        raise DataError(f"{path}: records are written as JSON lines; name the file {Path(path).stem}.jsonl")
    filled = ({field: value for field, value in asdict(row).items() if value not in (None, (), "")} for row in records)
    write_text(path, "".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in filled))


def with_block_subjects(records: Sequence[QA], *, size: int = 20, prefix: str = "author") -> list[QA]:
    """The records with a subject for every `size` in a row: `author-000`, `author-001`, ...

    TOFU's rows name no subject, but its full, retain and forget files hold 20 questions an author, one author after the
    other (Maini et al. 2024, arXiv:2401.06121, section 2.1). The count starts anew with every call, so give files that
    are used together different prefixes.

    Raises:
        DataError: the records do not divide into blocks.
    """
    if len(records) % size:
        raise DataError(
            f"{len(records)} records do not divide into subjects of {size}; name their `subject` in the file"
        )
    return [replace(record, subject=f"{prefix}-{place // size:03d}") for place, record in enumerate(records)]


def _records(name: str, stem: str, rows: Rows, format: Format | None) -> list[Record]:
    records: list[Record] = []
    row_of: dict[str, int] = {}
    for row, fields in rows:
        try:
            record = to_record(fields, f"{stem}-{row:05d}", format)
        except DataError as error:
            raise DataError(f"{name}: row {row}: {error}") from None
        if record.id in row_of:
            raise DataError(
                f"{name}: row {row}: id {record.id!r} is that of row {row_of[record.id]} too; "
                "give each row its own, or leave out field 'id'"
            )
        row_of[record.id] = row
        records.append(record)
    if not records:
        raise DataError(f"{name}: holds no records")
    return records


def file_rows(path: Path, format: Format | None = None) -> Rows:
    """The rows of a file, whatever they hold.

    Raises:
        DataError: no such file, an unknown suffix, or rows of another schema than `format`.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file")
    suffix = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name one file in it")
    if suffix not in CONTAINERS:
        raise DataError(f"{path}: the suffix {suffix!r} is unknown; expected one of {', '.join(CONTAINERS)}")
    if suffix == ".txt" and format not in (None, "text"):
        raise DataError(f"{path}: a .txt file holds passages, not rows of schema {format}; rename JSON lines to .jsonl")
    return CONTAINERS[suffix](path, format)


def _json_rows(path: Path, format: Format | None) -> Rows:
    text = read_text(path)
    if text.lstrip().startswith("["):
        return _array_rows(path, text, format)
    if format == "text" and not text.lstrip().startswith("{"):
        return _line_rows(text)
    return _json_line_rows(path, text)


def _array_rows(path: Path, text: str, format: Format | None) -> Rows:
    try:
        elements = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {_not_json(error)}; the file begins as a JSON array of objects") from None
    for row, element in enumerate(elements, start=1):
        yield row, {"text": element} if isinstance(element, str) and format == "text" else _object(path, row, element)


def _json_line_rows(path: Path, text: str) -> Rows:
    for row, line in _lines(text):
        try:
            element = json.loads(line)
        except (ValueError, RecursionError) as error:
            shapes = "one object a line or an array of objects" + ("" if line.lstrip().startswith("{") else _OR_TEXT)
            raise DataError(f"{path}: row {row}: {_not_json(error)}; expected {shapes}") from None
        yield row, _object(path, row, element)


def _line_rows(text: str) -> Rows:
    for row, line in _lines(text):
        yield row, {"text": line.strip()}


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank. Only a line feed ends one: JSON may hold Unicode's other line ends as they are."""
    for row, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield row, line


def _paragraph_rows(path: Path, format: Format | None) -> Rows:
    text = read_text(path).replace("\r\n", "\n")
    paragraphs = (paragraph.strip("\n") for paragraph in re.split(r"\n(?:[ \t]*\n)+", text))
    for row, paragraph in enumerate(filter(str.strip, paragraphs), start=1):
        yield row, {"text": paragraph}


def _csv_rows(path: Path, format: Format | None) -> Rows:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    row = 0
    try:
        header = _header(path, reader.fieldnames or ())
        for row, cells in enumerate(reader, start=1):
            if None in cells:
                reason = f"more cells than the header's {len(header)}; quote cells that hold commas"
                raise DataError(f"{path}: row {row}: {reason}")
            yield row, {field: _cell(field, cell, header) for field, cell in cells.items()}
    except csv.Error as error:
        raise DataError(f"{path}: row {row + 1}: not valid CSV: {error}") from None


def _header(path: Path, fields: Sequence[str]) -> list[str]:
    twice = [field for place, field in enumerate(fields) if field in fields[:place]]
    if twice:
        raise DataError(f"{path}: header: field {twice[0]!r} stands there twice; rename one")
    return list(fields)


def _cell(field: str, cell: str | None, header: list[str]) -> Any:
    """A cell's text, or its list or choice number, which CSV can spell only as text."""
    if cell and ((field in LISTS and cell.startswith("[")) or (field == "answer" and "choices" in header)):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _parquet_rows(path: Path, format: Format | None) -> Rows:
    try:
        with duckdb.connect() as connection:
            # DuckDB takes *, ? and [ in a path for a pattern.
            table = connection.execute("SELECT * FROM read_parquet(?)", [glob.escape(str(path))])
            header = [column[0] for column in table.description]
            rows = table.fetchall()
    except duckdb.Error as error:
        raise DataError(f"{path}: cannot be read as Parquet: {_first_line(error)}") from None
    for row, cells in enumerate(rows, start=1):
        yield row, dict(zip(header, cells, strict=True))


def _hub_rows(name: str, dataset: str, config: str | None, split: str) -> Rows:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"{name}: there is no such file, and to read it from the hub as a data set needs "
            "`pip install palimpsest[hub]`"
        ) from None
    try:
        rows = load_dataset(dataset, config, split=split)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be read from the hub: {_first_line(error)}") from error
    for row, fields in enumerate(rows, start=1):
        yield row, dict(fields)


def read_text(path: Path) -> str:
    """A UTF-8 file's text, without a byte order mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line}: byte {content[error.start]:#04x} is not valid UTF-8; save the file as UTF-8"
        ) from None


def _object(path: Path, row: int, element: Any) -> Fields:
    if not isinstance(element, dict):
        found = f"{path}: row {row}: a JSON {type(element).__name__} stands there"
        raise DataError(f"{found}; expected an object of fields{_OR_TEXT if isinstance(element, str) else ''}")
    return element


def _not_json(error: ValueError | RecursionError) -> str:
    match error:
        case json.JSONDecodeError(msg=reason, lineno=line, colno=column):
            return f"not valid JSON: {reason} ({f'line {line}, ' if line > 1 else ''}column {column})"
        case RecursionError():
            return "not valid JSON: nested too deeply"
    return f"not valid JSON: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_OR_TEXT = ", or format='text' for lines of plain text and arrays of texts"

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([^/:]+)(?:/([^/:]+))?)?")

CONTAINERS: dict[str, Callable[[Path, Format | None], Rows]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _paragraph_rows,
}
"""How a file is read, by its suffix."""
