"""The manifest beside an output: what ran, on what, what was planned and measured.

Holds no prompt, no answer and no secret. Written whole or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from bmx import __version__
from bmx.errors import OutputError
from bmx.job.durable_files import overwrite_file, replace_file, this_process
from bmx.job.fingerprint import PRIVATE
from bmx.plan.planner import Plan
from bmx.run_config import RunConfig
from bmx.stats import Stats
from bmx.units import now

FORMAT = 2
BEGINNING = re.compile(rb'\{\s*"format"')
SPARE = 64  # blanks at the end of a manifest, so that its last state fits in its place on a full disk
PACKAGES = ("torch", "transformers", "tokenizers", "nvidia-ml-py")
State = Literal["running", "finished", "interrupted", "failed"]


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of an earlier run, if it is one that this version can read."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("format") != FORMAT or "state" not in record:
        return None
    parts = record.get("fingerprint"), record.get("settings"), record.get("model", {})
    return record if all(isinstance(part, dict) for part in parts) else None


def known_tables(path: Path) -> dict[str, list[Any]]:
    """The states of tables that were made of the answers beside a manifest, by the names of their files."""
    tables = (read_manifest(path) or {}).get("tables")
    return tables if isinstance(tables, dict) and all(isinstance(states, list) for states in tables.values()) else {}


def note_table(path: Path, name: str, states: list[Any]) -> None:
    """Say in the manifest what a table may be: as it was, or as it is about to be.

    Raises:
        OutputError: the manifest is gone, or cannot be written.
    """
    record = read_manifest(path)
    if record is None:
        raise OutputError(f"the manifest {path} was changed or removed by another program")
    write_json(path, record | {"tables": known_tables(path) | {name: states}}, spare=SPARE)


def is_manifest(path: Path) -> bool:
    """Whether a file may be replaced by a manifest: it is missing, empty, or already a manifest of any version."""
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return True
    data = b""
    try:
        data = path.read_bytes() if path.is_file() else b""
        record = json.loads(data)
    except (OSError, ValueError, RecursionError):
        return BEGINNING.match(data) is not None  # a damaged one
    return isinstance(record, dict) and {"format", "fingerprint"} <= record.keys()


def write_state(path: Path, record: dict[str, Any], state: State) -> None:
    """Say in the manifest how a run ended, though the disk has no room for a new one.

    Raises:
        OutputError: it cannot be written.
    """
    overwrite_file(path, json.dumps(record | {"state": state, "finished": now()}, indent=2, ensure_ascii=False) + "\n")


def write_json(path: Path, record: dict[str, Any], spare: int = 0) -> None:
    """Write a record to a file, whole or not at all.

    Args:
        path: the file.
        record: what it is to hold.
        spare: blanks at its end.

    Raises:
        OutputError: it cannot be written; the old file is unchanged.
    """
    replace_file(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + " " * spare + "\n")


def run_started(config: RunConfig, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run before its first row, for JSON."""
    return {
        "format": FORMAT,
        "state": "running",
        **this_process(),
        "finished": None,
        "fingerprint": fingerprint,
        "settings": {name: value for name, value in config.flat().items() if name not in PRIVATE},
        "inputs": list(config.inputs),
        "versions": {"bmx": __version__} | {name: _version(name) for name in PACKAGES},
    }


def run_finished(state: State, plans: Sequence[Plan], stats: Stats) -> dict[str, Any]:
    """What the manifest says at the end of a run: its memory, its rows, its speed.

    Args:
        state: how the run ended.
        plans: those of the models, for the predicted memory; none for a run without a model.
        stats: the counters.
    """
    predicted, measured = sum(plan.memory.total for plan in plans), stats.peak_memory_bytes
    return {
        "state": state,
        "finished": now(),
        "memory": {
            "predicted_bytes": predicted,
            "measured_bytes": measured,
            "measured_over_predicted": round(measured / predicted, 4) if predicted else None,
            "largest_step_without_slots": _profiled(plans),
            "after_out_of_memory": [{"slots": s, "max_num_batched_tokens": t} for s, t in stats.shrunk_to],
        },
        **({"modules": dict(stats.modules)} if stats.modules else {}),
        **progress_record(stats),
    }


def progress_record(stats: Stats) -> dict[str, Any]:
    """The rows, errors and speed so far, for JSON."""
    return {
        "rows": {
            "total": stats.rows_total,
            "answered": stats.rows_answered,
            "failed": stats.rows_failed,
            "skipped": stats.rows_skipped,
            "before": stats.rows_before,
        },
        "errors": dict(sorted(stats.errors.items())),
        "finish_reasons": dict(sorted(stats.finish_reasons.items())),
        "throughput": {
            "seconds": round(stats.elapsed, 3),
            "prompt_tokens": stats.prompt_tokens,
            "reused_prompt_tokens": stats.reused_prompt_tokens,
            "generated_tokens": stats.generated_tokens,
            "prefill_tokens_per_second": round(stats.prefill_rate, 1),
            "decode_tokens_per_second": round(stats.decode_rate, 1),
            "generated_tokens_per_second": round(stats.generated_rate, 1),
        },
    }


def _profiled(plans: Sequence[Plan]) -> dict[str, int | None] | None:
    """The largest step of the first plan, if it was measured."""
    profiled = plans[0].profiled if plans else None
    return {"predicted_bytes": profiled.predicted, "measured_bytes": profiled.measured} if profiled else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
