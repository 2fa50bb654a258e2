"""The files of a local model as one short hash, which tells two models of one name apart."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path
from typing import Any

from bmx.config import FAKE
from bmx.model.demo import local_path
from bmx.model.gguf_file import find_parts

MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.py", "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja", "*.model"),
)
SAMPLES, SAMPLE_BYTES = 64, 4096


def model_files(model: str) -> str | None:
    """A hash of a local model's small files and of samples from its weights; None for a model of the hub.

    Raises:
        ModelError: the demo model is not installed.
    """
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
