"""The live progress of a run on a terminal: a bar with rows and time left, and a line with speeds below it.

Knows rich and the counters; ``reports`` says what the counters mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from bmx.stats import Stats
from bmx.terminal.reports import rows_and_time, speeds

REFRESH_PER_SECOND = 2.0


class RunProgress:
    """The counters of a run as rich draws them, anew at every refresh.

    Args:
        stats: the counters.
        console: where they are shown.
    """

    def __init__(self, stats: Stats, console: Console) -> None:
        self._stats, self._console = stats, console
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
        self._progress = Progress(BarColumn(bar_width=None), text, console=console, expand=True, auto_refresh=False)
        self._bar = self._progress.add_task("", total=None)

    def __rich__(self) -> Group:
        """The bar with what matters most, and below it as much of the rest as the terminal is wide."""
        share, room = self._stats.share_done, self._console.width - 1
        main = ", ".join(fitting(rows_and_time(self._stats), room * 3 // 4))
        if share is None:  # the bar only moves: how much is done is not known yet
            self._progress.update(self._bar, description=main)
        else:
            self._progress.update(self._bar, description=f"{share:.0%}, {main}", total=1.0, completed=share)
        rest = Text(", ".join(fitting(speeds(self._stats), room)), no_wrap=True, overflow="ellipsis")
        return Group(self._progress, rest)


@contextmanager
def shown(stats: Stats, console: Console) -> Iterator[None]:
    """Show the counters of a run while the body runs, and leave nothing of them behind.

    Args:
        stats: the counters.
        console: where they are shown.
    """
    with Live(
        RunProgress(stats, console),
        console=console,
        refresh_per_second=REFRESH_PER_SECOND,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        yield


def fitting(parts: Iterable[str], width: int) -> Iterator[str]:
    """The first part, and of the others those that fit beside it.

    Args:
        parts: what could be shown, the most important first.
        width: columns for all of them, with a comma and a space between two.
    """
    used = 0
    for part in parts:
        if not used or used + 2 + len(part) <= width:
            used += len(part) + (2 if used else 0)
            yield part
