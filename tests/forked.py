"""The command as a process that can be killed, for a few milliseconds a run: a server that has everything imported
forks for each run. A fault says what befalls the run, and at which of its calls to the system.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CALLS = ("open", "write", "fsync", "ftruncate", "fchmod", "replace", "unlink", "close")
ERRORS = ("ENOSPC", "EIO", "EDQUOT")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What befalls a run.

    Attributes:
        do: ``SIGKILL``, another signal, an error like ``ENOSPC``, or ``short``: a write that takes half of its bytes.
        at: at which call, from 1 on; it is then not made, except that half of a write is where ``torn``.
        calls: which calls count: of everything for a signal, of the modules that write files for an error.
        torn: the call writes half of its bytes first; of an error, the next call fails.
        times: how often a signal comes.
        lasts: whether all later calls fail too.
        after: seconds until a kill, instead of ``at``.
    """

    do: str = "SIGKILL"
    at: int = 0
    calls: Sequence[str] = CALLS
    torn: bool = False
    times: int = 1
    lasts: bool = False
    after: float = 0.0


@dataclass(frozen=True)
class Run:
    """A run that was begun."""

    pid: int
    folder: Path
    name: str

    def end(self) -> Result:
        """Wait for it."""
        status = _ask(wait=self.pid)["status"]
        out, err = (self.folder / f"{self.name}.{stream}" for stream in ("out", "err"))
        return Result(os.waitstatus_to_exitcode(status), out.read_text(), err.read_text())


@dataclass(frozen=True)
class Result:
    """How a run ended: with an exit code, or by a signal's number below zero."""

    code: int
    out: str
    err: str


def start(
    *args: object,
    cwd: Path,
    stdin: str = os.devnull,
    err: str | None = None,
    fault: Fault | None = None,
    ignored: Sequence[str] = (),
) -> Run:
    """Begin ``bmx ARGS``.

    Args:
        stdin: a file.
        err: where the log goes, instead of a file that is read at the end.
        ignored: signals that the process ignores from the start, as under nohup.
    """
    logs = cwd.parent / f"{cwd.name}.logs"
    logs.mkdir(exist_ok=True)
    name = str(len(os.listdir(logs)) // 2)
    for stream in ("out", "err"):
        (logs / f"{name}.{stream}").touch()
    pid = _ask(
        argv=["bmx", *map(str, args)],
        cwd=str(cwd),
        streams=[stdin, str(logs / f"{name}.out"), err or str(logs / f"{name}.err")],
        fault=vars(fault) if fault else None,
        ignored=list(ignored),
    )["pid"]
    return Run(pid, logs, name)


def run(*args: object, cwd: Path, **how: Any) -> Result:
    """Run ``bmx ARGS`` to its end."""
    return start(*args, cwd=cwd, **how).end()


class Work:
    """A folder with an input of its own, and what the command makes of it.

    Args:
        rows: its lines: objects, or bytes as they are.
        flags: of every run.
    """

    def __init__(self, folder: Path, rows: Iterable[dict[str, Any] | bytes], *flags: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.flags = folder, flags
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.errors, self.manifest = folder / "out.jsonl.errors.jsonl", folder / "out.jsonl.run.json"
        self.put(rows)

    def put(self, rows: Iterable[dict[str, Any] | bytes]) -> None:
        """Write the input."""
        lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        self.input.write_bytes(b"".join(line + b"\n" for line in lines))

    def start(self, *flags: object, **how: Any) -> Run:
        """Begin a run."""
        given = ("run", "in.jsonl", "-o", "out.jsonl", "-m", "fake", *self.flags, *flags)
        return start(*given, cwd=self.folder, **how)

    def __call__(self, *flags: object, **how: Any) -> Result:
        """Run to the end."""
        return self.start(*flags, **how).end()

    def clear(self) -> None:
        """Take away what runs have made."""
        for path in self.folder.iterdir():
            if path != self.input:
                path.unlink()

    @property
    def state(self) -> str:
        """What the manifest says of the last run."""
        return json.loads(self.manifest.read_bytes())["state"]

    @property
    def files(self) -> dict[str, bytes]:
        """What is in the folder, beside the input."""
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file() and path != self.input}

    @property
    def answers(self) -> dict[str | int, Any]:
        """Records of the output by id, in its order."""
        return whole_records(self.output)

    @property
    def failures(self) -> dict[str | int, Any]:
        """Records of the error file by id."""
        return whole_records(self.errors)

    @property
    def records(self) -> dict[str | int, Any]:
        """All records by id."""
        answers, failures = self.answers, self.failures
        assert not answers.keys() & failures.keys()
        return answers | failures


def whole_records(path: Path) -> dict[str | int, Any]:
    """Records by id, without the times of theirs; all lines must be whole, and no id there twice."""
    found: dict[str | int, Any] = {}
    data = path.read_bytes() if path.exists() else b""
    assert not data or data.endswith(b"\n"), data[-100:]
    for line in data.splitlines():
        record = json.loads(line)
        name = record.get("custom_id", record["id"])
        assert name not in found
        if record.get("response"):
            del record["response"]["body"]["created"]
        found[name] = record
    return found


def _ask(**request: Any) -> dict[str, Any]:
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@cache
def _server() -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BMX_")}
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=kept | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        start_new_session=True,
    )
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    """Answer requests until there are no more; returns in a process that is to be a run."""
    _warm_up()
    requests, answers = (os.fdopen(os.dup(fd), mode) for fd, mode in ((0, "r"), (1, "w")))
    while line := requests.readline():
        request = json.loads(line)
        if "wait" in request:
            answer = {"status": os.waitpid(request["wait"], 0)[1]}
        else:
            pid = os.fork()
            if pid == 0:
                os.close(requests.fileno())
                os.close(answers.fileno())
                _become(SimpleNamespace(**request))
                return
            answer = {"pid": pid}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)


