"""Which rows of a job have a record, in bounded memory however many there are.

Rows and records belong together by the hash of their content; the lines of an earlier reading prove nothing, since
the input may have been rewritten. Knows nothing of how rows are answered, nor of how files are written.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bmx.errors import BmxError, InputFileError
from bmx.job.input_rows import InputRow, Reader
from bmx.job.line_reader import LineSet
from bmx.job.output_records import KnownRecord
from bmx.request import Request

SHOWN = 5  # ids or lines named in a message
CACHE_KIB = 8192
LONGEST_ROWS = 1000  # lines that are measured even where others are only sampled
LINE_NAME = re.compile("line-([1-9][0-9]{0,17})")  # the id of a row that has none of its own
TABLES = """
CREATE TABLE rows (line INTEGER PRIMARY KEY, name INTEGER, key INTEGER, size INTEGER, own INTEGER);
CREATE TABLE records (
    id INTEGER PRIMARY KEY, file INTEGER, number INTEGER, name INTEGER, key INTEGER, line INTEGER, code TEXT,
    cut INTEGER
);
CREATE TABLE taken (line INTEGER PRIMARY KEY, record INTEGER); -- rows that have a record
CREATE TABLE moves (file INTEGER, number INTEGER, line INTEGER, PRIMARY KEY (file, number)) WITHOUT ROWID;
CREATE VIEW lost AS SELECT * FROM records WHERE id NOT IN (SELECT record FROM taken);
CREATE VIEW strays AS SELECT file, number, name, code,
    code IS NULL AND key NOT IN (SELECT key FROM rows JOIN taken USING (line)) AS is_answer FROM lost;
