"""Something done again and again beside the work, while the work takes. Knows threads, not what is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def periodically(seconds: Callable[[], float], act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` in a thread while the body runs.

    Args:
        seconds: how long to wait before the next time.
    """
    done = threading.Event()

    def beat() -> None:
        while not done.wait(seconds()):
            act()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
