"""Answers as a table in Parquet, CSV or TSV: made from the finished JSON lines, which stay the checkpoint of the job.

Knows records of JSON and formats of tables; knows nothing of rows or of how they are answered. One record is in memory
at a time, or one batch of a Parquet file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmx.errors import OutputError, UsageError
from bmx.job.durable_files import new_file, put_in_place
from bmx.job.manifest import known_tables, note_table
from bmx.job.table_reader import PARQUET_EXTRA
from bmx.prompt_template import printed

if TYPE_CHECKING:
    import pyarrow as pa

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
FOREIGN = "exists, and is not a table that bmx wrote here, or was edited since: it would be replaced"
COLUMNS_OF_NOTHING = ("id", "text", "finish_reason", "row_hash")  # of a table without answers
MOST_COLUMNS = 10_000
BATCH_BYTES, BATCH_ROWS = 1 << 25, 10_000  # of a Parquet file, whichever is less
EXACT = 2**53  # whole numbers up to this are numbers of 64 bits with a fraction too


def is_table(path: Path) -> bool:
    """Whether answers in a file of this name are a table."""
    return path.suffix.lower() in (*DELIMITERS, PARQUET)


def check_table(path: Path, manifest: Path) -> None:
    """Check before any work that a table can be written.

    Args:
        path: where it is to be.
        manifest: of the job; it says which tables bmx has written.

    Raises:
        UsageError: there is a file that bmx has not written, or pyarrow is missing.
    """
    if not _is_own(path, manifest):
        raise UsageError(f"the table {path} {FOREIGN}", hint="choose another, or move it away")
    if path.suffix.lower() == PARQUET:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UsageError(f"{path} is a Parquet file, which pyarrow writes", hint=PARQUET_EXTRA) from None


def write_table(path: Path, answers: Path, manifest: Path) -> bool:
    """Write the table of the answers, whole or not at all; returns whether it differs from the one that was there.

    Args:
        path: the table.
        answers: the finished JSON lines.
        manifest: of the job; it says which tables bmx has written.

    Raises:
        OutputError: it cannot be written, or somebody else has changed it; the old one stays.
    """
    columns = _columns(answers)
    try:
        with new_file(path) as file:
            if path.suffix.lower() == PARQUET:
                _write_parquet(file, columns, answers)
            else:
                _write_cells(file, columns, answers, DELIMITERS[path.suffix.lower()])
            new, old = _state(file), _state_at(path)
            if new == old:
                return False
            if not _is_own(path, manifest):
                raise OutputError(f"the table {path} {FOREIGN}")
            note_table(manifest, path.name, [state for state in (old, new) if state])
            put_in_place(file, path)
    except OutputError as error:
        hint = f"the answers are in {answers}; mend this, and the same command writes the table"
        raise OutputError(error.message, hint=hint) from None
    return True


def _is_own(path: Path, manifest: Path) -> bool:
    """Whether a table may be replaced: it is missing, empty, or as bmx wrote it."""
    state = _state_at(path)  # before the manifest, which knows a table before it is there
    return state is None or not state["bytes"] or state in known_tables(manifest).get(path.name, ())


def _state_at(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            return _state(file)
    except FileNotFoundError:
        return None


def _state(file: io.BufferedRandom | io.BufferedReader) -> dict[str, Any]:
    """The size of a file and a hash of what it holds."""
    file.seek(0)
    digest = file_digest(file, partial(blake2b, digest_size=16)).hexdigest()
    return {"bytes": file.tell(), "digest": digest}


def _records(answers: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Pairs of a line's size and its record."""
    with answers.open("rb") as lines:
        for line in lines:
            yield len(line), json.loads(line)


def flattened(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names of columns and values of a record, as pandas.json_normalize names them: ``usage.prompt_tokens``.

    Args:
        record: an object of JSON; objects in it become columns of their own, lists stay.
        prefix: of the names.
    """
    for name, value in record.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _columns(answers: Path) -> dict[str, set[str]]:
    """The kinds of values in each column, in the order of the records.

    Raises:
        OutputError: there are too many columns.
    """
    columns: dict[str, set[str]] = {}
    for _, record in _records(answers):
        for name, value in flattened(record):
            kinds = columns.setdefault(name, set())
            if value is not None:
                kinds.add(_kind(value))
        if len(columns) > MOST_COLUMNS:
            message = f"the answers have more than {MOST_COLUMNS:,} fields in all: too many for a table"
            raise OutputError(message, hint=f"the answers are in {answers}")
    return columns or {name: set() for name in COLUMNS_OF_NOTHING}


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case int() if abs(value) <= EXACT:
            return "whole"
        case int() if -(2**63) <= value < 2**63:
            return "large"
        case float():
            return "number"
    return "text"


def _type(kinds: set[str]) -> str:
    """The type of a column with values of these kinds."""
    for name, parts in (("boolean", {"boolean"}), ("whole", {"whole", "large"}), ("number", {"whole", "number"})):
        if kinds and kinds <= parts:
            return name
    return "text"


def _write_cells(file: io.BufferedRandom, columns: Iterable[str], answers: Path, delimiter: str) -> None:
    """Write a table of text; a cell without a value is empty."""
    import csv

    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(columns)
    for _, record in _records(answers):
        values = dict(flattened(record))
        cells = (values.get(name) for name in columns)
        writer.writerow("" if value is None else printed(value) for value in cells)
    text.detach()


def _write_parquet(file: io.BufferedRandom, columns: dict[str, set[str]], answers: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    types = {"boolean": pa.bool_(), "whole": pa.int64(), "number": pa.float64(), "text": pa.string()}
    schema = pa.schema([(name, types[_type(kinds)]) for name, kinds in columns.items()])
    with ParquetWriter(file, schema) as writer:
        rows: list[dict[str, Any]] = []
        held = 0
        for size, record in _records(answers):
            rows.append(dict(flattened(record)))
            held += size
            if held >= BATCH_BYTES or len(rows) == BATCH_ROWS:
                writer.write_batch(_batch(rows, schema))
                rows, held = [], 0
        if rows:
            writer.write_batch(_batch(rows, schema))


def _batch(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    def column(field: pa.Field) -> pa.Array:
        values = (row.get(field.name) for row in rows)
        if field.type == pa.string():
            values = (None if value is None else printed(value) for value in values)
        return pa.array(values, field.type, size=len(rows))

    return pa.RecordBatch.from_arrays([column(field) for field in schema], schema=schema)
