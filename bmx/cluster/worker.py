"""A worker: an engine that answers rows as they are fed to it, and reports results and counters as they come.

Knows nothing of other workers, nor of what carries its calls and reports.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

from bmx.cluster.machines import THREADS, Machine, Share, this_machine
from bmx.compress.budgets import Budget
from bmx.config import EngineConfig
from bmx.engine.engine import Engine
from bmx.errors import BmxError
from bmx.model.file_hash import model_files
from bmx.plan.planner import Length, Plan
from bmx.prompt_config import PromptConfig
from bmx.request import Request, Result
from bmx.shutdown import Stop
from bmx.stats import Stats

GATHERED = 0.05  # seconds in which results are gathered into one report
QUIET = 0.5  # seconds after which a report without results follows
MOST_RESULTS = 512  # of one report


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A worker whose model is loaded.

    Attributes:
        model: what computes the answers, as ``Engine.describe`` says it.
        files: a hash of the model's files; None for a model of the hub.
        budget: of the KV cache; None where nothing is evicted.
    """

    model: dict[str, Any]
    files: str | None
    budget: Budget | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a worker has done since its last report.

    Attributes:
        results: finished rows.
        stats: its counters so far.
        warnings: what it logged for people.
        ended: whether the run is over: no rows are left, or ``error`` ended it.
        error: what ended it.
    """

    results: list[Result]
    stats: Stats
    warnings: tuple[str, ...] = ()
    ended: bool = False
    error: BmxError | None = None


class BrokenWorkerError(BmxError):
    """A worker failed in a way that nobody foresaw."""


def foreseen(error: Exception) -> BmxError:
    """An error as one that can be sent to the driver and shown to a person."""
    if isinstance(error, BmxError):
        return error
    return BrokenWorkerError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


class Worker:
    """One engine. Its methods may be called from several threads; ``open`` comes first."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._life = 0  # calls for another life of this worker come too late
        self._rows: SimpleQueue[Request | None] = SimpleQueue()
        self._results: SimpleQueue[Result | _Ended] = SimpleQueue()
        self._feeding = Lock()
        self._fed = 0  # rows of this run that came
        self._total: int | None = None  # those that should have come, if that is known
        self._stop = Stop()
        self._in_flight = 0  # rows that the engine has taken and not answered
        self._stats = Stats()
        self._warnings = Warnings()
        logging.getLogger("bmx").addHandler(self._warnings)

    def machine(self, node: str) -> Machine:
        """The machine that it is on; ``node`` names it."""
        return this_machine(node)

    def open(self, life: int, config: EngineConfig, prompt: PromptConfig, share: Share) -> Opened:
        """Load the model.

        Args:
            life: how often the worker was started, from 1 on.
            config: the settings.
            prompt: settings of prompts.
            share: what it may use of its machine.

        Raises:
            BmxError: as ``Engine.open``.
        """
        os.environ[THREADS] = str(share.threads)  # before torch is loaded, which reads it
        if share.memory is not None:
            config = replace(config, memory_limit=share.memory)
        self._engine, self._life = Engine.open(config, prompt), life
        engine = self._engine
        return Opened(model=engine.describe(), files=model_files(config.model), budget=engine.budget)

    @property
    def engine(self) -> Engine:
        """Its engine.

        Raises:
            RuntimeError: it is not open.
        """
        if self._engine is None:
            raise RuntimeError("the worker is not open")
        return self._engine

    def close(self) -> None:
        """Free the model, and end the other processes that have a part of it."""
        self.engine.close()

    def measure(self, requests: Iterable[Request]) -> list[Length]:
        """The length of each request that can be answered at all."""
        return self.engine.measure(requests)

    def prompt_warnings(self) -> list[str]:
        """What a person should know of the prompts that it has measured."""
        return self.engine.prompt_warnings()

    def plan(self, lengths: Sequence[Length]) -> Plan:
        """Its own plan for rows of these lengths.

        Raises:
            MemoryLimitError: not even one slot fits.
        """
        return self.engine.plan(lengths)

    def feed(self, life: int, rows: Sequence[Request], total: int | None = None) -> None:
        """Take rows to be answered. Calls may overtake each other.

        Args:
            life: that the rows are for; those for an earlier one are with other workers already.
            rows: to be answered.
            total: rows of all calls of this run, if no more will follow: ``answers`` ends when all are answered.
        """
        with self._feeding:
            if life != self._life:
                return
            for row in rows:
                self._rows.put(row)
            self._fed += len(rows)
            self._total = self._total if total is None else total
            if self._fed == self._total:
                self._rows.put(None)
                self._fed, self._total = 0, None

    def stop(self, within: float) -> None:
        """Begin no further row; those in flight are dropped after ``within`` seconds."""
        self._stop.within = within
        with self._stop.graceful():
            self._stop.request(signal.SIGTERM)
        self._rows.put(None)

    def answers(self, plan: Plan, row_timeout: float | None) -> Iterator[Report]:
        """Answer the rows that are fed, until the last of them.

        A report follows at the latest half a second after the one before, so that one who waits sees the counters.

        Args:
            plan: its plan.
            row_timeout: seconds that a row may have its slot, or None.
        """
        self._stats = Stats()
        Thread(target=self._run, args=(plan, row_timeout), daemon=True).start()
        while True:
            results, ended = self._gathered()
            yield Report(
                results=results,
                stats=_snapshot(self._stats),
                warnings=self._warnings.taken(),
                ended=ended is not None,
                error=ended.error if ended else None,
            )
            if ended:
                return

    def _run(self, plan: Plan, row_timeout: float | None) -> None:
        """Answer rows on a thread of its own, so that reports do not wait for steps."""
        error: BmxError | None = None
        try:
            for result in self.engine.run(
                self._waiting_rows(),
                plan,
                stats=self._stats,
                stop=self._stop,
                row_timeout=row_timeout,
                paused=self._idle,
            ):
                self._in_flight -= 1
                self._results.put(result)
        except Exception as caught:
            error = foreseen(caught)
        self._results.put(_Ended(error))

    def _waiting_rows(self) -> Iterator[Request]:
        """The rows that are fed, until the last; waits for them, when nothing else is to be done."""
        while (row := self._rows.get()) is not None:
            self._in_flight += 1
            yield row

    def _idle(self) -> bool:
        """Whether the engine should go on with what is in flight instead of waiting for rows."""
        return self._in_flight > 0 and self._rows.empty()

    def _gathered(self) -> tuple[list[Result], _Ended | None]:
        """The results of a moment; perhaps none."""
        results: list[Result] = []
        until = time.monotonic() + QUIET
        while len(results) < MOST_RESULTS:
            try:
                item = self._results.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                break
            if isinstance(item, _Ended):
                return results, item
            if not results:
                until = time.monotonic() + GATHERED
            results.append(item)
        return results, None


@dataclass(frozen=True, slots=True)
class _Ended:
    """The end of a run, and what ended it early."""

    error: BmxError | None


class Warnings(logging.Handler):
    """Keeps what files of bmx log until it is reported."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: SimpleQueue[str] = SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self._lines.put(record.getMessage())

    def taken(self) -> tuple[str, ...]:
        """The lines since the last call."""
        lines = []
        while not self._lines.empty():
            lines.append(self._lines.get())
        return tuple(lines)


def _snapshot(stats: Stats) -> Stats:
    """A copy of the counters, which another thread goes on counting in."""
    return replace(stats, finish_reasons=Counter(stats.finish_reasons), shrunk_to=list(stats.shrunk_to))
