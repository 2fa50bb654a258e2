"""How fast a machine is, in the four numbers that predict a run: measured here once, or taken from a data sheet.

Knows products, bandwidth and the cost of starting an operator; knows nothing of models. torch is loaded to measure.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bmx import hardware
from bmx.errors import UsageError

CACHE_VERSION = 3
REPEATS = 7
SHAPES = {"cpu": (1024, 576, 1536, 64), "cuda": (4096, 4096, 8192, 8)}  # rows, inner and outer size, how many weights
THIN_ROWS = 16  # rows of a thin product
PYTHON_OVERHEAD = 3.5  # time of an operator within a model's modules, in times of the operator alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The speed of a machine.

    Attributes:
        flops: FLOPs a second of large matrix products in the type that models run in.
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


TYPICAL = Rates(
    flops=1e14, bandwidth=1e12, thin_bandwidth=1e12, operator_seconds=8e-6, source="a middling GPU, to compare plans by"
)


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU by its data sheet: dense bfloat16 (float16 before Ampere) FLOP/s, bytes/s and bytes of memory."""

    name: str
    flops: float
    bandwidth: float
    memory: int


CARDS = (
    Card("T4", 65e12, 320e9, 16 * 2**30),
    Card("V100", 125e12, 900e9, 32 * 2**30),
    Card("A10", 125e12, 600e9, 24 * 2**30),
    Card("A100-40G", 312e12, 1555e9, 40 * 2**30),
    Card("A100-80G", 312e12, 2039e9, 80 * 2**30),
    Card("L4", 121e12, 300e9, 24 * 2**30),
    Card("L40S", 362e12, 864e9, 48 * 2**30),
    Card("H100", 989e12, 3350e9, 80 * 2**30),
    Card("H200", 989e12, 4800e9, 141 * 10**9),
    Card("B200", 2250e12, 8000e9, 180 * 10**9),
    Card("RTX-3060", 25e12, 360e9, 12 * 2**30),
    Card("RTX-3090", 71e12, 936e9, 24 * 2**30),
    Card("RTX-4060-Ti", 44e12, 288e9, 16 * 2**30),
    Card("RTX-4090", 165e12, 1008e9, 24 * 2**30),
    Card("RTX-5090", 210e12, 1792e9, 32 * 2**30),
    Card("RTX-A6000", 155e12, 768e9, 48 * 2**30),
)
COMMON_WORDS = {"nvidia", "tesla", "geforce", "pcie", "nvl", "hbm2", "hbm2e", "hbm3", "hbm3e"}
COMMON_WORDS |= {"sxm2", "sxm3", "sxm4", "sxm5"}
REACHED_FLOPS, REACHED_BANDWIDTH = 0.65, 0.85  # of a data sheet's figures, by large products and copies
LAUNCH_SECONDS = 8e-6  # to launch an operator from Python


def card_named(name: str) -> Card:
    """The card of that name, as people, shops or ``nvidia-smi`` spell it.

    Raises:
        UsageError: no card of the table, or several; the hint lists the table.
    """
    words = _words(name)
    chip = [word for word in words if not re.fullmatch("[0-9]+g", word)]
    for wanted in ("".join(words), "".join(chip)):  # with the memory, where a chip comes with more than one
        for card in CARDS:
            if "".join(_words(card.name)) == wanted:
                return card
    several = sum("".join(_words(card.name)).startswith("".join(chip)) for card in CARDS) > 1
    raise UsageError(
        f"{'several cards are' if several else 'no card of the table is'} called {name!r}",
        hint="known are " + ", ".join(card.name for card in CARDS) + "; others by --gpu-memory 24G",
    )


def _words(name: str) -> list[str]:
    """The words of a name that tell cards apart: without maker and socket, memory as 80g."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    return [re.sub(r"(?<=[0-9])gi?b$", "g", word) for word in words if word not in COMMON_WORDS]


def card_rates(card: Card) -> Rates:
    """The rates that a card is expected to reach, as shares of its data sheet."""
    return Rates(
        flops=REACHED_FLOPS * card.flops,
        bandwidth=REACHED_BANDWIDTH * card.bandwidth,
        thin_bandwidth=REACHED_BANDWIDTH * card.bandwidth,
        operator_seconds=LAUNCH_SECONDS,
        source=f"{REACHED_FLOPS:.0%} of the matrix rate and {REACHED_BANDWIDTH:.0%} of the bandwidth of {card.name}",
    )


def machine_rates(device: str, dtype: str, name: str) -> Rates:
    """The rates of this machine: read from the cache, or measured in a second or two and cached.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: a torch type's name.
        name: of the processor or GPU.
    """
    file = _cache_file(device, dtype, name)
    with suppress(OSError, ValueError, TypeError):
        cached = Rates(**json.loads(file.read_text()))
        if min(cached.flops, cached.bandwidth, cached.thin_bandwidth, cached.operator_seconds) > 0:
            return cached
    rates = measure(device, dtype)
    with suppress(OSError):  # without a cache, the next call measures again
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(rates)))
    return rates


def forget(device: str, dtype: str, name: str) -> None:
    """Delete the cached rates, so that the next call measures again.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: a torch type's name.
        name: of the processor or GPU.
    """
    _cache_file(device, dtype, name).unlink(missing_ok=True)


def _cache_file(device: str, dtype: str, name: str) -> Path:
    from platformdirs import user_cache_path

    key = f"{device}-{dtype}-{hardware.usable_cores()}-{name}-v{CACHE_VERSION}"
    return user_cache_path("bmx") / "rates" / ("".join(c if c.isalnum() else "-" for c in key) + ".json")


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

    def thin() -> None:
        for weight in weights:
            torch.nn.functional.linear(few, weight)

    def operators() -> None:  # a normalisation as models write it: eight operators
        for _ in range(count):
            wide = few.float()
            gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(kind)

    seconds = {
        "product": _median(lambda: torch.nn.functional.linear(x, weights[0]), device),
        "passing": _median(lambda: block.mul_(1), device),
        "thin": _median(thin, device),
        "operators": _median(operators, device),
    }
    return Rates(
        flops=2 * rows * inner * outer / seconds["product"],
        bandwidth=2 * block.nbytes / seconds["passing"],
        thin_bandwidth=count * weights[0].nbytes / seconds["thin"],
        operator_seconds=PYTHON_OVERHEAD * seconds["operators"] / (8 * count),
        source="measured on this machine",
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
