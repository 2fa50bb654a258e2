"""The record of a run beside its output: what ran, on what, what was planned and what was measured.

Holds no prompt, no answer and no secret. Written whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bmx.config import RunConfig
from bmx.errors import OutputError
from bmx.planner import Plan
from bmx.stats import Stats

FORMAT = 1
PRIVATE = {"system_prompt", "prompt_template"}  # may quote what the prompts say
PACKAGES = ("bmx", "torch", "transformers", "tokenizers", "nvidia-ml-py")


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output is."""
    return output.with_name(output.name + ".run.json")


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan for JSON, memory item by item in bytes."""
    memory = plan.memory
    return {
        "slots": plan.slots,
        "groups": [{"capacity": group.capacity, "slots": group.slots} for group in plan.groups],
        "chunk_size": plan.step.chunk_size,
        "max_num_batched_tokens": plan.step.max_num_batched_tokens,
        "memory": {f.name: getattr(memory, f.name) for f in fields(memory)} | {"total": memory.total},
        "limit": {"bytes": plan.limits.total, "kv_bytes": plan.limits.pool, "source": plan.limits.source},
        "too_large": plan.too_large,
        "fill": round(plan.fill, 4),
    }


def run_record(config: RunConfig, model: dict[str, Any], plan: Plan, stats: Stats) -> dict[str, Any]:
    """A run for JSON.

    Args:
        model: architecture, type, device and kernels.
    """
    planned, measured = plan.memory.total, stats.peak_memory_bytes
    return {
        "format": FORMAT,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {name: value for name, value in config.flat().items() if name not in PRIVATE},
        "inputs": list(config.inputs),
        "model": model,
        "versions": {name: _version(name) for name in PACKAGES},
        "plan": plan_record(plan),
        "memory": {
            "predicted_bytes": planned,
            "measured_bytes": measured,
            "measured_over_predicted": round(measured / planned, 4) if planned else None,
            "largest_step_without_slots": _rehearsed(stats),
            "after_out_of_memory": [{"slots": s, "max_num_batched_tokens": t} for s, t in stats.shrunk_to],
        },
        "rows": {"total": stats.rows_total, "done": stats.rows_done, "failed": stats.rows_failed},
        "throughput": {
            "seconds": round(stats.elapsed, 3),
            "prompt_tokens": stats.prompt_tokens,
            "generated_tokens": stats.generated_tokens,
            "prefill_tokens_per_second": round(stats.prefill_rate, 1),
            "decode_tokens_per_second": round(stats.decode_rate, 1),
        },
    }


def _rehearsed(stats: Stats) -> dict[str, int] | None:
    return dict(zip(("predicted_bytes", "measured_bytes"), stats.rehearsed, strict=True)) if stats.rehearsed else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_manifest(path: Path, record: dict[str, Any]) -> None:
    """Put a manifest in place: a temporary file, synced, then renamed, then the folder synced.

    Raises:
        OutputError: it cannot be written; what was there before still is.
    """
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if temporary:
            with suppress(OSError):
                Path(temporary).unlink()
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="the answers themselves are intact") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
