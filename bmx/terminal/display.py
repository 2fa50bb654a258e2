"""How things are shown: notes, warnings, errors and progress on standard error, data on standard output.

On a terminal the progress is live; elsewhere it is a plain line every few seconds. Text from files is never markup.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from bmx.errors import OutputError
from bmx.periodic import periodically
from bmx.redact import without_secrets
from bmx.terminal.reports import Line, status_line
from bmx.units import now

if TYPE_CHECKING:
    from rich.console import Console

    from bmx.stats import Stats

EARLY_SECONDS, LATER_SECONDS = 10.0, 60.0  # between lines of progress off a terminal
EARLY_UNTIL = 120.0  # seconds since the run began
DUMB = ("dumb", "unknown")  # terminals that only take lines


class Display:
    """The terminal of a run.

    Args:
        progress: ``auto``, ``rich``, ``plain`` or ``none``.
        quiet: show nothing unless something failed.
        log_format: ``text``, or ``json``: each line an object with time, level and message.
    """

    def __init__(self, progress: str = "auto", *, quiet: bool = False, log_format: str = "text") -> None:
        self._stream = LastingStream(sys.stderr)  # the same while `foreign_lines` takes what others print
        self._json = log_format == "json"
        wanted = progress == "rich" or (progress == "auto" and self._stream.isatty())
        self._live = wanted and not self._json and os.environ.get("TERM", "").lower() not in DUMB
        self._mode = "none" if progress == "none" or quiet else "rich" if self._live else "plain"
        self._made_console: Console | None = None

    @property
    def _console(self) -> Console:
        from rich.console import Console

        if self._made_console is None:
            self._made_console = Console(
                file=self._stream,  # type: ignore[arg-type]  # it writes, and that is all that rich does
                markup=False,
                highlight=False,
                emoji=False,
                force_terminal=True if self._mode == "rich" else None,
            )
        return self._made_console

    def note(self, text: str, **numbers: Any) -> None:
        """Show a line, unless the user asked for quiet. ``numbers`` are for programs that read the log."""
        if self._mode != "none":
            self._print(text, "info", numbers)

    def report(self, lines: Iterable[Line]) -> None:
        """Show lines; ``--quiet`` leaves only the warnings."""
        for line in lines:
            if line.level != "info" or self._mode != "none":
                self._print(line.text, line.level, line.numbers)

    def warn(self, text: str) -> None:
        """Show something that a person should look at and that does not stop the run."""
        self._print(f"warning: {text}", "warning")

    def foreign(self, text: str) -> None:
        """Show a line that another library printed, unless the user asked for quiet."""
        if self._mode != "none":
            self._print(text, "warning")

    def error(self, message: str, hint: str | None = None) -> None:
        """Show what went wrong and what to do about it, also with ``--quiet``."""
        if self._json:
            self._print(message, "error", {"hint": hint})
            return
        self._print(f"error: {message}", "error")
        if hint:
            self._print(f"hint: {hint}", "error")

    def _print(self, text: str, level: str, numbers: Mapping[str, Any] | None = None) -> None:
        """Print a line."""
        text = printable(without_secrets(text))
        if self._live:
            self._console.print(self._wrapped(text), soft_wrap=True)
        elif self._json:
            line = {"time": now(), "level": level, "message": text, **(numbers or {})}
            self._stream.write(json.dumps(line, allow_nan=False) + "\n")
        else:
            self._stream.write(f"{now()} {text}\n")
        self._stream.flush()

    def _wrapped(self, text: str) -> str:
        """Text in lines of the terminal's width; a long word such as a path stays whole."""
        width = self._console.width
        return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False) if text else text

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show that something takes a while, while the body runs."""
        if self._mode != "rich":
            self.note(f"{what} ...")
            yield
            return
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.text import Text

        spinner = Spinner("dots", Text(printable(what)))
        with Live(spinner, console=self._console, transient=True, redirect_stdout=False, redirect_stderr=False):
            yield

    @contextmanager
    def live(self, stats: Stats) -> Iterator[None]:
        """Show the counters while the body runs."""
        if self._mode == "rich":
            from bmx.terminal.progress import shown

            with shown(stats, self._console):
                yield
        elif self._mode == "plain":
            with self._plain(stats):
                yield
        else:
            yield

    @contextmanager
    def _plain(self, stats: Stats) -> Iterator[None]:
        def seconds() -> float:
            return EARLY_SECONDS if stats.elapsed < EARLY_UNTIL else LATER_SECONDS

        def show() -> None:
            self.note(status_line(stats), rows_done=stats.rows_before + stats.rows_done, rows_total=stats.rows_total)

        with periodically(seconds, show):
            yield

    def data(self, *lines: str) -> None:
        """Lines of the result itself, on standard output.

        Raises:
            OutputError: the disk is full.
        """
        try:
            for line in lines:
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write standard output: {error.strerror}") from None


class LastingStream:
    """Standard error as the display writes to it: a full log disk or a closed terminal must not stop a run.

    From the first failure on, what is written is lost. A character that the encoding lacks is written as its code.

    Args:
        stream: the standard error; None if there is none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding = (stream and stream.encoding) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> int:
        """Write text, or lose it."""
        if self._stream is not None:
            try:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except (OSError, ValueError):
                self._stream = None
        return len(text)

    def flush(self) -> None:
        """Hand what was written to the system, or lose it."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._stream = None


def printable(text: str) -> str:
    """Text that cannot control a terminal: control characters and line breaks are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
