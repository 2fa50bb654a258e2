"""How things are shown: notes, warnings, errors and progress on standard error, data on standard output.

On a terminal the progress is live; elsewhere it is a plain line every few seconds. Text from files is never markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bmx.errors import OutputError
from bmx.periodic import periodically
from bmx.redact import without_secrets
from bmx.terminal.reports import Line, status_line
from bmx.units import now

if TYPE_CHECKING:
    from rich.console import Console, Group

    from bmx.stats import Stats

EARLY_SECONDS, LATER_SECONDS = 10.0, 60.0  # between lines of progress off a terminal
EARLY_UNTIL = 120.0  # seconds since the run began
REFRESH_PER_SECOND = 2.0


class Display:
    """The terminal of a run.

    Args:
        progress: ``auto``, ``rich``, ``plain`` or ``none``.
        quiet: show nothing unless something failed.
        log_format: ``text``, or ``json``: each line an object with time, level and message.
    """

    def __init__(self, progress: str = "auto", *, quiet: bool = False, log_format: str = "text") -> None:
        live = progress == "rich" or (progress == "auto" and sys.stderr is not None and sys.stderr.isatty())
        self._json = log_format == "json"
        self._mode = "none" if progress == "none" or quiet else "rich" if live and not self._json else "plain"
        self._live = live and not self._json
        self._stream = sys.stderr  # stays the same while `foreign_lines` takes what others print
        self._silent = sys.stderr is None
        self._made_console: Console | None = None

    @property
    def _console(self) -> Console:
        from rich.console import Console

        if self._made_console is None:
            force = True if self._mode == "rich" else None
            self._made_console = Console(
                file=self._stream, markup=False, highlight=False, emoji=False, soft_wrap=True, force_terminal=force
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
        """Print a line. A full log disk or a closed terminal must not stop the run: from then on nothing is printed."""
        if self._silent:
            return
        text = printable(without_secrets(text))
        try:
            if self._live:
                self._console.print(text)
            elif self._json:
                line = {"time": now(), "level": level, "message": text, **(numbers or {})}
                self._line(json.dumps(line, allow_nan=False))
            else:
                self._line(f"{now()} {text}")
        except (OSError, ValueError):
            self._silent = True

    def _line(self, text: str) -> None:
        stream = self._stream
        stream.write(
            text.encode(stream.encoding or "utf-8", "backslashreplace").decode(stream.encoding or "utf-8") + "\n"
        )
        stream.flush()

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
            with self._rich(stats):
                yield
        elif self._mode == "plain":
            with self._plain(stats):
                yield
        else:
            yield

    @contextmanager
    def _rich(self, stats: Stats) -> Iterator[None]:
        from rich.live import Live

        with Live(
            console=self._console,
            get_renderable=lambda: _panel(stats),
            refresh_per_second=REFRESH_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ):
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


def _panel(stats: Stats) -> Group:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    bar = ProgressBar(total=max(1, stats.work_total), completed=min(stats.work_done, stats.work_total), width=60)
    return Group(bar, Text(status_line(stats)))


def printable(text: str) -> str:
    """Text that cannot control a terminal: control characters and line breaks are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
