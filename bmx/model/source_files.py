"""Small files that lie beside a model's weights, in its folder or on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bmx.config import EngineConfig
from bmx.errors import ModelError


def read_object(source: str, file: str, config: EngineConfig, without: str) -> dict[str, Any]:
    """The JSON object in one of a model's files; empty if there is no such file.

    Args:
        source: folder or hub id.
        file: its name.
        config: names the model and its revision.
        without: what holds if the file is deleted, for people.

    Raises:
        ModelError: the file cannot be read, or is not a JSON object.
    """
    from transformers.utils import cached_file

    path = cached_file(source, file, revision=config.revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_bytes())
        problem = "" if isinstance(found, dict) else "is not an object"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        problem = "is not JSON"
    if problem:
        hint = f"correct it, delete it (then {without}), or download the model again"
        raise ModelError(f"cannot load model {config.model}: {file} {problem}", hint=hint)
    return dict(found)
