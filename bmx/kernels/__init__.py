"""The ground floor: tensors in, tensors out. This file chooses the back end, and says why it was chosen."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

from bmx.errors import UsageError
from bmx.kernels import build
from bmx.kernels.contract import Capabilities, KernelModule
from bmx.kernels.registry import CAPABILITIES, interpreted

LEAST_CAPABILITY = (8, 0)  # Ampere


@dataclass(frozen=True, slots=True)
class Kernels:
    """The chosen back end.

    Attributes:
        name: of its module here, and of its description in ``registry``.
        why: the reason for the choice.
    """

    name: str
    why: str

    @property
    def module(self) -> KernelModule:
        """Its functions; loads torch."""
        return cast("KernelModule", import_module(f"bmx.kernels.{self.name}"))

    @property
    def capabilities(self) -> Capabilities:
        """What it takes over."""
        return CAPABILITIES[self.name]


def choose(device_type: str) -> Kernels:
    """The kernels for a device; ``BMX_KERNELS=<name>`` forces the kernels of that name.

    Args:
        device_type: ``cpu`` or ``cuda``.

    Raises:
        UsageError: ``BMX_KERNELS`` names kernels that do not exist for this device, or cannot be compiled here.
    """
    forced = os.environ.get("BMX_KERNELS", "")
    names = ("reference", "cpu", "avx512") if device_type == "cpu" else ("reference", "triton")
    if device_type == "cpu" and interpreted():
        names = (*names, "triton")
    if forced and forced not in names:
        raise UsageError(f"BMX_KERNELS cannot be {forced!r}", hint=f"here it takes {' or '.join(names)}")
    library = build.library() if device_type == "cpu" and forced in ("", "avx512") else ""
    if forced == "avx512" and isinstance(library, str):
        raise UsageError(f"there are no compiled kernels: {library}", hint="leave out BMX_KERNELS")
    if forced:
        return Kernels(forced, f"BMX_KERNELS={forced}")
    if device_type == "cuda":
        reason = _why_no_triton()
        return Kernels("reference", f"plain torch: {reason}") if reason else Kernels("triton", "compiled for the GPU")
    if device_type != "cpu":
        return Kernels("reference", f"plain torch: no kernels of its own for {device_type}")
    if isinstance(library, str):
        return Kernels("cpu", f"tiled for a CPU; no compiled kernels: {library}")
    return Kernels("avx512", "compiled for this processor: bfloat16; other types are tiled for a CPU")


def _why_no_triton() -> str:
    """Why the GPU of this process cannot run Triton, or an empty string; a GPU elsewhere is expected to run it."""
    if sys.platform != "linux":
        return f"Triton has no packages for {sys.platform}"
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return "Triton kernels need a GPU of compute capability 8.0 or later"
    return "Triton is not installed (pip install triton)" if find_spec("triton") is None else ""
