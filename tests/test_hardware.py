"""What the machine says about itself, right or broken, becomes figures with the name of who said them; no error."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bmx import hardware
from bmx.config import EngineConfig
from bmx.plan.memory import limits as job_limits

GB = 10**9
CGROUP = "/sys/fs/cgroup"
MEMINFO = "MemTotal:       64000000 kB\nMemFree:  1000 kB\nMemAvailable:   40000000 kB\nHugePages_Total:       0\n"
SYSTEM_FREE, SYSTEM_TOTAL = 40_000_000 * 1024, 64_000_000 * 1024
V1_NO_LIMIT = "9223372036854771712\n"


@pytest.fixture
def machine(monkeypatch):
    """A machine whose /proc and /sys hold these texts and nothing else; an exception instead of a text is raised.

    The process has only these limits of its own, by what `resource` calls them.
    """

    def script(files: dict[str, str | Exception], limits: dict[str, int] | None = None) -> None:
        hardware.cpu_flags.cache_clear()
        soft = {getattr(resource, name): limit for name, limit in (limits or {}).items()}
        monkeypatch.setattr(resource, "getrlimit", lambda which: (soft.get(which, resource.RLIM_INFINITY), 10**15))

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
        f"{CGROUP}/memory.stat": f"anon 5\ninactive_file {cached - cached // 3}\nactive_file {cached // 3}\n",
    }


def v1(limit: str, used: int, cached: int = 0) -> dict[str, str]:
    return {
        f"{CGROUP}/memory/memory.limit_in_bytes": f"{limit}\n",
        f"{CGROUP}/memory/memory.usage_in_bytes": f"{used}\n",
        f"{CGROUP}/memory/memory.stat": (
            f"cache 77\ninactive_file 1\ntotal_inactive_file {cached - cached // 3}\ntotal_active_file {cached // 3}\n"
        ),
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
    "v2 limit above which the group is slowed down": (
        v2(f"{8 * GB}", 3 * GB) | {f"{CGROUP}/memory.high": f"{5 * GB}\n"},
        (2 * GB, 5 * GB, "cgroup memory.high"),
    ),
    "v2 more page cache than is used": (v2(f"{8 * GB}", GB, 3 * GB), (8 * GB, 8 * GB, "cgroup memory.max")),
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
def test_free_host_memory_is_the_smallest_of_all_limits(machine, files, expected):
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


STATUS = "Name:\tbmx\nVmPeak:\t 9000000 kB\nVmSize:\t 3000000 kB\nVmHWM:\t 2500000 kB\nVmData:\t 1000000 kB\n"
SIZE, DATA = 3_000_000 * 1024, 1_000_000 * 1024
OWN_LIMITS = {
    "none": ({}, STATUS, MEMINFO_WINS),
    "address space": ({"RLIMIT_AS": 8 * GB}, STATUS, (8 * GB - SIZE, 8 * GB, "RLIMIT_AS")),
    "data": ({"RLIMIT_DATA": 8 * GB}, STATUS, (8 * GB - DATA, 8 * GB, "RLIMIT_DATA")),
    "both, the least wins": (
        {"RLIMIT_DATA": 4 * GB, "RLIMIT_AS": 9 * GB},
        STATUS,
        (4 * GB - DATA, 4 * GB, "RLIMIT_DATA"),
    ),
    "above what the system has": ({"RLIMIT_AS": 900 * GB, "RLIMIT_DATA": 900 * GB}, STATUS, MEMINFO_WINS),
    "all used up": ({"RLIMIT_AS": GB}, STATUS, (0, GB, "RLIMIT_AS")),
    "use not in the file": ({"RLIMIT_AS": 8 * GB}, "Name:\tbmx\nVmSize: many\n", (8 * GB, 8 * GB, "RLIMIT_AS")),
    "no file": ({"RLIMIT_DATA": 8 * GB}, PermissionError(), (8 * GB, 8 * GB, "RLIMIT_DATA")),
}


@pytest.mark.parametrize(("limits", "status", "expected"), OWN_LIMITS.values(), ids=OWN_LIMITS)
def test_the_process_own_limits_count(machine, limits, status, expected):
    machine({"/proc/meminfo": MEMINFO, "/proc/self/status": status}, limits)
    assert hardware.free_host_memory() == hardware.FreeMemory(*expected)


MB = 10**6
ANONYMOUS, OF_FILES = 120 * MB // 1024, 180 * MB // 1024
OWN = f"VmSize:\t {2000 * MB // 1024} kB\nRssAnon:\t {ANONYMOUS} kB\nRssFile:\t {OF_FILES} kB\n"
SMALL = {
    "v2, libraries in the group's cache": (v2(f"{419 * MB}", 330 * MB, 200 * MB), {}, 419 * MB),
    "v2, libraries in another group's cache": (v2(f"{419 * MB}", 130 * MB), {}, 419 * MB),
    "v2, the process came from another group": (v2(f"{419 * MB}", 10 * MB), {}, 419 * MB),
    "v2, the parent's limit": (
        {name.replace(CGROUP, f"{CGROUP}/jobs"): text for name, text in v2(f"{419 * MB}", 330 * MB, 200 * MB).items()}
        | {"/proc/self/cgroup": "0::/jobs/one\n"},
        {},
        419 * MB,
    ),
    "v1": (v1(f"{419 * MB}", 330 * MB, 200 * MB), {}, 419 * MB),
    "address space": ({}, {"RLIMIT_AS": 2100 * MB}, 100 * MB + 300 * MB),
}


@pytest.mark.parametrize(("files", "own_limits", "most"), SMALL.values(), ids=SMALL)
def test_e_no_more_may_be_used_than_the_group_and_the_process_may_have(machine, files, own_limits, most):
    """Pages of files count once: as free memory, and not as held besides."""
    machine({"/proc/meminfo": MEMINFO, "/proc/self/status": OWN} | files, own_limits)
    memory, held = hardware.free_host_memory(), hardware.held_bytes()
    assert held == pytest.approx(120 * MB, abs=1024)
    allowed = job_limits(EngineConfig(gpu_memory_utilization=1.0), memory, held).total
    assert 0.5 * most < allowed <= most


def test_e_without_the_kernels_own_count_all_resident_memory_is_held(machine):
    machine({"/proc/self/status": "Name:\tbmx\n"})
    assert hardware.held_bytes() == hardware.resident_bytes()


def test_a_group_with_less_than_the_process_own_limit_wins(machine):
    machine({"/proc/meminfo": MEMINFO, "/proc/self/status": STATUS} | v2(f"{4 * GB}", 3 * GB), {"RLIMIT_AS": 8 * GB})
    assert hardware.free_host_memory().source == "cgroup memory.max"


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


def test_the_peak_is_the_kernels_own_count(machine):
    machine({"/proc/self/status": STATUS})
    assert hardware.peak_resident_bytes() == 2_500_000 * 1024


@pytest.mark.parametrize("status", [FileNotFoundError(), "Name:\tbmx\n"], ids=repr)
def test_the_peak_is_known_without_the_kernels_count(machine, status):
    machine({"/proc/self/status": status})
    assert hardware.peak_resident_bytes() > 10**7


def _take_and_give_back():
    """64 MB of pages of their own: the heap might hold as many free ones already, or keep them."""
    with mmap.mmap(-1, 64 * 10**6) as block:
        block.write(b"x" * len(block))


def test_a_reset_peak_counts_from_now():
    _take_and_give_back()
    before = hardware.peak_resident_bytes()
    if not hardware.reset_peak():
        pytest.skip("this system cannot reset the peak")
    after = hardware.peak_resident_bytes()
    assert after < before - 32 * 10**6
    _take_and_give_back()
    assert hardware.peak_resident_bytes() > after + 32 * 10**6


RESETS = {None: True, FileNotFoundError(): False, PermissionError(): False, OSError(errno.EINVAL, "old kernel"): False}


@pytest.mark.parametrize(("error", "done"), RESETS.items(), ids=repr)
def test_a_reset_says_whether_it_was_possible(monkeypatch, error, done):
    written = []

    def write_text(path: Path, text: str) -> None:
        written.append((str(path), text))
        if error:
            raise error

    monkeypatch.setattr(Path, "write_text", write_text)
    assert hardware.reset_peak() is done
    assert written == [("/proc/self/clear_refs", "5")]


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
def test_usable_cores_are_the_smallest_of_all_limits(machine, monkeypatch, files, affinity, expected):
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
def test_bfloat16_is_in_hardware_where_the_cpu_says_so(machine, text, fast):
    machine({"/proc/cpuinfo": text})
    assert hardware.multiplies("bfloat16") is fast


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


class Mismatch(Exception):
    """What pynvml raises, and it is no NVMLError, where the driver is older than the question."""


class Hidden(NVMLError):
    """In a device's place: raised when its handle is asked for."""


