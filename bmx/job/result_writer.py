"""Between the engine and the journal: which rows are in flight, and when their results are written and counted.

Knows rows, results and counters; knows nothing of models or paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from bmx.errors import BmxError, InputFileError, RowError
from bmx.job.input_rows import InputRow
from bmx.job.output_records import Dialect, as_record
from bmx.request import Result
from bmx.stats import Stats

WINDOW = 4096  # rows in memory between the first unfinished one and the last one read, in the input's order
TOO_LONG = "context_length_exceeded"
ALIKE = 100  # rows that fail in the same way, none before them with an answer: the run gives up


class FirstRows:
    """Whether the first rows of a run all fail in the same way: then the others would too."""

    def __init__(self) -> None:
        self._names: set[str | int] = set()
        self._failed = 0
        self._way: tuple[str, str] | None = None
        self._alike = True

    def expect(self, name: str | int) -> None:
        """Note that a row was read."""
        if self._alike and len(self._names) < ALIKE:
            self._names.add(name)

    def fail(self, name: str | int, error: RowError | None) -> bool:
        """Count the result of a row; whether it is the last of the first rows, and all have failed alike.

        Args:
            name: the row's id.
            error: of the row; None for an answer.
        """
        if not self._alike or name not in self._names:
            return False
        way = (error.code, re.sub("[0-9]+", "0", error.message)) if error else None
        self._way = self._way or way
        self._alike = way is not None and way == self._way
        self._failed += 1
        return self._alike and self._failed == ALIKE


class _Unwritten(NamedTuple):
    """What the record of a row needs of it beside its result."""

    key: str
    dialect: Dialect
    kept: dict[str, Any] | None
    ignored: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class ResultWriter:
    """Takes each row when it is read and its result when it is finished, and writes results at once or in order.

    Attributes:
        add_record: writes a record; its second argument says whether it is of an error.
        stats: counts the written rows.
        model: the model's name in records of the OpenAI dialects.
        in_order: whether results are held back until all rows before them are written.
        skip_too_long: whether a row that is too long does not count as failed.
        max_errors: the run gives up after more failed rows than this; None to give up only when the first rows all
            fail in the same way.
        on_result: called with each result that is written, or None.
    """

    add_record: Callable[[dict[str, Any], bool], None]
    stats: Stats
    model: str = ""
    in_order: bool = False
    skip_too_long: bool = False
    max_errors: int | None = None
    on_result: Callable[[Result], None] | None = None
    _rows: dict[str | int, _Unwritten] = field(default_factory=dict)  # read and not yet written, in order
    _held: dict[str | int, Result] = field(default_factory=dict)
    _first: FirstRows = field(default_factory=FirstRows)

    @property
    def full(self) -> bool:
        """Whether no row should be read until one is written."""
        return self.in_order and len(self._rows) >= WINDOW

    @property
    def held(self) -> int:
        """Number of finished results that wait for the rows before them."""
        return len(self._held)

    def expect(self, row: InputRow) -> None:
        """Note that a row was read: its result is written in its dialect, and in its turn where the order counts.

        Raises:
            InputFileError: a row with the same id is in flight, so the input has changed since its ids were read.
        """
        if row.id in self._rows:
            raise InputFileError("the input has changed while it was read: an id occurs twice")
        self._rows[row.id] = _Unwritten(row.key, row.dialect, row.kept, row.ignored)
        self._first.expect(row.id)

    def put(self, result: Result) -> None:
        """Write a result, or hold it back until the rows before it are written.

        Raises:
            BmxError: it cannot be written, or too many rows have failed.
        """
        if not self.in_order:
            self._write(result)
            return
        self._held[result.id] = result
        while self._rows and (first := next(iter(self._rows))) in self._held:
            self._write(self._held.pop(first))

    def _write(self, result: Result) -> None:
        row = self._rows.pop(result.id)
        code = result.error.code if result.error else None
        result = replace(result, ignored=row.ignored) if row.ignored else result
        self.add_record(as_record(result, row.key, row.dialect, self.model, row.kept), code is not None)
        skipped = self.skip_too_long and code == TOO_LONG
        self.stats.count_row(code, skipped=skipped)
        if self.on_result:
            self.on_result(result)
        if self.max_errors is None and self._first.fail(result.id, None if skipped else result.error) and result.error:
            message = f"gave up: the first {ALIKE} rows all failed in the same way: {result.error.message}"
            raise BmxError(message, hint="mend the cause and use --retry-failed; --max-errors N runs all the same")
        if self.max_errors is not None and self.stats.failed_now > self.max_errors:
            hint = "run the same command again to resume after them, with --retry-failed to answer them again"
            raise BmxError(f"gave up: {self.stats.failed_now:,} rows failed, more than --max-errors", hint=hint)
