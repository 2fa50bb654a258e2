"""What is done is on disk: the output and the error file of a job are its checkpoint.

Knows which rows have a record and which do not, in bounded memory however many there are. Knows nothing of how rows
are answered.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bmx.errors import BmxError, InputFileError, UsageError
from bmx.job.durable_files import LineFile, remove_file
from bmx.job.input_rows import InputRow, Reader, strict_loads
from bmx.job.line_reader import LineSet
from bmx.job.output_records import read_record, strict_dumps
from bmx.request import Request

SHOWN = 5  # ids or lines named in a message
CACHE_KIB = 8192
LONGEST_RECORD = 1 << 26  # bytes
LONGEST_ROWS = 1000  # lines that are measured even where others are only sampled
BEGINNING = b'{"id": '  # what every record begins with
REMEDY = "--overwrite starts over, -o names another output"


class Journal:
    """The output and the error file of a job; each row's record is added to one of them.

    Args:
        output: where answers go; None is standard output.
        errors: where errors go, created for the first one; None is the same place as the answers.
        kept: how much of the files stays; what follows is cut off when they are opened.

    Raises:
        OutputError: a file cannot be opened, written or closed.
    """

    def __init__(self, output: Path | None, errors: Path | None, kept: ExistingRecords) -> None:
        if errors and errors.is_file() and not kept.error_bytes:
            remove_file(errors)
        self._output = LineFile(output, kept.output_bytes)
        self._error_path = errors
        self._errors = LineFile(errors, kept.error_bytes) if errors and kept.error_bytes else None

    def add(self, record: dict[str, Any], failed: bool = False) -> None:
        """Add the record of a row.

        Args:
            record: an answer or an error, for JSON.
            failed: whether it is an error.

        Raises:
            BrokenPipeError: the reader of standard output has gone.
        """
        line = strict_dumps(record)
        if not failed or self._error_path is None:
            self._output.append(line)
            return
        if self._errors is None:
            regular = self._error_path.is_file() or not self._error_path.exists()
            self._errors = LineFile(self._error_path, None if regular else 0)
        self._errors.append(line)

    def close(self) -> None:
        """Sync and close both files."""
        try:
            self._output.close()
        finally:
            if self._errors:
                self._errors.close()


@dataclass(slots=True)
class ExistingRecords:
    """How much of a job's files earlier runs have written.

    Attributes:
        output_bytes, error_bytes: bytes up to the end of the last whole record.
    """

    output_bytes: int = 0
    error_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Todo:
    """The rows of a job that have no record yet.

    Attributes:
        rows: number of rows of the job.
        left: number of rows without a record.
        failed: number of rows whose record is an error, by error code.
        skip: numbers of the lines whose rows are not left, or not of this job.
        longest: numbers of the longest lines, which are measured even where others are only sampled.
    """

    rows: int
    left: int
    failed: Counter[str]
    skip: LineSet
    longest: frozenset[int]

    def sample(self, reader: Reader, every: int) -> Iterator[Request]:
        """One in ``every`` of the requests that are left, and those of the longest lines."""
        return (row.request for row in reader.rows(self.skip, every, self.longest) if row.request)


class Ledger:
    """The ids of a job's rows and records, in a private database that spills to the disk. Close it after use."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "temp_store=FILE", f"cache_size=-{CACHE_KIB}"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE rows (name INTEGER, key INTEGER, line INTEGER, size INTEGER)")
        self._db.execute("CREATE TABLE done (name INTEGER, key INTEGER, code TEXT)")
        self._lines = self._rows = 0
        self._limited = False

    def close(self) -> None:
        """Delete the database."""
        self._db.close()

    def read(self, reader: Reader, limit: int | None = None) -> int:
        """Enter the rows of an input, all of them or the first ``limit``.

        Returns:
            The number of rows entered.

        Raises:
            InputFileError: a file cannot be read, or two rows have the same id.
        """
        self._limited = limit is not None
        with _full_disk():
            self._insert("INSERT INTO rows VALUES (?, ?, ?, ?)", self._entries(islice(reader.identities(), limit)))
            try:
                self._db.execute("CREATE UNIQUE INDEX by_name ON rows (name)")
            except sqlite3.IntegrityError:
                self._refuse_repeated_ids(reader, limit)
        return self._rows

    def _entries(self, rows: Iterable[InputRow]) -> Iterator[tuple[int, int, int, int]]:
        for row in rows:
            self._rows, self._lines = self._rows + 1, row.line
            yield hash(str(row.id)), _number(row.key), row.line, row.size

    def _refuse_repeated_ids(self, reader: Reader, limit: int | None) -> None:
        """Name ids that occur twice."""
        query = "SELECT name FROM rows GROUP BY name HAVING count(*) > 1 LIMIT 1000"
        names = {name for (name,) in self._db.execute(query)}
        counts: Counter[str] = Counter(
            str(row.id) for row in islice(reader.identities(), limit) if hash(str(row.id)) in names
        )
        repeated = [name for name, count in counts.items() if count > 1]
        if not repeated:  # different ids with the same hash
            self._db.execute("CREATE INDEX by_name ON rows (name)")
            return
        shown = ", ".join(repr(name[:80]) for name in repeated[:SHOWN])
        more = f" and {len(repeated) - SHOWN} more" if len(repeated) > SHOWN else ""
        raise InputFileError(f"{len(repeated)} ids occur more than once: {shown}{more}", hint="ids must be unique")

    def find(self, output: Path | None, errors: Path | None, *, retry_failed: bool = False) -> ExistingRecords:
        """Enter the records of earlier runs.

        Args:
            output: the output of the job; None is standard output, which has none.
            errors: its error file; None is the same place.
            retry_failed: leave out the records in the error file, so that their rows are answered again.

        Returns:
            Where the records end in each file.

        Raises:
            UsageError: a file holds something else, or records that are not those of these rows.
        """
        existing = ExistingRecords()

        def records(path: Path) -> Iterator[tuple[int, int, str | None]]:
            whole = _Records(path)
            for name, key, code in whole:
                yield hash(str(name)), _number(key), code
            if path == output:
                existing.output_bytes = whole.end
            else:
                existing.error_bytes = whole.end

        with _full_disk():
            for path in (output, errors):
                if path and path.is_file() and path == errors and retry_failed:
                    deque(_Records(path), maxlen=0)  # raises where the file is not one of bmx
                elif path and path.is_file():
                    self._insert("INSERT INTO done VALUES (?, ?, ?)", records(path))
            try:
                self._db.execute("CREATE UNIQUE INDEX by_done ON done (name)")
            except sqlite3.IntegrityError:
                raise UsageError(f"{output} has records of the same id twice", hint=REMEDY) from None
            self._check_records(output)
        return existing

    def _check_records(self, output: Path | None) -> None:
        query = "SELECT line FROM rows JOIN done USING (name) WHERE rows.key != done.key ORDER BY line LIMIT ?"
        changed = [str(line) for (line,) in self._db.execute(query, (SHOWN + 1,))]
        if changed:
            lines = ", ".join(changed[:SHOWN]) + (" and more" if len(changed) > SHOWN else "")
            raise UsageError(
                f"rows of the input have changed since their records were written to {output}: see line {lines}",
                hint=f"{REMEDY}, --retry-failed answers failed rows again as they are now",
            )
        query = "SELECT count(*) FROM done WHERE name NOT IN (SELECT name FROM rows)"
        [(strangers,)] = self._db.execute(query)
        if strangers and not self._limited:
            raise UsageError(
                f"{output} or its errors have {strangers:,} records of rows that are not in the input",
                hint=f"{REMEDY}, --retry-failed drops the errors",
            )

    def todo(self, share: tuple[int, int] = (1, 1)) -> Todo:
        """The rows that have no record yet.

        Args:
            share: (i, n) restricts the job to the lines i, i + n, i + 2 n, ...
        """
        first, step = share
        skip = LineSet(self._lines)
        with _full_disk():
            [(rows,)] = self._db.execute("SELECT count(*) FROM rows WHERE (line - ?) % ? = 0", (first, step))
            query = "SELECT code, count(*) FROM done JOIN rows USING (name) GROUP BY code"
            records_by_code: dict[str | None, int] = dict(self._db.execute(query))
            query = "SELECT line FROM done JOIN rows USING (name) UNION ALL SELECT line FROM rows WHERE (line - ?) % ?"
            for (line,) in self._db.execute(query, (first, step)):
                skip.add(line)
            longest = self._db.execute("SELECT line FROM rows ORDER BY size DESC LIMIT ?", (LONGEST_ROWS,))
            lines = frozenset(line for (line,) in longest)
        left = rows - sum(records_by_code.values())
        failed = Counter({code: count for code, count in records_by_code.items() if code is not None})
        return Todo(rows, left, failed, skip, lines)

    def _insert(self, statement: str, values: Iterator[tuple[Any, ...]]) -> None:
        self._db.execute("BEGIN")
        self._db.executemany(statement, values)
        self._db.execute("COMMIT")


