"""The ground floor: tensors in, tensors out. This file chooses which attention runs, and says why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType

from bmx.errors import UsageError


@dataclass(frozen=True, slots=True)
class Kernels:
    """The chosen attention: a module with ``attend_chunk``, ``attend_slots`` and ``workspace_bytes``."""

    name: str
    why: str
    module: ModuleType


def choose(device_type: str) -> Kernels:
    """The kernels for a device; ``BMX_KERNELS=reference`` forces the plain ones.

    Args:
        device_type: ``cpu`` or ``cuda``.

    Raises:
        UsageError: ``BMX_KERNELS`` names kernels that there are not.
    """
    from bmx.kernels import cpu, reference

    forced = os.environ.get("BMX_KERNELS", "")
    if forced == "reference":
        return Kernels("reference", "BMX_KERNELS=reference", reference)
    if forced not in ("", device_type):
        raise UsageError(f"BMX_KERNELS cannot be {forced!r}", hint=f"it takes reference or {device_type}")
    if device_type == "cpu":
        return Kernels("cpu", "tiled for a CPU", cpu)
    return Kernels("reference", f"plain torch: no kernels of its own for {device_type} yet", reference)
