"""One measurement of ``gpu.py`` at a time, in a process of its own: what it is given, its limit, and what comes of it.

A cell is forked from a process that has loaded torch and the models' code but has never touched the GPU. So a cell
begins at once, with a context of its own, and whatever it breaks is gone with it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TAIL = 30  # lines of what a process said
LOOK_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where it runs, and how large things are there."""

    tried: bool

    @property
    def device(self) -> str:
        return "cpu" if self.tried else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Interpreted Triton computes bfloat16 wrongly."""
        return torch.float32 if self.tried else torch.bfloat16

    @property
    def repeats(self) -> int:
        return 1 if self.tried else 15


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a cell is given.

    Attributes:
        place: where it runs.
        seconds: that it may take.
        rates: FLOPs a second of large products and bytes a second of copies, as the first cell has measured them.
        found: what the cells before it have found, by part and name.
        beside: the path of the record without its ending, for files beside it.
        note: writes down a result at once, under a name.
    """

    place: Place
    seconds: float
    rates: dict[str, float]
    found: dict[str, dict[str, Any]]
    beside: str
    note: Callable[[str, Any], None]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A measurement.

    Attributes:
        part: to which it belongs.
        name: its own.
        seconds: that it may take at most.
        work: measures; returns what it found, for JSON.
        decisive: whether it is among the few that are run when time is short.
    """

    part: str
    name: str
    seconds: float
    work: Callable[[Context], dict[str, Any]]
    decisive: bool = False


class Record:
    """A JSON file that is written anew whenever something is noted."""

    def __init__(self, path: Path, found: dict[str, Any]) -> None:
        self.path, self.found = path, found
        self.write()

    def note(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.write()

    def write(self) -> None:
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(self.found, indent=1, default=str))
        beside.replace(self.path)


def run_cell(cell: Cell, entry: dict[str, Any], record: Record, place: Place, limit: float) -> None:
    """Run a cell in a process of its own, and note in its entry what it finds as it comes, and how it ended."""
    started, found = time.monotonic(), record.found["parts"]
    entry |= {"limit": limit, "found": {}}
    with tempfile.TemporaryDirectory() as folder:
        mine, said = Path(folder, "cell.json"), Path(folder, "said")
        context = {"place": place, "seconds": limit, "rates": record.found["rates"], "found": found}
        context["beside"] = str(record.path.with_suffix(""))
        process = multiprocessing.get_context("fork").Process(target=_in_child, args=(cell, context, mine, said))
        process.start()
        seen = 0
        while process.is_alive() and time.monotonic() - started < limit:
            process.join(LOOK_SECONDS)
            if mine.exists() and mine.stat().st_mtime_ns != seen:
                seen = mine.stat().st_mtime_ns
                entry["found"] = json.loads(mine.read_text())
                record.write()
        late = process.is_alive()
        if late:
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        if mine.exists():
            entry["found"] = json.loads(mine.read_text())
        problem = entry["found"].pop("problem", None)
        if late:
            problem = {"type": "TimedOut", "message": f"timed out after {limit:.0f} s"}
        elif process.exitcode and not problem:
            problem = {"type": "Ended", "message": f"ended with {process.exitcode}"}
        if problem:
            entry |= {"problem": problem, "said": said.read_text(errors="replace").splitlines()[-TAIL:]}
    entry["seconds"] = time.monotonic() - started
    record.write()


def _in_child(cell: Cell, context: dict[str, Any], mine: Path, said: Path) -> None:
    """The cell's process: its results go to one file, and what it says to another."""
    os.setsid()  # so that it can be ended with all that it starts
    told = os.open(said, os.O_WRONLY | os.O_CREAT, 0o600)
    for stream in (1, 2):
        os.dup2(told, stream)
    record = Record(mine, {})
    try:
        for name, value in cell.work(Context(**context, note=record.note)).items():
            record.found[name] = value
        record.write()
    except BaseException as problem:
        record.note("problem", described(problem))
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a GPU that has failed must not be asked to tidy up
    sys.stdout.flush()
    os._exit(0)


def described(problem: BaseException) -> dict[str, str]:
    trace = traceback.format_exception(problem, limit=-4)
    return {"type": type(problem).__name__, "message": str(problem)[:600], "traceback": "".join(trace)[-2500:]}


# Clocks.


def synchronize(place: Place) -> None:
    if not place.tried:
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], Any], place: Place) -> float:
    """Seconds of the median of some repetitions: on a GPU by its own clock, after a warm-up."""
    if place.tried:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    for _ in range(3):
        work()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(place.repeats)]
    for start, end in pairs:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in pairs)


def share(amount: float, seconds: float, rate: float | None) -> float | None:
    """Of what the machine does in that time; None where its rate is not known."""
    return amount / seconds / rate if rate else None
