"""What a process must be like for a command to work: checked first, since libraries would end it in their own words."""

from __future__ import annotations

import os
import re
import sys

from bmx.errors import UsageError

THREADS = re.compile(r" *0*[1-9][0-9]{0,5} *(,.*)?")  # the numbers after a comma are of nested loops


def check_process() -> None:
    """Refuse surroundings in which torch or transformers cannot be loaded.

    Raises:
        UsageError: says what must be changed.
    """
    if sys.flags.optimize > 1:
        hint = "leave out -OO and PYTHONOPTIMIZE"
        raise UsageError("python -OO takes away docstrings that transformers reads", hint=hint)
    try:
        os.getcwd()
    except OSError:
        raise UsageError("the current folder has been deleted", hint="cd to another one") from None
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads == "":
        del os.environ["OMP_NUM_THREADS"]
    elif threads is not None and not THREADS.fullmatch(threads):
        raise UsageError(
            f"OMP_NUM_THREADS={threads} is not a number of threads", hint="unset it to use all usable cores"
        )
