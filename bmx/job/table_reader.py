"""Rows of JSON arrays, CSV, TSV and Parquet, each as the line of JSON that it would be in a file of lines.

Knows formats of files; knows nothing of what rows ask. One row is in memory at a time, or one batch of a Parquet file.
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
import tempfile
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from bmx.errors import InputFileError
from bmx.job.file_kinds import SEPARATOR

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BATCH_BYTES, BATCH_ROWS = 1 << 20, 256  # of a Parquet file, whichever is less
STREAM_BYTES = 1 << 16  # of a column of a Parquet file that are read at a time
HALF_PAIR = "\ufdd0"  # stands for half a surrogate pair; Unicode gives this code to no letter
HALF_PAIRS = re.compile(
    rb"(?<!\\)((?:\\\\)*)(?:\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
LONGEST_NAME = 200  # letters of a column's name; a longer one is a text
TO_UTF_8 = "iconv -f WINDOWS-1252 -t UTF-8 converts a file in Latin-1"
CUT_SHORT = "was it cut short, or is it still being written?"
PARQUET_EXTRA = "pip install pyarrow, or bmx-llm[parquet] in place of bmx-llm"


class Line(NamedTuple):
    r"""A line of a file, or a row of a table as a line of JSON.

    Attributes:
        text: its bytes, with ``\n`` if it has one.
        rest: the pieces of what is left of a line that is too long; None for any other.
        fault: why the row of a table cannot be read; empty if it can.
        cells: whether the values are cells of a CSV file: all are text, and an empty one may stand for no value.
    """

    text: bytes
    rest: Iterator[bytes] | None = None
    fault: str = ""
    cells: bool = False


# JSON arrays


def array_rows(file: BinaryIO, shown: str, longest: int) -> Iterator[Line]:
    """The items of a JSON array.

    Args:
        file: its bytes.
        shown: its name in messages.
        longest: bytes of a row, as JSON, that may be read.

    Raises:
        InputFileError: the file is damaged, or no strict JSON.
    """
    import ijson

    if file.peek(len(BYTE_ORDER_MARK)).startswith(BYTE_ORDER_MARK):  # type: ignore[attr-defined]
        file.read(len(BYTE_ORDER_MARK))
    pairs, encoder, number = _WholePairs(file), json.JSONEncoder(ensure_ascii=False, default=_number), 0

    def encode(item: Any) -> str:
        text = encoder.encode(item)
        if pairs.replaced and HALF_PAIR in text:
            raise ValueError("half a surrogate pair")
        return text

    try:
        for item in ijson.items(pairs, "item", map_type=_Object):
            number += 1
            yield _line(item, encode, longest)
    except (ijson.JSONError, UnicodeDecodeError) as error:
        what = str(error).removeprefix("b'").replace("\\n", "\n").partition("\n")[0]
        raise InputFileError(
            f"the JSON array in {shown} cannot be read after its row {number:,}: {what}",
            hint=f"{CUT_SHORT} Strict JSON is in UTF-8 and has no NaN, no Infinity and no comments",
        ) from None


class _WholePairs:
    """The bytes of an array with a mark in place of halves of surrogate pairs: ijson would make question marks of them.

    Attributes:
        replaced: whether there were any.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._held, self.replaced = file, b"", False

    def read(self, size: int) -> bytes:
        """The next bytes, about this many; none at the end."""
        pieces, quote = [self._held], 0
        while not quote:  # a surrogate pair never goes on behind a quote
            pieces.append(self._file.read(size))
            quote = pieces[-1].rfind(b'"') + 1
            if not pieces[-1]:
                break
        data = b"".join(pieces)
        cut = len(data) - len(pieces[-1]) + quote
        data, self._held = data[:cut], data[cut:]
        if b"\\u" in data:
            data, count = HALF_PAIRS.subn(rb"\1\\ufdd0", data)
            self.replaced |= count > 0
        return data


