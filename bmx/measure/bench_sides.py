"""Measures one side of a bench: a cache answering prompts, or the upper bound of decode-only compression.

Knows plans, runs and their counters. Which sides are compared, and the machine's rates, are the business of ``bench``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from bmx.compress.policy import CompressionPolicy
from bmx.errors import BmxError, MemoryLimitError
from bmx.plan.memory import SlotGroup
from bmx.plan.planner import Length, Plan
from bmx.plan.roofline import held_rows, prefill_flops, weights_read
from bmx.request import Request, SamplingParams
from bmx.stats import Stats
from bmx.terminal.display import Display

if TYPE_CHECKING:
    from bmx.engine.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The work of a cell, the same for all of its sides.

    Attributes:
        prompts: token ids of each prompt.
        answer_tokens: tokens that are generated for each prompt.
    """

    prompts: list[list[int]]
    answer_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(map(len, self.prompts))

    @property
    def prompt_lengths(self) -> Counter[int]:
        """Histogram: tokens of a prompt -> number of prompts."""
        return Counter(map(len, self.prompts))

    def held_rows(self, policy: CompressionPolicy) -> Counter[int]:
        """Histogram: KV pairs held while decoding -> number of prompts."""
        return Counter(held_rows(policy, tokens, self.answer_tokens) for tokens in self.prompt_lengths.elements())


@dataclass(frozen=True, slots=True, kw_only=True)
class SideMeasurement:
    """What was measured of one side.

    Attributes:
        slots: sequences that are held at once.
        kv_bytes: bytes of their KV pairs.
        planned_bytes: bytes of memory in all, by the plan.
        peak_bytes: bytes of memory in all, measured.
        seconds: for all prompts.
        prefill_seconds: of them, steps that read prompts, and decode beside them.
        decode_seconds: of them, steps that only decode.
        decode_tokens: tokens of the steps that only decode.
        prefill_flops: floating-point operations of reading all prompts.
        step_seconds: seconds of decoding steps whose bytes are known.
        step_bytes: bytes that these steps read.
        as_full_cache: whether this upper bound is the full cache's own run, because that was faster.
    """

    slots: int
    kv_bytes: int
    planned_bytes: int
    peak_bytes: int
    seconds: float
    prefill_seconds: float
    decode_seconds: float
    decode_tokens: int
    prefill_flops: int
    step_seconds: float
    step_bytes: int
    as_full_cache: bool = False

    def record(self, workload: Workload, flops: float, bandwidth: float) -> dict[str, Any]:
        """The measurement for JSON.

        Args:
            workload: what was done.
            flops: floating-point operations that the machine reaches in a second.
            bandwidth: bytes that it reads in a second.
        """
        prompts = len(workload.prompts)
        generated = prompts * workload.answer_tokens
        return {
            "fits": True,
            "slots": self.slots,
            "kv_bytes": self.kv_bytes,
            "planned_bytes": self.planned_bytes,
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
            "generated_tokens": generated,
            "generated_tokens_per_second": generated / self.seconds,
            "tokens_per_second": (workload.prompt_tokens + generated) / self.seconds,
            "prompts_per_minute": 60 * prompts / self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "prefill_tokens_per_second": _ratio(workload.prompt_tokens, self.prefill_seconds),
            "prefill_flops": self.prefill_flops,
            "mfu": _ratio(self.prefill_flops, self.prefill_seconds * flops),
            "decode_seconds": self.decode_seconds,
            "decode_tokens_per_second": _ratio(self.decode_tokens, self.decode_seconds),
            "decode_step_seconds": self.step_seconds,
            "decode_step_bytes": self.step_bytes,
            "bandwidth_share": _ratio(self.step_bytes, self.step_seconds * bandwidth),
            "as_full_cache": self.as_full_cache,
        }


def plan_workload(engine: Engine, workload: Workload) -> Plan:
    """A plan for all prompts of a workload.

    Raises:
        MemoryLimitError: some prompt does not fit.
    """
    lengths = [Length.of(engine.policy, len(ids), workload.answer_tokens) for ids in workload.prompts]
    return plan_lengths(engine, lengths)


