"""The settings of the workers: how many, where, and when one counts as hung.

Each setting is declared once, as a field with its type, its default and its ``Setting``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Annotated

from bmx.config import MAX_SLOTS, EngineConfig
from bmx.settings import NEVER, RUN, Setting
from bmx.units import parse_count, parse_seconds

AUTO = "auto"  # the address of a Ray cluster that this machine belongs to


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The workers of a job, each with a model of its own, on this machine or on a Ray cluster.

    Attributes:
        workers: how many; None for one in this process, or on a cluster for as many as it has GPUs.
    """

    workers: Annotated[
        int | None,
        Setting(
            "Models that answer at once, each on a GPU of its own, or with an equal share of the CPU's threads; "
            "needs Ray (default: one, without Ray)",
            decides_answers=NEVER,
            unit="workers",
            metavar="N",
            parse=parse_count,
            commands=("run", "plan-batch"),
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        Setting(
            "A Ray cluster that stands already, for the workers: auto, or HOST:PORT",
            decides_answers=NEVER,
            commands=RUN,
            metavar="ADDRESS",
            rare=True,
        ),
    ] = None
    worker_timeout: Annotated[
        float,
        Setting(
            "A worker that computes nothing for this long is ended and started again; its rows go to others",
            decides_answers=NEVER,
            unit="seconds",
            parse=parse_seconds,
            commands=RUN,
            rare=True,
        ),
    ] = 600.0

    @property
    def count(self) -> int:
        """How many workers there are, where no cluster says it."""
        return self.workers or 1

    @property
    def uses_ray(self) -> bool:
        """Whether rows are answered by workers, and not in this process."""
        return self.ray_address is not None or self.count > 1

    def of_each_worker(self, engine: EngineConfig, rows: int) -> EngineConfig:
        """The settings of each worker's engine, which answers no more rows at once than its share of them.

        Args:
            engine: the settings of the job.
            rows: of the job.
        """
        if self.count == 1:
            return engine
        return replace(engine, max_num_seqs=min(engine.max_num_seqs or MAX_SLOTS, ceil(rows / self.count)))
