"""The ground floor: tensors in, tensors out. This file chooses which attention runs, and says why."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from bmx.errors import UsageError
from bmx.kernels.sizes import WORKSPACE


@dataclass(frozen=True, slots=True)
class Kernels:
    """The chosen attention, by the name of its module here, and why it was chosen."""

    name: str
    why: str

    @property
    def module(self) -> ModuleType:
        """The functions ``attend_chunk`` and ``attend_slots``; loads torch."""
        return import_module(f"bmx.kernels.{self.name}")

    @property
    def workspace_bytes(self) -> Callable[..., int]:
        """What they hold beside their inputs, from sizes alone."""
        return WORKSPACE[self.name]


def choose(device_type: str) -> Kernels:
    """The kernels for a device; ``BMX_KERNELS=reference`` forces the plain ones.

    Args:
        device_type: ``cpu`` or ``cuda``.

    Raises:
        UsageError: ``BMX_KERNELS`` names kernels that there are not.
    """
    forced = os.environ.get("BMX_KERNELS", "")
    if forced == "reference":
        return Kernels("reference", "BMX_KERNELS=reference")
    if forced not in ("", device_type):
        raise UsageError(f"BMX_KERNELS cannot be {forced!r}", hint=f"it takes reference or {device_type}")
    if device_type == "cpu":
        return Kernels("cpu", "tiled for a CPU")
    return Kernels("reference", f"plain torch: no kernels of its own for {device_type} yet")