class _Object(dict[str, Any]):
    """An object of an array. It marks a key that occurs twice, which ``dict`` would hide."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _Twice if key in self else value)


class _Twice:
    """Stands for the value of a key that occurs twice."""


def _number(value: Any) -> float:
    if value is _Twice:
        raise ValueError("a key occurs twice")
    return float(value)


# CSV and TSV


def csv_rows(file: BinaryIO, shown: str, longest: int, delimiter: str) -> Iterator[Line]:
    """The rows of a table whose first row names the columns; blank lines are skipped.

    Args:
        file: its bytes.
        shown: its name in messages.
        longest: bytes of a row, as JSON, that may be read.
        delimiter: what stands between two cells.

    Raises:
        InputFileError: the header names no columns, or the file ends within a cell.
    """
    encode = json.JSONEncoder(ensure_ascii=False).encode
    header: list[str] | None = None
    number = 0
    try:
        for cells, whole, fault in _records(file, delimiter, longest):
            if header is None:
                header = _header(cells, fault, shown)
                continue
            number += 1
            if not whole:
                yield Line(_bytes(encode(cells)), rest=iter(()), cells=True)
            elif fault or len(cells) != len(header):
                yield Line(_bytes(encode(cells)), fault=fault or _miscounted(cells, header, delimiter), cells=True)
            else:
                yield _line(dict(zip(header, cells, strict=True)), encode, longest, cells=True)
    except _UnclosedError:
        where = "the header" if header is None else f"row {number + 1:,}"
        message = f"{shown} ends within a quoted cell that begins in {where}"
        raise InputFileError(message, hint=f"is a quote missing? {CUT_SHORT.capitalize()}") from None


def _miscounted(cells: list[str], header: list[str], delimiter: str) -> str:
    count = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
    quotes = f" (a cell with {delimiter!r} in it needs quotes)" if len(cells) > len(header) else ""
    return f"the row has {count}, the header {len(header)}{quotes}"


def _records(file: BinaryIO, delimiter: str, longest: int) -> Iterator[tuple[list[str], bool, str]]:
    """Of each record, its cells, whether they are whole, and what is wrong with its quotes.

    Cells of a record that is too long are not whole; one with wrong quotes has its last line as its only cell.
    """
    import csv

    csv.field_size_limit(sys.maxsize)  # whole records are limited instead
    with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        lines = _Lines(text, delimiter, longest)
        records, fault = csv.reader(lines, delimiter=delimiter, strict=True), ""
        while True:
            try:
                cells, fault = next(records), ""
            except StopIteration:
                return
            except csv.Error as error:
                over = f" over {lines.count:,} lines" if lines.count > 1 else ""
                cells, fault = [lines.last], f"wrong quotes{over}: {error} (a quote within quotes is doubled)"
            whole = lines.size <= longest
            lines.size = lines.count = 0
            if cells:
                yield cells, whole, fault


class _UnclosedError(Exception):
    """The file ends within a quoted cell."""


class _Lines:
    """The lines of a CSV file. Of a record that is too long, only quotes, delimiters and line ends are kept.

    Attributes:
        size, count: letters and lines of the present record so far; whoever takes a record sets them to 0.
        last: the last line.

    Raises:
        _UnclosedError: the file ends within a record, which is then within a quoted cell.
    """

    def __init__(self, text: io.TextIOWrapper, delimiter: str, longest: int) -> None:
        self._text, self._longest = text, longest
        self.size = self.count = 0
        self.last = ""
        self._contents = re.compile(rf'[^"\r\n{re.escape(delimiter)}]+')

    def __iter__(self) -> Iterator[str]:
        within = False  # a quoted cell of a record that is too long: lines without a quote do not end it
        first = True
        while line := self._line():
            if first and SEPARATOR.match(line):
                self.size = 0
            elif not within or '"' in line:
                self.count, self.last = self.count + 1, line
                yield line
            within, first = self.size > self._longest, False
        if self.size:
            raise _UnclosedError

    def _line(self) -> str:
        line = piece = self._piece()
        while piece and not line.endswith(("\n", "\r")):
            piece = self._piece()
            line += piece
        return line

    def _piece(self) -> str:
        piece = self._text.readline(self._longest + 1)
        self.size += len(piece)
        return piece if self.size <= self._longest else self._contents.sub("x", piece)


def _header(cells: list[str], fault: str, shown: str) -> list[str]:
    """The names of the columns; one without a name is called as pandas calls it, such as ``Unnamed: 0``.

    Raises:
        InputFileError: the row does not name the columns.
    """
    if fault:
        raise InputFileError(f"the header of {shown} cannot be read", hint=fault)
    names = [cell.strip() or f"Unnamed: {place}" for place, cell in enumerate(cells)]
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        raise InputFileError(f"the header of {shown} is not in UTF-8", hint=TO_UTF_8) from None
    _refuse_repeated(names, shown)
    if any(len(name) > LONGEST_NAME for name in names) or all(not cell.strip() or _is_number(cell) for cell in cells):
        hint = "its first row must name the columns"
        raise InputFileError(f"{shown} has no header: its first row begins with {cells[0][:40]!r}", hint=hint)
    return names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# Parquet


def parquet_rows(file: BinaryIO, shown: str, longest: int) -> Iterator[Line]:
    """The rows of a Parquet file.

    Args:
        file: its bytes; they are copied to a temporary file if places in it cannot be sought.
        shown: its name in messages.
        longest: bytes of a row, as JSON, that may be read.

    Raises:
        InputFileError: the file is damaged, two columns have the same name, or pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputFileError(f"{shown} is a Parquet file, which pyarrow reads", hint=PARQUET_EXTRA) from None
    number = 0
    try:
        with _sought(file) as sought, ParquetFile(sought, buffer_size=STREAM_BYTES, pre_buffer=False) as table:
            schema = _in_microseconds(table.schema_arrow)
            _refuse_repeated(schema.names, shown)
            for batch in table.iter_batches(_batch_rows(table), use_threads=False):
                yield from _batch_lines(batch.cast(schema, safe=False), longest)
                number += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        what = str(error).partition("\n")[0]
        message = f"the Parquet file {shown} cannot be read after its row {number:,}: {what}"
        raise InputFileError(message, hint=CUT_SHORT) from None


