"""The ground floor: tensors in, tensors out. This file chooses which kernels run, and says why."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from bmx.errors import UsageError
from bmx.kernels import build
from bmx.kernels.sizes import WORKSPACE


@dataclass(frozen=True, slots=True)
class Kernels:
    """The chosen kernels, by the name of their module here, and why they were chosen."""

    name: str
    why: str

    @property
    def module(self) -> ModuleType:
        """The functions that ``reference`` has, and explains; loads torch."""
        return import_module(f"bmx.kernels.{self.name}")

    @property
    def workspace_bytes(self) -> Callable[..., int]:
        """What they hold beside their inputs, from sizes alone."""
        return WORKSPACE[self.name]


def choose(device_type: str) -> Kernels:
    """The kernels for a device; ``BMX_KERNELS=reference`` forces the plain ones, or another name those.

    Args:
        device_type: ``cpu`` or ``cuda``.

    Raises:
        UsageError: ``BMX_KERNELS`` names kernels that there are not.
    """
    forced = os.environ.get("BMX_KERNELS", "")
    names = ("reference", "cpu", "avx512") if device_type == "cpu" else ("reference",)
    if forced and forced not in names:
        raise UsageError(f"BMX_KERNELS cannot be {forced!r}", hint=f"here it takes {' or '.join(names)}")
    missing = build.library() if device_type == "cpu" and forced in ("", "avx512") else ""
    if forced == "avx512" and isinstance(missing, str):
        raise UsageError(f"there are no compiled kernels: {missing}", hint="leave out BMX_KERNELS")
    if forced:
        return Kernels(forced, f"BMX_KERNELS={forced}")
    if device_type == "cpu" and isinstance(missing, str):
        return Kernels("cpu", f"tiled for a CPU; no compiled kernels: {missing}")
    if device_type == "cpu":
        return Kernels("avx512", "compiled for this processor: bfloat16; other types are tiled for a CPU")
    return Kernels("reference", f"plain torch: no kernels of its own for {device_type} yet")
