"""The processes that share one model: starting the others, giving them orders, and what happens when one fails.

This process leads: it has the engine and the first part of the model. Each other one has another part, and computes
the same steps on it (``bmx/engine/follower.py``). Orders go over a socket to each of them; tensors by torch's process
group, which is gloo on CPUs and NCCL on GPUs. A follower ends when the socket does, so that none outlives its leader.

Where one fails in the midst of a step, the others wait for it. So a follower that fails says why and ends, its end is
seen by a thread here, and the whole group is ended: what waits for it raises an error. It is started again when it is
needed next.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from socket import socketpair
from typing import Any

from torch import cuda, device, distributed

from bmx import hardware
from bmx.config import EngineConfig
from bmx.engine.memory_meter import is_out_of_memory
from bmx.errors import BmxError, DeviceError, UsageError

FOLLOWER = "bmx.engine.follower"
LOOPBACK = "lo"  # all processes of a group are on one machine
NETWORKS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
NCCL_GOES_ON = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")  # a failed call is an error, and does not end the process
NOTICED = 5.0  # seconds within which the end of a process is seen by the others
BRIEFLY = 0.5
SAVED = "Finished answers are saved. Run the same command again; if it happens again, see the system's log"
GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What a follower is told first.

    Attributes:
        config: the settings.
        source: folder or hub id of the model.
        rank: its number; the leader's is 0.
        store: path of the file by which the processes find each other.
        kind: of device, ``cpu`` or ``cuda``.
    """

    config: EngineConfig
    source: str
    rank: int
    store: str
    kind: str

    def join(self) -> None:
        """Enter torch's process group; returns when all have."""
        for name in NETWORKS:
            os.environ.setdefault(name, LOOPBACK)
        size = self.config.tensor_parallel_size
        on_gpu = self.kind == "cuda"
        if on_gpu:
            os.environ.setdefault(*NCCL_GOES_ON)
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=distributed.FileStore(self.store, size),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=size,
            device_id=device("cuda", 0) if on_gpu else None,  # each process sees its own GPU as the first one
        )


@dataclass(frozen=True, slots=True)
class Report:
    """Why a follower has ended: whether memory ran out, and a line of text."""

    out_of_memory: bool
    text: str


