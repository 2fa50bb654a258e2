"""A job, and how far earlier runs of it have come: an output that another job has made is refused.

Knows settings, manifests and the journal; knows nothing of how rows are answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmx.errors import InputFileError, UsageError
from bmx.job.fingerprint import CUTTING, differences, fingerprint, row_hash_key
from bmx.job.input_rows import Reader, input_reader
from bmx.job.journal import REMEDY, SET_ASIDE, Journal
from bmx.job.ledger import SHOWN, Ledger, Strays, Todo
from bmx.job.manifest import read_manifest
from bmx.job.paths import JobPaths, file_stamps
from bmx.run_config import RunConfig
from bmx.terminal.tables import counted

FIND_OUT = "finished answers are saved; run the same command again to find out what has changed, and to resume"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """A job, and how far earlier runs of it have come.

    Attributes:
        config: its settings.
        paths: where it writes.
        fingerprint: what decides its answers, beside its rows.
        reader: reads its rows.
        stamps: the state of the input files before they were read.
        manifest: the manifest of the earlier run that this one resumes, or None.
        ledger: its rows, and those that have records.
        journal: the files that hold the records.
        todo: the rows without a record.
    """

    config: RunConfig
    paths: JobPaths
    fingerprint: dict[str, Any]
    reader: Reader
    stamps: list[tuple[int, ...]]
    manifest: dict[str, Any] | None
    ledger: Ledger
    journal: Journal
    todo: Todo

    def check_input(self) -> None:
        """Check that the input files are those that were read.

        Raises:
            InputFileError: they have changed.
        """
        if file_stamps(self.reader.paths) != self.stamps:
            raise InputFileError("the input has changed while it was read", hint=FIND_OUT)


def find_state(
    config: RunConfig, paths: JobPaths, inputs: tuple[Path, ...], journal: Journal, ledger: Ledger
) -> JobState:
    """What earlier runs have left to do.

    Args:
        config: all settings.
        paths: where the job writes.
        inputs: the files that hold the rows.
        journal: the files that hold the records.
        ledger: takes the rows and the records.

    Raises:
        InputFileError: the input cannot be read, or two rows have the same id.
        UsageError: the output is that of another job.
    """
    job, mark, stamps = config.job, fingerprint(config), file_stamps(inputs)
    reader = input_reader(config, inputs, row_hash_key(mark))
    manifest = read_manifest(paths.manifest) if paths.manifest and not job.overwrite else None
    ledger.enter_rows(reader, job.limit)
    if paths.used and not job.overwrite:
        _check_same_job(config, paths, mark, manifest)
        journal.read(ledger, retry_failed=job.retry_failed, set_aside=job.set_aside)
        _match(config, paths, manifest, ledger)
    return JobState(
        config=config,
        paths=paths,
        fingerprint=mark,
        reader=reader,
        stamps=stamps,
        manifest=manifest,
        ledger=ledger,
        journal=journal,
        todo=ledger.todo(job.share),
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
        if config.job.set_aside:
            return
        exists = next(path for path in (paths.output, paths.errors) if path and path.exists() and path.stat().st_size)
        message = f"{exists} exists, and no {paths.manifest} says how it was made"
        raise UsageError(message, hint=f"{SET_ASIDE.format(what='answers of other jobs', path=paths.output)}; {REMEDY}")
    now, then = config.flat(), manifest["settings"]
    about_files = ("error_file", "keep_fields", *(("order",) if config.job.order == "input" else ()))
    before, after = (_as_json(settings, about_files) for settings in (then, now))
    hint = REMEDY
    if not config.job.set_aside:
        if differences(manifest["fingerprint"], mark):
            hint = f"{SET_ASIDE.format(what='the earlier answers', path=paths.output)}; {REMEDY}"
        before, after = manifest["fingerprint"] | before, mark | after
    changed = differences(before, after)
    if changed:
        raise UsageError(f"the output {paths.output} was made with other settings: {changed}", hint=hint)


def _as_json(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The settings of these names, as JSON has them; nothing is None."""
    values = {name: settings.get(name) for name in names}
    return {name: (list(value) if isinstance(value, tuple) else value) or None for name, value in values.items()}


def _match(config: RunConfig, paths: JobPaths, manifest: dict[str, Any] | None, ledger: Ledger) -> None:
    """Find the rows of the records.

    Raises:
        UsageError: answers belong to no row, and the user has not said what becomes of them.
    """
    before, after = (manifest or {}).get("settings", {}), config.flat()
    cut_otherwise = _as_json(before, CUTTING) != _as_json(after, CUTTING)
    strays = ledger.match(config.job.share, drop_cut=cut_otherwise)
    if config.job.set_aside:
        ledger.set_strays_aside()
    elif strays.count:
        raise _stray_error(strays, paths)


def _stray_error(strays: Strays, paths: JobPaths) -> UsageError:
    if strays.lines:
        lines = ", ".join(map(str, strays.lines[:SHOWN])) + (" and more" if len(strays.lines) > SHOWN else "")
        what = f"rows of the input have changed since they were answered in {paths.output}: see line {lines}"
    else:
        what = f"{paths.output} has {counted(strays.count, 'answer')} of rows that are not in the input"
    return UsageError(what, hint=f"{SET_ASIDE.format(what='these answers', path=paths.output)}; {REMEDY}")
