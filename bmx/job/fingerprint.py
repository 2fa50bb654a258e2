"""What decides the answers of a run, beside its rows: two runs that share it may share an output.

Knows settings and the files of a model; loads nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path
from typing import Any

from bmx.config import CHUNK_SIZE, FAKE, PromptConfig, RunConfig
from bmx.model.demo import local_path
from bmx.request import SamplingParams

KEY_FORMAT = 1
ENGINE = ("model", "revision", "dtype", "quantization", "kv_policy", "kv_format", "kv_share_layers", "max_model_len")
COMPRESSION = (
    *("kv_budget", "kv_sink", "kv_recent", "kv_protect", "kv_layer_budgets", "kv_value_norm", "kv_probe"),
    "kv_probe_weight",
)
PRIVATE = ("system_prompt", "prompt_template", "kv_probe")  # may quote what the prompts say: only a hash is kept
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.py", "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja", "*.model"),
)
SAMPLES, SAMPLE_BYTES = 64, 4096


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """Names and values of all that decides an answer, for JSON.

    Raises:
        ModelError: the demo model is not installed.
    """
    flat = config.flat()
    names = [*ENGINE, *(f.name for part in (SamplingParams, PromptConfig) for f in fields(part))]
    names.append("shard")
    if config.engine.kv_policy != "none":
        names += COMPRESSION
    found = {name: flat[name] for name in names}
    if not config.engine.chunking_is_free:
        found["chunk_size"] = config.engine.chunk_size or CHUNK_SIZE
    for name in PRIVATE:
        found[name] = found.get(name) and _hash(found[name].encode())
    found |= {"model_files": model_files(config.engine.model), "key_format": KEY_FORMAT}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def seed(found: Mapping[str, Any]) -> bytes:
    """A fingerprint as 16 bytes."""
    return blake2b(json.dumps(found, sort_keys=True).encode(), digest_size=16).digest()


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What has changed, for people; nothing if all is the same."""
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    return ", ".join(_difference(name, before.get(name), after.get(name)) for name in changed)


def _difference(name: str, before: Any, after: Any) -> str:
    if name in (*PRIVATE, "model_files", "key_format"):
        return f"{name} has changed"
    return f"{name} was {json.dumps(before)[:80]}, is {json.dumps(after)[:80]}"


def model_files(model: str) -> str | None:
    """A hash of a local model: of its small files, and of samples from its weights; None for one of the hub."""
    if model == FAKE:
        return None
    path = local_path(model)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    digest = blake2b(digest_size=8)
    for file in files:
        if any(fnmatch(file.name, pattern) for pattern in MODEL_FILES) and file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            _sample(file, digest)
    return digest.hexdigest() if files else None


def _sample(file: Path, digest: Any) -> None:
    """Add a file: the whole of a small one, of a large one blocks spread evenly over it."""
    size = file.stat().st_size
    with file.open("rb", 0) as data:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(data.read())
            return
        for i in range(SAMPLES):
            digest.update(os.pread(data.fileno(), SAMPLE_BYTES, i * (size - SAMPLE_BYTES) // (SAMPLES - 1)))


def _hash(text: bytes) -> str:
    return blake2b(text, digest_size=8).hexdigest()
