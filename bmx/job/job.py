"""The job: files in, files out. Checks what can be checked before anything is loaded, then pipes rows through.

Knows the order of things; how a row is answered is the engine's business, how it is shown the display's, what is
done already the journal's.
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
from bmx.job.journal import REMEDY, Found, Journal, Ledger, Todo, is_error_file
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a job has to do.

    Attributes:
        places: where it writes.
        mark: what decides its answers, beside its rows.
        reader: reads its rows.
        before: the manifest of an earlier run that this one goes on with.
        found: what earlier runs have left there; ``todo`` what they have left to do.
    """

    places: JobPaths
    mark: dict[str, Any]
    reader: Reader
    before: dict[str, Any] | None
    found: Found
    todo: Todo


def run(config: RunConfig, display: Display, stop: Stop | None = None) -> Stats:
    """Answer every row of the inputs that has no record yet.

    Args:
        stop: tells when to end early.

    Returns:
        The counters: ``rows_failed`` says whether all went well.

    Raises:
        BmxError: the job cannot start or go on.
        Interrupted: it was told to stop; what is finished is kept.
    """
    check_cache(config.engine, config.prompt)
    places = find_paths(config)
    with ExitStack() as stack:
        for lock in () if config.job.dry_run else places.locks:
            stack.enter_context(locked(lock, config.job.lock_wait))
        stats = Stats()
        stack.enter_context(updated_stats_file(None if config.job.dry_run else places.stats, stats, display.warn))
        paths = stack.enter_context(input_paths(config.inputs))
        before = file_stamps(paths)
        work = find_work(config, places, paths)
        _count_before(stats, config, work)
        if work.todo.left:
            _answer(config, display, stop or Stop(), work, stats)
        else:
            _nothing_left(config, display, work, stats)
        if file_stamps(paths) != before:
            hint = "answers are kept; the same command finds out what has changed, and goes on"
            raise InputFileError("the input has changed while it was read", hint=hint)
        return stats


def find_work(config: RunConfig, places: JobPaths, paths: tuple[Path, ...]) -> Work:
    """What earlier runs have left to do.

    Raises:
        InputFileError: the input cannot be read, or two rows have the same id.
        UsageError: the output is that of another job.
    """
    job, mark = config.job, fingerprint(config)
    reader = input_reader(config, paths, row_hash_key(mark))
    if job.overwrite and places.errors and places.errors.is_file() and not is_error_file(places.errors):
        raise UsageError(f"the error file {places.errors} holds something else", hint="choose another")
    before = read_manifest(places.manifest) if places.manifest and not job.overwrite else None
    with closing(Ledger()) as ledger:
        ledger.read(reader, job.limit)
        found = Found()
        if places.used and not job.overwrite:
            _check_same_job(config, places, mark, before)
            found = ledger.find(places.output, places.errors, retry_failed=job.retry_failed)
        todo = ledger.todo(job.share)
    return Work(places=places, mark=mark, reader=reader, before=before, found=found, todo=todo)


def _nothing_left(config: RunConfig, display: Display, work: Work, stats: Stats) -> None:
    """All rows have their records, or there are none: no model is needed to say so."""
    places, before = work.places, work.before
    if config.job.dry_run:
        pass
    elif before and before["state"] == "finished":
        Journal(places.output, places.errors, work.found).close()  # a torn tail goes even so
    else:
        with recording(work, (before or {}) | run_started(config, work.mark), stats):
            pass
    display.nothing_left(stats, places.errors)


