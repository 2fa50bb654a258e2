"""The records beside an output: the manifest (what ran, on what, what was planned and measured) and the counters.

Hold no prompt, no answer and no secret. Written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from bmx.beat import beating
from bmx.config import RunConfig
from bmx.errors import OutputError
from bmx.files import me, now, replace_file
from bmx.fingerprint import PRIVATE
from bmx.planner import Plan
from bmx.stats import Stats

FORMAT = 2
STATS_FORMAT = 1
STATS_SECONDS = 5.0
PACKAGES = ("bmx", "torch", "transformers", "tokenizers", "nvidia-ml-py")
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


def is_stats_file(path: Path) -> bool:
    """Whether a file may be replaced by counters: it is missing, empty, or holds some."""
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return True
    try:
        record = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"format", "state", "rows"} <= record.keys()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Put a record in place, whole or not at all.

    Raises:
        OutputError: it cannot be written; what was there before still is.
    """
    replace_file(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def begun(config: RunConfig, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """A run for JSON, before its first row."""
    return {
        "format": FORMAT,
        "state": "running",
        **me(),
        "finished": None,
        "fingerprint": fingerprint,
        "settings": {name: value for name, value in config.flat().items() if name not in PRIVATE},
        "inputs": list(config.inputs),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan for JSON, memory item by item in bytes."""
    memory = plan.memory
    return {
        "slots": plan.slots,
        "groups": [{"capacity": group.capacity, "slots": group.slots} for group in plan.groups],
        "spare": [{"capacity": group.capacity, "slots": group.slots} for group in plan.spare],
        "chunk_size": plan.step.chunk_size,
        "max_num_batched_tokens": plan.step.max_num_batched_tokens,
        "memory": {f.name: getattr(memory, f.name) for f in fields(memory)} | {"total": memory.total},
        "limit": {"bytes": plan.limits.total, "kv_bytes": plan.limits.pool, "source": plan.limits.source},
        "too_large": plan.too_large,
        "fill": round(plan.fill, 4),
    }


def ended(state: State, plan: Plan | None, stats: Stats) -> dict[str, Any]:
    """What became of a run: its memory, its rows, its speed."""
    predicted, measured = plan.memory.total if plan else 0, stats.peak_memory_bytes
    return {
        "state": state,
        "finished": now(),
        "memory": {
            "predicted_bytes": predicted,
            "measured_bytes": measured,
            "measured_over_predicted": round(measured / predicted, 4) if predicted else None,
            "largest_step_without_slots": _rehearsed(stats),
            "after_out_of_memory": [{"slots": s, "max_num_batched_tokens": t} for s, t in stats.shrunk_to],
        },
        **_progress(stats),
    }


def _progress(stats: Stats) -> dict[str, Any]:
    return {
        "rows": {
            "total": stats.rows_total,
            "answered": stats.rows_answered,
            "failed": stats.rows_failed,
            "skipped": stats.rows_skipped,
            "before": stats.rows_before,
        },
        "errors": dict(sorted(stats.errors.items())),
        "throughput": {
            "seconds": round(stats.elapsed, 3),
            "prompt_tokens": stats.prompt_tokens,
            "reused_prompt_tokens": stats.reused_prompt_tokens,
            "generated_tokens": stats.generated_tokens,
            "prefill_tokens_per_second": round(stats.prefill_rate, 1),
            "decode_tokens_per_second": round(stats.decode_rate, 1),
        },
    }


def stats_record(state: State, stats: Stats) -> dict[str, Any]:
    """The counters of a run for JSON, at this moment: the schema of ``--stats-file``.

    Format 1. Fields may be added; those that are there keep their meaning.
    """
    left = stats.seconds_left
    return {
        "format": STATS_FORMAT,
        "state": state,
        "time": now(),
        **_progress(stats),
        "last_row": now(ago=stats.quiet_seconds) if stats.last_row else None,
        "seconds_left": None if left is None else round(left, 1),
        "slots": {"all": stats.slots, "active": stats.active_slots},
        "memory": {"bytes": stats.memory_bytes, "peak_bytes": stats.peak_memory_bytes, "kv_bytes": stats.kv_bytes},
    }


@contextmanager
def kept_stats(path: Path | None, stats: Stats, warn: Callable[[str], None]) -> Iterator[None]:
    """Keep the counters of a run in a file while the body runs. A disk that is full does not stop the run."""
    if path is None:
        yield
        return
    broken = False

    def write(state: State) -> None:
        nonlocal broken
        try:
            write_json(path, stats_record(state, stats))
            broken = False
        except OutputError as error:
            if not broken:
                warn(error.message)
            broken = True

    write("running")
    state: State = "failed"
    try:
        with beating(lambda: STATS_SECONDS, lambda: write("running")):
            yield
        state = "finished"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        write(state)


def _rehearsed(stats: Stats) -> dict[str, int] | None:
    return dict(zip(("predicted_bytes", "measured_bytes"), stats.rehearsed, strict=True)) if stats.rehearsed else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
