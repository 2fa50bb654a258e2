"""The job: files in, files out. Everything that can be checked is checked before a model is loaded.

Knows the order of the steps. How a row is answered is the engine's business, what is shown the terminal's, and which
rows have a record already the journal's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from bmx.engine.grammar import check_format
from bmx.engine.open import check_cache
from bmx.errors import BmxError, InputFileError
from bmx.job.answering import Answering, prepare
from bmx.job.field_names import check_field_names
from bmx.job.input_rows import model_names
from bmx.job.job_state import FIND_OUT, JobState, find_state
from bmx.job.journal import Journal
from bmx.job.ledger import Ledger
from bmx.job.locks import locked
from bmx.job.manifest import SPARE, State, known_tables, run_finished, run_started, write_json, write_state
from bmx.job.paths import find_paths, input_paths
from bmx.job.result_writer import ALIKE, TOO_LONG, FirstRows, ResultWriter
from bmx.job.stats_file import updated_stats_file
from bmx.job.table_writer import write_table
from bmx.plan.planner import Plan
from bmx.request import Request, Result
from bmx.run_config import RunConfig
from bmx.shutdown import Interrupted, Stop
from bmx.stats import Stats
from bmx.terminal.display import Display
from bmx.terminal.reports import nothing_left_lines, row_line, summary_lines
from bmx.terminal.worker_lines import worker_lines


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
    check_format(config.sampling)
    paths, dry = find_paths(config), config.job.dry_run
    with ExitStack() as stack:
        for lock in () if dry else paths.locks:
            stack.enter_context(locked(lock, config.job.lock_wait))
        stats = Stats()
        stack.enter_context(updated_stats_file(None if dry else paths.stats, stats, display.warn))
        inputs = stack.enter_context(input_paths(config.inputs))
        journal = Journal(paths.output, paths.errors, read_only=dry)
        stack.callback(_close_quietly, journal)
        ledger = stack.enter_context(closing(Ledger()))
        state = find_state(config, paths, inputs, journal, ledger)
        _count_earlier_runs(stats, state)
        if state.todo.left:
            _answer(state, display, stop or Stop(), stats, stack)
        else:
            _nothing_left(state, display, stats)
        return stats


def _close_quietly(journal: Journal) -> None:
    """Close a journal whose run is over, or never began: what is to be said is said."""
    with suppress(BmxError):
        journal.close()


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
    elif manifest and manifest["state"] == "finished" and manifest.get("rows", {}).get("total") == stats.rows_total:
        _begin(state, display)
        state.journal.close()
    else:
        record = (manifest or {}) | run_started(state.config, state.fingerprint)
        with recording(state, record, stats, display):
            pass
    state.check_input()
    written = _write_table(state, display)
    display.report(nothing_left_lines(stats, state.paths.errors, written))


def _answer(state: JobState, display: Display, stop: Stop, stats: Stats, stack: ExitStack) -> None:
    """Load the model, make a plan, and answer the rows that have no record."""
    job, record = state.config.job, run_started(state.config, state.fingerprint)
    answering = None
    for note in check_field_names(state.config, state.reader):
        display.note(note)
    if _check_first_rows(state, display):
        answering = prepare(state, display, stats, stack)
        record |= answering.record
    if job.dry_run:
        return
    plans = answering.plans if answering else ()
    with recording(state, record, stats, display, plans) as journal, display.live(stats):
        writer = ResultWriter(
            add_record=journal.add,
            stats=stats,
            model=model_names(state.config)[0],
            in_order=job.order == "input",
            skip_too_long=state.config.prompt.on_too_long == "skip",
            max_errors=job.max_errors,
            on_result=(lambda result: display.note(row_line(result))) if job.verbose else None,
        )
        _pipe(state, answering, writer, stop)
        if stop.requested and stats.rows_done < state.todo.left:
            held = f", {writer.held:,} finished ones waited for their turn" if writer.held else ""
            done = stats.rows_before + stats.rows_done
            display.note(f"{done:,} of {stats.rows_total:,} rows have their records{held}")
        _check_complete(state, stats, stop)
    _write_table(state, display)
    if answering and answering.fleet and job.verbose:
        display.report(worker_lines(answering.fleet.workers))
    display.report(summary_lines(stats, plans, state.paths.output, state.paths.errors, state.paths.table))


def _write_table(state: JobState, display: Display) -> Path | None:
    """Make the table of the answers, if one is asked for; returns its path if it has changed.

    Raises:
        OutputError: it cannot be written.
    """
    paths = state.paths
    if not (paths.table and paths.output and paths.manifest) or state.config.job.dry_run:
        return None
    with display.waiting(f"writing {paths.table}"):
        return paths.table if write_table(paths.table, paths.output, paths.manifest) else None


def _check_first_rows(state: JobState, display: Display) -> bool:
    """Whether a row can be answered: its own errors need no model. A line says why none can.

    Raises:
        InputFileError: the first rows all fail in the same way, and --max-errors does not say that it may be so.
    """
    first, why = FirstRows(), ""
    for row in state.reader.rows(state.todo.skip):
        if row.request:
            return True
        first.expect(row.id)
        if first.fail(row.id, row.error) and row.error and state.config.job.max_errors is None:
            message = f"the first {ALIKE} rows all fail in the same way: {_without_line(row.error.message)}"
            raise InputFileError(message, hint="mend the rows or the command; --max-errors N runs all the same")
        why = why or f"{row.id}: {_without_line(row.error.message)}" if row.error else why
    if why:
        display.note(f"no row that is left can be answered; {why}")
    return False


def _without_line(message: str) -> str:
    return re.sub("^line [0-9]+:? ", "", message)


def _pipe(state: JobState, answering: Answering | None, writer: ResultWriter, stop: Stop) -> None:
    """Read rows, answer them and write the results, until no row is left or the run is to stop.

    Args:
        state: the job.
        answering: answers the requests; None where no row became one.
        writer: takes the results.
        stop: says when to end early.
    """
    rows, timeout = _requests(state, writer, stop), state.config.job.row_timeout
    if answering:
        results = answering.run(rows, stats=writer.stats, stop=stop, row_timeout=timeout, paused=lambda: writer.full)
    else:
        results = (row for row in rows if isinstance(row, Result))
    with closing(results), stop.graceful():
        for result in results:
            writer.put(result)


def _requests(state: JobState, writer: ResultWriter, stop: Stop) -> Iterator[Request | Result]:
    """The rows without a record, as requests; a row that cannot be answered is its own result.

    A row that is not the one which stood in its line before ends the reading: the input is being changed.
    """
    for row in state.reader.rows(state.todo.skip):
        if stop.requested or not state.ledger.is_at(row):
            return
        writer.expect(row)
        yield row.request or Result(id=row.id, error=row.error)


def _check_complete(state: JobState, stats: Stats, stop: Stop) -> None:
    """Check that every row has its record.

    Raises:
        Interrupted: a signal ended the run early.
        InputFileError: the input has changed.
    """
    if stats.rows_done < state.todo.left and stop.signal is not None:
        raise Interrupted(stop.signal)
    state.check_input()
    if stats.rows_done < state.todo.left:
        raise InputFileError("the input has changed while it was read", hint=FIND_OUT)


@contextmanager
def recording(
    state: JobState, record: dict[str, Any], stats: Stats, display: Display, plans: Sequence[Plan] = ()
) -> Iterator[Journal]:
    """The journal, ready for records while the body runs, and the manifest, which says how the run ended.

    Args:
        state: the job.
        record: the manifest at the beginning of the run.
        stats: the counters, for the manifest at the end.
        display: shows how the files of earlier runs were mended.
        plans: those of the models, for the predicted memory.

    Raises:
        OutputError: the disk is full or fails, or another program has changed a file. The manifest says "finished"
            only when everything is on the disk.
    """
    path = state.paths.manifest
    if path and (tables := known_tables(path)):
        record |= {"tables": tables}
    ended: State = "failed"
    _begin(state, display)
    try:
        if path:
            write_json(path, record, spare=SPARE)
        yield state.journal
        state.journal.close()
        ended = "finished"
    except KeyboardInterrupt:
        ended = "interrupted"
        raise
    finally:
        _close_quietly(state.journal)
        if path:
            _write_end(path, record, ended, plans, stats)


def _write_end(path: Path, record: dict[str, Any], ended: State, plans: Sequence[Plan], stats: Stats) -> None:
    """Say in the manifest how the run ended, on a full disk too.

    Raises:
        OutputError: it cannot be written. An error that has ended the run is not hidden by another one.
    """
    try:
        write_json(path, record | run_finished(ended, plans, stats))
    except BmxError:
        with suppress(BmxError):
            write_state(path, record, "failed" if ended == "finished" else ended)
        if ended == "finished":
            raise


def _begin(state: JobState, display: Display) -> None:
    """Mend the files of earlier runs, and tell."""
    display.report(state.journal.begin(state.ledger))
