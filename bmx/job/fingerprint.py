"""What decides the answers of a run, beside its rows: two runs with the same fingerprint may share an output.

Knows settings and the files of a model; loads nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from bmx.config import EngineConfig
from bmx.model.file_hash import model_files
from bmx.prompt_config import PromptConfig
from bmx.request import SamplingParams
from bmx.run_config import JobConfig, RunConfig
from bmx.settings import ALWAYS, IF_CHUNKED, IF_CUT, IF_EVICTING, IF_GIVEN, IF_TRUE, settings_in

KEY_FORMAT = 2
SECTIONS = (EngineConfig, SamplingParams, PromptConfig, JobConfig)  # in the order of a fingerprint's entries
SETTINGS = tuple(setting for section in SECTIONS for setting in settings_in(section))
PRIVATE = tuple(setting.name for setting in SETTINGS if setting.private)  # only hashes of them are kept
CUTTING = tuple(setting.name for setting in SETTINGS if setting.decides_answers is IF_CUT)


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


def _hash(text: bytes) -> str:
    return blake2b(text, digest_size=8).hexdigest()
