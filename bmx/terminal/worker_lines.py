"""What is said about the workers of a job, as lines of text: their plans, and what each has done.

Knows workers, plans and counters; prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bmx.terminal.reports import Line, plan_range
from bmx.terminal.tables import counted, megabytes

if TYPE_CHECKING:
    from bmx.cluster.worker_state import WorkerState


def worker_plan_lines(workers: Sequence[WorkerState]) -> Iterator[Line]:
    """The plans of all workers: one line if they are alike, else one for each."""
    plans = [worker.plan for worker in workers if worker.plan]
    slots, nbytes = sum(plan.slots for plan in plans), sum(plan.memory.total for plan in plans)
    hosts = len({worker.host for worker in workers})
    where = f" on {counted(hosts, 'machine')}" if hosts > 1 else ""
    yield Line(f"{counted(len(workers), 'worker')}{where}: {counted(slots, 'slot')} and {megabytes(nbytes)} in all")
    if len({(plan.groups, worker.model["device"]) for plan, worker in zip(plans, workers, strict=True)}) == 1:
        return
    for worker in workers:
        if worker.plan:
            slots_of_it, memory = plan_range(worker.plan.groups), megabytes(worker.plan.memory.total)
            yield Line(f"{worker_name(worker)}: {slots_of_it}, memory {memory}")


def worker_name(worker: WorkerState) -> str:
    """A worker for people: its number, its machine and its device."""
    return f"worker {worker.number} on {worker.host} ({worker.model['device']})"


def worker_lines(workers: Sequence[WorkerState]) -> Iterator[Line]:
    """What each worker has done."""
    for worker in workers:
        stats = worker.stats
        rates = f"prompt {stats.prefill_rate:,.0f} tok/s, generated {stats.generated_rate:,.0f} tok/s"
        again = f", started again {counted(worker.restarts, 'time')}" if worker.restarts else ""
        yield Line(f"{worker_name(worker)}: {counted(worker.answers, 'answer')}, {rates}{again}")