@dataclass(slots=True)
class _Follower:
    """A process, the socket to it, what it has answered, and why it ended: what it says, or the code of its end."""

    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection
    answers: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    report: Report | None = None
    code: int | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class Group:
    """The followers of this process, while they run.

    Args:
        config: the settings; ``tensor_parallel_size`` says how many processes there are.
        source: folder or hub id of the model.
        kind: of device, ``cpu`` or ``cuda``.

    Raises:
        UsageError: there are too few GPUs, or this process is in a group already.
    """

    def __init__(self, config: EngineConfig, source: str, kind: str) -> None:
        self.size = config.tensor_parallel_size
        _check_devices(self.size, kind)
        self._folder = Path(tempfile.mkdtemp(prefix="bmx-group-"))  # which no other user may read
        self._followers: list[_Follower] = []
        self.closed = False
        self._releasing = threading.Lock()  # taken once, and kept
        own = Membership(config=config, source=source, rank=0, store=str(self._folder / "store"), kind=kind)
        try:
            with self.failures():
                for rank in range(1, self.size):
                    self._followers.append(self._start(rank, kind))
                self.answers()  # they have started, and nothing of what they need is missing
                for follower in self._followers:
                    _send(follower, replace(own, rank=follower.rank))
                own.join()
        except BaseException:
            self.close()
            raise

    def _start(self, rank: int, kind: str) -> _Follower:
        """Start a process, and watch it."""
        ours, theirs = socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", FOLLOWER, str(theirs.fileno())],
                env=_environment(rank, self.size, kind),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        follower = _Follower(rank, process, Connection(ours.detach()))
        threading.Thread(target=self._watch, args=(follower,), daemon=True).start()
        return follower

    def _watch(self, follower: _Follower) -> None:
        """Take what a follower says, until it ends; then let nothing wait for it any more."""
        with suppress(EOFError, OSError):
            while True:
                answer = follower.connection.recv()
                if isinstance(answer, Report):
                    follower.report = answer
                else:
                    follower.answers.put(answer)
        if not self.closed and self._releasing.acquire(blocking=False):
            with suppress(subprocess.TimeoutExpired):
                follower.process.wait(NOTICED)
            self._release()
        follower.ended.set()

    def _release(self) -> None:
        """End all followers, and what waits for them: connections of gloo end with them, kernels of NCCL by order."""
        for follower in self._followers:
            follower.code = follower.process.poll()  # of those that have ended of themselves
            follower.process.kill()
        with suppress(Exception):  # there is no group yet, or none any more
            distributed.distributed_c10d._get_default_group().abort()

    def tell(self, name: str, *values: Any) -> None:
        """Give all followers an order.

        Args:
            name: of the order, a method of ``Following``.
            values: its arguments.
        """
        for follower in self._followers:
            _send(follower, (name, values))

    def answers(self) -> list[Any]:
        """Wait for one answer of each follower.

        Raises:
            ConnectionError: one has ended.
        """
        return [_answer_of(follower) for follower in self._followers]

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Compute with the followers; an error in it ends the group, and is told as what caused it.

        Raises:
            MemoryError: memory ran out in another process.
            DeviceError: another process failed, or was killed.
        """
        try:
            yield
        except BaseException as error:
            own = is_out_of_memory(error) or not isinstance(error, RuntimeError | OSError | BmxError)
            cause = None if own else self._cause(known=isinstance(error, BmxError))
            self.close()
            if cause is None:
                raise
            raise cause from error

    def _cause(self, known: bool) -> Exception | None:
        """Why the followers ended that did so of themselves; None if none did.

        Args:
            known: whether there is an error that says more than a follower that fails in the same way.
        """
        until = time.monotonic() + (BRIEFLY if known else NOTICED)
        for follower in self._followers:
            follower.ended.wait(max(0.0, until - time.monotonic()))
        reports = [follower.report for follower in self._followers if follower.report]
        for report in reports:
            if report.out_of_memory:
                return MemoryError(f"out of memory: {report.text}")
        for follower in self._followers:
            if follower.report is None and follower.code is not None:
                how = f"signal {-follower.code}" if follower.code < 0 else f"exit code {follower.code}"
                message = f"the process with part {follower.rank + 1} of {self.size} of the model ended ({how})"
                return DeviceError(message, hint=SAVED)
        if known or not reports:
            return None
        return DeviceError(f"a process with a part of the model failed: {reports[0].text}", hint=SAVED)

    def close(self) -> None:
        """End the followers, and leave torch's process group."""
        if self.closed:
            return
        self.closed = True
        for follower in self._followers:
            follower.process.kill()  # they hold nothing that must be saved
        for follower in self._followers:
            follower.process.wait()
            follower.ended.wait(NOTICED)
            follower.connection.close()
        with suppress(Exception):  # that of a broken group may fail
            if distributed.is_initialized():
                distributed.destroy_process_group()
        shutil.rmtree(self._folder, ignore_errors=True)


def _check_devices(size: int, kind: str) -> None:
    """Refuse a group that cannot be.

    Raises:
        UsageError: there are too few GPUs, or this process is in a group already.
    """
    if distributed.is_initialized():
        raise UsageError(
            "tensor_parallel_size: this process is in a torch process group already",
            hint="close the other engine first, or open this one in a process of its own",
        )
    if kind == "cuda" and cuda.device_count() < size:
        found = cuda.device_count()
        message = f"--tensor-parallel-size {size} needs {size} GPUs, and there are {found}"
        raise UsageError(message, hint="lower it, or check CUDA_VISIBLE_DEVICES")
    if kind == "cpu" and cuda.is_available():
        message = "--tensor-parallel-size: transformers splits models over the GPUs of a machine that has some"
        raise UsageError(message, hint=f"hide them to try it on the CPU: {GPUS}= bmx run ...")


def _environment(rank: int, size: int, kind: str) -> dict[str, str]:
    """The environment of a follower: its own GPU alone, or its share of the CPU's threads."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    if kind == "cuda":
        visible = [gpu for gpu in os.environ.get(GPUS, "").split(",") if gpu] or [str(gpu) for gpu in range(size)]
        return {**environment, GPUS: visible[rank]}
    return {"OMP_NUM_THREADS": str(max(1, hardware.usable_cores() // size)), **environment}


def _send(follower: _Follower, message: Any) -> None:
    follower.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def _answer_of(follower: _Follower) -> Any:
    """The next answer of a follower.

    Raises:
        ConnectionError: it has ended.
    """
    while True:
        try:
            return follower.answers.get(timeout=0.1)
        except Empty:
            if follower.ended.is_set() and follower.answers.empty():
                raise ConnectionError(f"follower {follower.rank} has ended") from None
