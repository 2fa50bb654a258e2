"""Lock files: one run at a time uses an output.

Knows the system's locks, which end with the process that holds them; knows nothing of what they protect.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bmx.errors import LockedError, OutputError
from bmx.job.durable_files import this_process, write_all

LOCK_POLL_SECONDS = 0.1
LOCK_BEGINNING = b'{"host":'


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
            if _is_at(path, handle):
                os.unlink(path)
        with suppress(OSError):
            os.close(handle)


def _lock(path: Path) -> int | None:
    """A file descriptor that holds the lock; None if another process holds it."""
    handle = None
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(path, handle):
            os.close(handle)  # its last owner removed the file in between
            return _lock(path)
        if os.pread(handle, len(LOCK_BEGINNING), 0) not in (b"", LOCK_BEGINNING):
            os.close(handle)
            raise OutputError(f"{path} is not a lock file of bmx", hint="move it away, or choose another output")
        os.ftruncate(handle, 0)
        write_all(handle, json.dumps(this_process()).encode())
    except BlockingIOError:
        if handle is not None:
            os.close(handle)
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OutputError(f"{path} is a symbolic link, not a lock file of bmx", hint="remove it") from None
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
