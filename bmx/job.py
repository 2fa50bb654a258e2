"""The job: files in, a file out. Checks what can be checked before anything is loaded, then pipes rows through.

Knows paths and the order of things; how a row is answered is the engine's business, how it is shown the display's.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bmx.config import RunConfig
from bmx.display import Display
from bmx.engine.lengths import sampling_step
from bmx.errors import InputFileError, OutputError, UsageError
from bmx.jsonl import Reader, Writer, duplicate_ids, open_input
from bmx.manifest import manifest_path, run_record, write_manifest
from bmx.request import Result
from bmx.stats import Stats

STDIO = "-"
SHOWN_DUPLICATES = 5


def run(config: RunConfig, display: Display) -> Stats:
    """Answer every row of the inputs.

    Returns:
        The counters: ``rows_failed`` says whether all went well.

    Raises:
        BmxError: the job cannot start or go on.
    """
    output = output_path(config)
    check_output(output, config)
    with input_paths(config.inputs) as paths:
        reader = input_reader(config, paths)
        rows = check_rows(reader)
        if not rows and config.job.dry_run:
            display.note("the input has no rows")
            return Stats()
        if not rows:
            with Writer(output, overwrite=config.job.overwrite):
                display.note("the input has no rows")
            return Stats()
        return _generate(config, display, reader, rows, output)


def _generate(config: RunConfig, display: Display, reader: Reader, rows: int, output: Path | None) -> Stats:
    from bmx.engine.engine import Engine

    unpacked = config.engine.model == "demo" or config.engine.model.lower().endswith(".gguf")
    once = " (a GGUF file is unpacked once, then kept)" if unpacked else ""
    with display.waiting(f"loading model {config.engine.model}{once}"):
        engine = Engine.open(config.engine, config.prompt)
    every = sampling_step(rows)
    with display.waiting("measuring the prompts, making the plan"):
        lengths = engine.measure(reader.requests(), every)
        plan = engine.plan(lengths)
    stats = engine.stats
    stats.rows_total = rows
    stats.work_total = every * sum(length.prompt_tokens + length.max_tokens for length in lengths)
    display.plan(engine.loaded.spec, engine.kernels, plan, lengths, rows, every)
    if config.job.dry_run:
        return stats
    with Writer(output, overwrite=config.job.overwrite) as writer, display.live(stats):

        def write(result: Result) -> None:
            writer.write(result)
            stats.rows_done += 1
            stats.rows_failed += result.error is not None

        for result in engine.generate(reader.requests(bad=write), plan):
            write(result)
    display.summary(stats, plan, str(output) if output else None)
    if output:
        write_manifest(manifest_path(output), run_record(config, engine.describe(), plan, stats))
    return stats


def output_path(config: RunConfig) -> Path | None:
    """Where the answers go; None is standard output.

    Raises:
        UsageError: the input has no name to derive one from.
    """
    if config.job.output_file == STDIO:
        return None
    if config.job.output_file:
        return Path(config.job.output_file)
    if config.inputs[0] == STDIO:
        raise UsageError("reading from standard input needs an output", hint="-o answers.jsonl, or -o - for stdout")
    first = Path(config.inputs[0])
    return first.with_name(first.name.removesuffix(".jsonl") + ".out.jsonl")


def check_output(output: Path | None, config: RunConfig) -> None:
    """Refuse an output that would destroy something, or that cannot be written, before any work.

    Raises:
        UsageError: it is an input, or it exists.
        OutputError: its folder is missing or not a folder.
    """
    if output is None:
        return
    for name in config.inputs:
        if name != STDIO and output.exists() and Path(name).exists() and output.samefile(name):
            raise UsageError(f"the output {output} is also an input", hint="choose another with -o")
    if output.is_dir():
        raise UsageError(f"the output {output} is a folder", hint="-o takes a file")
    if output.exists() and not config.job.overwrite and not config.job.dry_run:
        raise UsageError(f"the output {output} exists", hint="choose another with -o, or replace it with --overwrite")
    if not output.parent.is_dir():
        raise OutputError(f"the folder {output.parent} does not exist", hint="create it, or choose another with -o")


@contextmanager
def input_paths(names: tuple[str, ...]) -> Iterator[tuple[Path, ...]]:
    """The input files; standard input is copied to a temporary file first, since inputs are read more than once.

    Raises:
        InputFileError: one is missing or cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="bmx-") as folder:
        paths: list[Path] = []
        for name in names:
            path = Path(name)
            if name == STDIO or (path.exists() and not path.is_file() and not path.is_dir()):  # a pipe
                path = _spooled(name, Path(folder) / f"input-{len(paths)}.jsonl")
            open_input(path).close()
            paths.append(path)
        yield tuple(paths)


def _spooled(name: str, to: Path) -> Path:
    try:
        with to.open("wb") as copy:
            if name == STDIO:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            else:
                with Path(name).open("rb") as pipe:
                    shutil.copyfileobj(pipe, copy)
    except OSError as error:
        raise InputFileError(f"cannot copy {name} to a temporary file: {error.strerror}") from None
    return to


def check_rows(reader: Reader) -> int:
    """How many rows there are.

    Raises:
        InputFileError: two rows have the same id.
    """
    count = 0

    def counted() -> Iterator[object]:
        nonlocal count
        for item in reader:
            count += 1
            yield item

    twice = duplicate_ids(counted())  # type: ignore[arg-type]
    if twice:
        shown = ", ".join(repr(name[:80]) for name in twice[:SHOWN_DUPLICATES])
        more = f" and {len(twice) - SHOWN_DUPLICATES} more" if len(twice) > SHOWN_DUPLICATES else ""
        raise InputFileError(f"{len(twice)} ids occur more than once: {shown}{more}", hint="ids must be unique")
    return count


def input_reader(config: RunConfig, paths: tuple[Path, ...]) -> Reader:
    """What reads the rows of these files, with the defaults and the template of the job."""
    return Reader(
        paths=paths,
        defaults=config.sampling,
        template=_unescape(config.prompt.prompt_template),
        limit=config.job.limit,
    )


def _unescape(template: str | None) -> str | None:
    r"""A template from a shell: ``\n`` and ``\t`` typed as two characters mean what they say."""
    return None if template is None else template.replace("\\n", "\n").replace("\\t", "\t")
