"""Files that must not be lost: they grow by whole lines, are replaced whole, and have one owner at a time.

Knows the system's calls and what a power cut leaves; knows nothing of rows.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bmx.errors import LockedError, OutputError
from bmx.units import now

SYNC_SECONDS = 1.0  # lines written longer ago than this survive a power cut
LOCK_POLL_SECONDS = 0.1
LOCK_BEGINNING = b'{"host":'
KEPT = "everything that this run wrote before is kept"


def this_process() -> dict[str, Any]:
    """Host, process id and time, for lock files and manifests."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": now()}


def _write(handle: int, data: bytes) -> None:
    """Write all of the data: the system may accept it in parts."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


class LineFile:
    """A file, or a stream, that grows by whole lines.

    Each line goes to the system at once, so that it outlives the process. A thread syncs to the disk once a second,
    so that all but the last second's lines outlive a power cut.

    Args:
        path: the file, created if it is missing; None is standard output.
        keep: bytes at its start that stay; the rest is cut off. None: the file must not exist yet.

    Raises:
        OutputError: it cannot be opened or written. A line is in the file whole or not at all.
    """

    def __init__(self, path: Path | None, keep: int | None) -> None:
        self._name = str(path) if path else "standard output"
        self._failure: OSError | None = None
        if path is None and sys.stdout is None:
            raise OutputError("standard output is closed", hint="-o takes a file")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_EXCL if keep is None else 0)
            self._fd = os.dup(1) if path is None else os.open(path, flags, 0o666)
            self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode) and path is not None
            if path and self._regular:
                if os.fstat(self._fd).st_size != (keep or 0):
                    os.ftruncate(self._fd, keep or 0)
                sync_folder(path.parent)
        except OSError as error:
            raise self._error(error, "cannot create") from None
        self._size = keep or 0
        self._dirty = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._sync_each_second, daemon=True)
        if self._regular:
            self._thread.start()

    def append(self, line: bytes) -> None:
        """Add a line, its newline included.

        Raises:
            BrokenPipeError: the reader of a stream has gone.
            OutputError: the disk is full, or fails.
        """
        if self._failure:
            raise self._error(self._failure)
        try:
            _write(self._fd, line)
        except BrokenPipeError:
            raise
        except OSError as error:
            if self._regular:
                with suppress(OSError):
                    os.ftruncate(self._fd, self._size)
            raise self._error(error) from None
        self._size += len(line)
        self._dirty = True

    def close(self) -> None:
        """Sync and close.

        Raises:
            OutputError: some lines may not be on the disk.
        """
        self._closing.set()
        if self._regular:
            self._thread.join()
        try:
            try:
                self._sync()
            finally:
                os.close(self._fd)
        except OSError as error:
            raise self._error(error) from None
        if self._failure:
            raise self._error(self._failure)

    def _sync_each_second(self) -> None:
        while not self._closing.wait(SYNC_SECONDS) and not self._failure:
            try:
                self._sync()
            except OSError as error:
                self._failure = error

    def _sync(self) -> None:
        if self._regular and self._dirty:
            self._dirty = False
            os.fsync(self._fd)

    def _error(self, error: OSError, what: str = "cannot write") -> OutputError:
        return OutputError(f"{what} {self._name}: {error.strerror}", hint=KEPT)


def replace_file(path: Path, text: str) -> None:
    """Replace a file, whole or not at all: write a temporary file, sync it, rename it, sync the folder.

    Only one process may replace a file at a time.

    Raises:
        OutputError: it cannot be written; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            _write(handle, text.encode(errors="backslashreplace"))  # a path may hold any bytes: an escape in JSON
            os.fsync(handle)
            os.fchmod(handle, 0o666 & ~_umask())
        finally:
            os.close(handle)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise OutputError(f"cannot write {path}: {error.strerror}", hint=KEPT) from None


def _umask() -> int:
    """The process's umask, where possible without changing it for a moment, which other threads would see."""
    with suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def remove_file(path: Path) -> None:
    """Remove a file so that it stays removed after a power cut.

    Raises:
        OutputError: it cannot be removed.
    """
    try:
        os.unlink(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot remove {path}: {error.strerror}") from None


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that files created or renamed in it survive a power cut.

    Raises:
        OSError: the disk fails.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, wait: float) -> Iterator[None]:
    """Hold a lock while the body runs. The system releases it when the process dies.

    Args:
        path: the lock file.
        wait: seconds to wait for another process that holds the lock.

    Raises:
        LockedError: another process still holds it.
        OutputError: the lock file cannot be created.
    """
    deadline = time.monotonic() + wait
    while (handle := _lock(path)) is None:
        if time.monotonic() >= deadline:
            raise LockedError(
                f"another run is at work: {_owner(path)} holds {path}", hint="--lock-wait 10m waits for it"
            )
        time.sleep(min(LOCK_POLL_SECONDS, wait))
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held, so that no other process's lock file is removed
            os.unlink(path)
        with suppress(OSError):
            os.close(handle)


def _lock(path: Path) -> int | None:
    """A file descriptor that holds the lock; None if another process holds it."""
    handle = None
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(path, handle):
            os.close(handle)  # its last owner removed the file in between
            return _lock(path)
        if os.pread(handle, len(LOCK_BEGINNING), 0) not in (b"", LOCK_BEGINNING):
            os.close(handle)
            raise OutputError(f"{path} is not a lock file of bmx", hint="move it away, or choose another output")
        os.ftruncate(handle, 0)
        _write(handle, json.dumps(this_process()).encode())
    except BlockingIOError:
        if handle is not None:
            os.close(handle)
        return None
    except OSError as error:
        raise OutputError(
            f"cannot lock {path}: {error.strerror}", hint="the folder of the output must be writable"
        ) from None
    return handle


def _is_at(path: Path, handle: int) -> bool:
    """Whether an open file is still the one at that path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_bytes())
        return f"process {owner['pid']} on {owner['host']}, since {owner['started']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "it"