def _check_same_job(config: RunConfig, places: JobPaths, mark: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Refuse an output that another job, or another program, has written.

    Args:
        before: its manifest.

    Raises:
        UsageError: says what differs.
    """
    if not config.job.resume:
        raise UsageError(f"the output {places.output} exists", hint=REMEDY)
    if before is None:
        exists = next(path for path in (places.output, places.errors) if path and path.exists() and path.stat().st_size)
        raise UsageError(f"{exists} exists, and no {places.manifest} says how it was made", hint=REMEDY)
    now, then = config.flat(), before["settings"]
    kept = ("error_file", "order") if config.job.order == "input" else ("error_file",)  # where its records lie, and how
    changed = differences(
        before["fingerprint"] | {name: then.get(name) for name in kept},
        mark | {name: now[name] for name in kept},
    )
    if changed:
        raise UsageError(f"the output {places.output} was made with other settings: {changed}", hint=REMEDY)


def _check_same_model(work: Work, model: dict[str, Any]) -> None:
    """Refuse to go on with a model that has changed at its source.

    Raises:
        UsageError: names both.
    """
    before = (work.before or {}).get("model", model)
    for name in ("commit", "dtype"):
        if before.get(name) != model[name]:
            raise UsageError(
                f"the output {work.places.output} was made with {name} {before.get(name)} of the model, "
                f"now {model[name]}",
                hint=f"--{'revision' if name == 'commit' else name} {before.get(name)} goes on with it; {REMEDY}",
            )


def _count_before(stats: Stats, config: RunConfig, work: Work) -> None:
    """Go on counting where earlier runs run_finished."""
    todo = work.todo
    stats.rows_total, stats.rows_before = todo.rows, todo.rows - todo.left
    stats.errors.update(todo.failed)
    if config.prompt.on_too_long == "skip":
        stats.rows_skipped = stats.errors.pop(TOO_LONG, 0)


def _answer(config: RunConfig, display: Display, stop: Stop, work: Work, stats: Stats) -> None:
    places, todo = work.places, work.todo
    engine = _loaded(config, display)
    model = engine.describe()
    if work.found.output_bytes or work.found.error_bytes:
        _check_same_model(work, model)
    every = sampling_step(todo.left)
    with display.waiting("measuring the prompts, making the plan"):
        lengths = engine.measure(todo.sample(work.reader, every))
        plan = engine.plan(lengths)
    stats.work_total = every * sum(length.prompt_tokens + length.max_tokens for length in lengths)
    display.plan(model, plan, lengths, todo.left, every)
    if config.job.dry_run:
        return
    record = run_started(config, work.mark) | {"model": model, "plan": plan_record(plan)}
    with recording(work, record, stats, plan) as journal, display.live(stats):
        outbox = ResultWriter(
            add=journal.add,
            stats=stats,
            model=model_names(config)[0],
            in_order=config.job.order == "input",
            skips=config.prompt.on_too_long == "skip",
            max_errors=config.job.max_errors,
            tell=display.row if config.job.verbose else None,
        )
        results = engine.run(
            _requests(work, outbox, stop),
            plan,
            stats=stats,
            stop=stop,
            row_timeout=config.job.row_timeout,
            paused=lambda: outbox.full,
        )
        with closing(results), stop.graceful():
            for result in results:
                outbox.put(result)
        if stop.requested and stats.rows_done < todo.left:
            waiting = f", {outbox.held:,} finished ones waited for their turn" if outbox.held else ""
            done = stats.rows_before + stats.rows_done
            display.note(f"{done:,} of {stats.rows_total:,} rows have their records{waiting}")
        _check_complete(stats, todo, stop)
    display.summary(stats, plan, places.output, places.errors)


def _loaded(config: RunConfig, display: Display) -> Engine:
    engine = config.engine
    if engine.trust_remote_code and not engine.revision and not Path(engine.model).exists():
        display.warn(f"code that comes with {engine.model} runs here in whatever version it is: pin it with --revision")
    unpacked = engine.model == "demo" or engine.model.lower().endswith(".gguf")
    once = " (a GGUF file is unpacked once, then kept)" if unpacked else ""
    with display.waiting(f"loading model {engine.model}{once}"):
        return Engine.open(config.engine, config.prompt)


def _requests(work: Work, outbox: ResultWriter, stop: Stop) -> Iterator[Request | Result]:
    """The rows as the engine wants them: requests, and results of the rows that cannot be answered."""
    for row in work.reader.rows(work.todo.skip):
        if stop.requested:
            return
        outbox.expect(row)
        yield row.request or Result(id=row.id, error=row.error)


def _check_complete(stats: Stats, todo: Todo, stop: Stop) -> None:
    """See that every row has its record.

    Raises:
        Interrupted: a signal has run_finished the run before.
        BmxError: rows are missing all the same.
    """
    if stats.rows_done == todo.left:
        return
    if stop.signal is not None:
        raise Interrupted(stop.signal)
    what = f"{stats.rows_done:,} of {todo.left:,} rows were answered: has the input changed meanwhile?"
    raise BmxError(what, hint="the same command finds out, and goes on")


@contextmanager
def recording(work: Work, record: dict[str, Any], stats: Stats, plan: Plan | None = None) -> Iterator[Journal]:
    """The journal, open while the body runs, and the manifest that says what becomes of the run.

    Raises:
        OutputError: the disk is full, or fails. The manifest says "finished" only when all is on the disk.
    """

    def write(more: dict[str, Any]) -> None:
        if work.places.manifest:
            write_json(work.places.manifest, record | more)

    journal = Journal(work.places.output, work.places.errors, work.found)
    state: State = "failed"
    try:
        write({})
        yield journal
        journal.close()
        state = "finished"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        if state == "finished":
            write(run_finished(state, plan, stats))
        else:  # what went wrong is told already
            with suppress(BmxError):
                journal.close()
            with suppress(BmxError):
                write(run_finished(state, plan, stats))