def gpu(
    name="H100", free=70 * GB, total=80 * GB, uuid="GPU-aaaa", bus="00000000:3B:00.0", compute=(), graphics=(), mig=0
):
    """A device; an exception in place of an answer is raised when that is asked."""
    memory = free if isinstance(free, Exception) else SimpleNamespace(free=free, total=total)
    pci = bus if isinstance(bus, Exception) else SimpleNamespace(busId=bus)
    mode = mig if isinstance(mig, Exception) else [mig, 0]
    return SimpleNamespace(name=name, memory=memory, uuid=uuid, pci=pci, compute=compute, graphics=graphics, mode=mode)


def process(pid: int, used: int | None = None):
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


QUESTIONS = {
    "MemoryInfo": "memory",
    "Name": "name",
    "UUID": "uuid",
    "PciInfo": "pci",
    "MigMode": "mode",
    "ComputeRunningProcesses": "compute",
    "GraphicsRunningProcesses": "graphics",
}


@pytest.fixture
def nvml(monkeypatch):
    """A pynvml with these devices."""

    def script(*devices, init=None, count=None, shutdown=None) -> ModuleType:
        fake = ModuleType("pynvml")
        fake.open = 0

        def answer(value):
            if isinstance(value, Exception):
                raise value
            return value

        def opened(change: int, error: Exception | None) -> None:
            answer(error)
            fake.open += change

        fake.NVMLError, fake.NVMLError_NotSupported, fake.NVMLLibraryMismatchError = NVMLError, NotSupported, Mismatch
        fake.nvmlInit = lambda: opened(1, init)
        fake.nvmlShutdown = lambda: opened(-1, shutdown)
        fake.nvmlDeviceGetCount = lambda: answer(count or len(devices))
        fake.nvmlDeviceGetHandleByIndex = lambda index: answer(devices[index])
        for question, field in QUESTIONS.items():
            setattr(fake, f"nvmlDeviceGet{question}", lambda handle, field=field: answer(getattr(handle, field)))
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return script


