"""What the driver needs of whatever starts workers and carries calls to them: Ray, or a stand-in of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from bmx.cluster.machines import Machine

RESUME = "finished answers are saved; run the same command again to resume"


class DeadWorkerError(Exception):
    """The process of a worker has ended, and will be started again; the message says why, for people."""


Call = Any  # a call that was made and whose result may still be under way; of a stream, its next item


class Crew(Protocol):
    """Workers with numbers from 0 on."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def gpus(self) -> bool:
        """Whether each has a GPU."""

    def shared(self, value: Any) -> Any:
        """A large argument of several calls, sent only once to each machine."""

    def machine(self, worker: int) -> Call:
        """Ask where a worker is. One that has died answers when it was started again."""

    def call(self, worker: int, method: str, *arguments: Any) -> Call:
        """Call a method of ``Worker`` by its name."""

    def answers(self, worker: int, *arguments: Any) -> Call:
        """Call ``Worker.answers``: a stream of reports."""

    def ready(self, calls: Sequence[Call], seconds: float) -> list[Call]:
        """The calls that have given something, as soon as one has; none when the seconds are over.

        Raises:
            BmxError: what carries the calls has ended.
        """

    def take(self, call: Call) -> Any:
        """What a call has given; waits for it.

        Raises:
            DeadWorkerError: its worker did not live to give it.
            BmxError: what the worker raised.
        """

    def kill(self, worker: int, machine: Machine) -> None:
        """End a worker's process, whatever it does; it is started again."""
