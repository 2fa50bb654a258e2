"""A process that holds a part of a model and computes what the leader tells it: ``python -m bmx.engine.follower FD``.

Knows the orders of ``bmx/engine/group_runner.py`` and ``bmx/engine/group_backend.py``. It ends when the socket does,
and when anything fails, with a report of why.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from bmx.compress.policy import CompressionPolicy
from bmx.engine.backend import ModelBackend
from bmx.engine.group import Membership, Report
from bmx.engine.group_runner import FollowingRunner, SentChunk
from bmx.engine.memory_meter import bound_kernel_caches, is_out_of_memory, release
from bmx.errors import MemoryLimitError
from bmx.kv.layout import SlotIndex
from bmx.model.loader import load_model
from bmx.model.spec import ModelSpec
from bmx.plan.memory import StepSize
from bmx.plan.planner import Plan


class Following:
    """A part of the model, and the runner of the plan that is being followed. Its methods are the leader's orders.

    Args:
        membership: what is to be loaded, and which part of it.
        connection: to the leader, for answers.
    """

    def __init__(self, membership: Membership, connection: Connection) -> None:
        membership.join()
        self._backend = ModelBackend(load_model(membership.source, membership.config))
        self._connection, self._entered = connection, ExitStack()
        self._runner: FollowingRunner | None = None
        self._tried: tuple[ModelSpec, CompressionPolicy] | None = None

    def begin(self, spec: ModelSpec, plan: Plan, policy: CompressionPolicy, probe: tuple[int, ...]) -> None:
        """Hold the slots of a plan."""
        if self._tried != (spec, policy):
            self._backend.try_kernels(spec, policy)
            self._tried = spec, policy
        self._runner = FollowingRunner(self._backend.loaded, policy, plan, self._backend.kernels, probe)
        self._entered.enter_context(self._runner)
        self._connection.send("ready")

    def step(self, chunks: tuple[SentChunk, ...]) -> None:
        """Compute a step."""
        self._running.follow(chunks)

    def copy(self, source: SlotIndex, target: SlotIndex, tokens: int) -> None:
        """Copy a slot's state."""
        self._running.copy(source, target, tokens)

    def profile(self, size: StepSize, sampled: int) -> None:
        """Compute the largest step, so that its memory can be measured."""
        self._running.profile_step(size, sampled)
        self._connection.send("done")

    def end(self) -> None:
        """Free the slots."""
        self._entered.close()
        self._runner = None
        release()

    def free(self) -> None:
        """Say how many bytes this process could hold on its device in all."""
        meter = self._backend.meter
        self._connection.send(meter.free_memory().free + meter.held)

    @property
    def _running(self) -> FollowingRunner:
        """The runner.

        Raises:
            RuntimeError: no plan has begun.
        """
        if self._runner is None:
            raise RuntimeError("no plan has begun")
        return self._runner


def follow(connection: Connection) -> None:
    """Do what the leader says, in order, until the connection ends; then this process ends at once."""
    orders: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, orders), daemon=True).start()
    connection.send("started")
    following = Following(orders.get(), connection)
    while True:
        name, values = orders.get()
        getattr(following, name)(*values)


def _receive(connection: Connection, orders: SimpleQueue[Any]) -> None:
    """Queue what the leader says, so that its end is seen in the midst of a step too."""
    folder: Path | None = None
    try:
        while True:
            order = connection.recv()
            folder = Path(order.store).parent if isinstance(order, Membership) else folder
            orders.put(order)
    except (EOFError, OSError):
        if folder:
            shutil.rmtree(folder, ignore_errors=True)  # which a leader that was killed has left
        os._exit(0)


def main() -> None:
    """Follow the leader at the other end of the socket whose number is the argument."""
    for interrupt in (signal.SIGINT, signal.SIGTERM):  # the leader ends its steps in order, and then this process
        signal.signal(interrupt, signal.SIG_IGN)
    logging.disable(logging.WARNING)  # the leader says it too
    bound_kernel_caches()
    connection = Connection(int(sys.argv[1]))
    try:
        follow(connection)
    except BaseException as error:  # also what a scorer of another package raises
        text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        connection.send(Report(is_out_of_memory(error) or isinstance(error, MemoryLimitError), text))
    os._exit(1)  # without waiting for threads of a group that is broken


if __name__ == "__main__":
    main()
