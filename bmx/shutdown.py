"""When a run should end early: SIGINT, SIGTERM and SIGHUP as a value that is looked at between steps.

Knows signals and a clock; knows nothing of runs.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHELL_BASE = 128  # what shells add to the number of a signal to make an exit code


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; ``exit_code`` is the shell's for that signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = SHELL_BASE + number


class Stop:
    """Whether a run should end, and until when it may finish what it has begun.

    Args:
        within: seconds from the first signal until what is in flight is dropped.

    Attributes:
        within: as given.
        gently: whether the first signal is only taken down. If not, it raises, as a second one always does.
        signal: the number of the first signal, or None.
    """

    def __init__(self, within: float = 0.0) -> None:
        self.within = within
        self._deadline = math.inf
        self.gently = False
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        """Whether no more should be begun."""
        return self.signal is not None

    @property
    def overdue(self) -> bool:
        """Whether what is in flight should be dropped."""
        return time.monotonic() >= self._deadline

    def request(self, number: int) -> None:
        """Take a signal down, or end the run at once.

        Raises:
            Interrupted: there was one before, or nothing is in flight that could be finished.
        """
        if self.requested or not self.gently:
            self.signal = number
            raise Interrupted(number)
        self.signal = number
        self._deadline = time.monotonic() + self.within

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """While the body runs, the first signal is only taken down."""
        self.gently = True
        try:
            yield
        finally:
            self.gently = False

    @contextmanager
    def install_handlers(self) -> Iterator[None]:
        """Listen to the signals that the process does not ignore (``nohup`` ignores SIGHUP)."""
        before: dict[int, Any] = {number: signal.getsignal(number) for number in STOPPING}
        mine = [number for number, handler in before.items() if handler != signal.SIG_IGN]
        for number in mine:
            signal.signal(number, lambda number, _: self.request(number))
        try:
            yield
        finally:
            for number in mine:
                signal.signal(number, before[number])
