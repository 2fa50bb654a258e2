"""The file of ``--stats-file``: the counters of a run in progress, for programs that watch it.

Holds no prompt, no answer and no secret. Written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmx.errors import OutputError
from bmx.job.manifest import State, progress_record, write_json
from bmx.periodic import periodically
from bmx.stats import Stats
from bmx.units import now

STATS_FORMAT = 1
STATS_SECONDS = 5.0


def is_stats_file(path: Path) -> bool:
    """Whether a file may be replaced by counters: it is missing, empty, or already a stats file."""
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return True
    try:
        record = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"format", "state", "rows", "last_row"} <= record.keys()


def stats_record(state: State, stats: Stats) -> dict[str, Any]:
    """The counters of a run for JSON, at this moment: the schema of ``--stats-file``.

    Format 1. Fields may be added; existing ones keep their meaning.
    """
    left = stats.seconds_left
    return {
        "format": STATS_FORMAT,
        "state": state,
        "time": now(),
        **progress_record(stats),
        "last_row": now(ago=stats.quiet_seconds) if stats.last_row else None,
        "seconds_left": None if left is None else round(left, 1),
        "slots": {"all": stats.slots, "active": stats.active_slots},
        "memory": {"bytes": stats.memory_bytes, "peak_bytes": stats.peak_memory_bytes, "kv_bytes": stats.kv_bytes},
    }


@contextmanager
def updated_stats_file(path: Path | None, stats: Stats, warn: Callable[[str], None]) -> Iterator[None]:
    """Keep the counters of a run in a file while the body runs. A full disk does not stop the run.

    Args:
        path: the file, replaced every ``STATS_SECONDS``; None for no file.
        stats: the counters.
        warn: shows a message when the file cannot be written.
    """
    if path is None:
        yield
        return
    broken = False

    def write(state: State) -> None:
        nonlocal broken
        try:
            write_json(path, stats_record(state, stats))
            broken = False
        except OutputError as error:
            if not broken:
                warn(error.message)
            broken = True

    write("running")
    state: State = "failed"
    try:
        with periodically(lambda: STATS_SECONDS, lambda: write("running")):
            yield
        state = "finished"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        write(state)
