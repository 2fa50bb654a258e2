"""The errors, as a small tree. Knows messages, hints and exit codes; knows nothing of terminals.

BmxError                  a job that cannot start or continue (exit 1)
├── UsageError            a flag, environment or config value (exit 2)
├── MemoryLimitError      it does not fit (exit 4)
├── InputFileError        the input file cannot be used (exit 5)
├── OutputError           the output cannot be written (exit 1)
├── LockedError           another run uses the same output (exit 75)
├── ModelError            no such model, or one that bmx cannot run correctly (exit 1)
│   └── PreviewError      a model whose sizes are known only once it is loaded (exit 1)
└── DeviceError           the GPU has failed and stays broken (exit 1)

RowError                  one input line cannot be answered: it becomes a Result, never an exit
"""

from __future__ import annotations


class BmxError(Exception):
    """A job that cannot start or continue.

    Args:
        message: one line that says what is wrong.
        hint: one line that says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(BmxError):
    """A flag, an environment variable, a setting or an argument is wrong."""

    exit_code = 2


class MemoryLimitError(BmxError):
    """Not even one sequence fits in the memory that may be used."""

    exit_code = 4


class InputFileError(BmxError):
    """The input file is missing, unreadable or unusable as a whole."""

    exit_code = 5


class OutputError(BmxError):
    """The output file cannot be created or written."""


class LockedError(BmxError):
    """Another run uses the same output."""

    exit_code = 75


class ModelError(BmxError):
    """The model cannot be found or loaded, or bmx would not run it correctly."""


class PreviewError(ModelError):
    """The sizes of the model are known only once it is loaded; it may run."""


class DeviceError(BmxError):
    """The GPU has failed, and only a new process can use it again."""


class RowError(Exception):
    """One row cannot be answered; ``code`` is one of the error codes of an output line."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return type(self), (
            self.code,
            self.message,
        )  # an exception is otherwise copied and pickled by its message alone
