"""Where a job reads and writes. Paths that would destroy another file are refused before any work.

Knows paths; reads no row.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from bmx.errors import InputFileError, OutputError, UsageError
from bmx.job.file_kinds import without_row_suffix
from bmx.job.journal import is_of_bmx
from bmx.job.line_reader import COMPRESSED, open_input
from bmx.job.manifest import is_manifest
from bmx.job.stats_file import is_stats_file
from bmx.job.table_writer import check_table, is_table
from bmx.periodic import said_if_long
from bmx.run_config import RunConfig

STDIO = "-"
UNWRITTEN = (".arrow", ".feather", ".ods", ".orc", ".parq", ".pq", ".xls", ".xlsx")  # tables of other kinds
LONGEST_SUFFIX = len(".errors.jsonl.set-aside")  # of the files beside an output


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPaths:
    """All the files that a job writes.

    Attributes:
        output: where answers go, by the name that the user gave; None is standard output.
        errors: where failed rows go; None is the same place as the answers.
        manifest: beside an output that is a file; None for a stream or a device.
        locks: beside the output, and beside an error file that was named.
        stats: where the counters go; None is nowhere.
        table: the table that is made of the answers, if one is.
    """

    output: Path | None
    errors: Path | None = None
    manifest: Path | None = None
    locks: tuple[Path, ...] = ()
    stats: Path | None = None
    table: Path | None = None

    @property
    def used(self) -> bool:
        """Whether the files hold something: records of an earlier run, or something else."""
        files = [path for path in (self.output, self.errors) if path and path.is_file()]
        return self.manifest is not None and any(path.stat().st_size for path in files)


def find_paths(config: RunConfig) -> JobPaths:
    """Where everything goes.

    Raises:
        UsageError: the input has no name to derive the output's from, a folder is missing, or a file of somebody else
            would be destroyed.
        InputFileError: an input is a folder.
        OutputError: a folder cannot be written to.
    """
    for name in config.inputs:
        if name != STDIO and (not name or name.endswith("/") or Path(name).name in ("", "..")):
            raise InputFileError(f"{name or 'an empty name'} is a folder, not a file of prompts")
    try:
        paths = _named_paths(config)
        _check_all(paths, config)
    except (OSError, RuntimeError, ValueError) as error:  # names that no file can have, links in a circle
        raise UsageError(f"these files cannot be used: {error}") from None
    return paths


def find_record_path(config: RunConfig, command: str, default: str) -> tuple[Path, Path]:
    """The one file that a measuring command writes, and its lock; refused like the paths of a job.

    Whether an existing file may be replaced is left to the command: it knows its own kind of file.

    Args:
        config: all settings; ``output_file`` names the file.
        command: the command's name, for messages.
        default: the file's name where the settings name none.

    Raises:
        UsageError: it is not a file, its folder is missing, or a file of somebody else would be destroyed.
        OutputError: it cannot be written to.
    """
    named = Path(config.job.output_file or default)
    if is_table(named):
        raise UsageError(f"{command} writes JSON, not a table", hint=f"-o {named.with_suffix('.json')}")
    job = replace(config.job, output_file=config.job.output_file or default, overwrite=False)
    paths = find_paths(replace(config, job=job))
    if paths.output is None or not paths.manifest:
        raise UsageError(f"{command} keeps what it measures in a file", hint=f"-o {default}")
    return paths.output.resolve() if paths.output.is_symlink() else paths.output, paths.locks[0]


def _named_paths(config: RunConfig) -> JobPaths:
    job, output, table = config.job, _output(config), _table(config)
    if table:
        output = table.with_suffix(".out.jsonl")
        if _is_pipe(output):
            raise UsageError(f"{output} is not a file: the answers cannot be kept in it", hint="-o takes another name")
    errors, stats = (Path(name) if name else None for name in (job.error_file, job.stats_file))
    if stats and stats.is_symlink() and not _is_pipe(stats):
        stats = stats.resolve()  # the file is replaced, never the link
    if output is None or _is_pipe(output):
        return JobPaths(output=output, errors=errors, stats=stats)
    if output.is_dir():
        raise UsageError(f"the output {output} is a folder", hint="-o takes a file")
    place = output.resolve() if output.is_symlink() else output  # one output, one lock, whatever it is called
    return JobPaths(
        output=output,
        errors=errors or _beside(place, ".errors.jsonl"),
        manifest=_beside(place, ".run.json"),
        locks=tuple(_beside(path, ".lock") for path in (place, errors) if path and not _is_pipe(path)),
        stats=stats,
        table=table.resolve() if table and table.is_symlink() else table,
    )


def _table(config: RunConfig) -> Path | None:
    """The table that the user asks for, if the output has the name of one.

    Raises:
        UsageError: it has the name of a file that bmx does not write, or is a pipe or a device.
    """
    path = Path(config.job.output_file or "")
    if path.suffix in COMPRESSED:
        raise UsageError(f"bmx compresses no output: {path}", hint=f"-o {path.with_suffix('')}, compressed afterwards")
    if path.suffix.lower() in UNWRITTEN:
        raise UsageError(f"bmx writes no files such as {path}", hint=f"-o {path.with_suffix('.csv')}, or .parquet")
    if is_table(path) and _is_pipe(path):
        raise UsageError(f"the table {path} is not a file", hint="-o takes a file")
    return path if is_table(path) else None


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _output(config: RunConfig) -> Path | None:
    if config.job.output_file in (STDIO, "/dev/stdout"):
        return None
    if config.job.output_file:
        return Path(config.job.output_file)
    if config.inputs[0] == STDIO or config.inputs[0].startswith(("/dev/", "/proc/")):
        raise UsageError(
            "reading from standard input or a pipe needs an output", hint="-o answers.jsonl, or -o - for stdout"
        )
    first = Path(config.inputs[0])
    packed = first.suffix in COMPRESSED
    stem = without_row_suffix(first.name.removesuffix(first.suffix) if packed else first.name)
    share = f".{config.job.shard.replace('/', '-of-')}" if config.job.shard else ""
    return first.with_name(f"{stem}{share}.out.jsonl")


def _check_all(paths: JobPaths, config: RunConfig) -> None:
    taken = [("an input", Path(name)) for name in config.inputs if name != STDIO]
    named = {"table": paths.table, "output": paths.output, "error file": paths.errors, "stats file": paths.stats}
    locks = dict(zip(("lock", "lock of the error file"), paths.locks, strict=False))
    for name, path in {**named, "manifest": paths.manifest, **locks}.items():
        if path:
            _check(name, path, taken)
            taken.append((f"the {name}", path))
    errors, replaced = paths.errors, config.job.overwrite
    may_be_damaged = (replaced or config.job.set_aside) and paths.used and paths.output and is_of_bmx(paths.output)
    for name, path, is_own in (
        ("stats file", paths.stats, is_stats_file),
        ("manifest", None if may_be_damaged else paths.manifest, is_manifest),
        ("output", paths.output if replaced and paths.manifest else None, is_of_bmx),
        ("error file", errors if replaced else None, lambda path: _is_pipe(path) or is_of_bmx(path, errors_only=True)),
    ):
        if path and not is_own(path):
            message = f"the {name} {path} exists and is not one of bmx: it would be replaced"
            raise UsageError(message, hint="choose another, or move it away")
    if paths.table and paths.manifest:
        check_table(paths.table, paths.manifest)
    if errors and not paths.manifest and not config.job.overwrite and errors.is_file() and errors.stat().st_size:
        raise UsageError(f"the error file {errors} exists", hint="choose another, or replace it with --overwrite")


def _check(name: str, path: Path, taken: list[tuple[str, Path]]) -> None:
    for what, other in taken:
        if _same(path, other):
            raise UsageError(f"the {name} {path} is also {what}", hint="choose another")
    if path.is_dir():
        raise UsageError(f"the {name} {path} is a folder", hint="it must be a file")
    parent = path.resolve().parent
    if not parent.is_dir():
        shown = path.parent if not path.is_symlink() else parent
        problem = f"{shown} is not a folder" if shown.exists() else f"the folder {shown} does not exist"
        raise UsageError(problem, hint="create it, or choose another")
    _check_length(name, path, parent)
    if not _writable(path.resolve(), parent):
        raise OutputError(f"the {name} {path} cannot be written: permission denied", hint="choose another")


def _check_length(name: str, path: Path, folder: Path) -> None:
    """Refuse a name that leaves no room for the longest name of a file beside it."""
    room = os.pathconf(folder, "PC_NAME_MAX") - len(os.fsencode(path.name))
    if name == "output" and room < LONGEST_SUFFIX:
        message = f"the name of the output is {LONGEST_SUFFIX - room} bytes too long for the files beside it"
        raise UsageError(f"{message}: {path.name:.60}...", hint="-o takes a shorter one")


def _writable(path: Path, parent: Path) -> bool:
    """Whether a file can be written or created. Another run may create or remove it at any moment."""
    if not os.path.lexists(path):
        return os.access(parent, os.W_OK)
    return os.access(path, os.W_OK) or not os.path.lexists(path)


def _same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except (FileNotFoundError, NotADirectoryError):
        return path.resolve() == other.resolve()


@contextmanager
def input_paths(names: tuple[str, ...]) -> Iterator[tuple[Path, ...]]:
    """The input files. Standard input is copied to a temporary file first, since inputs are read more than once.

    Raises:
        InputFileError: a file is missing or cannot be read.
    """
    if names.count(STDIO) > 1:
        raise UsageError("standard input can be read only once")
    with ExitStack() as stack:
        paths: list[Path] = []
        for name in names:
            path, shown = Path(name), "standard input" if name == STDIO else name
            if name == STDIO or _is_pipe(path):
                copy = stack.enter_context(_temporary_file())
                _spool(name, copy)
                path = Path(f"/proc/self/fd/{copy.fileno()}")
            with open_input(path, shown):
                paths.append(path)
        yield tuple(paths)


def file_stamps(paths: tuple[Path, ...]) -> list[tuple[int, ...]]:
    """Device, inode, size and time of each file: they change when it is replaced or written to."""
    stamps = (path.stat() for path in paths if path.exists())
    return [(stamp.st_dev, stamp.st_ino, stamp.st_size, stamp.st_mtime_ns) for stamp in stamps]


def _is_pipe(path: Path) -> bool:
    """Whether a path is a pipe or a device: what is read from it cannot be read again."""
    return os.path.exists(path) and not path.is_file() and not path.is_dir()


@contextmanager
def _temporary_file() -> Iterator[IO[bytes]]:
    """A file without a name: nothing of it is left when the process is killed."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    except OSError as error:
        raise InputFileError(f"cannot create a temporary file: {error.strerror}", hint="see TMPDIR") from None
    with file:
        yield file


def _spool(name: str, copy: IO[bytes]) -> None:
    """Copy an input that can be read only once."""
    if name == STDIO and sys.stdin is None:
        raise InputFileError("standard input is closed")
    shown = "standard input" if name == STDIO else name
    try:
        with (
            said_if_long(f"waiting for the end of {shown}: a pipe is read as a whole first"),
            sys.stdin.buffer if name == STDIO else Path(name).open("rb") as pipe,
        ):
            shutil.copyfileobj(pipe, copy)
        copy.flush()
    except OSError as error:
        raise InputFileError(f"cannot copy {name} to a temporary file: {error.strerror}", hint="see TMPDIR") from None
