"""The ground floor: tensors in, tensors out. This file chooses which kernels run, and says why."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from bmx.errors import UsageError
from bmx.kernels import build
from bmx.kernels.workspace import WORKSPACE

LEAST_CAPABILITY = (8, 0)  # Ampere


@dataclass(frozen=True, slots=True)
class Kernels:
    """The chosen kernels, by the name of their module here, and why they were chosen."""

    name: str
    why: str

    @property
    def module(self) -> ModuleType:
        """The functions that ``reference`` has, and explains; loads torch."""
        return import_module(f"bmx.kernels.{self.name}")

    def workspace_bytes(self, alone: bool) -> Callable[..., int]:
        """What they hold beside their inputs, from sizes alone.

        Args:
            alone: whether they are left to do all; otherwise, on a GPU, plain torch decodes.
        """
        return WORKSPACE[self.name if alone or self.name != "triton" else "reference"]


def choose(device_type: str) -> Kernels:
    """The kernels for a device; ``BMX_KERNELS=reference`` forces the plain ones, or another name those.

    Args:
        device_type: ``cpu`` or ``cuda``.

    Raises:
        UsageError: ``BMX_KERNELS`` names kernels that there are not.
    """
    forced = os.environ.get("BMX_KERNELS", "")
    names = ("reference", "cpu", "avx512") if device_type == "cpu" else ("reference", "triton")
    if device_type == "cpu" and interpreted():
        names = (*names, "triton")
    if forced and forced not in names:
        raise UsageError(f"BMX_KERNELS cannot be {forced!r}", hint=f"here it takes {' or '.join(names)}")
    missing = build.library() if device_type == "cpu" and forced in ("", "avx512") else ""
    if forced == "avx512" and isinstance(missing, str):
        raise UsageError(f"there are no compiled kernels: {missing}", hint="leave out BMX_KERNELS")
    if forced:
        return Kernels(forced, f"BMX_KERNELS={forced}")
    if device_type == "cuda":
        lacking = _lacks_triton()
        return Kernels("reference", f"plain torch: {lacking}") if lacking else Kernels("triton", "compiled for the GPU")
    if device_type != "cpu":
        return Kernels("reference", f"plain torch: no kernels of its own for {device_type}")
    if isinstance(missing, str):
        return Kernels("cpu", f"tiled for a CPU; no compiled kernels: {missing}")
    return Kernels("avx512", "compiled for this processor: bfloat16; other types are tiled for a CPU")


def interpreted() -> bool:
    """Whether what is written for GPUs is interpreted here: slow, and good for tests alone."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _lacks_triton() -> str:
    """Why there is no Triton for the GPU of this process, or nothing; a GPU elsewhere is expected to have it."""
    if sys.platform != "linux":
        return f"Triton has no packages for {sys.platform}"
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return "what is written in Triton needs a GPU of compute capability 8.0"
    return "Triton is not installed (pip install triton)" if find_spec("triton") is None else ""