def test_gpus_are_listed_as_nvml_names_them(nvml):
    fake = nvml(gpu(), gpu("A100", 1 * GB, 40 * GB, "GPU-bbbb", "0001A2B3:C1:00.0", compute=[process(7, GB)], mig=1))
    users = (hardware.GpuProcess(pid=7, used=GB),)
    assert hardware.gpus() == [
        hardware.Gpu(name="H100", free=70 * GB, total=80 * GB, uuid="GPU-aaaa", pci="0000:3b:00.0"),
        hardware.Gpu(
            name="A100", free=GB, total=40 * GB, uuid="GPU-bbbb", pci="1a2b3:c1:00.0", processes=users, mig=True
        ),
    ]
    assert fake.open == 0


def test_an_older_pynvml_answers_in_bytes(nvml):
    nvml(gpu(b"H100", uuid=b"GPU-aaaa", bus=b"0000:3B:00.0"))
    (found,) = hardware.gpus()
    assert (found.name, found.uuid, found.pci) == ("H100", "GPU-aaaa", "0000:3b:00.0")


@pytest.mark.parametrize("error", [LibraryNotFound("no driver"), NoPermission("init")], ids=repr)
def test_without_a_driver_there_are_no_gpus(nvml, error):
    nvml(gpu(), init=error)
    assert hardware.gpus() == []


def test_a_hidden_device_does_not_hide_the_others(nvml):
    fake = nvml(gpu(), Hidden("container"), gpu(uuid="GPU-bbbb"))
    assert [found.uuid for found in hardware.gpus()] == ["GPU-aaaa", "GPU-bbbb"]
    assert fake.open == 0


