"""The ground floor: tensors in, tensors out. This file chooses the back end, and says why it was chosen."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, cast

from bmx.errors import UsageError
from bmx.kernels import build
from bmx.kernels.contract import FUNCTIONS, Capabilities, KernelModule
from bmx.kernels.instruction_sets import SETS
from bmx.kernels.registry import CAPABILITIES, interpreted

LEAST_CAPABILITY = (8, 0)  # Ampere
STEPS = {"decode_step", "prefill_step"}
MIXERS = {"convolve", "delta_rule", "state_space"}
MIXING = {"convolve", "delta_rule", "state_space"}
BY_CHANNEL = {"append_by_channel", "decode_by_channel", "read_by_channel"}


@dataclass(frozen=True, slots=True)
class Kernels:
    """The chosen back end.

    Attributes:
        name: of its module here, or of its instruction set, and of its description in ``registry``.
        why: the reason for the choice.
        replaced: functions that plain torch computes in its place, each with the reason (``trial``).
    """

    name: str
    why: str
    replaced: Mapping[str, str] = field(default_factory=dict, kw_only=True, hash=False)

    @property
    def module(self) -> KernelModule:
        """Its functions; loads torch."""
        if self.name in SETS:
            from bmx.kernels.compiled import kernels_for

            return kernels_for(self.name)
        own: Any = import_module(f"bmx.kernels.{self.name}")
        if self.replaced:
            plain = import_module("bmx.kernels.reference")
            own = SimpleNamespace(**{f: getattr(plain if f in self.replaced else own, f) for f in FUNCTIONS})
        return cast("KernelModule", own)

    @property
    def capabilities(self) -> Capabilities:
        """What it takes over: no whole steps if a function is replaced that computes them."""
        own = CAPABILITIES[self.name]
        if not BY_CHANNEL.isdisjoint(self.replaced):
            own = replace(own, profile=replace(own.profile, reads_by_channel=False))
        if not MIXING.isdisjoint(self.replaced):
            own = replace(own, mixes_in_place=False)
        if STEPS.isdisjoint(self.replaced):
            return own
        plain = CAPABILITIES["reference"]
        own = replace(own, workspace=plain.workspace, profile=plain.profile)
        return replace(own, orders=(), capturable=False, skips_empty_rows=False)


def choose(device_type: str) -> Kernels:
    """The kernels for a device; ``BMX_KERNELS=<name>`` forces the kernels of that name.

    Args:
        device_type: ``cpu`` or ``cuda``.

    Raises:
        UsageError: ``BMX_KERNELS`` names kernels that do not exist for this device, or cannot be compiled here.
    """
    forced = os.environ.get("BMX_KERNELS", "")
    if forced:
        return _forced(forced, device_type)
    if device_type == "cuda":
        reason = _why_no_triton()
        return Kernels("reference", f"plain torch: {reason}") if reason else Kernels("triton", "compiled for the GPU")
    if device_type != "cpu":
        return Kernels("reference", f"plain torch: no kernels of its own for {device_type}")
    best = build.best()
    if best.name is None:
        return Kernels("cpu", f"tiled for a CPU; no compiled kernels: {best.lack}")
    return Kernels(best.name, "; ".join(filter(None, (f"compiled for {SETS[best.name].title}", best.lack))))


def _forced(name: str, device_type: str) -> Kernels:
    """The kernels of a name.

    Raises:
        UsageError: there are none of that name for this device, or they cannot be compiled here.
    """
    sets = tuple(one.name for one in SETS.values() if not one.lack())
    names = ("reference", "cpu", *sets) if device_type == "cpu" else ("reference", "triton")
    if device_type == "cpu" and interpreted():
        names = (*names, "triton")
    reason = build.library(name) if device_type == "cpu" and name in SETS else ""
    if name not in names or (reason and isinstance(reason, str)):
        why = f": {reason}" if reason else ""
        hint = f"here it takes {', '.join(names[:-1])} or {names[-1]}"
        raise UsageError(f"BMX_KERNELS cannot be {name!r}{why}", hint=hint)
    return Kernels(name, f"BMX_KERNELS={name}")


def _why_no_triton() -> str:
    """Why the GPU of this process cannot run Triton, or an empty string; a GPU elsewhere is expected to run it."""
    if sys.platform != "linux":
        return f"Triton has no packages for {sys.platform}"
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    if torch.version.hip:
        return "the Triton kernels are for NVIDIA GPUs, and this torch is for AMD's (ROCm)"
    if (major_minor := torch.cuda.get_device_capability()) < LEAST_CAPABILITY:
        has = ".".join(map(str, major_minor))
        return f"Triton kernels need a GPU of compute capability 8.0 or later, this one has {has}"
    return "Triton is not installed (pip install triton)" if find_spec("triton") is None else ""
