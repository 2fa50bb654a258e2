"""Between the engine and the journal: which rows are in flight, and when a result is written and counted.

Knows rows, results and counters; knows nothing of models or paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bmx.errors import BmxError, InputFileError
from bmx.job.input_rows import InputRow
from bmx.job.output_records import Dialect, as_record
from bmx.request import Result
from bmx.stats import Stats

WINDOW = 4096  # rows that may be read beyond the first unfinished one, where the order counts
TOO_LONG = "context_length_exceeded"


@dataclass(slots=True, kw_only=True)
class ResultWriter:
    """Takes each row when it is read and its result when it is there, and has it written, as it comes or in order.

    Attributes:
        add: writes a record: of an answer, or (True) of an error.
        stats: counts.
        model: the name to answer as.
        in_order: whether results are held back until all rows before them are written.
        skips: whether a row that is too long is left out on purpose.
        max_errors: failed rows that are put up with, or None for any number.
        tell: hears of each result that is written.
    """

    add: Callable[[dict[str, Any], bool], None]
    stats: Stats
    model: str = ""
    in_order: bool = False
    skips: bool = False
    max_errors: int | None = None
    tell: Callable[[Result], None] | None = None
    _rows: dict[str | int, tuple[str, Dialect]] = field(default_factory=dict)  # not written yet, in order
    _held: dict[str | int, Result] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """Whether no row should be read until one is written."""
        return self.in_order and len(self._rows) >= WINDOW

    @property
    def held(self) -> int:
        """Results that wait for those before them."""
        return len(self._held)

    def expect(self, row: InputRow) -> None:
        """Note that a row was read: its result is written in its dialect, and in its turn where the order counts.

        Raises:
            InputFileError: one of the same id is in flight, which was not so when the ids were read.
        """
        if row.id in self._rows:
            raise InputFileError("the input has changed while it was read: an id occurs twice")
        self._rows[row.id] = (row.key, row.dialect)

    def put(self, result: Result) -> None:
        """Take a result.

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
        key, dialect = self._rows.pop(result.id)
        code = result.error.code if result.error else None
        self.add(as_record(result, key, dialect, self.model), code is not None)
        self.stats.count_row(code, skipped=self.skips and code == TOO_LONG)
        if self.tell:
            self.tell(result)
        if self.max_errors is not None and self.stats.failed_now > self.max_errors:
            hint = "the same command goes on behind them; --retry-failed answers them again"
            raise BmxError(f"gave up: {self.stats.failed_now:,} rows failed, more than --max-errors", hint=hint)
