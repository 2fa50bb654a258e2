"""``python -m bmx`` and the command ``bmx``: whenever a signal comes, the process ends with its exit code, in silence.

Nothing heavy is imported before that is so. A command that has something to finish installs handlers of its own
(``bmx/shutdown.py``); until then and after it, there is nothing to lose.
"""

import atexit
import os
import signal
import sys
from contextlib import suppress

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = tuple(128 + number for number in STOPPING)


def end(number: int, _: object) -> None:
    """Say which signal came, and end the process at once, with the exit code that a shell gives to that signal."""
    with suppress(OSError):
        os.write(2, f"error: interrupted by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def show_unraisable(error: "sys.UnraisableHookArgs") -> None:
    """Report an error that Python cannot raise, as in a finalizer; a signal that came just then is not reported."""
    if not issubclass(error.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(error)


def main() -> None:
    """Run the command line."""
    sys.unraisablehook = show_unraisable
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, end)
            atexit.register(signal.signal, number, signal.SIG_IGN)  # all threads have ended: the exit code stands
    from bmx.cli.commands import main as run

    try:
        run()
    except SystemExit as ended:
        if ended.code not in INTERRUPTED:
            raise
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(int(ended.code))  # everything is closed: whoever stops a run does not wait for other threads


if __name__ == "__main__":
    main()
