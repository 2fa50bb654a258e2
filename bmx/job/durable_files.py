"""Files that must not be lost: they are replaced whole or not at all, and stay after a power cut.

Knows the system's calls and what a power cut leaves; knows nothing of rows.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any

from bmx.errors import OutputError
from bmx.units import now

KEPT = "everything that this run wrote before is kept; mend this, and the same command resumes"


def this_process() -> dict[str, Any]:
    """Host, process id and time, for lock files and manifests."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": now()}


def write_all(handle: int, data: bytes) -> None:
    """Write all of the data: the system may accept it in parts.

    Raises:
        OSError: the disk is full, or fails.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace a file, whole or not at all: write a temporary file, sync it, rename it, sync the folder.

    Only one process may replace a file at a time.

    Raises:
        OutputError: it cannot be written; the old file is unchanged.
    """
    with new_file(path) as file:
        if isinstance(content, str):  # a path may hold any bytes: an escape in JSON
            content = content.encode(errors="backslashreplace")
        write_all(file.fileno(), content)
        put_in_place(file, path)


@contextmanager
def new_file(path: Path) -> Iterator[BufferedRandom]:
    """A temporary file for ``put_in_place``; nothing is left of it where the body does not put it there.

    Only one process may do so at a time.

    Raises:
        OutputError: it cannot be written; the old file is unchanged.
    """
    temporary = _temporary(path)
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "w+b") as file:
            yield file
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint=KEPT) from None
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def put_in_place(file: BufferedRandom, path: Path) -> None:
    """Put a file of ``new_file`` in the place of another one, so that it is there after a power cut.

    Raises:
        OSError: the disk is full, or fails.
    """
    file.flush()
    os.fsync(file.fileno())
    os.fchmod(file.fileno(), 0o666 & ~_umask())
    os.replace(_temporary(path), path)
    sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _umask() -> int:
    """The process's umask, where possible without changing it for a moment, which other threads would see."""
    with suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def overwrite_file(path: Path, text: str) -> None:
    """Write over the beginning of a file and pad the rest with blanks: this needs no space on a full disk.

    Raises:
        OutputError: the file is missing or shorter than the text, or it cannot be written.
    """
    data = text.encode(errors="backslashreplace")
    try:
        handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            size = os.fstat(handle).st_size
            if size < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_all(handle, data.rstrip(b"\n") + b" " * (size - len(data)) + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint=KEPT) from None


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
