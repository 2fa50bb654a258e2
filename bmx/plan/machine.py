"""The machine that a run would be on: this one, or a GPU by its name or memory.

Knows memory and rates; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bmx import hardware
from bmx.config import EngineConfig
from bmx.errors import UsageError
from bmx.hardware import FreeMemory
from bmx.kernels.contract import HALF
from bmx.plan.cards import card_named, card_rates
from bmx.plan.machine_speed import Rates, machine_rates


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine that a run could use.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        name: for people.
        memory: its free memory.
        held: bytes that this process holds there already.
        rates: says how fast it is with numbers of so many bytes, or None where that is unknown.
    """

    kind: str
    name: str
    memory: FreeMemory
    rates: Callable[[int], Rates | None]
    held: int = 0


def shared_machine(target: Machine, workers: int) -> Machine:
    """A machine as one of several workers sees it: an equal share of a CPU and its memory, or a GPU of its own.

    Args:
        target: the machine, or the GPU that each worker has.
        workers: how many there are.
    """
    if target.kind != "cpu" or workers == 1:
        return target
    memory = replace(target.memory, free=target.memory.free // workers, total=target.memory.total // workers)

    def rates(itemsize: int) -> Rates | None:
        whole = target.rates(itemsize)
        return whole and replace(
            whole,
            flops=whole.flops / workers,
            bandwidth=whole.bandwidth / workers,
            thin_bandwidth=whole.thin_bandwidth / workers,
        )

    return replace(target, memory=memory, rates=rates, held=target.held // workers)


def machine(config: EngineConfig, gpu: str | None, gpu_memory: int | None) -> Machine:
    """The machine that the user means: a GPU by name or size, or the best device here.

    Args:
        config: the settings.
        gpu: name of a card of the table, or None.
        gpu_memory: bytes of a GPU's memory, or None.

    Raises:
        UsageError: no card of that name, or ``device`` is cuda and no GPU is visible.
    """
    if gpu:
        card = card_named(gpu)
        size, source = (gpu_memory, "--gpu-memory") if gpu_memory else (card.memory, f"an idle {card.name}")
        memory = FreeMemory(size, size, source)
        return Machine(kind="cuda", name=card.name, memory=memory, rates=lambda _: card_rates(card))
    if gpu_memory:
        memory = FreeMemory(gpu_memory, gpu_memory, "--gpu-memory")
        return Machine(kind="cuda", name="a GPU", memory=memory, rates=lambda _: None)
    seen = hardware.visible_gpus() if config.device != "cpu" else []
    if seen:
        return _this_gpu(seen[0], config)
    if config.device == "cuda":
        raise UsageError("no GPU is visible here", hint="name one with --gpu H100, or its size with --gpu-memory 24G")
    return Machine(
        kind="cpu",
        name=hardware.cpu_name(),
        memory=hardware.free_host_memory(),
        held=hardware.held_bytes(),
        rates=lambda itemsize: machine_rates("cpu", _dtype(config, itemsize), hardware.cpu_name()),
    )


def _this_gpu(gpu: hardware.Gpu, config: EngineConfig) -> Machine:
    """A GPU of this machine: by NVML alone where that knows the free memory, else by CUDA."""
    memory = None if gpu.unified else gpu.free_memory
    return Machine(
        kind="cuda",
        name=gpu.name,
        memory=memory or hardware.free_gpu_memory(),
        rates=lambda itemsize: _gpu_rates(gpu.name, _dtype(config, itemsize)),
    )


def _dtype(config: EngineConfig, itemsize: int) -> str:
    """torch's name of the type of a model's numbers, from their bytes; of two types with as many, the likelier one."""
    return "float32" if itemsize > HALF else "float16" if config.dtype == "float16" else "bfloat16"


def _gpu_rates(name: str, dtype: str) -> Rates | None:
    """The rates of a GPU of this machine: measured where torch can use it, else by its data sheet, if that is known."""
    import torch

    if torch.cuda.is_available():
        return machine_rates("cuda", dtype, name)
    try:
        return card_rates(card_named(name))
    except UsageError:
        return None
