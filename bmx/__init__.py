"""bmx: offline batch inference with the KV cache compressed while prompts are read (Batch-Max)."""

from __future__ import annotations

TYPE_CHECKING = False  # as in typing, which would take a while to import
if TYPE_CHECKING:
    from typing import Any

    from bmx.config import EngineConfig
    from bmx.engine.engine import Engine
    from bmx.errors import BmxError, RowError, UsageError
    from bmx.prompt_config import PromptConfig
    from bmx.request import Request, Result, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "BmxError",
    "Engine",
    "EngineConfig",
    "PromptConfig",
    "Request",
    "Result",
    "RowError",
    "SamplingParams",
    "UsageError",
]

_HOMES = {
    "BmxError": "bmx.errors",
    "Engine": "bmx.engine.engine",
    "EngineConfig": "bmx.config",
    "PromptConfig": "bmx.prompt_config",
    "Request": "bmx.request",
    "Result": "bmx.request",
    "RowError": "bmx.errors",
    "SamplingParams": "bmx.request",
    "UsageError": "bmx.errors",
}


def __getattr__(name: str) -> Any:
    """Public names, imported when they are first used, so that ``bmx --help`` loads no torch."""
    from importlib import import_module

    if name == "Engine":
        import_module("bmx.hardware").wait_briefly()
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bmx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
