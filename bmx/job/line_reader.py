"""Lines of plain, gzip and zstd files as bytes, one in memory at a time; rows of tables as such lines.

Knows bytes; knows nothing of JSON.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bmx.errors import InputFileError
from bmx.job.file_kinds import FileKind, file_kind
from bmx.job.table_reader import Line, array_rows, csv_rows, parquet_rows

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE = 1 << 17
COMPRESSED = (".gz", ".zst")
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # the first bytes of such files; no line of JSON begins like this
PIPED = "the input that was piped in"
ZSTD_PIECE = 256  # compressed bytes at a time: each byte may become a hundred kilobytes


class LineSet:
    """A set of line numbers, one bit each. Lines after the last one count as members."""

    def __init__(self, last: int) -> None:
        self._bits = bytearray(last // 8 + 1)
        self.last = last

    def add(self, number: int) -> None:
        """Add a line."""
        self._bits[number >> 3] |= 1 << (number & 7)

    def __contains__(self, number: int) -> bool:
        return number > self.last or bool(self._bits[number >> 3] & (1 << (number & 7)))


@contextmanager
def open_input(path: Path, shown: str | None = None) -> Iterator[tuple[BinaryIO, FileKind]]:
    """A file of rows as bytes, decompressed if its name or its first bytes say that it is compressed; and its kind.

    Args:
        path: the file.
        shown: its name in messages; None for its path.

    Raises:
        InputFileError: missing, a folder, not readable, damaged, or of a kind that bmx does not read.
    """
    name = shown or str(path)
    try:
        if path.is_dir():
            raise InputFileError(f"{name} is a folder, not a file of prompts")
        with _opened(path) as file:
            yield file, file_kind(file.peek(PIECE), name, str(path) if shown in (None, str(path)) else "")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputFileError(f"cannot read {name}: {error}") from None
    except OSError as error:
        raise InputFileError(f"cannot read {name}: {error.strerror}") from None


def _opened(path: Path) -> io.BufferedReader:
    with path.open("rb") as file:
        start = file.read(len(ZSTD))
    if path.suffix == ".gz" or start.startswith(GZIP):
        return io.BufferedReader(gzip.open(path), PIECE)
    if path.suffix == ".zst" or start == ZSTD:
        return io.BufferedReader(ZstdFile(path), PIECE)
    return io.BufferedReader(path.open("rb", 0), PIECE)


class ZstdFile(io.RawIOBase):
    """The contents of a zstd file, which may have several frames.

    Raises:
        EOFError: the file is damaged, or ends in the middle.
    """

    def __init__(self, path: Path) -> None:
        from zstandard import ZstdDecompressor

        self._file = path.open("rb", PIECE)
        self._decompressor = ZstdDecompressor()
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """True: this is a file to read from."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill ``buffer`` with the next bytes; returns their number, 0 at the end."""
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view) and (ready := self._more()):
            count = min(len(view) - filled, len(ready))
            view[filled : filled + count], self._ready = ready[:count], ready[count:]
            filled += count
        return filled

    def _more(self) -> memoryview:
        """Bytes that are decompressed; none at the end."""
        while not self._ready:
            piece = (self._frame.unused_data if self._frame and self._frame.eof else b"") or self._file.read(ZSTD_PIECE)
            if not piece:
                if self._frame and not self._frame.eof:
                    raise EOFError("the file ends in the middle of a zstd frame")
                return self._ready
            self._ready = memoryview(self._decompressed(piece))
        return self._ready

    def _decompressed(self, piece: bytes) -> bytes:
        from zstandard import ZstdError

        if self._frame is None or self._frame.eof:
            self._frame = self._decompressor.decompressobj()
        try:
            return bytes(self._frame.decompress(piece))
        except ZstdError as error:
            raise EOFError(str(error)) from None

    def close(self) -> None:
        """Close the compressed file."""
        self._file.close()
        super().close()


def read_lines(path: Path, longest: int) -> Iterator[Line]:
    """The lines of a file, or the rows of an array or a table as lines of JSON.

    Args:
        path: the file.
        longest: bytes of a line that are kept in memory.

    Raises:
        InputFileError: see ``open_input``; or a table is damaged, or its header names no columns.
    """
    name = PIPED if str(path).startswith("/proc/self/fd/") else str(path)
    with open_input(path) as (file, kind):
        if kind.format == "array":
            yield from array_rows(file, name, longest)
        elif kind.format == "csv":
            yield from csv_rows(file, name, longest, kind.delimiter)
        elif kind.format == "parquet":
            yield from parquet_rows(file, name, longest)
        else:
            yield from _lines(file, longest)


def _lines(file: BinaryIO, longest: int) -> Iterator[Line]:
    while line := file.readline(longest + 1):
        if len(line) <= longest or line.endswith(b"\n"):
            yield Line(line)
            continue
        rest = _pieces(file)
        yield Line(line, rest)
        for _ in rest:  # whatever nobody has read
            pass


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """The pieces of a line up to its end."""
    while piece := file.readline(PIECE):
        yield piece
        if piece.endswith(b"\n"):
            return
