"""The file that ``bmx calibrate`` writes: its measurements, and the settings that it recommends.

Knows the file; knows nothing of how it was measured. ``--kv-budget auto`` reads it, also where somebody else has put
it beside the data: nothing but settings of the cache is taken from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from bmx.config import EngineConfig
from bmx.errors import UsageError
from bmx.job.file_kinds import without_row_suffix
from bmx.job.fingerprint import differences, fingerprint
from bmx.measure.calibration_checks import CALIBRATED, LATER_SETTINGS, problem_of
from bmx.run_config import RunConfig, setting_named
from bmx.units import now

FORMAT = 1
LARGEST = 1 << 26  # bytes of a file of measurements
SHOWN = 5  # ids named in a message
REMEDY = "`bmx calibrate INPUT` makes one; name it with --calibration, or give --kv-budget a number"
ANSWERS_KEY = "bmx_full_cache_answers"  # the one entry of metadata in the file of the full cache's answers
ANSWERS_BEGINNING = b'{"__metadata__":{"' + ANSWERS_KEY.encode() + b'":'
LENGTH_BYTES = 8  # before the header of a safetensors file


def default_path(name: str) -> Path:
    """The calibration file of an input, beside it."""
    return Path(f"{without_row_suffix(name)}.calibration.json")


def answers_path(path: Path) -> Path:
    """The file of the full cache's answers, beside a calibration file."""
    return path.with_suffix(".teacher.safetensors")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read or holds something else; says what.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(error.strerror) from None
    if len(raw) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST:,} bytes")
    try:
        record = json.loads(raw, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    return record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def may_replace(path: Path, mark: str) -> bool:
    """Whether a file is missing, empty, or a JSON object with that entry.

    Args:
        path: the file.
        mark: what objects of that kind have.
    """
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return True
    try:
        return mark in read_object(path)
    except (OSError, ValueError):
        return False


def is_calibration_file(path: Path) -> bool:
    """Whether a file may be replaced by a calibration: it is missing, empty, or one already."""
    return may_replace(path, "calibration_format")


def is_answers_file(path: Path) -> bool:
    """Whether a file may be replaced by the full cache's answers: it is missing, empty, or begins like such a file."""
    if not path.exists():
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(LENGTH_BYTES + len(ANSWERS_BEGINNING))
    return not beginning or beginning[LENGTH_BYTES:] == ANSWERS_BEGINNING


def read_calibration(path: Path, hint: str = REMEDY) -> dict[str, Any] | None:
    """The contents of a calibration file; None if it does not exist.

    Args:
        path: the file.
        hint: what to do about one that cannot be used.

    Raises:
        UsageError: the file cannot be read, is not a calibration file, or is damaged.
    """
    try:
        record = read_object(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the calibration file {path}: {error}", hint=hint) from None
    if record.get("calibration_format") != FORMAT:
        raise UsageError(f"{path} is not a calibration file of this version of bmx", hint=hint)
    problem = problem_of(record)
    if problem:
        raise UsageError(f"the calibration file {path} cannot be used: {problem}", hint=hint)
    for settings in (*(candidate["settings"] for candidate in record["candidates"]), record.get("recommended") or {}):
        if settings.get("kv_format") == "auto":  # earlier versions wrote it for the model's own dtype
            settings["kv_format"] = "model"
        for name in LATER_SETTINGS:
            settings.setdefault(name, setting_named(name).default)
    return record


def with_calibration(inputs: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """The user's settings, with ``--kv-budget auto`` replaced by the settings that the calibration file recommends.

    Args:
        inputs: input paths; the file's default name comes from the first.
        given: the settings that the user gave, by name.

    Raises:
        UsageError: the file does not exist, is damaged, recommends nothing, or was made with other settings.
    """
    if given.get("kv_budget") != "auto":
        return given
    path = Path(given.get("calibration") or default_path(inputs[0] if inputs else "prompts.jsonl"))
    return given | recommended(path, given.get("model", EngineConfig().model), given)


def recommended(path: Path, model: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that a calibration file recommends.

    Args:
        path: the file.
        model: the model to run, which must be the calibrated one.
        given: the settings that the user gave, which must not contradict the recommended ones.

    Raises:
        UsageError: the file does not exist, is damaged, recommends nothing, or was made with other settings.
    """
    record = read_calibration(path)
    if record is None:
        raise UsageError(f"--kv-budget auto: there is no calibration file {path}", hint=REMEDY)
    if record["model"] != model:
        raise UsageError(f"the calibration file {path} is of {record['model']:.200}, not of {model}", hint=REMEDY)
    if record["recommended"] is None:
        least = record.get("min_agreement", 1)
        raise UsageError(
            f"the calibration file {path} recommends nothing: no candidate reached {least:.0%}",
            hint="calibrate larger budgets, lower --min-agreement, or give --kv-budget a number",
        )
    settings = {name: setting_named(name).coerce(value) for name, value in record["recommended"].items()}
    for name, value in settings.items():
        if name != "kv_budget" and name in given and given[name] != value:
            raise UsageError(
                f"{name} is {given[name]}; the calibration file {path} was made with {value}",
                hint="leave it out, calibrate with it, or give --kv-budget a number",
            )
    return settings


def saved_or_new_record(config: RunConfig, output: Path, rows: dict[str, str]) -> dict[str, Any]:
    """The output file's contents: what an earlier call has saved, or a new record.

    What was saved is only taken up if it was measured with the same settings on the same rows, by their content.

    Args:
        config: the settings.
        output: the file.
        rows: a hash of the line of each row that is measured on, by the row's id.

    Raises:
        UsageError: the file was made with other settings or rows, or is damaged.
    """
    settings = {name: value for name, value in fingerprint(config).items() if name not in CALIBRATED}
    settings["rows"] = rows
    hint = "--overwrite replaces it, -o names another file"
    saved = None if config.job.overwrite else read_calibration(output, hint)
    if saved is None:
        new = {"calibration_format": FORMAT, "begun": now(), "model": config.engine.model, "fingerprint": settings}
        return new | {"candidates": [], "recommended": None}
    changed = differences(saved["fingerprint"] | {"rows": rows}, settings)
    if changed:
        raise UsageError(f"{output} was made with other settings: {changed}", hint=hint)
    if saved["fingerprint"].get("rows") != rows:
        others = _other_rows(saved["fingerprint"].get("rows"), rows)
        raise UsageError(f"{output} was measured on other rows: {others}", hint=hint)
    return saved


def _other_rows(before: Any, now: dict[str, str]) -> str:
    """Which rows of the sample have changed, for people.

    Args:
        before: what the file says of its rows.
        now: a hash of each row's line, by the row's id.
    """
    before = before if isinstance(before, dict) else {}
    changed = [name for name in now if name in before and before[name] != now[name]]
    if not changed:
        return "other ids were in the sample"
    shown = ", ".join(repr(name[:80]) for name in changed[:SHOWN])
    return f"changed since: {shown}" + (f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else "")
