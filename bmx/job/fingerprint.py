"""What decides the answers of a run, beside its rows: two runs with the same fingerprint may share an output.

Knows settings and the files of a model; loads nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path
from typing import Any

from bmx.config import FAKE, EngineConfig
from bmx.model.demo import local_path
from bmx.model.gguf_file import find_parts
from bmx.prompt_config import PromptConfig
from bmx.request import SamplingParams
from bmx.run_config import JobConfig, RunConfig
from bmx.settings import ALWAYS, IF_CHUNKED, IF_CUT, IF_EVICTING, IF_GIVEN, IF_TRUE, settings_in

KEY_FORMAT = 2
SECTIONS = (EngineConfig, SamplingParams, PromptConfig, JobConfig)  # in the order of a fingerprint's entries
SETTINGS = tuple(setting for section in SECTIONS for setting in settings_in(section))
PRIVATE = tuple(setting.name for setting in SETTINGS if setting.private)  # only hashes of them are kept
CUTTING = tuple(setting.name for setting in SETTINGS if setting.decides_answers is IF_CUT)
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.py", "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja", "*.model"),
)
SAMPLES, SAMPLE_BYTES = 64, 4096


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """Names and values of everything that decides an answer, for JSON.

    Raises:
        ModelError: the demo model is not installed.
    """
    values = config.flat() | {"chunk_size": config.engine.eviction_chunk_size}
    evicting, chunked = config.engine.kv_policy != "none", not config.engine.chunking_is_free
    entries: dict[str, Any] = {}
    for when, applies in {ALWAYS: True, IF_EVICTING: evicting, IF_CHUNKED: chunked}.items():
        entries |= {s.name: values[s.name] for s in SETTINGS if s.decides_answers is when and applies}
    entries |= {s.name: True for s in SETTINGS if s.decides_answers is IF_TRUE and values[s.name]}
    entries |= {s.name: values[s.name] for s in SETTINGS if s.decides_answers is IF_GIVEN and values[s.name]}
    for name in PRIVATE:
        entries[name] = entries.get(name) and _hash(entries[name].encode())
    entries |= {"model_files": model_files(config.engine.model), "key_format": KEY_FORMAT}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in entries.items()}


def row_hash_key(fingerprint: Mapping[str, Any]) -> bytes:
    """The key of the rows' hashes: 16 bytes that stand for the fingerprint."""
    return blake2b(json.dumps(fingerprint, sort_keys=True).encode(), digest_size=16).digest()


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What differs between two fingerprints, for people; empty if nothing does."""
    off = {s.name: False for s in SETTINGS if s.decides_answers is IF_TRUE}  # a fingerprint leaves these out
    before, after = off | dict(before), off | dict(after)
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    return ", ".join(_difference(name, before.get(name), after.get(name)) for name in changed)


def _difference(name: str, before: Any, after: Any) -> str:
    if name == "key_format":
        return "another version of bmx made it"
    if name in (*PRIVATE, "model_files"):
        return f"{name} has changed"
    return f"{name} was {json.dumps(before)[:80]}, is {json.dumps(after)[:80]}"


def model_files(model: str) -> str | None:
    """A hash of a local model's small files and of samples from its weights; None for a model of the hub."""
    if model == FAKE:
        return None
    path = local_path(model)
    files = sorted(path.iterdir()) if path.is_dir() else find_parts(path, model) if path.is_file() else []
    digest = blake2b(digest_size=8)
    for file in files:
        if any(fnmatch(file.name, pattern) for pattern in MODEL_FILES) and file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            _sample(file, digest)
    return digest.hexdigest() if files else None


def _sample(file: Path, digest: Any) -> None:
    """Add a file to the hash: all of a small one, of a large one blocks spread evenly over it."""
    size = file.stat().st_size
    with file.open("rb", 0) as data:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(data.read())
            return
        for i in range(SAMPLES):
            digest.update(os.pread(data.fileno(), SAMPLE_BYTES, i * (size - SAMPLE_BYTES) // (SAMPLES - 1)))


def _hash(text: bytes) -> str:
    return blake2b(text, digest_size=8).hexdigest()