def plan_lengths(engine: Engine, lengths: list[Length]) -> Plan:
    """A plan for requests of these lengths.

    Raises:
        MemoryLimitError: one of them does not fit.
    """
    plan = engine.plan(lengths)
    if plan.too_large:
        raise MemoryLimitError(f"{plan.too_large:,} of {len(lengths):,} prompts need more memory than may be used")
    return plan


def measure_cache(engine: Engine, plan: Plan, workload: Workload, display: Display) -> SideMeasurement:
    """Answer a workload as a job would, and measure it.

    Args:
        engine: with the cache to measure.
        plan: for the workload.
        workload: what is answered.
        display: shows the progress.
    """
    stats, seconds = _answer(engine, plan, workload, display)
    spec = engine.spec
    weights = weights_read(spec, engine.backend.model, stats.decode_tokens // max(1, stats.decode_steps))
    held = workload.held_rows(engine.policy)
    held_bytes = sum(count * engine.policy.answering.layout(spec, rows).kv_bytes for rows, count in held.items())
    bytes_per_prompt = held_bytes // len(workload.prompts) + 2 * spec.state_bytes  # states are read and written
    return SideMeasurement(
        slots=stats.slots,
        kv_bytes=stats.kv_bytes,
        planned_bytes=plan.memory.total,
        peak_bytes=stats.peak_memory_bytes,
        seconds=seconds,
        prefill_seconds=stats.prefill_seconds,
        decode_seconds=stats.decode_seconds,
        decode_tokens=stats.decode_tokens,
        prefill_flops=_prefill_flops(engine, plan, workload),
        step_seconds=stats.decode_seconds,
        step_bytes=stats.decode_steps * weights + stats.decode_tokens * bytes_per_prompt,
    )


def measure_decode_only(
    engine: Engine,
    policy: CompressionPolicy,
    workload: Workload,
    full: SideMeasurement | MemoryLimitError,
    display: Display,
) -> SideMeasurement:
    """An upper bound of what compression in decoding alone could reach; nobody implements it.

    As many prompts as fit uncompressed are read at once. Then each is cut to its budget in no time, and decoded in
    slots of that size that are never full, so that nothing is evicted. Of three numbers of slots, the best counts. The
    full cache's own run, which mixes reading and decoding, counts instead if it was faster.

    Args:
        engine: with the full cache.
        policy: says what is left of a prompt.
        workload: what is answered.
        full: what was measured of the full cache.
        display: shows the progress.

    Raises:
        MemoryLimitError: some prompt alone is too long.
    """
    plan = plan_lengths(
        engine, [_uncompressed_length(policy, len(ids), workload.answer_tokens) for ids in workload.prompts]
    )
    reading = replace(workload, answer_tokens=1)
    stats, read_seconds = _answer(engine, _with_one_more_row(engine, plan), reading, display)
    rows = sum(workload.held_rows(policy).elements()) // len(workload.prompts)
    slots, decode_seconds, step_seconds = _fastest_decoding(engine, plan, workload, rows)
    if isinstance(full, SideMeasurement) and full.seconds <= read_seconds + decode_seconds:
        return replace(full, as_full_cache=True)
    spec = engine.spec
    row_bytes = engine.policy.answering.layout(spec, rows).kv_bytes + 2 * spec.state_bytes
    step_bytes = weights_read(spec, engine.backend.model, slots) + slots * row_bytes
    return SideMeasurement(
        slots=slots,
        kv_bytes=plan.memory.pool * slots // plan.slots,
        planned_bytes=plan.memory.total,
        peak_bytes=stats.peak_memory_bytes,
        seconds=read_seconds + decode_seconds,
        prefill_seconds=stats.prefill_seconds,
        decode_seconds=decode_seconds,
        decode_tokens=len(workload.prompts) * (workload.answer_tokens - 1),
        prefill_flops=_prefill_flops(engine, plan, reading),
        step_seconds=step_seconds,
        step_bytes=step_bytes if step_seconds else 0,
    )


def _uncompressed_length(policy: CompressionPolicy, tokens: int, answer: int) -> Length:
    """The length of a request whose prompt is compressed only after all of it has been read."""
    length = Length.of(policy, tokens, answer)
    return replace(length, rows_needed=max(tokens, length.rows_needed))


def _with_one_more_row(engine: Engine, plan: Plan) -> Plan:
    """The plan with a row in each slot for the one token that a run must generate; its slots hold prompts alone."""
    groups = tuple(SlotGroup(group.capacity + 1, group.slots) for group in plan.groups)
    layouts = tuple(engine.policy.layout(engine.spec, group.capacity) for group in groups)
    return replace(plan, groups=groups, layouts=layouts)


def _fastest_decoding(engine: Engine, plan: Plan, workload: Workload, rows: int) -> tuple[int, float, float]:
    """The number of slots that decodes a workload in the least time, that time, and the seconds of one step.

    Three numbers are tried: all slots of the plan, half of them, and as many as make the last round of prompts as full
    as the others.

    Args:
        engine: with the full cache.
        plan: gives the number of slots.
        workload: what is decoded.
        rows: KV pairs that each slot holds.
    """
    from bmx.measure.decode_bound import decode_step_seconds

    prompts, steps = len(workload.prompts), workload.answer_tokens - 1
    if not steps:
        return plan.slots, 0.0, 0.0
    candidates = {plan.slots, ceil(prompts / ceil(prompts / plan.slots)), ceil(plan.slots / 2)}
    step_seconds = {slots: decode_step_seconds(engine, plan, slots, rows, steps) for slots in candidates}
    best = min(step_seconds, key=lambda slots: ceil(prompts / slots) * step_seconds[slots])
    return best, ceil(prompts / best) * steps * step_seconds[best], step_seconds[best]


def _prefill_flops(engine: Engine, plan: Plan, workload: Workload) -> int:
    spec, policy, chunk = engine.spec, engine.policy, plan.step.chunk_size

    def rows(tokens: int) -> int:
        return policy.reading_rows(tokens) or policy.rows_needed(tokens, workload.answer_tokens)

    return sum(
        count * prefill_flops(spec, policy, tokens, rows(tokens), chunk)
        for tokens, count in workload.prompt_lengths.items()
    )


def _answer(engine: Engine, plan: Plan, workload: Workload, display: Display) -> tuple[Stats, float]:
    """Answer all prompts after a short warm-up; returns the counters, and the seconds in all.

    Raises:
        BmxError: a prompt was not answered in full.
    """
    answer_tokens = workload.answer_tokens
    beginnings = [ids[: plan.step.chunk_size] for ids in workload.prompts[:2]]
    list(engine.run(_requests(beginnings, min(2, answer_tokens)), plan))
    prompts = len(workload.prompts)
    answers = prompts * answer_tokens
    stats = Stats(rows_total=prompts, prompt_work=workload.prompt_tokens, answer_work=answers)
    started = time.perf_counter()
    requests = _requests(workload.prompts, answer_tokens)
    with display.live(stats), closing(engine.run(requests, plan, stats=stats)) as results:
        for result in results:
            if result.error or len(result.token_ids) != answer_tokens:
                reason = result.error.message if result.error else f"{len(result.token_ids)} tokens"
                raise BmxError(f"prompt {result.id} was not answered in full: {reason}")
            stats.count_row(None)
    if stats.shrunk_to:
        display.warn(f"memory ran out: the run continued with {stats.slots} of {plan.slots} slots")
    return stats, time.perf_counter() - started


def _requests(prompts: Sequence[Sequence[int]], answer_tokens: int) -> list[Request]:
    """Requests for token ids, to be answered greedily and past any end token."""
    params = SamplingParams(max_tokens=answer_tokens, ignore_eos=True)
    return [Request(id=i, prompt=" ".join(map(str, ids)), raw=True, params=params) for i, ids in enumerate(prompts)]


def _ratio(amount: float, divisor: float) -> float | None:
    return amount / divisor if divisor else None
