"""What would fit: a model, a machine and the lengths of requests become options, each with its plan and forecast.

Knows sizes and rates; loads no model and reads no file of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from bmx import kernels
from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.errors import MemoryLimitError
from bmx.model.loader import RUNTIME_BYTES
from bmx.model.preview import tokenizer_bytes
from bmx.model.spec import ModelSpec
from bmx.plan.builder import PlanBuilder
from bmx.plan.device import Device
from bmx.plan.forecast import Forecast
from bmx.plan.machine import Machine
from bmx.plan.machine_speed import TYPICAL
from bmx.plan.memory import Memory, does_not_fit, limits
from bmx.plan.planner import Length, Plan

BUDGETS = (4096, 2048, 1024, 512, 256, 128, 64)  # that are tried where the one asked for does not fit
CHUNKS = (256, 128, 64, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One way to run the job, and what comes of it.

    ``plan`` is None where not one row fits; ``problem`` says then, or of rows that do not fit, how much is missing.
    """

    name: str
    budget: int | float | str | None
    plan: Plan | None
    forecast: Forecast | None
    problem: MemoryLimitError | None = None

    @property
    def fits(self) -> bool:
        """Whether every row fits."""
        return self.plan is not None and not self.plan.too_large


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanQuery:
    """A job of which nothing is known but sizes.

    Attributes:
        device: the machine, as the closed form sees it.
        lengths: of its requests, or of every ``every``-th of them.
        rows: requests in all.
        probe: tokens of the probe, where one is asked.
    """

    config: EngineConfig
    spec: ModelSpec
    machine: Machine
    device: Device
    lengths: tuple[Length, ...]
    rows: int
    every: int = 1
    probe: int = 0

    def options(self, budgets: Sequence[int | float | str]) -> Iterator[Scenario]:
        """Batch-Max with each budget, decode-only compression with the first, and the full cache."""
        evicting, full = self._evicting(), self.config.full_cache
        for budget in budgets:
            yield self.option("batch-max", replace(evicting, kv_budget=budget))
        yield self.option("decode-only", full, replace(evicting, kv_budget=budgets[0]))
        yield self.option("full cache", full)

    def _evicting(self) -> EngineConfig:
        """The settings, with a policy that evicts."""
        return replace(self.config, kv_policy="average-attention") if self.config.kv_policy == "none" else self.config

    def option(self, name: str, config: EngineConfig, then: EngineConfig | None = None) -> Scenario:
        """One plan and its forecast.

        Args:
            then: settings that compress at once and for free when a whole prompt has been read: the best that
                compression in decoding alone could do.
        """
        builder, after = self._builder(config), CompressionPolicy.from_config(then) if then else None
        lengths = self._lengths(builder.policy, after)
        budget = config.kv_budget if builder.policy.scorer else then.kv_budget if then else None
        try:
            plan = builder.plan(lengths)
        except MemoryLimitError as error:
            return Scenario(name=name, budget=budget, plan=None, forecast=None, problem=error)
        forecast, rates = None, self.machine.rates()
        if rates:
            kept = [after.layout(self.spec, after.rows_needed(g.capacity, 0)) for g in plan.groups] if after else None
            forecast = builder.forecast(plan, lengths, rates, kept)
            forecast = replace(forecast, seconds=forecast.seconds * self.rows / max(1, len(lengths)))
        problem = does_not_fit(self._alone(builder, lengths), plan.limits) if plan.too_large else None
        return Scenario(name=name, budget=budget, plan=plan, forecast=forecast, problem=problem)

    def _builder(self, config: EngineConfig) -> PlanBuilder:
        machine = self.machine
        return PlanBuilder(
            config=config,
            spec=self.spec,
            policy=CompressionPolicy.from_config(config),
            device=self.device,
            kernels=kernels.choose(machine.kind),
            limits=limits(config, machine.memory, machine.held),
            rates=lambda: machine.rates() or TYPICAL,
            probe_tokens=self.probe if config.kv_probe else 0,
        )

    def _alone(self, builder: PlanBuilder, lengths: Sequence[Length]) -> Memory:
        """The memory of the largest row alone, in the smallest steps."""
        return builder.memory_of_one(max(length.rows_needed for length in lengths), builder.step_sizes(lengths)[-1])

    def remedies(self) -> list[str]:
        """Changes of which each alone makes every row fit, the mildest first; at most three."""
        config = self.config
        builder = self._builder(config)
        needed, allowed = self._alone(builder, self._lengths(builder.policy)), builder.limits
        found = [*self._smaller_settings(config)]
        if needed.total > allowed.total:
            found.append(f"{needed.total / 1e6:,.0f} MB that may be used instead of {allowed.total / 1e6:,.0f} MB")
            spare = allowed.total - (needed.total - needed.weights)
            if spare > 0:
                most, has = spare / 1e6, needed.weights / 1e6
                found.append(f"a model with at most {most:,.0f} MB of weights (this one has {has:,.0f} MB)")
        if allowed.pool is not None and needed.pool > allowed.pool:
            found.append(f"--kv-cache-memory {ceil(needed.pool / 1e6)}M")
        return found[:3]

    def _smaller_settings(self, config: EngineConfig) -> Iterator[str]:
        """Settings that make every row fit."""
        evicting = self._evicting()
        least, asked = config.kv_sink + config.kv_recent + 1, config.kv_budget
        most = asked if config.kv_policy != "none" and isinstance(asked, int) else 1 << 40
        budgets = [b for b in BUDGETS if least <= b < most]
        for budget in budgets:
            if self._fits(replace(evicting, kv_budget=budget)):
                yield f"--kv-budget {budget}" + (
                    " with --kv-policy average-attention" if config.kv_policy == "none" else ""
                )
                break
        for chunk in CHUNKS:
            if chunk < config.eviction_chunk_size and self._fits(replace(config, chunk_size=chunk)):
                yield f"--chunk-size {chunk}"
                break
        both = [(b, c) for b in budgets for c in CHUNKS if c < config.eviction_chunk_size]
        for budget, chunk in both:
            if self._fits(replace(evicting, kv_budget=budget, chunk_size=chunk)):
                yield f"--kv-budget {budget} --chunk-size {chunk}"
                break

    def _lengths(self, policy: CompressionPolicy, after: CompressionPolicy | None = None) -> list[Length]:
        """The lengths with the rows that they need; where compression waits for a prompt's end, all of the prompt's."""

        def rows(one: Length) -> int:
            needed = (after or policy).rows_needed(one.prompt_tokens, one.max_tokens)
            return max(one.prompt_tokens, needed) if after else needed

        return [replace(one, rows_needed=rows(one)) for one in self.lengths]

    def _fits(self, config: EngineConfig) -> bool:
        builder = self._builder(config)
        return not builder.limits.missing(self._alone(builder, self._lengths(builder.policy)))


def device_of(machine: Machine, spec: ModelSpec, config: EngineConfig) -> Device:
    """A machine as the closed form sees it, with what a process there is expected to hold beside the model."""
    tokenizer = tokenizer_bytes(config) if machine.kind == "cpu" else 0
    return Device.of(machine.kind, spec, RUNTIME_BYTES[machine.kind] + tokenizer, config)