@pytest.mark.parametrize(
    ("error", "unified"), [(NoPermission("memory"), False), (NotSupported("GB10"), True), (NVMLError("?"), False)]
)
def test_a_gpu_whose_memory_nvml_does_not_report_is_listed(nvml, error, unified):
    nvml(gpu(free=error), gpu(uuid="GPU-bbbb"))
    first, second = hardware.gpus()
    assert (first.free, first.total, first.uuid, first.unified) == (None, None, "GPU-aaaa", unified)
    assert (second.free, second.total, second.unified) == (70 * GB, 80 * GB, False)


UNTOLD = {
    "name": ("name", "unknown GPU"),
    "uuid": ("uuid", ""),
    "bus": ("pci", ""),
    "compute": ("processes", ()),
    "graphics": ("processes", ()),
    "mig": ("mig", False),
}


@pytest.mark.parametrize("error", [NoPermission(), NotSupported(), Mismatch()], ids=repr)
@pytest.mark.parametrize("question", UNTOLD)
def test_a_failing_nvml_query_leaves_the_other_fields(nvml, question, error):
    nvml(gpu(**{question: error}), gpu(uuid="GPU-bbbb"))
    first, second = hardware.gpus()
    field, instead = UNTOLD[question]
    assert getattr(first, field) == instead
    assert (first.free, second.uuid) == (70 * GB, "GPU-bbbb")


def test_a_driver_that_cannot_count_its_devices_shows_none(nvml):
    fake = nvml(gpu(), count=NVMLError("GPU is lost"))
    assert hardware.gpus() == []
    assert fake.open == 0


def test_gpus_are_listed_although_nvml_fails_to_shut_down(nvml):
    nvml(gpu(), shutdown=NVMLError("uninitialised"))
    assert len(hardware.gpus()) == 1


# ---- who holds the memory ----

NOT_AVAILABLE = 2**64 - 1
USERS = {
    "none": ([], [], {}),
    "computing and drawing": ([process(1, GB)], [process(2, 2 * GB)], {1: GB, 2: 2 * GB}),
    "one that does both": ([process(1, 3 * GB)], [process(1, 2 * GB)], {1: 3 * GB}),
    "one that does both, once untold": ([process(1)], [process(1, 2 * GB)], {1: 2 * GB}),
    "one that does both, then untold": ([process(1, GB)], [process(1)], {1: GB}),
    "untold": ([process(1)], [], {1: None}),
    "untold, by the largest number": ([process(1, NOT_AVAILABLE)], [], {1: None}),
    "may not list the one kind": (NoPermission(), [process(2, GB)], {2: GB}),
    "may not list the other kind": ([process(1, GB)], NotSupported(), {1: GB}),
}


@pytest.mark.parametrize(("compute", "graphics", "expected"), USERS.values(), ids=USERS)
def test_the_processes_of_both_kinds_are_listed_once(nvml, compute, graphics, expected):
    nvml(gpu(compute=compute, graphics=graphics))
    (found,) = hardware.gpus()
    assert {user.pid: user.used for user in found.processes} == expected
    assert len(found.processes) == len(expected)


HOLDERS = {
    "nobody": ({}, [], ""),
    "this process alone": ({os.getpid(): GB}, [], ""),
    "one": ({4242: 61_234_000_000, os.getpid(): GB}, [4242], "pid 4242 holds 61,234 MB"),
    "an unknown amount is last": (
        {77: None, 4242: 61_234_000_000, 78: 0},
        [4242, 78, 77],
        "pid 4242 holds 61,234 MB, pid 78 holds 0 MB, pid 77 holds an unknown amount",
    ),
    "the largest three are named": (
        {1: GB, 2: None, 3: 3 * GB, 4: 2 * GB, 5: 5 * GB},
        [5, 3, 4, 1, 2],
        "pid 5 holds 5,000 MB, pid 3 holds 3,000 MB, pid 4 holds 2,000 MB and 2 more",
    ),
}


