"""The lines of a job's files, numbered and hashed: each holds a row. Any share of them can be left out.

Knows lines as bytes; knows nothing of JSON.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from random import Random

from bmx.job.line_reader import LineSet, read_lines
from bmx.job.table_reader import BYTE_ORDER_MARK, Line

BLANKS = b" \t\r\n"


class RowLines:
    """The lines of files, which hold a row each; its attributes describe the line that was read last.

    Attributes:
        number: of the line, counted through all files.
        line: its bytes; empty if it is too long.
        size: its length in bytes.
        key: its hash without the white space around it.
        too_long: whether it is longer than lines may be.
        torn: a remark for a last line without a newline, which may still be growing.
        fault: why it cannot be read, as the row of a table.
        cells: whether its values are cells of a CSV file.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        longest: int,
        hash_key: bytes,
        skip: LineSet | None,
        every: int,
        always: Container[int],
    ) -> None:
        """Lines of these files.

        Args:
            paths: the files, read one after the other.
            longest: bytes of the longest line that is read.
            hash_key: the key of the lines' hashes.
            skip: numbers of lines to skip.
            every: read only one in this many of the other lines, chosen at random, the same ones each time.
            always: numbers of lines that ``every`` never leaves out.
        """
        self._paths, self._longest, self._hash_key = paths, longest, hash_key
        self._skip, self._every, self._always = skip, every, always
        self.number = self.size = 0
        self.line = b""
        self.key = self.torn = self.fault = ""
        self.too_long = self.cells = False

    @property
    def blank(self) -> bool:
        """Whether the line holds nothing but white space or a byte order mark."""
        return not (self.too_long or self.fault) and self.line.strip(BLANKS) in (b"", BYTE_ORDER_MARK)

    def __iter__(self) -> Iterator[bytes]:
        chance, wanted, at, skip = Random(0), 0, -1, self._skip
        lines = (line for path in self._paths for line in read_lines(path, self._longest))
        for self.number, line in enumerate(lines, 1):
            if skip is not None and self.number > skip.last:
                return
            if skip is not None and self.number in skip:
                continue
            if self._every > 1:
                at += 1
                if at % self._every == 0:
                    wanted = at + chance.randrange(self._every)
                if at != wanted and self.number not in self._always:
                    continue
            self._describe(line)
            yield self.line

    def _describe(self, line: Line) -> None:
        text, rest, self.fault, self.cells = line
        self.too_long = rest is not None
        self.line = b"" if self.too_long else text
        self.torn = "" if text.endswith(b"\n") else " (the file ends in this line: is it still being written?)"
        if rest is None:
            self.size, self.key = len(text), blake2b(text.strip(), key=self._hash_key, digest_size=8).hexdigest()
        else:
            self.size, self.key = _hashed(chain((text,), rest), self._hash_key)


def _hashed(pieces: Iterable[bytes], key: bytes) -> tuple[int, str]:
    """The length of a line that comes in pieces, and its hash without the white space around it."""
    digest, size, blanks, begun = blake2b(key=key, digest_size=8), 0, b"", False
    for piece in pieces:
        size += len(piece)
        text = piece if begun else piece.lstrip()
        end = len(text.rstrip())
        if end:
            digest.update(blanks + text[:end])
            blanks, begun = text[end:], True
        elif begun:
            blanks += text
    return size, digest.hexdigest()
