"""The workers as Ray's actors: their calls, what these give, and what is known when one dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bmx.cluster.crew import RESUME, Call, DeadWorkerError
from bmx.cluster.machines import Machine
from bmx.cluster.ray_cluster import lost_processes
from bmx.cluster.worker import Report, Worker
from bmx.errors import BmxError

THREADS = 4  # calls of one worker at once: its answers, rows that are fed to it, a stop
REPORTS = 8  # that wait to be read, before a worker waits


class Actor:
    """A worker in a process of its own. Errors that a person can understand are values here: Ray changes their type."""

    def __init__(self) -> None:
        self._worker = Worker()
        self._life = 0

    def machine(self) -> Machine:
        """The machine that it is on."""
        return self._worker.machine(ray.get_runtime_context().get_node_id())

    def call(self, name: str, *arguments: Any) -> Any:
        """A method of the worker, by its name; a ``BmxError`` is returned."""
        try:
            return getattr(self._worker, name)(*arguments)
        except BmxError as error:
            return error

    def answers(self, *arguments: Any) -> Iterator[Report]:
        """The worker's reports."""
        yield from self._worker.answers(*arguments)


class RayCrew:
    """The actors of a job, each a worker with a number from 0 on.

    Args:
        count: how many.
        gpus: that each has.

    Attributes:
        gpus: whether each has one.
    """

    def __init__(self, count: int, gpus: int) -> None:
        actor = ray.remote(Actor).options(
            num_cpus=0,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=THREADS,
            scheduling_strategy="SPREAD",
        )
        self.gpus = gpus > 0
        self._actors: list[Any] = [actor.remote() for _ in range(count)]

    @property
    def size(self) -> int:
        """See ``Crew``."""
        return len(self._actors)

    def shared(self, value: Any) -> Any:
        """See ``Crew``."""
        return ray.put(value)

    def machine(self, worker: int) -> Call:
        """See ``Crew``."""
        return self._actors[worker].machine.options(max_task_retries=-1).remote()

    def call(self, worker: int, method: str, *arguments: Any) -> Call:
        """See ``Crew``."""
        return self._actors[worker].call.remote(method, *arguments)

    def answers(self, worker: int, *arguments: Any) -> Call:
        """See ``Crew``."""
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": REPORTS}
        return self._actors[worker].answers.options(**options).remote(*arguments)

    def ready(self, calls: Sequence[Call], seconds: float) -> list[Call]:
        """See ``Crew``."""
        if lost := lost_processes():
            raise BmxError(f"Ray's {' and '.join(lost)} ended", hint=RESUME)
        if not calls:
            time.sleep(seconds)
            return []
        found: list[Call] = ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]
        return found or ray.wait(list(calls), num_returns=1, timeout=seconds)[0]

    def take(self, call: Any) -> Any:
        """See ``Crew``."""
        try:
            value = ray.get(next(call) if isinstance(call, ray.ObjectRefGenerator) else call)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except StopIteration:
            raise DeadWorkerError("its answers ended") from None
        except RayError as error:
            raise DeadWorkerError(_why(error)) from error
        if isinstance(value, BmxError):
            raise value
        return value

    def kill(self, worker: int, machine: Machine) -> None:
        """See ``Crew``. Ray asks the process to end, which one that hangs does not: the system ends it then."""
        ray.kill(self._actors[worker], no_restart=False)
        if machine.node == ray.get_runtime_context().get_node_id():
            _end_process(machine.pid)
        else:
            there = NodeAffinitySchedulingStrategy(machine.node, soft=False)
            ray.remote(_end_process).options(num_cpus=0, scheduling_strategy=there).remote(machine.pid)


def _end_process(pid: int) -> None:
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def _why(error: RayError) -> str:
    """Why a worker died, in a line."""
    text = " ".join(str(error).split())
    if "creation task" in text:
        return f"it cannot be started: {str(error).strip().splitlines()[-1]}"
    return "its machine is gone" if "node" in text.lower() and "died" in text else "its process was killed"


def gpus_of_cluster() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def nodes_of_cluster() -> int:
    """Machines of the cluster that live."""
    return sum(bool(node["Alive"]) for node in ray.nodes())
