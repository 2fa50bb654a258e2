"""Lines of plain, gzip and zstd files as bytes, one in memory at a time.

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
from bmx.job.file_kinds import refuse_other_kinds

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE = 1 << 17
COMPRESSED = (".gz", ".zst")
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # the first bytes of such files; no line of JSON begins like this
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
def open_input(path: Path, shown: str | None = None) -> Iterator[BinaryIO]:
    """A file of lines as bytes, decompressed if its name or its first bytes say that it is compressed.

    Args:
        path: the file.
        shown: its name in messages; None for its path.

    Raises:
        InputFileError: missing, a folder, not readable, damaged, or no JSON lines.
    """
    name = shown or str(path)
    try:
        if path.is_dir():
            raise InputFileError(f"{name} is a folder, not a file of prompts")
        with _opened(path) as file:
            refuse_other_kinds(file.peek(PIECE), name, str(path) if shown in (None, str(path)) else "")
            yield file
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
        while not self._ready:
            piece = (self._frame.unused_data if self._frame and self._frame.eof else b"") or self._file.read(ZSTD_PIECE)
            if not piece:
                if self._frame and not self._frame.eof:
                    raise EOFError("the file ends in the middle of a zstd frame")
                return 0
            self._ready = memoryview(self._decompressed(piece))
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._ready))
        view[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

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


def read_lines(path: Path, longest: int) -> Iterator[tuple[bytes, Iterator[bytes] | None]]:
    r"""Pairs of a line, with its ``\n`` if it has one, and the pieces of what is left of a line that is too long.

    Args:
        path: the file.
        longest: bytes of a line that are kept in memory; None follows a line that is not longer.

    Raises:
        InputFileError: see ``open_input``.
    """
    with open_input(path) as file:
        while line := file.readline(longest + 1):
            if len(line) <= longest or line.endswith(b"\n"):
                yield line, None
                continue
            rest = _pieces(file)
            yield line, rest
            for _ in rest:  # whatever nobody has read
                pass


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """The pieces of a line up to its end."""
    while piece := file.readline(PIECE):
        yield piece
        if piece.endswith(b"\n"):
            return
