"""Where the workers are: what each says of its machine, and which share of that machine it gets.

Knows figures; starts nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import bmx
from bmx import hardware
from bmx.config import FAKE, EngineConfig
from bmx.errors import UsageError

THREADS = "OMP_NUM_THREADS"  # what it says is the number of threads of each worker
LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a worker says of itself before it loads anything.

    Attributes:
        node: tells one machine of a cluster from another.
        host: its name, for people.
        pid: the worker's process.
        version: of bmx.
        libraries: versions of those that compute.
        cores: that the worker may use.
        free_memory: free bytes of the host.
    """

    node: str
    host: str
    pid: int
    version: str
    libraries: tuple[tuple[str, str], ...]
    cores: int
    free_memory: int


@dataclass(frozen=True, slots=True)
class Share:
    """A worker's share of its machine: threads, and bytes of memory or None where a GPU's count."""

    threads: int
    memory: int | None


def this_machine(node: str) -> Machine:
    """The machine of this process; ``node`` names it."""
    return Machine(
        node=node,
        host=os.uname().nodename,
        pid=os.getpid(),
        version=bmx.__version__,
        libraries=tuple((name, _version(name)) for name in LIBRARIES),
        cores=hardware.usable_cores(),
        free_memory=hardware.free_host_memory().free,
    )


def _version(library: str) -> str:
    loaded = sys.modules.get(library)
    try:
        return str(loaded.__version__) if loaded else version(library)
    except (PackageNotFoundError, AttributeError):
        return "none"


def check_alike(machines: Sequence[Machine]) -> None:
    """Refuse workers that would answer in different ways.

    Raises:
        UsageError: a worker has another version of bmx, or of a library that computes.
    """
    own = this_machine("")
    for number, machine in enumerate(machines, 1):
        for name, here, there in (
            ("bmx", own.version, machine.version),
            *((name, here, dict(machine.libraries).get(name)) for name, here in own.libraries),
        ):
            if here != there:
                raise UsageError(
                    f"worker {number} on {machine.host} has {name} {there}, this machine {here}",
                    hint=f"install {name} {here} on every machine of the cluster",
                )


def shares(machines: Sequence[Machine], config: EngineConfig, gpus: bool) -> list[Share]:
    """The share of each worker: those of one machine divide its threads and its free memory equally.

    Args:
        machines: of each worker.
        config: the settings; a memory limit among them is that of each worker.
        gpus: whether each worker has a GPU, whose memory is its own.
    """
    on_node = Counter(machine.node for machine in machines)
    free = {machine.node: machine.free_memory for machine in machines}
    given = re.match("[ ]*([0-9]+)", os.environ.get(THREADS, ""))
    found = []
    for machine in machines:
        threads = (
            int(given[1]) if given else max(1, machine.cores // (on_node[machine.node] * config.tensor_parallel_size))
        )
        divided = config.memory_limit is None and not gpus and config.model != FAKE
        memory = int(free[machine.node] * config.gpu_memory_utilization) // on_node[machine.node] if divided else None
        found.append(Share(threads, memory))
    return found