@contextmanager
def _sought(file: BinaryIO) -> Iterator[BinaryIO]:
    """A file in which every place can be sought; a compressed one is unpacked to a temporary file."""
    if isinstance(getattr(file, "raw", None), io.FileIO):
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy)
        yield copy


def _batch_rows(table: ParquetFile) -> int:
    """Rows of a batch that take about a megabyte."""
    groups = (table.metadata.row_group(number) for number in range(table.num_row_groups))
    row_bytes: int = sum(group.total_byte_size for group in groups) // max(1, table.metadata.num_rows)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))


def _batch_lines(batch: pa.RecordBatch, longest: int) -> Iterator[Line]:
    try:
        rows = batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, KeyError, OverflowError) as error:  # texts that are not UTF-8, dates after the year 9999
        if batch.num_rows > 1:
            for place in range(batch.num_rows):
                yield from _batch_lines(batch.slice(place, 1), longest)
        else:
            yield Line(_bytes(str(error)), fault=f"the row cannot be read: {error}")
        return
    for row in rows:
        yield _line(row, _encode_value, longest)


def _encode_value(value: Any) -> str:
    """A value of Parquet as JSON, with null in place of numbers that JSON does not have."""
    try:
        return _PARQUET_ENCODER.encode(value)
    except ValueError:
        return _PARQUET_ENCODER.encode(_without_nan(value))


def _in_microseconds(schema: pa.Schema) -> pa.Schema:
    """The schema with times in microseconds in place of nanoseconds, which Python's times do not have."""
    import pyarrow as pa

    def changed(field: pa.Field) -> pa.Field:
        kind = field.type
        if getattr(kind, "unit", None) == "ns":
            zone = getattr(kind, "tz", None)
            plain = {pa.types.is_timestamp: pa.timestamp("us", zone), pa.types.is_time: pa.time64("us")}
            new = next((plain[is_kind] for is_kind in plain if is_kind(kind)), pa.duration("us"))
        elif pa.types.is_struct(kind):
            new = pa.struct([changed(kind.field(place)) for place in range(kind.num_fields)])
        elif pa.types.is_list(kind):
            new = pa.list_(changed(kind.value_field))
        else:
            return field
        return field.with_type(new)

    return pa.schema([changed(field) for field in schema])


def _as_json(value: Any) -> str:
    """A value of Parquet that JSON has no kind for, as text."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


_PARQUET_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_as_json)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value


# All tables


def _refuse_repeated(names: list[str], shown: str) -> None:
    """Refuse columns of the same name.

    Raises:
        InputFileError: names one.
    """
    for name, count in Counter(names).items():
        if count > 1:
            hint = "each column needs a name of its own"
            raise InputFileError(f"two columns of {shown} are called {name[:LONGEST_NAME]!r}", hint=hint)


def _line(row: Any, encode: Callable[[Any], str], longest: int, *, cells: bool = False) -> Line:
    """A row as a line of JSON, or what is wrong with it."""
    try:
        text = encode(row)
        line = text.encode() + b"\n"
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        return Line(_bytes(text), fault=f"byte 0x{byte:02x} is not UTF-8 ({TO_UTF_8})", cells=cells)
    except RecursionError:
        return Line(b"", fault="nested too deep")
    except (ValueError, TypeError) as error:
        return Line(_bytes(str(row)), fault=str(error))
    return Line(line, iter(()) if len(line) > longest else None, cells=cells)


def _bytes(text: str) -> bytes:
    """The bytes of a text; those that are not UTF-8 as they were read."""
    return text.encode(errors="surrogateescape")
