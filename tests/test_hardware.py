"""What the machine says about itself, right or broken, becomes figures with the name of who said them; no error."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bmx import hardware

GB = 10**9
CGROUP = "/sys/fs/cgroup"
MEMINFO = "MemTotal:       64000000 kB\nMemFree:  1000 kB\nMemAvailable:   40000000 kB\nHugePages_Total:       0\n"
SYSTEM_FREE, SYSTEM_TOTAL = 40_000_000 * 1024, 64_000_000 * 1024
V1_NO_LIMIT = "9223372036854771712\n"


@pytest.fixture
def machine(monkeypatch):
    """A machine whose /proc and /sys hold these texts and nothing else; an exception instead of a text is raised."""

    def script(files: dict[str, str | Exception]) -> None:
        hardware.cpu_flags.cache_clear()

        def read_text(path: Path, *_, **__) -> str:
            content = files.get(str(path), FileNotFoundError(str(path)))
            if isinstance(content, Exception):
                raise content
            return content

        monkeypatch.setattr(Path, "read_text", read_text)

    yield script
    monkeypatch.undo()
    hardware.cpu_flags.cache_clear()


def v2(limit: str, used: int, cached: int = 0) -> dict[str, str]:
    return {
        f"{CGROUP}/memory.max": f"{limit}\n",
        f"{CGROUP}/memory.current": f"{used}\n",
        f"{CGROUP}/memory.stat": f"anon 5\ninactive_file {cached}\nactive_file 9\n",
    }


def v1(limit: str, used: int, cached: int = 0) -> dict[str, str]:
    return {
        f"{CGROUP}/memory/memory.limit_in_bytes": f"{limit}\n",
        f"{CGROUP}/memory/memory.usage_in_bytes": f"{used}\n",
        f"{CGROUP}/memory/memory.stat": f"cache 77\ninactive_file 1\ntotal_inactive_file {cached}\n",
    }


MEMINFO_WINS = (SYSTEM_FREE, SYSTEM_TOTAL, "MemAvailable")
HOSTS = {
    "no cgroup": ({}, MEMINFO_WINS),
    "v2 without a limit": (v2("max", 3 * GB), MEMINFO_WINS),
    "v2 limit below the system's": (v2(f"{8 * GB}", 3 * GB), (5 * GB, 8 * GB, "cgroup memory.max")),
    "v2 page cache counts as free": (v2(f"{8 * GB}", 3 * GB, GB), (6 * GB, 8 * GB, "cgroup memory.max")),
    "v2 limit above the system's": (v2(f"{900 * GB}", 3 * GB), MEMINFO_WINS),
    "v2 group over its limit": (v2(f"{GB}", 3 * GB), (0, GB, "cgroup memory.max")),
    "v2 without statistics": (
        v2(f"{8 * GB}", 3 * GB) | {f"{CGROUP}/memory.stat": PermissionError()},
        (5 * GB, 8 * GB, "cgroup memory.max"),
    ),
    "v2 use not readable": (
        v2(f"{8 * GB}", 3 * GB) | {f"{CGROUP}/memory.current": PermissionError()},
        MEMINFO_WINS,
    ),
    "v1 without a limit": (v1(V1_NO_LIMIT, 3 * GB), MEMINFO_WINS),
    "v1 limit": (v1(f"{4 * GB}", 3 * GB), (GB, 4 * GB, "cgroup memory/memory.limit_in_bytes")),
    "v1 page cache counts as free": (
        v1(f"{4 * GB}", 3 * GB, 2 * GB),
        (3 * GB, 4 * GB, "cgroup memory/memory.limit_in_bytes"),
    ),
    "both, the smaller wins": (
        v2(f"{8 * GB}", 3 * GB) | v1(f"{4 * GB}", 3 * GB),
        (GB, 4 * GB, "cgroup memory/memory.limit_in_bytes"),
    ),
}


@pytest.mark.parametrize(("files", "expected"), HOSTS.values(), ids=HOSTS)
def test_free_host_memory_is_the_least_that_anyone_leaves(machine, files, expected):
    machine({"/proc/meminfo": MEMINFO} | files)
    found = hardware.free_host_memory()
    assert (found.free, found.total, found.source) == expected


GROUPS = {
    "v2": ("0::/jobs/step_7\n", v2, CGROUP, f"{CGROUP}/jobs/step_7"),
    "v2, limit of the parent": ("0::/jobs/step_7/task_0\n", v2, CGROUP, f"{CGROUP}/jobs/step_7"),
    "v1": ("4:memory:/jobs/step_7\n1:cpu:/\n", v1, f"{CGROUP}/memory", f"{CGROUP}/memory/jobs/step_7"),
    "v1, limit of the parent": (
        "4:memory:/jobs/step_7/task_0\n",
        v1,
        f"{CGROUP}/memory",
        f"{CGROUP}/memory/jobs/step_7",
    ),
}


@pytest.mark.parametrize(("member", "version", "root", "group"), GROUPS.values(), ids=GROUPS)
def test_the_limits_of_the_process_own_group_and_of_its_parents_count(machine, member, version, root, group):
    """Slurm and systemd limit groups below the root, and a process without a namespace sees them there."""
    files = {name.replace(root, group): text for name, text in version(f"{8 * GB}", 3 * GB).items()}
    machine({"/proc/meminfo": MEMINFO, "/proc/self/cgroup": member} | files)
    assert hardware.free_host_memory().free == 5 * GB


def test_a_kernel_without_memavailable_still_has_free_memory(machine):
    machine({"/proc/meminfo": "MemTotal: 8000 kB\nMemFree: 3000 kB\nCached: 1000 kB\n"})
    found = hardware.free_host_memory()
    assert 0 < found.free <= 4000 * 1024
    assert found.total == 8000 * 1024


@pytest.mark.parametrize("meminfo", [FileNotFoundError(), PermissionError(), ""], ids=repr)
def test_without_meminfo_half_of_the_memory_is_assumed_free(machine, meminfo):
    machine({"/proc/meminfo": meminfo})
    found = hardware.free_host_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert (found.free, found.total) == (total // 2, total)


def test_this_very_process_has_memory():
    resident, peak = hardware.resident_bytes(), hardware.peak_resident_bytes()
    assert 10**7 < resident < peak + 10**6  # the kernel counts the two a few pages apart
    assert peak < hardware.free_host_memory().total


def test_without_proc_the_resident_memory_is_the_peak(machine):
    machine({})
    assert hardware.resident_bytes() == hardware.peak_resident_bytes()


# ---- cores ----


def cpuinfo(sockets: int, cores: int, threads: int, flags: str = "fpu sse2") -> str:
    blocks = [
        f"processor : 0\nmodel name\t: Some CPU\nphysical id\t: {s}\ncore id\t: {c}\nflags\t\t: {flags}\n"
        for s in range(sockets)
        for c in range(cores)
        for _ in range(threads)
    ]
    return "\n".join(blocks)


SIXTEEN = {"/proc/cpuinfo": cpuinfo(2, 8, 2)}  # 32 hardware threads
CORES = {
    "one per physical core": (SIXTEEN, 32, 16),
    "affinity": (SIXTEEN, 6, 6),
    "v2 quota": (SIXTEEN | {f"{CGROUP}/cpu.max": "400000 100000\n"}, 32, 4),
    "v2 quota of four and a half": (SIXTEEN | {f"{CGROUP}/cpu.max": "450000 100000\n"}, 32, 4),
    "v2 quota of less than one core": (SIXTEEN | {f"{CGROUP}/cpu.max": "50000 100000\n"}, 32, 1),
    "v2 without a quota": (SIXTEEN | {f"{CGROUP}/cpu.max": "max 100000\n"}, 32, 16),
    "v2 quota above the affinity": (SIXTEEN | {f"{CGROUP}/cpu.max": "2000000 100000\n"}, 3, 3),
    "v2 quota not readable": (SIXTEEN | {f"{CGROUP}/cpu.max": PermissionError()}, 32, 16),
    "v2 quota is nonsense": (SIXTEEN | {f"{CGROUP}/cpu.max": "many\n"}, 32, 16),
    "v1 quota": (
        SIXTEEN | {f"{CGROUP}/cpu/cpu.cfs_quota_us": "400000\n", f"{CGROUP}/cpu/cpu.cfs_period_us": "100000\n"},
        32,
        4,
    ),
    "v1 without a quota": (
        SIXTEEN | {f"{CGROUP}/cpu/cpu.cfs_quota_us": "-1\n", f"{CGROUP}/cpu/cpu.cfs_period_us": "100000\n"},
        32,
        16,
    ),
    "no topology, as on ARM": ({"/proc/cpuinfo": "processor: 0\nFeatures : asimd bf16\n"}, 8, 8),
    "nothing to read": ({}, 5, 5),
}


@pytest.mark.parametrize(("files", "affinity", "expected"), CORES.values(), ids=CORES)
def test_usable_cores_are_the_least_that_anyone_allows(machine, monkeypatch, files, affinity, expected):
    machine(files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    assert hardware.usable_cores() == expected


@pytest.mark.parametrize(("limit", "expected"), [("2", 2), ("64", 16), ("", 16), ("many", 16)])
def test_openmps_own_limit_of_threads_counts(machine, monkeypatch, limit, expected):
    """With more threads asked of torch than OpenMP grants, its bfloat16 products are wrong numbers."""
    machine(SIXTEEN)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    monkeypatch.setenv("OMP_THREAD_LIMIT", limit)
    assert hardware.usable_cores() == expected


def test_a_system_without_affinity_counts_its_cores(machine, monkeypatch):
    machine({})
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert hardware.usable_cores() == 1


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        (cpuinfo(1, 1, 1, "avx512f avx512_bf16"), True),
        (cpuinfo(1, 1, 1, "amx_bf16 amx_tile"), True),
        ("Features\t: asimd bf16\n", True),
        (cpuinfo(1, 1, 1, "avx2 fma"), False),
        ("", False),
    ],
)
def test_bfloat16_is_fast_where_the_cpu_says_so(machine, text, fast):
    machine({"/proc/cpuinfo": text})
    assert hardware.fast_bfloat16_cpu() is fast


def test_the_cpu_has_a_name(machine):
    machine(SIXTEEN)
    assert hardware.cpu_name() == "Some CPU"


# ---- GPUs ----


class NVMLError(Exception):
    pass


class NoPermission(NVMLError):
    pass


class NotSupported(NVMLError):
    pass


class LibraryNotFound(NVMLError):
    pass


class Hidden(NVMLError):
    """Raised when the device's handle is asked for."""


