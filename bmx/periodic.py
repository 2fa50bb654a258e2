"""Calls in a thread while other work is done: repeated ones, and one when the work takes long. Knows threads only."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONG_SECONDS = 3.0

logger = logging.getLogger(__name__)


@contextmanager
def periodically(seconds: Callable[[], float], act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` in a thread while the body runs.

    Args:
        seconds: the time to wait before the next call; asked before each one.
        act: what is called.
    """
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(seconds()):
            act()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def said_if_long(text: str) -> Iterator[None]:
    """Log a warning when the body, which may wait for ever, takes longer than a moment."""
    timer = threading.Timer(LONG_SECONDS, logger.warning, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
