"""The machine: memory that is really free, GPUs, cores. Says where each figure comes from.

Knows the operating system and NVML; knows nothing of models. Imports torch only to ask about a GPU.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60
NAMED_HOLDERS = 3
SPINS = "10000"  # each takes 15 to 50 ns
MULTIPLIERS = {  # flags of processors that multiply numbers of a type
    "bfloat16": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    "float16": frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Free memory.

    Attributes:
        free: bytes that could be allocated now.
        total: bytes in all.
        source: where the figures come from, for people.
        holders: processes that hold the rest, for people; empty if unknown.
    """

    free: int
    total: int
    source: str
    holders: str = ""

    def divided(self, processes: int) -> FreeMemory:
        """What each of several processes may take of it."""
        source = f"{self.source} / {processes}" if processes > 1 else self.source
        return FreeMemory(self.free // processes, self.total // processes, source, self.holders)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that holds memory of a GPU; ``used``: bytes, or None where NVML does not say."""

    pid: int
    used: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU as NVML describes it; unknown values are None or empty.

    Attributes:
        name: for people.
        free: free bytes, or None.
        total: bytes in all, or None.
        uuid: as `nvidia-smi -L` shows it, with its GPU- prefix.
        pci: its PCI address, as 0000:3b:00.0.
        processes: processes that hold some of its memory, this one included.
        mig: whether it is partitioned into MIG slices; NVML's memory figures are not those of a slice.
        unified: whether it has no memory of its own and uses the host's.
    """

    name: str
    free: int | None
    total: int | None
    uuid: str
    pci: str
    processes: tuple[GpuProcess, ...] = ()
    mig: bool = False
    unified: bool = False

    @property
    def free_memory(self) -> FreeMemory | None:
        """The free memory by NVML alone, before CUDA has begun; None where NVML cannot say."""
        if self.free is None or self.total is None or self.mig:
            return None
        return FreeMemory(self.free, self.total, "NVML", holders(self))


def free_host_memory() -> FreeMemory:
    """The free memory of the host: the least of what the system, the control groups and the process's limits leave.

    Page cache counts as free: Linux's MemAvailable, and a group's limit less the pages that it cannot drop. What this
    process holds beside such pages (`held_bytes`) does not.
    """
    return min((_system_memory(), *_group_limits(), *_own_limits()), key=lambda memory: memory.free)


def _group_limits() -> Iterator[FreeMemory]:
    """The free memory of each control group of this process that has a limit."""
    for prefix, limit_file, used_file, prefix_of_lists in (
        ("", "memory.max", "memory.current", ""),
        ("", "memory.high", "memory.current", ""),  # above it, the system slows the group down
        ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        for group in _own_groups(prefix.rstrip("/")):
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is None or used is None or limit >= NO_LIMIT:
                continue
            droppable = sum(
                _stat(group / "memory.stat", f"{prefix_of_lists}{list_}_file") for list_ in ("active", "inactive")
            )
            yield FreeMemory(min(limit, max(0, limit - used + droppable)), limit, f"cgroup {prefix}{limit_file}")


def _own_limits() -> Iterator[FreeMemory]:
    """The memory that this process's own limits (ulimit -v, ulimit -d) leave."""
    for name, key in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY:
            yield FreeMemory(max(0, limit - (_own_status(key) or 0)), limit, name)


def _own_groups(controller: str) -> list[Path]:
    """The folders of this process's control group and of the groups above it.

    Args:
        controller: name of the controller under version 1 of control groups; empty under version 2.
    """
    root, own = CGROUP / controller, ""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = path.strip("/")
    return [root / own, *(parent for parent in (root / own).parents if parent.is_relative_to(root))]


def free_gpu_memory() -> FreeMemory:
    """The free memory of the current CUDA device: as CUDA reports it, or NVML where that is less.

    Where the GPU uses the host's memory, CUDA does not count reclaimable page cache; the host's figure is taken.
    """
    import torch

    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpu = _same_gpu(properties, gpus())
    integrated = getattr(properties, "is_integrated", None)
    if integrated or (integrated is None and gpu and gpu.unified and not gpu.mig):
        host = free_host_memory()
        return FreeMemory(min(total, host.free), total, f"{host.source} (unified memory)")
    if gpu is None:
        return FreeMemory(free, total, "cudaMemGetInfo; NVML does not list this GPU")
    if gpu.mig:
        return FreeMemory(free, total, "cudaMemGetInfo; NVML shows no memory of a MIG slice")
    if gpu.free is None:
        return FreeMemory(free, total, "cudaMemGetInfo; NVML does not tell")
    source = "NVML" if gpu.free < free else "cudaMemGetInfo"
    return FreeMemory(min(gpu.free, free), total, source, holders(gpu))


def _same_gpu(properties: Any, listed: list[Gpu]) -> Gpu | None:
    """The GPU with these CUDA properties, by UUID or PCI address; indices differ between CUDA and NVML."""
    uuid = str(getattr(properties, "uuid", "")).removeprefix("GPU-").lower()
    for gpu in listed:
        if uuid and gpu.uuid.removeprefix("GPU-").lower() == uuid:
            return gpu
    place: list[Any] = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in place:
        return None
    pci = "{:04x}:{:02x}:{:02x}.0".format(*place)
    return next((gpu for gpu in listed if gpu.pci == pci), None)


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA would show to this process, in the order of CUDA_VISIBLE_DEVICES.

    An invalid entry ends the list and a GPU named twice empties it, as in CUDA. Slices (MIG-...) are left out, since
    NVML has no memory figures of a slice. Indices count in PCI order, which is CUDA's where the GPUs are alike or
    CUDA_DEVICE_ORDER is PCI_BUS_ID; otherwise CUDA may put the fastest first. The device that a process really uses
    is therefore listed by UUID: see `free_gpu_memory`.
    """
    listed, wanted = gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return listed
    entries = [entry.strip() for entry in wanted.split(",")]
    place_of = _place_by_uuid if entries[0].startswith(("GPU-", "MIG-")) else _place_by_index
    chosen: list[int | str] = []
    for entry in entries:
        place = place_of(entry, listed)
        if place is None:
            break
        if place in chosen:
            return []
        chosen.append(place)
    return [listed[place] for place in chosen if isinstance(place, int)]


def _place_by_index(entry: str, listed: list[Gpu]) -> int | None:
    """The index at the beginning of an entry, as CUDA reads it; None where no GPU has that index."""
    digits = re.match("[0-9]+", entry)
    return int(digits[0]) if digits and int(digits[0]) < len(listed) else None


def _place_by_uuid(entry: str, listed: list[Gpu]) -> int | str | None:
    """The index of the one GPU whose UUID begins with an entry; the entry of a MIG slice itself; None otherwise."""
    if entry.startswith("MIG-"):
        return entry
    places = [place for place, gpu in enumerate(listed) if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
    return places[0] if len(places) == 1 else None


def other_gpu_processes(gpu: Gpu) -> list[GpuProcess]:
    """Other processes that hold memory of a GPU: the largest first, those of unknown size last."""
    others = (process for process in gpu.processes if process.pid != os.getpid())
    return sorted(others, key=lambda process: (process.used is None, -(process.used or 0), process.pid))


def holders(gpu: Gpu) -> str:
    """Other processes that hold memory of a GPU, for people; empty without such processes."""
    others = other_gpu_processes(gpu)
    parts = [
        f"pid {process.pid} holds " + ("an unknown amount" if process.used is None else f"{process.used / 1e6:,.0f} MB")
        for process in others[:NAMED_HOLDERS]
    ]
    more = f" and {len(others) - NAMED_HOLDERS} more" if len(others) > NAMED_HOLDERS else ""
    return ", ".join(parts) + more


def gpus() -> list[Gpu]:
    """All GPUs that NVML lists, in the order of the PCI bus; empty without a driver."""
    with _nvml() as nvml:
        count = _ask(nvml, "nvmlDeviceGetCount") if nvml else 0
        handles = [_ask(nvml, "nvmlDeviceGetHandleByIndex", index) for index in range(count or 0)]
        return [_gpu(nvml, handle) for handle in handles if handle is not None]


def _gpu(nvml: Any, handle: Any) -> Gpu:
    """One GPU as NVML describes it."""
    memory, unified = None, False
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        unified = isinstance(error, nvml.NVMLError_NotSupported)
    bus = _ask(nvml, "nvmlDeviceGetPciInfo", handle)
    domain, _, place = _text(bus.busId if bus else "").lower().partition(":")
    return Gpu(
        name=_text(_ask(nvml, "nvmlDeviceGetName", handle) or "unknown GPU"),
        free=memory.free if memory else None,
        total=memory.total if memory else None,
        uuid=_text(_ask(nvml, "nvmlDeviceGetUUID", handle) or ""),
        pci=f"{domain.lstrip('0').zfill(4)}:{place}" if place else "",
        processes=_processes(nvml, handle),
        mig=(_ask(nvml, "nvmlDeviceGetMigMode", handle) or [0])[0] == 1,
        unified=unified,
    )


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    """The compute and graphics processes of a GPU; a process with several entries is listed once, with its largest."""
    used: dict[int, int | None] = {}
    for kind in ("Compute", "Graphics"):
        for process in _ask(nvml, f"nvmlDeviceGet{kind}RunningProcesses", handle) or ():
            size = process.usedGpuMemory
            known = used.get(process.pid)
            if size is None or size >= NO_LIMIT:  # NVML says "not available" by the largest number
                size = known
            used[process.pid] = size if known is None else max(size, known)
    return tuple(GpuProcess(pid=pid, used=size) for pid, size in used.items())


def _ask(nvml: Any, question: str, *about: Any) -> Any:
    """NVML's answer, or None where it may not or cannot give one."""
    try:
        return getattr(nvml, question)(*about)
    except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):  # the latter, for an older driver, is not an NVMLError
        return None