def gpu(name="H100", free=70 * GB, total=80 * GB, uuid="GPU-aaaa"):
    return SimpleNamespace(name=name, free=free, total=total, uuid=uuid)


@pytest.fixture
def nvml(monkeypatch):
    """A pynvml with these devices (or, in a device's place, the error that asking for its memory gives)."""

    def script(*devices, init: Exception | None = None, count: Exception | None = None) -> ModuleType:
        fake = ModuleType("pynvml")
        fake.open = 0

        def raise_or(error, value):
            if isinstance(error, Exception):
                raise error
            return value

        def initialise():
            raise_or(init, None)
            fake.open += 1

        def shutdown():
            fake.open -= 1

        fake.NVMLError = NVMLError
        fake.nvmlInit = initialise
        fake.nvmlShutdown = shutdown
        fake.nvmlDeviceGetCount = lambda: raise_or(count, len(devices))
        fake.nvmlDeviceGetHandleByIndex = lambda i: raise_or(
            devices[i] if isinstance(devices[i], Hidden) else None, devices[i]
        )
        fake.nvmlDeviceGetMemoryInfo = lambda handle: raise_or(handle, handle)
        fake.nvmlDeviceGetName = lambda handle: handle.name
        fake.nvmlDeviceGetUUID = lambda handle: handle.uuid
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return script