"""
MATCH_IN_PLACE = """
INSERT OR IGNORE INTO taken SELECT rows.line, records.id
FROM records JOIN rows ON rows.line = records.line AND rows.key = records.key
WHERE NOT own AND NOT cut AND (code IS NULL) = :is_answer AND (rows.line - :first) % :step = 0
"""
MATCH_OWN_IDS = """
INSERT OR IGNORE INTO taken SELECT rows.line, records.id FROM records JOIN rows ON rows.key = records.key
WHERE own AND NOT cut AND (code IS NULL) = :is_answer AND (rows.line - :first) % :step = 0
"""
MATCH_MOVED = """
WITH unplaced AS (
    SELECT id, key, row_number() OVER (PARTITION BY key ORDER BY id) AS n
    FROM lost WHERE line IS NOT NULL AND NOT cut AND (code IS NULL) = :is_answer
), untaken AS (
    SELECT line, key, row_number() OVER (PARTITION BY key ORDER BY line) AS n
    FROM rows WHERE NOT own AND key IN (SELECT key FROM unplaced) AND line NOT IN (SELECT line FROM taken)
        AND (line - :first) % :step = 0
)
INSERT INTO taken SELECT untaken.line, unplaced.id FROM unplaced JOIN untaken USING (key, n)
"""
RENAME_MOVED = """
INSERT OR IGNORE INTO moves SELECT file, number, taken.line
FROM taken JOIN records ON id = record JOIN rows ON rows.line = taken.line
WHERE NOT own AND taken.line != records.line
"""
FORGET_UNKNOWN = """
DELETE FROM records WHERE name NOT IN (SELECT name FROM rows) AND key NOT IN (SELECT key FROM rows)
"""
DROPPED = 0  # stands for the line of a record that is taken out of its file and not kept
SET_ASIDE = """
INSERT OR IGNORE INTO moves
SELECT file, number, CASE WHEN code IS NOT NULL AND name IN (SELECT name FROM rows) THEN 0 END
FROM strays WHERE is_answer = ?
"""


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


@dataclass(frozen=True, slots=True)
class Strays:
    """Answers that belong to no row of the input.

    Attributes:
        count: how many.
        lines: the first lines of the input whose rows have the ids of such answers, but other contents.
    """

    count: int
    lines: tuple[int, ...]


class Ledger:
    """The rows of a job and the records of earlier runs, in a private database that spills to the disk.

    Enter the rows, then the records, then match them. Close it after use.

    Attributes:
        has_records: whether records of earlier runs were entered.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "temp_store=FILE", f"cache_size=-{CACHE_KIB}"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.executescript(TABLES)
        self._lines = self._rows = 0
        self._limited = self.has_records = False

    def close(self) -> None:
        """Delete the database."""
        self._db.close()

    def enter_rows(self, reader: Reader, limit: int | None = None) -> int:
        """Enter the rows of an input, all of them or the first ``limit``.

        Returns:
            The number of rows entered.

        Raises:
            InputFileError: a file cannot be read, or two rows have the same id.
        """
        self._limited = limit is not None
        with _full_disk():
            entries = self._entries(islice(reader.identities(), limit))
            self._insert("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", entries)
            try:
                self._db.execute("CREATE UNIQUE INDEX by_name ON rows (name)")
            except sqlite3.IntegrityError:
                self._refuse_repeated_ids(reader, limit)
        return self._rows

    def _entries(self, rows: Iterable[InputRow]) -> Iterator[tuple[int, int, int, int, bool]]:
        for row in rows:
            self._rows, self._lines = self._rows + 1, row.line
            yield row.line, hash(str(row.id)), _number(row.key), row.size, row.id != f"line-{row.line}"

    def _refuse_repeated_ids(self, reader: Reader, limit: int | None) -> None:
        """Name ids that occur twice."""
        self._db.execute("CREATE VIEW repeated AS SELECT name FROM rows GROUP BY name HAVING count(*) > 1")
        [(number,)] = self._db.execute("SELECT count(*) FROM repeated")
        names = {name for (name,) in self._db.execute("SELECT name FROM repeated LIMIT 1000")}
        counts: Counter[str] = Counter(
            str(row.id) for row in islice(reader.identities(), limit) if hash(str(row.id)) in names
        )
        repeated = [name for name, count in counts.items() if count > 1]
        if not repeated:  # different ids with the same hash
            self._db.execute("CREATE INDEX by_name ON rows (name)")
            return
        shown = ", ".join(repr(name[:80]) for name in repeated[:SHOWN])
        more = f" and {number - SHOWN:,} more" if number > SHOWN else ""
        what = "an id occurs" if number == 1 else f"{number:,} ids occur"
        where = f" in the field {reader.id_field!r}" if reader.id_field else ""
        raise InputFileError(f"{what} more than once{where}: {shown}{more}", hint="ids must be unique")

    def enter_records(
        self, file: int, records: Iterable[tuple[int, KnownRecord | None]], *, drop_errors: bool = False
    ) -> None:
        """Enter the lines of a file of records.

        Args:
            file: a number that stands for the file.
            records: pairs of a line's number and its record; None for a line that is none and is to be set aside.
            drop_errors: whether errors are to be dropped, so that their rows are answered again.
        """

        def entries() -> Iterator[tuple[Any, ...]]:
            for number, record in records:
                dropped = record is not None and record.error_code is not None and drop_errors
                if record is None or dropped:
                    place = DROPPED if dropped else None
                    self._db.execute("INSERT OR IGNORE INTO moves VALUES (?, ?, ?)", (file, number, place))
                    continue
                self.has_records = True
                name = str(record.id)
                line = LINE_NAME.fullmatch(name)
                key = _number(record.key)
                yield file, number, hash(name), key, line and int(line[1]), record.error_code, record.cut

        with _full_disk():
            self._insert("INSERT INTO records VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", entries())

    def match(self, share: tuple[int, int] = (1, 1), *, drop_cut: bool = False) -> Strays:
        """Find the row of each record, and what becomes of records without one.

        A row without an id is called after its line, which may have moved: its record gets the new name. A second
        answer of a row, and an error of a row that is gone, are to be set aside. An error of a row that was answered or
        mended is dropped.

        Args:
            share: the lines of this job, as for ``todo``; a record of another row is a stray.
            drop_cut: whether records of rows of which something was cut count as strays.
        """
        with _full_disk():
            if not drop_cut:
                self._db.execute("UPDATE records SET cut = 0 WHERE cut")
            self._db.execute("CREATE INDEX by_key ON rows (key)")
            if self._limited:  # other records may be those of rows behind the limit
                self._db.execute(FORGET_UNKNOWN)
            for is_answer in (True, False):  # an answer counts before an error of the same row
                for statement in (MATCH_IN_PLACE, MATCH_OWN_IDS, MATCH_MOVED):
                    if not self._all_matched:
                        values = {"is_answer": is_answer, "first": share[0], "step": share[1]}
                        self._db.execute(statement, values)
            self._db.execute(RENAME_MOVED)
            if self._all_matched:
                return Strays(0, ())
            self._db.execute(SET_ASIDE, (False,))
            [(count,)] = self._db.execute("SELECT count(*) FROM strays WHERE is_answer")
            query = (
                "SELECT line FROM rows WHERE name IN (SELECT name FROM strays WHERE is_answer) ORDER BY line LIMIT ?"
            )
            lines = tuple(line for (line,) in self._db.execute(query, (SHOWN + 1,)))
        return Strays(count, lines)

    @property
    def _all_matched(self) -> bool:
        [(records, taken)] = self._db.execute("SELECT (SELECT count(*) FROM records), (SELECT count(*) FROM taken)")
        return int(records) == int(taken)

    def set_strays_aside(self) -> None:
        """Decide that answers which belong to no row are to be set aside."""
        with _full_disk():
            self._db.execute(SET_ASIDE, (True,))

    def moves(self, file: int) -> Iterator[tuple[int, int | None]]:
        """Pairs of a line of a file and the line of the input after which its record is to be named.

        Instead of the latter, None is for a line that is to be set aside, and ``DROPPED`` for one to drop.
        """
        query = "SELECT number, line FROM moves WHERE file = ? ORDER BY number"
        return iter(self._db.execute(query, (file,)))

    def count_moves(self, file: int) -> tuple[int, int, int]:
        """Numbers of lines to set aside, of records to drop, and of records to name anew."""
        query = "SELECT total(line IS NULL), total(line = 0), total(line > 0) FROM moves WHERE file = ?"
        [(aside, dropped, renamed)] = self._db.execute(query, (file,))
        return int(aside), int(dropped), int(renamed)

    def forget_lines_behind(self, file: int, number: int) -> None:
        """Leave out the lines of a file behind one of them: they will be cut off."""
        self._db.execute("DELETE FROM moves WHERE file = ? AND number > ?", (file, number))

    def is_at(self, row: InputRow) -> bool:
        """Whether a row, read again, is the one that stood in its line when the rows were entered."""
        found = self._db.execute("SELECT key FROM rows WHERE line = ?", (row.line,)).fetchone()
        return bool(found) and int(found[0]) == _number(row.key)

    def todo(self, share: tuple[int, int] = (1, 1)) -> Todo:
        """The rows that have no record yet.

        Args:
            share: (i, n) restricts the job to the lines i, i + n, i + 2 n, ...
        """
        first, step = share
        skip = LineSet(self._lines)
        with _full_disk():
            [(rows,)] = self._db.execute("SELECT count(*) FROM rows WHERE (line - ?) % ? = 0", (first, step))
            query = "SELECT code, count(*) FROM taken JOIN records ON id = record GROUP BY code"
            records_by_code: dict[str | None, int] = dict(self._db.execute(query))
            query = "SELECT line FROM taken UNION ALL SELECT line FROM rows WHERE (line - ?) % ?"
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
        ledger.enter_rows(reader, limit)
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
    return int(key, 16) - 2**63