def _text(answer: str | bytes) -> str:
    return answer.decode(errors="replace") if isinstance(answer, bytes) else answer


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
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def resident_bytes() -> int:
    """Bytes that this process holds in memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_resident_bytes()


def held_bytes() -> int:
    """Bytes that this process holds and the system cannot drop: without pages of files, which count as free memory."""
    anonymous, shared = _own_status("RssAnon"), _own_status("RssShmem")
    return resident_bytes() if anonymous is None else anonymous + (shared or 0)


def file_bytes() -> int:
    """Bytes of pages of files among those that this process holds; 0 where the system does not say."""
    return _own_status("RssFile") or 0


def peak_resident_bytes() -> int:
    """The most bytes held in memory since the start or, where it succeeded, since `reset_peak`."""
    peak = _own_status("VmHWM")  # getrusage's figure does not follow a reset
    if peak is not None:
        return peak
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def reset_peak() -> bool:
    """Let `peak_resident_bytes` count from now; returns False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim_heap() -> None:
    """Return free pages in the middle of the heap to the system, which the C library does not do by itself."""
    with suppress(OSError, TypeError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def usable_cores() -> int:
    """The number of cores that this process may use, by affinity and control group quota; one per physical core."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    for quota, period in _cpu_quotas():
        if quota.isdigit() and period.isdigit():
            allowed = min(allowed, int(quota) // int(period))
    threads = os.environ.get("OMP_THREAD_LIMIT", "")  # more threads make torch compute wrong numbers
    if threads.isdigit():
        allowed = min(allowed, int(threads))
    return max(1, min(allowed, _physical_cores() or allowed))


def wait_briefly() -> None:
    """Let threads that wait for one another sleep after half a millisecond, unless the environment says how they wait.

    By themselves they spin for 10 ms and more. Where other programs work on the machine, they take the cores from the
    threads that they wait for. The OpenMP library reads this when torch is loaded: later calls change nothing.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def _cpu_quotas() -> Iterator[tuple[str, str]]:
    """(quota, period) in microseconds of CPU time of each control group of this process; not always numbers."""
    for group in _own_groups(""):
        quota, _, period = _read(group / "cpu.max").strip().partition(" ")
        yield quota, period
    for group in _own_groups("cpu"):
        yield _read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip()


def multiplies(dtype: str) -> bool:
    """Whether this CPU multiplies numbers of a 16-bit type in hardware; ``dtype`` is torch's name of it."""
    return bool(MULTIPLIERS[dtype] & cpu_flags())


@cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets of the first core, as Linux names them."""
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
    """The free memory of the whole system, by the best source that it has."""
    lines = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())
    known = {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if len(parts) == 3}
    total = known.get("MemTotal", 0)
    if "MemAvailable" in known:
        return FreeMemory(known["MemAvailable"], total, "MemAvailable")
    if "MemFree" in known:
        return FreeMemory(known["MemFree"] + known.get("Cached", 0), total, "MemFree and Cached")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return FreeMemory(total // 2, total, "half of the physical memory")


def _own_status(key: str) -> int | None:
    """The bytes in a line of this process's /proc/self/status."""
    line = re.search(rf"^{key}:\s*([0-9]+) kB", _read(Path("/proc/self/status")), re.MULTILINE)
    return int(line[1]) * 1024 if line else None


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
