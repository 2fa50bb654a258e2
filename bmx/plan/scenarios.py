"""Ways to run a job on a machine, compared: each scenario has its plan and its forecast.

Knows sizes and rates; loads no model and reads no file of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import ceil

from bmx import kernels
from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.errors import MemoryLimitError
from bmx.model.loader import RUNTIME_BYTES
from bmx.model.preview import tokenizer_bytes
from bmx.model.spec import ModelSpec
from bmx.model.spec_settings import under_settings
from bmx.plan.builder import PlanBuilder
from bmx.plan.device import Device
from bmx.plan.forecast import Forecast
from bmx.plan.machine import Machine
from bmx.plan.machine_speed import TYPICAL
from bmx.plan.memory import Limits, Memory, does_not_fit, limits
from bmx.plan.planner import Length, Plan
from bmx.policies import DEFAULT_POLICY

BUDGETS = (4096, 2048, 1024, 512, 256, 128, 64)  # tried where the configured budget does not fit
CHUNKS = (256, 128, 64, 32)  # tried where the configured chunk size does not fit
NAMED_ROWS = 5  # rows that are named at most
TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One way to run a job.

    Attributes:
        name: of the kind of cache.
        budget: KV budget, where KV pairs are evicted.
        plan: None where not even one row fits.
        forecast: the expected time; None without a plan, or where the machine's speed is unknown.
        problem: how much memory is missing where not all rows fit.
        left_out: the first of the rows that do not fit, by their ids.
    """

    name: str
    budget: int | float | str | None
    plan: Plan | None
    forecast: Forecast | None
    problem: MemoryLimitError | None = None
    left_out: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every row that can be answered fits."""
        return self.plan is not None and not self.plan.too_large


@dataclass(slots=True)
class FailedRows:
    """Rows that cannot be answered, whatever the memory.

    Attributes:
        code: their error code.
        count: how many were found.
        named: ids and messages of the first of them.
    """

    code: str
    count: int = 0
    named: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str | int, message: str) -> None:
        """Add a row.

        Args:
            name: its id.
            message: why it fails.
        """
        self.count += 1
        if len(self.named) < NAMED_ROWS:
            self.named.append((str(name), message))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanQuery:
    """A job to be planned, known by its sizes alone.

    Attributes:
        config: the settings.
        spec: the model's sizes.
        machine: where the job would run.
        device: that machine, as the memory formula sees it.
        lengths: of the requests, or of every ``every``-th one.
        rows: number of requests.
        every: the sampling interval of ``lengths``.
        probe: tokens of the probe, if there is one.
        names: ids of the requests in ``lengths``; empty for imagined ones.
        failed: rows that were read for ``lengths`` and cannot be answered, by error code.
        skips_too_long: whether rows that are longer than the model takes are left out on purpose.
        workers: how many such machines share the rows; plans are those of one, and the times those of all together.
    """

    config: EngineConfig
    spec: ModelSpec
    machine: Machine
    device: Device
    lengths: tuple[Length, ...]
    rows: int
    every: int = 1
    probe: int = 0
    names: tuple[str, ...] = ()
    failed: tuple[FailedRows, ...] = ()
    skips_too_long: bool = False
    workers: int = 1

    @property
    def measured(self) -> int:
        """Number of rows that were read: those of ``lengths``, and those that cannot be answered."""
        return len(self.lengths) + sum(failed.count for failed in self.failed)

    @property
    def too_long(self) -> bool:
        """Whether some rows are longer than the model takes, and not left out on purpose."""
        return not self.skips_too_long and any(failed.code == TOO_LONG for failed in self.failed)

    @property
    def limits(self) -> Limits:
        """What the job may use."""
        return limits(self.config, self.machine.memory, self.machine.held)

    def options(self, budgets: Sequence[int | float | str]) -> Iterator[Scenario]:
        """The scenarios: Batch-Max with each budget, decode-only compression with the first, and the full cache.

        The others than Batch-Max keep whole prompts in the model's own type. An archive is also compared with the full
        cache in its format. Where nothing is to be evicted, there is the full cache alone, stored as configured.
        """
        if self.config.kv_policy == "none":
            yield self.option("full cache", self.config.full_cache)
            return
        evicting, full = self._evicting(), replace(self.config.full_cache, kv_format="model")
        archive = self.config.kv_archive
        name = f"archive {archive}" if self.config.archives else "batch-max"
        for budget in budgets:
            yield self.option(name, replace(evicting, kv_budget=budget))
        if self.config.archives and archive != "model":
            yield self.option(f"full cache {archive}", replace(full, kv_format=archive))
        yield self.option("decode-only", full, replace(evicting.without_archive, kv_budget=budgets[0]))
        yield self.option("full cache", full)

    def _evicting(self) -> EngineConfig:
        """The settings with a policy that evicts."""
        return replace(self.config, kv_policy=DEFAULT_POLICY) if self.config.kv_policy == "none" else self.config

    def option(self, name: str, config: EngineConfig, then: EngineConfig | None = None) -> Scenario:
        """One scenario.

        Args:
            name: of the kind of cache.
            config: the settings of its run.
            then: settings by which each prompt is compressed, at once and for free, when all of it has been read: the
                best that compression in decoding alone could do.
        """
        builder, after = self._builder(config), CompressionPolicy.from_config(then, self.spec) if then else None
        lengths = self._lengths(builder.policy, after)
        budget = config.kv_budget if builder.policy.scorer else then.kv_budget if then else None
        try:
            plan = builder.plan(lengths)
        except MemoryLimitError as error:
            return Scenario(name=name, budget=budget, plan=None, forecast=None, problem=error)
        forecast, rates = None, self.machine.rates(self.spec.itemsize)
        if rates:
            kept = [after.layout(self.spec, after.rows_needed(g.capacity, 0)) for g in plan.groups] if after else None
            forecast = builder.forecast(plan, lengths, rates, kept)
            forecast = replace(forecast, seconds=forecast.seconds * self.rows / max(1, self.measured) / self.workers)
        problem = does_not_fit(self._alone(builder, lengths), plan.limits) if plan.too_large else None
        return Scenario(
            name=name,
            budget=budget,
            plan=plan,
            forecast=forecast,
            problem=problem,
            left_out=self._left_out(plan, lengths) if plan.too_large else (),
        )

    def _left_out(self, plan: Plan, lengths: Sequence[Length]) -> tuple[str, ...]:
        """The ids of the first rows that a plan has no slot for."""
        largest = max(group.capacity for group in plan.groups)
        names = zip(self.names, lengths, strict=False)
        return tuple(islice((name for name, length in names if length.rows_needed > largest), NAMED_ROWS))

    def _builder(self, config: EngineConfig) -> PlanBuilder:
        machine, spec = self.machine, under_settings(self.spec, config)
        return PlanBuilder(
            config=config,
            spec=spec,
            policy=CompressionPolicy.from_config(config, spec),
            device=self.device,
            kernels=kernels.choose(machine.kind),
            limits=self.limits,
            rates=lambda: machine.rates(self.spec.itemsize) or TYPICAL,
            probe_tokens=self.probe if config.kv_probe else 0,
        )

    def _alone(self, builder: PlanBuilder, lengths: Sequence[Length]) -> Memory:
        """The memory of the largest row alone, in the smallest steps."""
        longest = max(lengths, key=lambda length: length.rows_needed)
        return builder.memory_of_one(longest, builder.step_sizes(lengths)[-1])

    def remedies(self) -> list[str]:
        """Changes that would each make every row fit, the mildest first; at most three."""
        config = self.config
        builder = self._builder(config)
        needed, allowed = self._alone(builder, self._lengths(builder.policy)), builder.limits
        changes = [*self._smaller_settings(config)]
        if needed.total > allowed.total:
            changes.append(f"{needed.total / 1e6:,.0f} MB that may be used instead of {allowed.total / 1e6:,.0f} MB")
            spare = allowed.total - (needed.total - needed.weights)
            if spare > 0:
                most, has = spare / 1e6, needed.weights / 1e6
                changes.append(f"a model with at most {most:,.0f} MB of weights (this one has {has:,.0f} MB)")
        if allowed.pool is not None and needed.pool > allowed.pool:
            changes.append(f"--kv-cache-memory {ceil(needed.pool / 1e6)}M")
        return changes[:3]

    def _smaller_settings(self, config: EngineConfig) -> Iterator[str]:
        """Smaller settings that make every row fit: of the budget, of the chunk size, of both."""
        evicting = self._evicting()
        least, configured = config.kv_sink + config.kv_recent + 1, config.kv_budget
        below = configured if config.kv_policy != "none" and isinstance(configured, int) else 1 << 40
        budgets = [budget for budget in BUDGETS if least <= budget < below]
        for budget in budgets:
            if self._fits(replace(evicting, kv_budget=budget)):
                policy = f"--kv-policy {DEFAULT_POLICY} " if config.kv_policy == "none" else ""
                yield f"{policy}--kv-budget {budget}"
                break
        for chunk in CHUNKS:
            if chunk < config.eviction_chunk_size and self._fits(replace(config, chunk_size=chunk)):
                yield f"--chunk-size {chunk}"
                break
        narrow = replace(config, state_format="bfloat16")
        if self.spec.states and narrow != config and self._fits(narrow):
            yield "--state-format bfloat16"
        both = [(b, c) for b in budgets for c in CHUNKS if c < config.eviction_chunk_size]
        for budget, chunk in both:
            if self._fits(replace(evicting, kv_budget=budget, chunk_size=chunk)):
                policy = f"--kv-policy {DEFAULT_POLICY} " if config.kv_policy == "none" else ""
                yield f"{policy}--kv-budget {budget} --chunk-size {chunk}"
                break

    def _lengths(self, policy: CompressionPolicy, after: CompressionPolicy | None = None) -> list[Length]:
        """The lengths, with the rows that they need under a policy.

        Args:
            policy: which KV pairs stay in a slot.
            after: the policy that compresses a prompt once all of it has been read, so that all of it must fit.
        """

        def rows(length: Length) -> int:
            needed = (after or policy).rows_needed(length.prompt_tokens, length.max_tokens)
            return max(length.prompt_tokens, needed) if after else needed

        measured = CompressionPolicy.from_config(self.config, self.spec)
        kinds = [(one.scorer is None, one.key_format, one.value_format) for one in (policy, measured)]
        alike = after is None and policy.archive is None and kinds[0] == kinds[1]

        def in_place(length: Length) -> int:
            evicts = policy.evicts(length.prompt_tokens, length.max_tokens)
            return length.in_place if alike and not evicts else 0

        return [
            replace(
                length,
                rows_needed=rows(length),
                reading_rows=policy.reading_rows(length.prompt_tokens),
                in_place=in_place(length),
            )
            for length in self.lengths
        ]

    def _fits(self, config: EngineConfig) -> bool:
        builder = self._builder(config)
        return not builder.limits.missing(self._alone(builder, self._lengths(builder.policy)))


def device_of(machine: Machine, spec: ModelSpec, config: EngineConfig, *, tokenizer: bool = True) -> Device:
    """A machine as the memory formula sees it, with what a process there is expected to hold beside the model.

    Args:
        machine: where the job would run.
        spec: the model's sizes.
        config: the settings.
        tokenizer: whether the process holds the model's tokenizer.
    """
    held = tokenizer_bytes(config) if machine.kind == "cpu" and tokenizer else 0
    return Device.of(machine.kind, spec, RUNTIME_BYTES[machine.kind] + held, config)
