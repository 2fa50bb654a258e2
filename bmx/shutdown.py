"""When a run should end early: SIGINT, SIGTERM and SIGHUP become a value that the run checks between steps.

Knows signals and a clock; knows nothing of runs.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHELL_BASE = 128  # a shell's exit code for a signal is this plus the signal's number


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; ``exit_code`` is the one that a shell gives to that signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = SHELL_BASE + number


class Stop:
    """Whether a run should end, and until when it may finish the rows in flight.

    Args:
        within: seconds from the first signal until the rows in flight are dropped.

    Attributes:
        within: as given.
        acknowledge: is called with the number of a signal that was only recorded. A thread of its own calls it, so that
            it may print and take locks, whatever the signal has interrupted.
        is_graceful: whether the first signal is only recorded. If not, it raises, as a second one always does.
        signal: the number of the first signal, or None.
    """

    def __init__(self, within: float = 0.0) -> None:
        self.within = within
        self.acknowledge: Callable[[int], None] = lambda _: None
        self._recorded: SimpleQueue[int | None] = SimpleQueue()  # its put() may be called in a signal handler
        self._deadline = math.inf
        self.is_graceful = False
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        """Whether no new row should be started."""
        return self.signal is not None

    @property
    def overdue(self) -> bool:
        """Whether the rows in flight should be dropped."""
        return time.monotonic() >= self._deadline

    def request(self, number: int) -> None:
        """Record a signal, or end the run at once.

        Raises:
            Interrupted: this is the second signal, or the run is not within ``graceful``.
        """
        if self.requested or not self.is_graceful:
            self.signal = number
            self._deadline = 0.0  # where Python cannot raise, as in a finalizer, the run ends at its next check
            raise Interrupted(number)
        self.signal = number
        self._deadline = time.monotonic() + self.within
        self._recorded.put(number)

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """While the body runs, the first signal is only recorded."""
        self.is_graceful = True
        try:
            yield
        finally:
            self.is_graceful = False

    @contextmanager
    def install_handlers(self) -> Iterator[None]:
        """Handle the signals that the process does not ignore (``nohup`` ignores SIGHUP) while the body runs."""
        before: dict[int, Any] = {number: signal.getsignal(number) for number in STOPPING}
        handled = [number for number, handler in before.items() if handler != signal.SIG_IGN]
        answering = Thread(target=self._acknowledge_all, daemon=True)
        answering.start()
        try:
            for number in handled:
                signal.signal(number, lambda number, _: self.request(number))
            yield
        finally:
            for number in handled:
                signal.signal(number, before[number])
            self._recorded.put(None)
            answering.join()

    def _acknowledge_all(self) -> None:
        while (number := self._recorded.get()) is not None:
            self.acknowledge(number)