def unanswered_rows(reader: Reader, limit: int | None = None, share: tuple[int, int] = (1, 1)) -> Todo:
    """The rows of an input for a command that keeps no records: all of them are left.

    Args:
        reader: reads the input.
        limit: only the first rows of the input, this many; None for all.
        share: (i, n) restricts them to the lines i, i + n, i + 2 n, ...

    Raises:
        InputFileError: a file cannot be read, or two rows have the same id.
    """
    with closing(Ledger()) as ledger:
        ledger.read(reader, limit)
        return ledger.todo(share)


@contextmanager
def _full_disk() -> Iterator[None]:
    """Turn a full disk under the database into a message."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise BmxError(f"cannot keep the ids of the rows in temporary files: {error}", hint="see TMPDIR") from None


def _number(key: str) -> int:
    """A row hash as the database takes it: a signed number of 64 bits."""
    return int(key, 16) - 2**63 if re.fullmatch("[0-9a-f]{16}", key) else 0


class _Records:
    """(id, key, error code) of each record in a file; ``end`` is where the last whole record ends.

    A write that was cut off by a crash or a power cut leaves a torn tail, which is ignored. Any other line that is not
    a record was written by somebody else.

    Raises:
        UsageError: the file was not written by bmx, or was damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.end = 0

    def __iter__(self) -> Iterator[tuple[str | int, str, str | None]]:
        torn = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_RECORD), b""), 1):
                record = _record(line) if line.endswith(b"\n") else None
                if record and not torn:
                    yield record
                    self.end += len(line)
                elif record or not _is_torn(line):
                    raise UsageError(f"line {torn or number} of {self._path} is not a record of bmx", hint=REMEDY)
                torn = torn or (0 if record else number)


def is_error_file(path: Path) -> bool:
    """Whether a file holds only errors written by bmx."""
    try:
        return all(code is not None for _, _, code in _Records(path))
    except UsageError:
        return False


def _record(line: bytes) -> tuple[str | int, str, str | None] | None:
    try:
        return read_record(strict_loads(line.decode()))
    except ValueError:
        return None


def _is_torn(line: bytes) -> bool:
    """Whether a line may be what a crash left of a record: its beginning, then zeros of a block never written."""
    left = line.rstrip(b"\0\n")
    if BEGINNING.startswith(left):
        return True
    if not left.startswith(BEGINNING):
        return False
    try:
        return read_record(strict_loads(left.decode())) is not None  # only its newline is missing
    except ValueError:
        return True