@pytest.mark.parametrize(("users", "order", "text"), HOLDERS.values(), ids=HOLDERS)
def test_the_other_processes_on_a_gpu_are_named_with_their_memory(nvml, users, order, text):
    nvml(gpu(compute=[process(pid, used) for pid, used in users.items()]))
    (found,) = hardware.gpus()
    assert [other.pid for other in hardware.other_gpu_processes(found)] == order
    assert hardware.holders(found) == text


# ---- which GPUs CUDA shows ----

VISIBLE = {
    None: "abcd",
    "": "",
    " ": "",
    "0": "a",
    "2,0": "ca",
    " 2, 0 ": "ca",
    "-1": "",
    "0,2,-1,1": "ac",
    "1,4,0": "b",
    "1,,0": "b",
    "1,x,0": "b",
    "1gpu,2": "bc",  # read as strtoul does
    "NoDevFiles": "",
    "0,0": "",
    "0,1,0": "",
    "0,-1,0": "a",  # what follows the end is not read
    "GPU-b1": "b",
    "GPU-dc,GPU-a1ff": "ca",
    "GPU-a1ff, GPU-b1": "ab",
    "GPU-d": "",  # both c and d begin so
    "GPU-b1,GPU-e,GPU-a1": "b",
    "GPU-b,GPU-b1": "",
    "b1": "",
    "GPU-b1,0": "b",
    "0,GPU-b1": "a",
    "MIG-s": "",
    "MIG-s,MIG-t": "",
    "MIG-s,GPU-b1": "b",
    "GPU-b1,MIG-s,GPU-a1": "ba",
    "MIG-s,GPU-b1,MIG-s": "",
    "0,MIG-s,1": "a",
}
UUIDS = {"a": "GPU-a1ff-00", "b": "GPU-b1ff-00", "c": "GPU-dc1f-00", "d": "GPU-d1ff-00"}


@pytest.mark.parametrize(("variable", "expected"), VISIBLE.items(), ids=repr)
def test_visible_gpus_are_those_of_cuda_visible_devices_in_its_order(nvml, monkeypatch, variable, expected):
    nvml(*(gpu(name, uuid=uuid) for name, uuid in UUIDS.items()))
    if variable is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert "".join(found.name for found in hardware.visible_gpus()) == expected


