"""Limits of time, memory and length for what renders a template.

Jinja's sandbox keeps a template away from files and from Python's objects, and lets it compute as long and as much as
it likes. Knows nothing of what a template is for.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

SECONDS = 5  # of processor time, for one text; usual templates take less than a millisecond
LENGTH = 1_000_000  # characters that a template may add to what it is given
COPIES = 10  # how often it may print what it is given
MEMORY = 256 * 2**20  # bytes
BYTES_PER_CHARACTER = 32  # of what it is given: a few copies in Python's widest characters
_alone = threading.Lock()  # the limit of memory is the whole process's


class TemplateLimitError(Exception):
    """A template takes too much time or memory, or prints too much."""


class _TimeIsUp(BaseException):
    """Raised inside a template; no ``except Exception`` on the way catches it."""


def limited(render: Callable[[], str], characters: int) -> str:
    """The text that a template makes, within the limits.

    Args:
        render: renders the template.
        characters: of all texts that the template is given.

    Raises:
        TemplateLimitError: the template takes too much time or memory, or prints too much.
        Exception: whatever else the template raises.
    """
    with _limits(characters):
        text = render()
    if len(text) > LENGTH + COPIES * characters:
        raise TemplateLimitError(f"it prints {len(text):,} characters for {characters:,} that it is given")
    return text


@contextmanager
def _limits(characters: int) -> Iterator[None]:
    """Limit what the body computes and allocates; the time is limited in the main thread only.

    Raises:
        TemplateLimitError: the body went beyond a limit.
    """
    memory = MEMORY + BYTES_PER_CHARACTER * characters
    try:
        with _alone, _processor_time(SECONDS), _address_space(memory):
            yield
    except _TimeIsUp:
        raise TemplateLimitError(f"it computes for more than {SECONDS} seconds") from None
    except MemoryError:
        raise TemplateLimitError(f"it needs more than {memory >> 20} MB of memory") from None


@contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """Interrupt the body after some processor time, in Python as in C code that looks for signals.

    Raises:
        _TimeIsUp: in the body. Nothing is limited outside the main thread, which alone receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGPROF, _raise_time_is_up)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again each second, should the first one be lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def _raise_time_is_up(*_: object) -> NoReturn:
    raise _TimeIsUp


@contextmanager
def _address_space(more: int) -> Iterator[None]:
    """Let the process's address space grow by ``more`` bytes and no further."""
    old, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    new = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (new if old == resource.RLIM_INFINITY else min(new, old), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (old, hard))
