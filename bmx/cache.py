"""What bmx keeps in the user's cache: entries that appear whole or not at all, and that are checked when they are used.

Knows files and folders; knows nothing of what they hold.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bmx.periodic import said_if_long

CONTENTS = "contents.json"  # the names and sizes of a folder's files, written last
REMEDY = "set XDG_CACHE_HOME to a folder that can be written"

logger = logging.getLogger(__name__)
_told: set[str] = set()


def cache_folder(kind: str) -> Path:
    """The folder for one kind of entries; it need not exist.

    Raises:
        OSError: there is no home folder, and no variable names another one; or platformdirs is not installed.
    """
    try:
        from platformdirs import user_cache_path
    except ImportError as error:
        raise OSError(errno.ENOENT, "platformdirs is not installed") from error
    try:
        folder = user_cache_path("bmx") / kind
    except RuntimeError:
        folder = Path()
    if not folder.is_absolute():
        raise OSError(errno.ENOENT, "there is no home folder")
    return folder


def remedy(error: OSError) -> str:
    """What makes a cache work that cannot be used because of an error."""
    return "pip install platformdirs" if isinstance(error.__cause__, ImportError) else REMEDY


def warn_once(problem: str, error: OSError) -> None:
    """Say once that something is done without the cache, and what would help against the error."""
    if problem not in _told:
        _told.add(problem)
        logger.warning("%s: %s", problem, remedy(error))


def store(file: Path, content: bytes) -> None:
    """Write an entry.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with partial.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def is_whole(folder: Path) -> bool:
    """Whether every file that was stored in a folder is there with its size."""
    try:
        sizes = json.loads((folder / CONTENTS).read_bytes())
        return bool(sizes == _sizes(folder, sizes))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def filled(folder: Path, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled first unless it is whole. Other processes that want it wait for the first one.

    Args:
        folder: the entry.
        fill: writes its files to the folder that it is given.

    Raises:
        OSError: the cache cannot be written; nothing is left behind.
    """
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if is_whole(folder):
            return folder
        work = folder.with_name(f".{folder.name}.partial")
        try:
            _remove(work)  # of a process that was killed
            work.mkdir()
            fill(work)
            names = [path.name for path in work.iterdir()]
            (work / CONTENTS).write_text(json.dumps(_sizes(work, names)))
            for path in (*work.iterdir(), work):
                _sync(path)
            _remove(folder)  # it was damaged
            work.rename(folder)
        finally:
            with suppress(OSError):
                _remove(work)
    return folder


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names}


def _remove(folder: Path) -> None:
    if os.path.lexists(folder):
        shutil.rmtree(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock while the body runs; the file stays, since others may wait for it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with said_if_long(f"waiting for another run that writes beside {path}"):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
