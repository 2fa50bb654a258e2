"""The file that ``bmx calibrate`` writes: its measurements, and the settings that it recommends.

Knows the file; knows nothing of how it was measured. ``--kv-budget auto`` reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bmx.config import EngineConfig
from bmx.errors import UsageError
from bmx.run_config import all_settings, setting_named

FORMAT = 1
REMEDY = "`bmx calibrate INPUT` makes one; name it with --calibration, or give --kv-budget a number"
CALIBRATED = frozenset(setting.name for setting in all_settings() if setting.calibrated)  # in which candidates differ


def default_path(name: str) -> Path:
    """The calibration file of an input, beside it."""
    return Path(f"{name.removesuffix('.jsonl')}.calibration.json")


def read_calibration(path: Path) -> dict[str, Any] | None:
    """The contents of a calibration file; None if it does not exist.

    Raises:
        UsageError: the file cannot be read, or is not a calibration file.
    """
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the calibration file {path}: {error}", hint=REMEDY) from None
    if not isinstance(record, dict) or record.get("calibration_format") != FORMAT:
        raise UsageError(f"{path} is not a calibration file of this version of bmx", hint=REMEDY)
    return record


def with_calibration(inputs: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """The user's settings, with ``--kv-budget auto`` replaced by the settings that the calibration file recommends.

    Args:
        inputs: input paths; the file's default name comes from the first.
        given: the settings that the user gave, by name.

    Raises:
        UsageError: the file does not exist, recommends nothing, or was made with other settings.
    """
    if given.get("kv_budget") != "auto":
        return given
    path = Path(given.get("calibration") or default_path(inputs[0] if inputs else "prompts.jsonl"))
    settings = recommended(path, given.get("model", EngineConfig().model), given)
    return given | {name: setting_named(name).coerce(value) for name, value in settings.items()}


def recommended(path: Path, model: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that a calibration file recommends.

    Args:
        path: the file.
        model: the model to run, which must be the calibrated one.
        given: the settings that the user gave, which must not contradict the recommended ones.

    Raises:
        UsageError: the file does not exist, recommends nothing, or was made with other settings.
    """
    record = read_calibration(path)
    if record is None:
        raise UsageError(f"--kv-budget auto: there is no calibration file {path}", hint=REMEDY)
    if record["model"] != model:
        raise UsageError(f"the calibration file {path} is of {record['model']}, not of {model}", hint=REMEDY)
    settings: dict[str, Any] | None = record["recommended"]
    if settings is None:
        raise UsageError(
            f"the calibration file {path} recommends nothing: no candidate reached {record['min_agreement']:.0%}",
            hint="calibrate larger budgets, lower --min-agreement, or give --kv-budget a number",
        )
    for name, value in settings.items():
        if name != "kv_budget" and name in given and given[name] != value:
            raise UsageError(
                f"{name} is {given[name]}; the calibration file {path} was made with {value}",
                hint="leave it out, calibrate with it, or give --kv-budget a number",
            )
    return settings
