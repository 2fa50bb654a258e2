"""What is done is on disk: the output and the error file of a job are its checkpoint.

Knows what earlier runs have left in these files and adds records to them. Knows nothing of how rows are answered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from bmx.errors import OutputError, UsageError
from bmx.job.durable_files import sync_folder, write_all
from bmx.job.ledger import DROPPED, Ledger
from bmx.job.line_file import LineFile
from bmx.job.output_records import KnownRecord, read_record, renamed, strict_dumps
from bmx.job.strict_json import strict_loads
from bmx.terminal.reports import Line
from bmx.terminal.tables import counted

BEGINNING = b'{"id": '  # what every record begins with
SET_ASIDE = "--set-aside moves {what} to {path}.set-aside and answers what is missing"
REMEDY = "--overwrite starts over, -o names another output"
OUTPUT, ERRORS = range(2)  # the files in the ledger
_STAYS = -1


class Journal:
    """The output and the error file of a job; each row's record is added to one of them.

    Args:
        output: where answers go; None is standard output.
        errors: where errors go, created for the first one; None is the same place as the answers.
        read_only: neither lock nor write the files.

    Raises:
        LockedError: another run writes to one of the files.
        OutputError: a file cannot be opened, written or closed.
    """

    def __init__(self, output: Path | None, errors: Path | None, *, read_only: bool = False) -> None:
        self._files = [LineFile(output, read_only=read_only)]
        self._ends = [0, 0]  # where the records end in each file
        self._errors_started = False
        if errors:
            try:
                self._files.append(LineFile(errors, read_only=read_only))
            except BaseException:
                self._files[OUTPUT].close()
                raise

    def read(self, ledger: Ledger, *, retry_failed: bool = False, set_aside: bool = False) -> None:
        """Enter the records of earlier runs.

        Args:
            ledger: takes them.
            retry_failed: drop errors, so that their rows are answered again.
            set_aside: also set the lines of a file aside that holds no record at all.

        Raises:
            UsageError: a file holds no record of bmx, but something else.
        """
        for number, file in enumerate(self._files):
            lines = _Records(file)
            ledger.enter_records(number, lines, drop_errors=retry_failed)
            ledger.forget_lines_behind(number, lines.last)
            self._ends[number] = lines.end
            if lines.foreign and not set_aside:
                hint = f"{SET_ASIDE.format(what='its lines', path=file.path)}; {REMEDY}"
                raise UsageError(f"{file.path} holds something else than records of bmx", hint=hint)

    def begin(self, ledger: Ledger) -> list[Line]:
        """Mend the files and begin to add records.

        Lines that are to be set aside are added to ``<file>.set-aside`` before they are taken out of the file. What a
        crash left of a last line is cut off.

        Returns:
            What was set aside or named anew, for people.

        Raises:
            OutputError: a file cannot be written, or another program has changed it since it was read.
        """
        for file in self._files:
            file.check_unchanged()
        notes = [note for number, file in enumerate(self._files) for note in self._mend(ledger, number, file)]
        self._files[OUTPUT].start(self._ends[OUTPUT])
        if len(self._files) > 1 and self._ends[ERRORS]:
            self._start_errors()
        return notes

    def _start_errors(self) -> None:
        self._files[ERRORS].start(self._ends[ERRORS])
        self._errors_started = True

    def _mend(self, ledger: Ledger, number: int, file: LineFile) -> Iterator[Line]:
        aside, dropped, renamed = ledger.count_moves(number)
        if aside:
            other = file.path.with_name(f"{file.path.name}.set-aside")
            _add_lines(other, (line for line, place in self._lines(ledger, number) if place is None))
            lines = counted(aside, "line")
            yield Line(f"warning: moved to {other}: {lines} of {file.path} without a row, or no records", "warning")
        if dropped:
            yield Line(f"dropped from {file.path}: {counted(dropped, 'error')} of rows to answer, or answered since")
        if renamed:
            records = counted(renamed, "record")
            yield Line(f"rows without ids have moved in the input: {records} of {file.path} renumbered")
        if aside or dropped or renamed:
            self._ends[number] = file.replace(_named(self._lines(ledger, number)))
        if number == ERRORS and not self._ends[ERRORS]:
            file.remove()

    def _lines(self, ledger: Ledger, number: int) -> Iterator[tuple[bytes, int | None]]:
        """The lines of a file that are not cut off, each with its place as in ``Ledger.moves``, or ``_STAYS``."""
        moves, end = ledger.moves(number), 0
        at, place = next(moves, (0, None))
        for current, piece in self._files[number].lines():
            end += len(piece)
            if end > self._ends[number]:
                return
            while at and at < current:
                at, place = next(moves, (0, None))
            yield piece, place if at == current else _STAYS

    def add(self, record: dict[str, Any], failed: bool = False) -> None:
        """Add the record of a row.

        Args:
            record: an answer or an error, for JSON.
            failed: whether it is an error.

        Raises:
            BrokenPipeError: the reader of standard output has gone.
        """
        line = strict_dumps(record)
        if not failed or len(self._files) == 1:
            self._files[OUTPUT].append(line)
            return
        if not self._errors_started:
            self._start_errors()
        self._files[ERRORS].append(line)

    def close(self) -> None:
        """Sync, check and close both files."""
        try:
            self._files[OUTPUT].close()
        finally:
            for file in self._files[ERRORS:]:
                file.close()


def _named(lines: Iterable[tuple[bytes, int | None]]) -> Iterator[bytes]:
    """The lines that stay in a file, under their new names."""
    for line, place in lines:
        if place == _STAYS:
            yield line
        elif place not in (None, DROPPED):
            yield strict_dumps(renamed(strict_loads(line.decode()), f"line-{place}"))


def _add_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Add lines to a file and sync it: all of them or none.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(handle).st_size
            last = os.pread(handle, 1, size - 1) if size else b"\n"
            try:
                for line in chain(() if last == b"\n" else (b"\n",), lines):  # a run may have died in a line
                    write_all(handle, last := line)
                if not last.endswith(b"\n"):
                    write_all(handle, b"\n")
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="nothing was changed") from None


class _Records:
    """Pairs of the number of each line of a file and its record, or None for a line that is not a record.

    A write that was cut off by a crash or a power cut leaves a torn tail. ``end`` is where it begins, and ``last`` the
    number of the line before it. ``foreign`` is whether the file has lines, but no record among them.
    """

    def __init__(self, file: LineFile) -> None:
        self._file = file
        self.end = self.last = 0
        self.foreign = False

    def __iter__(self) -> Iterator[tuple[int, KnownRecord | None]]:
        position, found, continued = 0, 0, False
        for number, piece in self._file.lines():
            position += len(piece)
            whole = piece.endswith(b"\n") and not continued
            record = _record(piece) if whole else None
            if record or continued or not _is_torn(piece):
                self.end, self.last = position, number
            found += record is not None
            continued = not piece.endswith(b"\n")
            yield number, record
        self.foreign = bool(self.end) and not found


def is_of_bmx(path: Path, *, errors_only: bool = False) -> bool:
    """Whether a file is one of bmx's outputs, an empty one included.

    Args:
        path: the file.
        errors_only: whether all its records must be errors.
    """
    file = LineFile(path, read_only=True)
    lines = _Records(file)
    records = (record for _, record in lines if record)
    try:
        if errors_only:
            return all(record.error_code is not None for record in records) and not lines.foreign
        return next(records, None) is not None or not lines.foreign
    finally:
        file.close()


def _record(line: bytes) -> KnownRecord | None:
    try:
        return read_record(strict_loads(line.decode()))
    except ValueError:
        return None


def _is_torn(line: bytes) -> bool:
    """Whether a line may be what a crash left of a record: its beginning, then zeros of a block never written.

    A line that has its end, or is a whole value of another program (with NaN, with a key twice), is not.
    """
    left = line.rstrip(b"\0\n")
    if BEGINNING.startswith(left):
        return True
    if not left.startswith(BEGINNING) or line.endswith(b"\n"):
        return False
    try:
        return read_record(json.loads(left)) is not None  # only its newline is missing
    except (ValueError, RecursionError):
        return True
