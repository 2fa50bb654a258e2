"""A worker as the driver knows it: data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bmx.cluster.machines import Machine, Share
from bmx.plan.planner import Plan
from bmx.stats import Stats


@dataclass(slots=True, kw_only=True)
class WorkerState:
    """A worker as the driver knows it.

    Attributes:
        number: from 1 on, for people.
        machine: where it is.
        share: its share of that machine.
        model: what computes its answers, as ``Engine.describe`` says it.
        plan: its own plan; None before it has one.
        stats: its counters since it was last started, or began a run.
        past: the counters of its runs before.
        restarts: how often it was started again.
    """

    number: int
    machine: Machine
    share: Share
    model: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    stats: Stats = field(default_factory=Stats)
    past: list[Stats] = field(default_factory=list)
    restarts: int = 0

    @property
    def answers(self) -> int:
        """How many rows it has answered."""
        return sum(stats.finish_reasons.total() for stats in (self.stats, *self.past))

    @property
    def host(self) -> str:
        """The name of its machine."""
        return self.machine.host
