"""How fast a machine is, in the four numbers that predict a run: measured here, and kept for a while.

Knows products, bandwidth and the cost of starting an operator; knows nothing of models. torch is loaded to measure.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bmx import hardware, kernels
from bmx.cache import cache_folder, store, warn_once
from bmx.kernels.linear import Linear

CACHE_VERSION = 5
KEPT_SECONDS = 7 * 24 * 3600.0
KEPT_IF_BUSY = 600.0  # seconds; the speed of a busy machine is not that of an idle one
BUSY = 0.5  # processes that want to run, for each core
REPEATS = 7
SHAPES = {"cpu": (1024, 576, 1536, 64), "cuda": (4096, 4096, 8192, 8)}  # rows, inner and outer size, how many weights
THIN_ROWS = 16  # rows of a thin product
PYTHON_OVERHEAD = 3.5  # time of an operator within a model's modules, in times of the operator alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The speed of a machine.

    Attributes:
        flops: FLOPs a second of large matrix products in the type that models run in, by the kernels that run there.
        bandwidth: bytes a second that operators without products read and write.
        thin_bandwidth: bytes of weights a second that products of a few rows read.
        operator_seconds: seconds to start an operator, the Python around it included.
        source: where the numbers come from, for people.
    """

    flops: float
    bandwidth: float
    thin_bandwidth: float
    operator_seconds: float
    source: str


MEASURED, MEASURED_BUSY = "measured on this machine", "measured on this machine while it was busy"
TYPICAL = Rates(
    flops=1e14, bandwidth=1e12, thin_bandwidth=1e12, operator_seconds=8e-6, source="a middling GPU, to compare plans by"
)


def machine_rates(device: str, dtype: str, name: str) -> Rates:
    """The rates of this machine: read from the cache, or measured in a second or two and cached.

    Cached rates are used for a week; those of a machine that was busy with other work, for ten minutes.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: a torch type's name.
        name: of the processor or GPU.
    """
    with suppress(OSError, ValueError, TypeError, RecursionError):
        file = _cache_file(device, dtype, name)
        cached = Rates(**json.loads(file.read_text()))
        age, kept = time.time() - file.stat().st_mtime, KEPT_IF_BUSY if cached.source == MEASURED_BUSY else KEPT_SECONDS
        if min(cached.flops, cached.bandwidth, cached.thin_bandwidth, cached.operator_seconds) > 0 and 0 <= age < kept:
            return cached
    busy = _busy()
    rates = measure(device, dtype)
    if busy:
        rates = replace(rates, source=MEASURED_BUSY)
    try:
        store(_cache_file(device, dtype, name), json.dumps(asdict(rates)).encode())
    except OSError as error:
        warn_once(f"the speed of this machine cannot be kept ({error.strerror}), and is measured in each run", error)
    return rates


def forget(device: str, dtype: str, name: str) -> None:
    """Delete the cached rates, so that the next call measures again.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: a torch type's name.
        name: of the processor or GPU.
    """
    _cache_file(device, dtype, name).unlink(missing_ok=True)


def _busy() -> bool:
    """Whether other work has kept this machine's cores busy in the last minute."""
    try:
        return os.getloadavg()[0] > BUSY * (os.cpu_count() or 1)
    except OSError:
        return False


def _cache_file(device: str, dtype: str, name: str) -> Path:
    key = f"{device}-{dtype}-{kernels.choose(device).name}-{hardware.usable_cores()}-{name}-v{CACHE_VERSION}"
    return cache_folder("rates") / ("".join(c if c.isalnum() else "-" for c in key) + ".json")


def measure(device: str, dtype: str) -> Rates:
    """Time matrix products, passes over memory and small operators on this machine, in the sizes that models have."""
    import torch

    kind, place = getattr(torch, dtype), torch.device(device)
    rows, inner, outer, count = SHAPES[device]
    x = torch.randn(rows, inner, device=place).to(kind)
    # more than fits in a processor's cache
    weights = [torch.randn(outer, inner, device=place).to(kind) for _ in range(count)]
    block = torch.ones(count * outer * inner, dtype=kind, device=place)
    few, gain = x[:THIN_ROWS], torch.ones(inner, dtype=kind, device=place)
    chosen = kernels.choose(device)
    own_products = device == "cpu" and dtype in chosen.capabilities.model_dtypes  # on a GPU, torch's are used
    product = kernels.Kernels(chosen.name if own_products else "reference", "").module.product
    products = [product((Linear(weight=weight, bias=None),)) for weight in weights]

    def thin() -> None:
        for multiply in products:
            multiply(few)

    def operators() -> None:  # a normalisation as models write it: eight operators
        for _ in range(count):
            wide = few.float()
            gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(kind)

    seconds = {
        "product": _median(lambda: products[0](x), device),
        "passing": _median(lambda: block.mul_(1), device),
        "thin": _median(thin, device),
        "operators": _median(operators, device),
    }
    return Rates(
        flops=2 * rows * inner * outer / seconds["product"],
        bandwidth=2 * block.nbytes / seconds["passing"],
        thin_bandwidth=count * weights[0].nbytes / seconds["thin"],
        operator_seconds=PYTHON_OVERHEAD * seconds["operators"] / (8 * count),
        source=MEASURED,
    )


def _median(work: Callable[[], Any], device: str) -> float:
    """The median seconds of several calls, after one that is not timed."""
    import torch

    taken = []
    for _ in range(REPEATS + 1):
        before = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - before)
    return sorted(taken[1:])[REPEATS // 2]
