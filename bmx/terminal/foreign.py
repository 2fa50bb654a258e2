"""What other libraries print while bmx is at work: their lines become lines of the display, without secrets.

Knows Python's streams, warnings and loggers, and progress bars; knows no library by name. What native code writes to
the process's own standard error is not caught: a crash must be able to speak.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

from bmx.terminal.display import Display

BAR_SECONDS = 10.0  # between lines about the same progress bar
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # how bars move the cursor
FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)


@contextmanager
def foreign_lines(display: Display) -> Iterator[None]:
    """While the body runs, what libraries print, log or warn of goes to the display.

    Warnings from bmx's own files are shown as warnings. ``--quiet`` hides the lines of others.

    Args:
        display: shows the lines; it writes to the standard error of before.
    """
    stream, own = ForeignStream(display.foreign, sys.stderr), OwnWarnings(display)
    logger = logging.getLogger("bmx")
    logger.addHandler(own)
    try:
        with redirect_stderr(stream), warnings.catch_warnings():
            warnings.resetwarnings()  # PYTHONWARNINGS=error would make other people's advice an error
            for category in FOR_DEVELOPERS:
                warnings.simplefilter("ignore", category)
            warnings.showwarning = stream.show_warning
            yield
    finally:
        logger.removeHandler(own)
        stream.flush_line()


class OwnWarnings(logging.Handler):
    """Shows what files of bmx log as warnings of the run."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record."""
        self._display.warn(record.getMessage())


class ForeignStream(io.TextIOBase):
    """A standard error that hands over whole lines. Of a progress bar it hands over its state every few seconds.

    Args:
        show: is given each line.
        beneath: the standard error of before, whose file descriptor native code and child processes use.
    """

    def __init__(self, show: Callable[[str], None], beneath: TextIO | None) -> None:
        self._show = show
        self._beneath = beneath
        self._text = ""
        self._lock = threading.RLock()  # libraries print from threads
        self._next_bar = time.monotonic() + BAR_SECONDS

    def writable(self) -> bool:
        """True: this is a stream to write to."""
        return True

    def fileno(self) -> int:
        """The file descriptor of the standard error of before."""
        return super().fileno() if self._beneath is None else self._beneath.fileno()

    def isatty(self) -> bool:
        """True, so that downloads draw their progress bars; colours are taken out."""
        return True

    def write(self, text: str, /) -> int:
        """Take text; complete lines are shown."""
        with self._lock:
            *lines, self._text = (self._text + text).split("\n")
            for line in lines:
                self._take(line)
            if "\r" in self._text:
                self._take(self._text)
                self._text = "\r"
        return len(text)

    def flush_line(self) -> None:
        """Show the beginning of a line that was never ended."""
        with self._lock:
            line, self._text = self._text, ""
            self._take(line)

    def show_warning(self, message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        """Show a warning of the ``warnings`` module in one line."""
        with self._lock:
            self.flush_line()
            self._take(f"{category.__name__}: {' '.join(str(message).split())}")

    def _take(self, line: str) -> None:
        """Show a line; a bar, which overwrites itself, only when it is time."""
        states = [state for part in line.split("\r") if (state := CONTROL.sub("", part).strip())]
        if not states:
            return
        if "\r" in line:
            if time.monotonic() < self._next_bar:
                return
            self._next_bar = time.monotonic() + BAR_SECONDS
        self._show(states[-1])
