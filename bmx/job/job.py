"""The job: files in, files out. Everything that can be checked is checked before a model is loaded.

Knows the order of the steps. How a row is answered is the engine's business, what is shown the terminal's, and which
rows have a record already the journal's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmx.engine.engine import Engine
from bmx.engine.open import check_cache
from bmx.engine.prompt_lengths import sampling_step
from bmx.errors import BmxError, InputFileError, UsageError
from bmx.job.durable_files import locked
from bmx.job.fingerprint import differences, fingerprint, row_hash_key
from bmx.job.input_rows import Reader, input_reader, model_names
from bmx.job.journal import REMEDY, ExistingRecords, Journal, Ledger, Todo, is_error_file
from bmx.job.manifest import State, read_manifest, run_finished, run_started, write_json
from bmx.job.paths import JobPaths, file_stamps, find_paths, input_paths
from bmx.job.result_writer import TOO_LONG, ResultWriter
from bmx.job.stats_file import updated_stats_file
from bmx.plan.planner import Plan, plan_record
from bmx.request import Request, Result
from bmx.run_config import RunConfig
from bmx.shutdown import Interrupted, Stop
from bmx.stats import Stats
from bmx.terminal.display import Display
from bmx.terminal.reports import nothing_left_lines, plan_lines, row_line, summary_lines

SAVED = "finished answers are saved"
FIND_OUT = "run the same command again to find out what has changed, and to resume"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """A job, and how far earlier runs of it have come.

    Attributes:
        config: its settings.
        paths: where it writes.
        fingerprint: what decides its answers, beside its rows.
        reader: reads its rows.
        manifest: the manifest of the earlier run that this one resumes, or None.
        existing: the records of earlier runs.
        todo: the rows without a record.
    """

    config: RunConfig
    paths: JobPaths
    fingerprint: dict[str, Any]
    reader: Reader
    manifest: dict[str, Any] | None
    existing: ExistingRecords
    todo: Todo


def run(config: RunConfig, display: Display, stop: Stop | None = None) -> Stats:
    """Answer every row of the inputs that has no record yet.

    Args:
        config: all settings.
        display: shows the plan, the progress and the summary.
        stop: says when to end early.

    Returns:
        The counters: ``rows_failed`` says whether all went well.

    Raises:
        BmxError: the job cannot start or continue.
        Interrupted: a signal ended it; finished answers are saved.
    """
    check_cache(config.engine, config.prompt)
    paths = find_paths(config)
    with ExitStack() as stack:
        for lock in () if config.job.dry_run else paths.locks:
            stack.enter_context(locked(lock, config.job.lock_wait))
        stats = Stats()
        stack.enter_context(updated_stats_file(None if config.job.dry_run else paths.stats, stats, display.warn))
        inputs = stack.enter_context(input_paths(config.inputs))
        stamps = file_stamps(inputs)
        state = find_state(config, paths, inputs)
        _count_earlier_runs(stats, state)
        if state.todo.left:
            _answer(state, display, stop or Stop(), stats)
        else:
            _nothing_left(state, display, stats)
        if file_stamps(inputs) != stamps:
            raise InputFileError("the input has changed while it was read", hint=f"{SAVED}; {FIND_OUT}")
        return stats


def find_state(config: RunConfig, paths: JobPaths, inputs: tuple[Path, ...]) -> JobState:
    """What earlier runs have left to do.

    Args:
        config: all settings.
        paths: where the job writes.
        inputs: the files that hold the rows.

    Raises:
        InputFileError: the input cannot be read, or two rows have the same id.
        UsageError: the output is that of another job.
    """
    job, mark = config.job, fingerprint(config)
    reader = input_reader(config, inputs, row_hash_key(mark))
    if job.overwrite and paths.errors and paths.errors.is_file() and not is_error_file(paths.errors):
        raise UsageError(f"the error file {paths.errors} holds something else", hint="choose another")
    manifest = read_manifest(paths.manifest) if paths.manifest and not job.overwrite else None
    with closing(Ledger()) as ledger:
        ledger.read(reader, job.limit)
        existing = ExistingRecords()
        if paths.used and not job.overwrite:
            _check_same_job(config, paths, mark, manifest)
            existing = ledger.find(paths.output, paths.errors, retry_failed=job.retry_failed)
        todo = ledger.todo(job.share)
    return JobState(
        config=config, paths=paths, fingerprint=mark, reader=reader, manifest=manifest, existing=existing, todo=todo
    )


def _check_same_job(config: RunConfig, paths: JobPaths, mark: dict[str, Any], manifest: dict[str, Any] | None) -> None:
    """Refuse an output that another job, or another program, has written.

    Args:
        config: all settings.
        paths: where this job writes.
        mark: the fingerprint of this job.
        manifest: the manifest beside the output.

    Raises:
        UsageError: says what differs.
    """
    if not config.job.resume:
        raise UsageError(f"the output {paths.output} exists", hint=REMEDY)
    if manifest is None:
        exists = next(path for path in (paths.output, paths.errors) if path and path.exists() and path.stat().st_size)
        raise UsageError(f"{exists} exists, and no {paths.manifest} says how it was made", hint=REMEDY)
    now, then = config.flat(), manifest["settings"]
    about_records = ("error_file", "order") if config.job.order == "input" else ("error_file",)  # their place and order
    changed = differences(
        manifest["fingerprint"] | {name: then.get(name) for name in about_records},
        mark | {name: now[name] for name in about_records},
    )
    if changed:
        raise UsageError(f"the output {paths.output} was made with other settings: {changed}", hint=REMEDY)


def _count_earlier_runs(stats: Stats, state: JobState) -> None:
    """Start the counters where earlier runs ended."""
    todo = state.todo
    stats.rows_total, stats.rows_before = todo.rows, todo.rows - todo.left
    stats.errors.update(todo.failed)
    if state.config.prompt.on_too_long == "skip":
        stats.rows_skipped = stats.errors.pop(TOO_LONG, 0)


def _nothing_left(state: JobState, display: Display, stats: Stats) -> None:
    """Finish a job whose rows all have their records, or that has no rows: this needs no model."""
    manifest = state.manifest
    if state.config.job.dry_run:
        pass
    elif manifest and manifest["state"] == "finished":
        Journal(state.paths.output, state.paths.errors, state.existing).close()  # cuts off a torn tail
    else:
        with recording(state, (manifest or {}) | run_started(state.config, state.fingerprint), stats):
            pass
    display.report(nothing_left_lines(stats, state.paths.errors))


def _answer(state: JobState, display: Display, stop: Stop, stats: Stats) -> None:
    """Load the model, make a plan, and answer the rows that have no record."""
    engine, plan = _prepare(state, display, stats)
    if state.config.job.dry_run:
        return
    record = run_started(state.config, state.fingerprint) | {"model": engine.describe(), "plan": plan_record(plan)}
    with recording(state, record, stats, plan) as journal, display.live(stats):
        writer = ResultWriter(
            add_record=journal.add,
            stats=stats,
            model=model_names(state.config)[0],
            in_order=state.config.job.order == "input",
            skip_too_long=state.config.prompt.on_too_long == "skip",
            max_errors=state.config.job.max_errors,
            on_result=(lambda result: display.note(row_line(result))) if state.config.job.verbose else None,
        )
        _pipe(state, engine, plan, writer, stop)
        if stop.requested and stats.rows_done < state.todo.left:
            held = f", {writer.held:,} finished ones waited for their turn" if writer.held else ""
            done = stats.rows_before + stats.rows_done
            display.note(f"{done:,} of {stats.rows_total:,} rows have their records{held}")
        _check_complete(stats, state.todo, stop)
    display.report(summary_lines(stats, plan, state.paths.output, state.paths.errors))


def _prepare(state: JobState, display: Display, stats: Stats) -> tuple[Engine, Plan]:
    """The loaded model, and the plan for the rows that are left; it is shown.

    Raises:
        UsageError: the records that exist are those of another version of the model.
    """
    engine = _loaded(state.config, display)
    model = engine.describe()
    if state.existing.output_bytes or state.existing.error_bytes:
        _check_same_model(state, model)
    every = sampling_step(state.todo.left)
    with display.waiting("measuring the prompts, making the plan"):
        lengths = engine.measure(state.todo.sample(state.reader, every))
        plan = engine.plan(lengths)
    stats.work_total = every * sum(length.prompt_tokens + length.max_tokens for length in lengths)
    display.report(plan_lines(model, plan, lengths, state.todo.left, every))
    return engine, plan


def _loaded(config: RunConfig, display: Display) -> Engine:
    engine = config.engine
    if engine.trust_remote_code and not engine.revision and not Path(engine.model).exists():
        display.warn(f"code that comes with {engine.model} runs here, whatever its newest version is: pin --revision")
    unpacked = engine.model == "demo" or engine.model.lower().endswith(".gguf")
    once = " (a GGUF file is unpacked once, then kept)" if unpacked else ""
    with display.waiting(f"loading model {engine.model}{once}"):
        return Engine.open(config.engine, config.prompt)


def _check_same_model(state: JobState, model: dict[str, Any]) -> None:
    """Refuse to resume with a model that has changed at its source.

    Raises:
        UsageError: names both.
    """
    earlier = (state.manifest or {}).get("model", model)
    for name in ("commit", "dtype"):
        if earlier.get(name) not in (None, model[name]):
            flag = f"--{'revision' if name == 'commit' else name} {earlier.get(name)}"
            raise UsageError(
                f"the output {state.paths.output} was made with {name} {earlier.get(name)} of the model, "
                f"now {model[name]}",
                hint=f"{flag} resumes with the earlier one; {REMEDY}",
            )


def _pipe(state: JobState, engine: Engine, plan: Plan, writer: ResultWriter, stop: Stop) -> None:
    """Read rows, answer them and write the results, until no row is left or the run is to stop."""
    results = engine.run(
        _requests(state, writer, stop),
        plan,
        stats=writer.stats,
        stop=stop,
        row_timeout=state.config.job.row_timeout,
        paused=lambda: writer.full,
    )
    with closing(results), stop.graceful():
        for result in results:
            writer.put(result)


def _requests(state: JobState, writer: ResultWriter, stop: Stop) -> Iterator[Request | Result]:
    """The rows without a record, as requests; a row that cannot be answered is its own result."""
    for row in state.reader.rows(state.todo.skip):
        if stop.requested:
            return
        writer.expect(row)
        yield row.request or Result(id=row.id, error=row.error)


def _check_complete(stats: Stats, todo: Todo, stop: Stop) -> None:
    """Check that every row has its record.

    Raises:
        Interrupted: a signal ended the run early.
        BmxError: rows are missing although no signal came.
    """
    if stats.rows_done == todo.left:
        return
    if stop.signal is not None:
        raise Interrupted(stop.signal)
    message = f"{stats.rows_done:,} of {todo.left:,} rows were answered: has the input changed in between?"
    raise BmxError(message, hint=FIND_OUT)


@contextmanager
def recording(state: JobState, record: dict[str, Any], stats: Stats, plan: Plan | None = None) -> Iterator[Journal]:
    """The journal, open while the body runs, and the manifest, which says how the run ended.

    Args:
        state: the job.
        record: the manifest at the beginning of the run.
        stats: the counters, for the manifest at the end.
        plan: the plan, for its predicted memory; None for a run without a model.

    Raises:
        OutputError: the disk is full, or fails. The manifest says "finished" only when everything is on the disk.
    """

    def write_manifest(more: dict[str, Any]) -> None:
        if state.paths.manifest:
            write_json(state.paths.manifest, record | more)

    journal = Journal(state.paths.output, state.paths.errors, state.existing)
    ended: State = "failed"
    try:
        write_manifest({})
        yield journal
        journal.close()
        ended = "finished"
    except KeyboardInterrupt:
        ended = "interrupted"
        raise
    finally:
        if ended == "finished":
            write_manifest(run_finished(ended, plan, stats))
        else:  # the error that ended the run is on its way: another one must not hide it
            with suppress(BmxError):
                journal.close()
            with suppress(BmxError):
                write_manifest(run_finished(ended, plan, stats))