def _warm_up() -> None:
    """Import all that a run imports, by a run; and keep what takes long and is the same each time."""
    import gc
    import importlib.metadata
    from tempfile import TemporaryDirectory

    import typer.main

    importlib.metadata.version = cache(importlib.metadata.version)
    typer.main.get_command = cache(typer.main.get_command)
    from bmx.cli.commands import main

    with TemporaryDirectory() as folder:
        path = Path(folder) / "in.jsonl"
        path.write_text('{"prompt": "x"}\n')
        sys.argv = ["bmx", "run", str(path), "-m", "fake", "-q", "--progress", "none"]
        with suppress(SystemExit):
            main()
    assert "torch" not in sys.modules
    gc.freeze()
    os.fsync = lambda _: None  # nobody cuts the power here


def _become(request: Any) -> None:
    """Make this process the run that is wanted."""
    from bmx.job import durable_files, line_file, locks

    os.chdir(request.cwd)
    sys.argv = request.argv
    for fd, path in enumerate(request.streams):
        handle = os.open(path, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, fd)
        os.close(handle)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        signal.signal(signal.Signals[name], signal.SIG_IGN if name in request.ignored else usual)
    if not request.fault:
        return
    fault = Fault(**request.fault)
    if fault.after:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the system ends the process: no line of Python is run
        signal.setitimer(signal.ITIMER_REAL, fault.after)
    elif fault.do.startswith("SIG"):
        _patch(os, fault)
    else:
        calls = SimpleNamespace(**vars(os))
        for module in (durable_files, line_file, locks):
            module.os = calls  # type: ignore[attr-defined]
        _patch(calls, fault)


def _patch(module: Any, fault: Fault) -> None:
    """Have the fault befall the calls that the module's users make."""
    count, write = 0, os.write

    def patched(name: str, call: Any) -> Any:
        def befallen(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += name in fault.calls
            due = count == fault.at and name in fault.calls
            if fault.do == "short":
                return write(args[0], args[1][: (len(args[1]) + 1) // 2]) if name == "write" else call(*args, **more)
            if fault.do in ERRORS:
                if fault.torn and due and name == "write":
                    return write(args[0], args[1][: len(args[1]) // 2])
                if (due and not fault.torn) or (
                    count > fault.at and name in fault.calls and (fault.lasts or (fault.torn and count == fault.at + 1))
                ):
                    write(1, b"befallen\n")
                    number = getattr(errno, fault.do)
                    raise OSError(number, os.strerror(number))
            elif due:
                if fault.torn and name == "write":
                    write(args[0], args[1][: len(args[1]) // 2])
                for _ in range(fault.times):
                    os.kill(os.getpid(), signal.Signals[fault.do])
            return call(*args, **more)

        return befallen

    for name in CALLS:
        setattr(module, name, patched(name, getattr(module, name)))


if __name__ == "__main__":
    _serve()
    from bmx.cli.commands import main

    try:
        main()
    except SystemExit as ended:  # the interpreter would take as long to end as the run
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(int(ended.code or 0))
