"""Why a model cannot be loaded, in a line, and what to do: from what transformers and the libraries below it raise."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from bmx.model.folders import ELSEWHERE, SOURCES
from bmx.redact import without_secrets

CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}
CANNOT_WRITE |= {errno.ENOTDIR}
DAMAGE = ("deserializing header", "not a valid JSON file")  # of safetensors, of transformers
OTHER_FORM = "or use the model in another form: as it was before, or a .gguf file"
INSTALL = f"install what it needs, {OTHER_FORM}"
PIP = re.compile(r"pip install (?:-U |--upgrade )?['\"]?([a-z][\w.-]*(?:\[[\w,]+\])?(?:[<>=]=?[\w.]+)?)", re.IGNORECASE)
PACKAGES = {"HQQ": "hqq", "Quark": "amd-quark"}  # of libraries that transformers asks for without a command
TRUST = "--trust-remote-code runs it; read it first, and pin it"


def cause_and_hint(name: str, error: Exception) -> tuple[str, str]:
    """What an error means for who loads the model ``name``, and the way out."""
    text = str(error)
    known = {
        "trust_remote_code": ("it comes with code of its own", TRUST),
        "ignore_mismatched_sizes": ("its weights have other shapes than its config says", download_again(name)),
        "instantiate the backend tokenizer": ("it has no tokenizer that can be read", download_again(name)),
    }
    for sign, cause_and_way_out in known.items():
        if sign in text:
            return cause_and_way_out
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE and not Path(name).exists():
        return _cache_problem(error.errno)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = without_secrets(" ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__)
    if any(sign in text for sign in DAMAGE):
        return f"one of its files is damaged or cut short ({cause})", download_again(name)
    if isinstance(error, ImportError):
        package = _package(error)
        return cause, f"pip install '{package}' beside bmx, {OTHER_FORM}" if package else INSTALL
    return cause, ELSEWHERE if "quantiz" in text.lower() or "checkpoints is not supported" in text else SOURCES


def _package(error: ImportError) -> str | None:
    """What pip installs against a missing library: what its error says, else the name of the missing module."""
    if found := PIP.search(str(error)):
        return found[1]
    known = next((package for word, package in PACKAGES.items() if word in str(error)), None)
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return known or (missing.partition(".")[0] if missing else None)


def download_again(name: str) -> str:
    """How to get the files of a model once more; the hub's cache would give the same ones again."""
    from huggingface_hub import constants

    kept = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if Path(name).exists() or not kept.is_dir():
        return "download the model again"
    return f"delete {kept}: the next run downloads it again"


def _cache_problem(number: int) -> tuple[str, str]:
    from huggingface_hub import constants

    cause = f"it cannot be kept in the cache {constants.HF_HUB_CACHE}: {os.strerror(number)}"
    return cause, "make room there, or set HF_HOME to another folder"