def test_gpus_are_listed_as_nvml_names_them(nvml):
    fake = nvml(gpu(), gpu("A100", 1 * GB, 40 * GB, "GPU-bbbb"))
    assert hardware.gpus() == [
        hardware.Gpu("H100", 70 * GB, 80 * GB, "GPU-aaaa"),
        hardware.Gpu("A100", 1 * GB, 40 * GB, "GPU-bbbb"),
    ]
    assert fake.open == 0


@pytest.mark.parametrize("error", [LibraryNotFound("no driver"), NoPermission("init")], ids=repr)
def test_without_a_driver_there_are_no_gpus(nvml, error):
    nvml(gpu(), init=error)
    assert hardware.gpus() == []


@pytest.mark.parametrize("error", [NoPermission("memory"), NotSupported("MIG"), Hidden("container")], ids=repr)
def test_a_device_that_will_not_tell_is_left_out(nvml, error):
    fake = nvml(error, gpu(uuid="GPU-bbbb"))
    assert [found.uuid for found in hardware.gpus()] == ["GPU-bbbb"]
    assert fake.open == 0


def test_a_driver_that_will_not_count_its_devices_shows_none(nvml):
    fake = nvml(gpu(), count=NVMLError("GPU is lost"))
    assert hardware.gpus() == []
    assert fake.open == 0


@pytest.fixture
def cuda(monkeypatch):
    """A current CUDA device with 60 of 80 GB free by its own account."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (60 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(uuid="bbbb"))


CUDA_SAYS = (60 * GB, 80 * GB, "cudaMemGetInfo")
DEVICES = {
    "no gpu in NVML": ([], CUDA_SAYS),
    "NVML sees less: another process just took some": (
        [gpu(free=50 * GB, uuid="GPU-bbbb")],
        (50 * GB, 80 * GB, "NVML"),
    ),
    "NVML sees more": ([gpu(free=70 * GB, uuid="GPU-bbbb")], CUDA_SAYS),
    "reordered devices are matched by UUID, not by index": (
        [gpu(free=GB, uuid="GPU-aaaa"), gpu(free=55 * GB, uuid="GPU-bbbb")],
        (55 * GB, 80 * GB, "NVML"),
    ),
    "a MIG slice has a UUID that NVML's list lacks": ([gpu(free=GB, uuid="GPU-cccc")], CUDA_SAYS),
    "no permission": ([NoPermission("memory")], CUDA_SAYS),
    "not supported": ([NotSupported("memory")], CUDA_SAYS),
}


@pytest.mark.parametrize(("devices", "expected"), DEVICES.values(), ids=DEVICES)
def test_free_gpu_memory_is_the_less_of_what_cuda_and_nvml_say(nvml, cuda, devices, expected):
    nvml(*devices)
    found = hardware.free_gpu_memory()
    assert (found.free, found.total, found.source) == expected


@pytest.mark.parametrize("broken", [{"init": LibraryNotFound()}, {"count": NVMLError("unknown error")}], ids=str)
def test_cuda_alone_is_believed_where_nvml_is_broken(nvml, cuda, broken):
    nvml(gpu(free=GB, uuid="GPU-bbbb"), **broken)
    found = hardware.free_gpu_memory()
    assert (found.free, found.total, found.source) == CUDA_SAYS
