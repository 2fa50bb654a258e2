"""Cleans up behind a job: ends whatever of its Ray is left and deletes its folder, after the job's process has ended.

A program of its own, which outlives the job however that ends; it needs nothing but Python.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PATIENCE = 10.0  # seconds in which processes end by themselves or are ended
PAUSE = 0.1  # seconds between two looks


def clean(folder: str) -> None:
    """End the processes that have files of a folder open, and delete the folder."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and (left := list(_users(folder))):
        for process in left:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(PAUSE)
    shutil.rmtree(folder, ignore_errors=True)


def _users(folder: str) -> Iterator[int]:
    """Processes that have files of a folder open, but for the one that started this."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in (os.getpid(), os.getppid()):
            with suppress(OSError):
                if any(os.readlink(link).startswith(f"{folder}/") for link in (entry / "fd").iterdir()):
                    yield int(entry.name)


if __name__ == "__main__":
    sys.stdin.buffer.read()  # its other end closes when the job ends
    clean(sys.argv[1])
