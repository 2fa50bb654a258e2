"""What machine this is: memory that is really free, GPUs, cores. Says where each figure comes from.

Knows the operating system and NVML; knows nothing of models. Imports torch only to ask about a GPU.
"""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Bytes that could be taken now, and who says so."""

    free: int
    total: int
    source: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as NVML sees it."""

    name: str
    free: int
    total: int
    uuid: str


def free_host_memory() -> FreeMemory:
    """The least of what the system and this process's control group leave.

    Reclaimable page cache counts as free: Linux's MemAvailable, and a group's limit less what it cannot drop.
    """
    best = _system_memory()
    for prefix, limit_file, used_file, cache_key in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in _own_groups(prefix.rstrip("/")):
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is None or used is None or limit >= NO_LIMIT:
                continue
            free = limit - used + _stat(group / "memory.stat", cache_key)
            if free < best.free:
                best = FreeMemory(max(0, free), limit, f"cgroup {prefix}{limit_file}")
    return best


def _own_groups(controller: str) -> list[Path]:
    """The folders of this process's control group and of all above it.

    Args:
        controller: its name under version 1, empty under version 2.
    """
    root, own = CGROUP / controller, ""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = path.strip("/")
    return [root / own, *(parent for parent in (root / own).parents if parent.is_relative_to(root))]


def free_gpu_memory() -> FreeMemory:
    """Free bytes of the current CUDA device: what CUDA reports, or NVML where that is less."""
    import torch

    free, total = torch.cuda.mem_get_info()
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    for gpu in gpus():
        if gpu.uuid.removeprefix("GPU-") == uuid and gpu.free < free:
            return FreeMemory(gpu.free, total, "NVML")
    return FreeMemory(free, total, "cudaMemGetInfo")


def gpus() -> list[Gpu]:
    """All GPUs that NVML shows; none where there is no driver."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        found: list[Gpu] = []
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError:
            return found
        for index in range(count):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
            except nvml.NVMLError:
                continue  # MIG slices and containers may hide a device: CUDA's own figure is used then
            found.append(Gpu(name, memory.free, memory.total, uuid))
        return found


@contextmanager
def _nvml() -> Iterator[Any]:
    """The NVML module while it is initialised, or None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that was ever in memory."""
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def usable_cores() -> int:
    """Cores that this process may use: its affinity, its control group's quota, one per physical core."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    for quota, period in _cpu_quotas():
        if quota.isdigit() and period.isdigit():
            allowed = min(allowed, int(quota) // int(period))
    threads = os.environ.get("OMP_THREAD_LIMIT", "")  # torch computes wrong numbers with more than OpenMP grants
    if threads.isdigit():
        allowed = min(allowed, int(threads))
    return max(1, min(allowed, _physical_cores() or allowed))


def _cpu_quotas() -> Iterator[tuple[str, str]]:
    """(microseconds of CPU, of how many) of each control group that this process is in; not always numbers."""
    for group in _own_groups(""):
        quota, _, period = _read(group / "cpu.max").strip().partition(" ")
        yield quota, period
    for group in _own_groups("cpu"):
        yield _read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip()


def fast_bfloat16_cpu() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags())


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets of the first core, as Linux names them."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.lower().startswith(("flags", "features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def cpu_name() -> str:
    """The processor's name."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _physical_cores() -> int:
    pairs: set[tuple[str, str]] = set()
    package = ""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "physical id":
            package = value
        elif key.strip() == "core id":
            pairs.add((package, value))
    return len(pairs)


def _system_memory() -> FreeMemory:
    """What the whole system says, whoever is asked to say it."""
    lines = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())
    known = {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if len(parts) == 3}
    total = known.get("MemTotal", 0)
    if "MemAvailable" in known:
        return FreeMemory(known["MemAvailable"], total, "MemAvailable")
    if "MemFree" in known:
        return FreeMemory(known["MemFree"] + known.get("Cached", 0), total, "MemFree and Cached")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return FreeMemory(total // 2, total, "half of the physical memory")


def _stat(path: Path, key: str) -> int:
    for line in _read(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
