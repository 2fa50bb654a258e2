"""A call that is repeated in a thread while other work is done. Knows threads, not what is called."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
