"""A file that grows by whole lines, has one writer, and is watched: what is claimed to be in it is there.

Knows the system's calls and what other programs may do to a file; knows nothing of rows.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from bmx.errors import BmxError, LockedError, OutputError
from bmx.job.durable_files import KEPT, remove_file, sync_folder, write_all
from bmx.periodic import said_if_long

SYNC_SECONDS = 1.0  # lines written longer ago than this survive a power cut
PIECE = 1 << 26  # bytes of a line that are in memory at a time
FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
CHANGED = "the same command finds out what is there, and answers what is missing"


class LineFile:
    """A file, or a stream, that grows by whole lines.

    A file that exists is opened and locked at once, and may be read before ``start``; one that is missing is created
    by ``start``. From then on each line goes to the system at once, so that it outlives the process. A thread syncs
    the file to the disk once a second, so that all but the last second's lines outlive a power cut, and looks whether
    the file is still the one at its path and has the size that it should have.

    Args:
        path: the file; None is standard output. Links are followed.
        read_only: neither lock nor write it.

    Raises:
        LockedError: another run writes to the file, by whatever name.
        OutputError: it cannot be opened.
    """

    def __init__(self, path: Path | None, *, read_only: bool = False) -> None:
        self._path = path
        self._name = str(path) if path else "standard output"
        self._watched = path
        if path:
            with suppress(OSError):  # there is no working folder
                self._watched = path.absolute()  # not os.path.abspath: what is before ".." may be a link
        self._fd = -1
        self._regular = path is not None and (path.is_file() or not path.exists())
        self._size = self._time = 0
        self._dirty = False
        self._failure: BmxError | None = None
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._sync_each_second, daemon=True)
        if path and path.is_file():
            try:
                self._fd = os.open(path, os.O_RDONLY if read_only else FLAGS)
            except OSError as error:
                raise self._error(error, "cannot open") from None
            if not read_only:
                try:
                    self._lock(self._fd)
                except BaseException:
                    os.close(self._fd)
                    raise
            self._note_state()

    @property
    def path(self) -> Path:
        """The path of a file.

        Raises:
            OutputError: this is standard output.
        """
        if self._path is None:
            raise OutputError("standard output has no path")
        return self._path

    @property
    def exists(self) -> bool:
        """Whether there is a file, with or without lines."""
        return self._fd >= 0

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Pairs of a line's number and its bytes; a very long line comes in pieces, only the last with a newline."""
        if not self.exists:
            return
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            number = 1
            while piece := file.readline(PIECE):
                yield number, piece
                number += piece.endswith(b"\n")

    def check_unchanged(self) -> None:
        """Check before ``start`` that the file is still as it was when it was opened: what was read is what is there.

        Raises:
            OutputError: another program has changed it.
        """
        if not self.exists:
            return
        try:
            self._check()
            if not self._failure and os.fstat(self._fd).st_mtime_ns != self._time:
                self._failure = self._changed("was written to")
        except OSError as error:
            raise self._error(error, "cannot check") from None
        if self._failure:
            raise self._failure

    def _note_state(self) -> None:
        status = os.fstat(self._fd)
        self._size, self._time = status.st_size, status.st_mtime_ns

    def start(self, keep: int) -> None:
        """Create the file, or cut it off, and begin to watch it.

        Args:
            keep: bytes at its start that stay.

        Raises:
            LockedError: another run has created it meanwhile.
            OutputError: it cannot be created or written, or another program has changed it since it was opened.
        """
        self.check_unchanged()
        if self._path is None and sys.stdout is None:
            raise OutputError("standard output is closed", hint="-o takes a file")
        try:
            if self._path is None:
                self._fd = os.dup(1)
            elif not self._regular:
                with said_if_long(f"waiting for a program that reads {self._name}"):
                    self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            elif not self.exists:
                self._fd = os.open(self._path, FLAGS | os.O_CREAT, 0o666)
                self._lock(self._fd)
                if os.fstat(self._fd).st_size:
                    raise OutputError(f"another program has written to {self._name} meanwhile", hint=CHANGED)
                sync_folder(self._path.resolve().parent)
            elif os.fstat(self._fd).st_size != keep:
                os.ftruncate(self._fd, keep)
        except OSError as error:
            raise self._error(error, "cannot create") from None
        self._size = keep
        if self._regular:
            self._thread.start()

    def replace(self, lines: Iterable[bytes]) -> int:
        """Put a new file in place of this one, whole or not at all; returns its size. Only before ``start``.

        Raises:
            OutputError: it cannot be written, or another program has changed the old one; the old file stays.
        """
        path = self.path.resolve()
        temporary = path.with_name(f".{path.name}.tmp")
        new = -1
        try:
            new = os.open(temporary, FLAGS | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            self._lock(new)
            for line in lines:
                write_all(new, line)
            status = os.fstat(self._fd)
            with suppress(OSError):  # only the superuser may give files away
                os.fchown(new, status.st_uid, status.st_gid)
            os.fchmod(new, stat.S_IMODE(status.st_mode))
            os.fsync(new)
            self.check_unchanged()
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException as error:
            with suppress(OSError):
                os.unlink(temporary)
            if new >= 0:
                os.close(new)
            if isinstance(error, OSError):
                raise self._error(error) from None
            raise
        os.close(self._fd)
        self._fd = new
        self._note_state()
        return self._size

    def remove(self) -> None:
        """Remove the file, not a link to it; it is created anew by ``start``.

        Raises:
            OutputError: it cannot be removed, or another program has changed it.
        """
        if self.exists:
            self.check_unchanged()
            remove_file(self.path.resolve())
            os.close(self._fd)
            self._fd = -1

    def append(self, line: bytes) -> None:
        """Add a line, its newline included. It is in the file whole or not at all.

        Raises:
            BrokenPipeError: the reader of a stream has gone.
            OutputError: the disk is full or fails, or another program has changed the file.
        """
        with self._writing:
            if self._failure:
                raise self._failure
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            except BrokenPipeError:
                raise
            except OSError as error:
                self._take_back(len(line) - len(rest))
                raise self._error(error) from None
            self._size += len(line)
            self._dirty = True

    def _take_back(self, count: int) -> None:
        """Cut off the beginning of a line that could not be written whole, unless another program wrote behind it."""
        if self._regular and count:
            with suppress(OSError):
                end = os.lseek(self._fd, 0, os.SEEK_CUR)
                if os.fstat(self._fd).st_size == end:
                    os.ftruncate(self._fd, end - count)

    def close(self) -> None:
        """Sync, check and close.

        Raises:
            OutputError: some lines may not be on the disk, or another program has changed the file.
        """
        if not self.exists:
            return
        started = self._thread.is_alive()
        self._closing.set()
        if started:
            self._thread.join()
        try:
            try:
                if started and not self._failure:
                    self._sync()
                    self._check()
            finally:
                handle, self._fd = self._fd, -1
                os.close(handle)
        except OSError as error:
            raise self._error(error) from None
        if self._failure:
            raise self._failure

    def _sync_each_second(self) -> None:
        while not self._closing.wait(SYNC_SECONDS) and not self._failure:
            try:
                self._sync()
                self._check()
            except OSError as error:
                self._failure = self._error(error)

    def _sync(self) -> None:
        if self._dirty:
            self._dirty = False
            os.fsync(self._fd)

    def _check(self) -> None:
        """Note it when the file is no longer the one at its path, or has not the size that was written."""
        with self._writing:
            ours, size = os.fstat(self._fd), self._size
        try:
            there = os.stat(self._watched or self.path)
        except (FileNotFoundError, NotADirectoryError):
            what = "was deleted or moved away"
        else:
            what = "" if os.path.samestat(ours, there) else "was replaced"
        if not what and ours.st_size != size:
            what = f"has {ours.st_size:,} bytes instead of {size:,}: it was changed"
        if what:
            self._failure = self._changed(what)

    def _changed(self, what: str) -> OutputError:
        message = f"{self._name} {what} by another program while the run was at work"
        return OutputError(message, hint=CHANGED)

    def _lock(self, handle: int) -> None:
        """Lock the file itself: it may have several names, and lock files can be deleted."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(f"another run is at work: it writes to {self._name}", hint="wait for its end") from None
        except OSError as error:
            raise self._error(error, "cannot lock") from None

    def _error(self, error: OSError, what: str = "cannot write") -> OutputError:
        return OutputError(f"{what} {self._name}: {error.strerror}", hint=KEPT)