@pytest.mark.parametrize("variable", ["GPU-a1,", "GPU-a1,G"])
def test_an_invalid_uuid_does_not_select_the_only_gpu(nvml, monkeypatch, variable):
    nvml(gpu(uuid=UUIDS["a"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert len(hardware.visible_gpus()) == 1


def test_two_gpus_without_uuid_and_bus_id_count_as_two(nvml, monkeypatch):
    nvml(*[gpu(uuid=NoPermission(), bus=NoPermission())] * 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert len(hardware.visible_gpus()) == 2


@pytest.mark.parametrize("variable", ["0", "GPU-a1"])
def test_without_a_driver_no_gpu_is_visible(nvml, monkeypatch, variable):
    nvml(init=LibraryNotFound())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert hardware.visible_gpus() == []


# ---- how much of the current one is free ----


@pytest.fixture
def cuda(monkeypatch):
    """A current CUDA device with these properties, and 60 of 80 GB free by its own account."""

    def script(**properties) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (60 * GB, 80 * GB))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(**properties))

    return script


def cuda_says(why: str = ""):
    return (60 * GB, 80 * GB, "cudaMemGetInfo" + why)


UNLISTED = cuda_says("; NVML does not list this GPU")
UNTELLING = cuda_says("; NVML does not tell")
SLICED = cuda_says("; NVML shows no memory of a MIG slice")
NVML_SAYS = (50 * GB, 80 * GB, "NVML")
OURS, OTHER = {"uuid": "bbbb"}, gpu(free=GB, uuid="GPU-aaaa", bus="00000000:01:00.0")
SOCKET = {"pci_domain_id": 0, "pci_bus_id": 0x3B, "pci_device_id": 0}
DEVICES = {
    "no gpu in NVML": (OURS, [], UNLISTED),
    "NVML sees less: another process just took some": (OURS, [gpu(free=50 * GB, uuid="GPU-bbbb")], NVML_SAYS),
    "NVML sees more": (OURS, [gpu(free=70 * GB, uuid="GPU-bbbb")], cuda_says()),
    "matched by UUID, not by index": (OURS, [OTHER, gpu(free=50 * GB, uuid="GPU-bbbb")], NVML_SAYS),
    "a prefix and capitals in the UUID": ({"uuid": "GPU-BBBB"}, [OTHER, gpu(free=50 * GB, uuid="GPU-bbbb")], NVML_SAYS),
    "by UUID rather than by PCI id": (
        OURS | SOCKET,
        [gpu(free=GB), gpu(free=50 * GB, uuid="GPU-bbbb", bus="00000000:4C:00.0")],
        NVML_SAYS,
    ),
    "no UUID in CUDA, by PCI id": (SOCKET, [OTHER, gpu(free=50 * GB)], NVML_SAYS),
    "no such UUID in NVML, by PCI id": (OURS | SOCKET, [OTHER, gpu(free=50 * GB)], NVML_SAYS),
    "no UUID from NVML, by PCI id": (OURS | SOCKET, [OTHER, gpu(free=50 * GB, uuid=NoPermission())], NVML_SAYS),
    "another domain": (SOCKET, [gpu(free=GB, bus="00000001:3B:00.0")], UNLISTED),
    "nothing to match by": ({}, [gpu(free=GB, uuid=NoPermission(), bus=NoPermission())], UNLISTED),
    "another GPU": (OURS, [OTHER], UNLISTED),
    "a slice, which has a UUID of its own": (OURS | SOCKET, [gpu(free=GB, mig=1)], SLICED),
    "a slice, and the whole is not told": (OURS | SOCKET, [gpu(free=NoPermission(), mig=1)], SLICED),
    "a slice, and the whole has no figure": (OURS | SOCKET, [gpu(free=NotSupported(), mig=1)], SLICED),
    "no permission": (OURS, [gpu(free=NoPermission(), uuid="GPU-bbbb")], UNTELLING),
}


@pytest.mark.parametrize(("properties", "devices", "expected"), DEVICES.values(), ids=DEVICES)
def test_free_gpu_memory_is_the_smaller_of_cudas_and_nvmls_value(nvml, cuda, properties, devices, expected):
    nvml(*devices)
    cuda(is_integrated=0, **properties)
    assert hardware.free_gpu_memory() == hardware.FreeMemory(*expected)


@pytest.mark.parametrize("broken", [{"init": LibraryNotFound()}, {"count": NVMLError("unknown error")}], ids=str)
def test_cuda_alone_is_believed_where_nvml_is_broken(nvml, cuda, broken):
    nvml(gpu(free=GB, uuid="GPU-bbbb"), **broken)
    cuda(uuid="bbbb")
    assert hardware.free_gpu_memory() == hardware.FreeMemory(*UNLISTED)


LOW = "MemTotal: 90000000 kB\nMemAvailable: 70000000 kB\n"  # 72 of 92 GB
HIGH = "MemTotal: 120000000 kB\nMemAvailable: 110000000 kB\n"
SHARED = {
    "NVML tells no memory": ({}, NotSupported(), LOW, {}, (70_000_000 * 1024, "MemAvailable (unified memory)")),
    "CUDA says so": ({"is_integrated": 1}, 50 * GB, LOW, {}, (70_000_000 * 1024, "MemAvailable (unified memory)")),
    "no more than CUDA's total": ({"is_integrated": 1}, GB, HIGH, {}, (80 * GB, "MemAvailable (unified memory)")),
    "the group leaves less": (
        {"is_integrated": 1},
        GB,
        LOW,
        v2(f"{9 * GB}", GB),
        (8 * GB, "cgroup memory.max (unified memory)"),
    ),
}


@pytest.mark.parametrize(("properties", "memory", "meminfo", "group", "expected"), SHARED.values(), ids=SHARED)
def test_a_gpu_without_memory_of_its_own_shares_the_hosts(
    nvml, cuda, machine, properties, memory, meminfo, group, expected
):
    nvml(gpu(free=memory, uuid="GPU-bbbb"))
    cuda(uuid="bbbb", **properties)
    machine({"/proc/meminfo": meminfo} | group)
    free, source = expected
    assert hardware.free_gpu_memory() == hardware.FreeMemory(free, 80 * GB, source)
