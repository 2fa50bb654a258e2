"""One side of a bench: a cache that is run on some prompts, or the bound of what another could do, and what it took.

Knows plans, runs and their counters; how fast the machine is, and what is compared with what, is ``bench``'s business.
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
from bmx.plan.planner import Length, Plan, SlotGroup
from bmx.plan.roofline import held_rows, prefill_flops, weights_read
from bmx.request import Request, SamplingParams
from bmx.stats import Stats
from bmx.terminal.display import Display

if TYPE_CHECKING:
    from bmx.engine.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Prompts as token ids, and how many tokens each is answered with."""

    prompts: list[list[int]]
    answer: int

    @property
    def tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def lengths(self) -> Counter[int]:
        """How many prompts there are of each length."""
        return Counter(map(len, self.prompts))

    def held(self, policy: CompressionPolicy) -> Counter[int]:
        """How many prompts there are of which so many pairs are held while they are answered."""
        return Counter(held_rows(policy, tokens, self.answer) for tokens in self.lengths.elements())


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One side of a cell: sizes in bytes, times in seconds.

    Attributes:
        planned, peak: memory in all.
        seconds: for all prompts.
        prefill_flops: of all prompts.
        step_bytes: read in the steps that only decoded, which took ``step_seconds``.
        as_full_cache: whether this bound is the full cache's own run, which was faster than what the bound is made of.
    """

    slots: int
    kv_bytes: int
    planned: int
    peak: int
    seconds: float
    prefill_seconds: float
    decode_seconds: float
    prefill_flops: int
    step_seconds: float
    step_bytes: int
    as_full_cache: bool = False

    def record(self, cell: Cell, flops: float, bandwidth: float) -> dict[str, Any]:
        """The side for JSON.

        Args:
            flops, bandwidth: what the machine reached in a second.
        """
        prompts = len(cell.prompts)
        generated, decoded = prompts * cell.answer, prompts * (cell.answer - 1)
        return {
            "fits": True,
            "slots": self.slots,
            "kv_bytes": self.kv_bytes,
            "planned_bytes": self.planned,
            "peak_bytes": self.peak,
            "seconds": self.seconds,
            "generated_tokens": generated,
            "generated_tokens_per_second": generated / self.seconds,
            "tokens_per_second": (cell.tokens + generated) / self.seconds,
            "prompts_per_minute": 60 * prompts / self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "prefill_tokens_per_second": _over(cell.tokens, self.prefill_seconds),
            "prefill_flops": self.prefill_flops,
            "mfu": _over(self.prefill_flops, self.prefill_seconds * flops),
            "decode_seconds": self.decode_seconds,
            "decode_tokens_per_second": _over(decoded, self.decode_seconds),
            "decode_step_seconds": self.step_seconds,
            "decode_step_bytes": self.step_bytes,
            "bandwidth_share": _over(self.step_bytes, self.step_seconds * bandwidth),
            "as_full_cache": self.as_full_cache,
        }


def length_of(policy: CompressionPolicy, tokens: int, answer: int) -> Length:
    """What a plan must know of such a prompt."""
    return Length(tokens, answer, policy.rows_needed(tokens, answer))


def plan_for(engine: Engine, cell: Cell) -> Plan:
    """A plan for all of a cell.

    Raises:
        MemoryLimitError: some prompt does not fit.
    """
    return planned(engine, [length_of(engine.policy, len(ids), cell.answer) for ids in cell.prompts])


def planned(engine: Engine, lengths: list[Length]) -> Plan:
    """A plan for all of these lengths.

    Raises:
        MemoryLimitError: one of them does not fit.
    """
    plan = engine.plan(lengths)
    if plan.too_large:
        raise MemoryLimitError(f"{plan.too_large:,} of {len(lengths):,} prompts need more memory than may be used")
    return plan


def run_side(engine: Engine, plan: Plan, cell: Cell, display: Display) -> Measured:
    """Answer the prompts of a cell as a job would."""
    stats, seconds = _run(engine, plan, cell, display)
    spec = engine.spec
    weights = weights_read(spec, engine.backend.model, stats.pure_tokens // max(1, stats.pure_steps))
    held = cell.held(engine.policy)
    pairs = sum(count * engine.policy.layout(spec, rows).kv_bytes for rows, count in held.items()) // len(cell.prompts)
    return Measured(
        slots=stats.slots,
        kv_bytes=stats.kv_bytes,
        planned=plan.memory.total,
        peak=stats.peak_memory_bytes,
        seconds=seconds,
        prefill_seconds=stats.prefill_seconds,
        decode_seconds=stats.decode_seconds,
        prefill_flops=_flops(engine, plan, cell),
        step_seconds=stats.pure_seconds,
        step_bytes=stats.pure_steps * weights + stats.pure_tokens * pairs,
    )


def run_bound(
    engine: Engine, policy: CompressionPolicy, cell: Cell, full: Measured | MemoryLimitError, display: Display
) -> Measured:
    """The best that compression in decoding alone could do, as an upper bound: nobody implements it.

    As many rows as fit with their whole prompts are read at once. Then each is cut to its budget in no time, and
    decoded in slots of that size which are never full, so that nothing is evicted. The best number of rows is taken of
    three; or the full cache's own run, which mixes reading and decoding, where that was faster.

    Args:
        engine: with the full cache; ``full``: what it was measured to do.
        policy: says what is left of a prompt.

    Raises:
        MemoryLimitError: some prompt alone is too long.
    """
    plan = planned(engine, [_whole(policy, len(ids), cell.answer) for ids in cell.prompts])
    once = replace(cell, answer=1)
    stats, seconds = _run(engine, _with_a_row_more(engine, plan), once, display)
    rows = sum(cell.held(policy).elements()) // len(cell.prompts)
    slots, decoding, step = _decoding(engine, plan, cell, rows)
    if isinstance(full, Measured) and full.seconds <= seconds + decoding:
        return replace(full, as_full_cache=True)
    spec = engine.spec
    read = weights_read(spec, engine.backend.model, slots) + slots * engine.policy.layout(spec, rows).kv_bytes
    return Measured(
        slots=slots,
        kv_bytes=plan.memory.pool * slots // plan.slots,
        planned=plan.memory.total,
        peak=stats.peak_memory_bytes,
        seconds=seconds + decoding,
        prefill_seconds=stats.prefill_seconds,
        decode_seconds=decoding,
        prefill_flops=_flops(engine, plan, once),
        step_seconds=step,
        step_bytes=read if step else 0,
    )


def _whole(policy: CompressionPolicy, tokens: int, answer: int) -> Length:
    """What a plan must know of a prompt that is compressed only when all of it has been read."""
    length = length_of(policy, tokens, answer)
    return replace(length, rows_needed=max(tokens, length.rows_needed))


def _with_a_row_more(engine: Engine, plan: Plan) -> Plan:
    """Slots with room for the one token that a run must generate; the plan has room for prompts alone."""
    groups = tuple(SlotGroup(group.capacity + 1, group.slots) for group in plan.groups)
    layouts = tuple(engine.policy.layout(engine.spec, group.capacity) for group in groups)
    return replace(plan, groups=groups, layouts=layouts)


def _decoding(engine: Engine, plan: Plan, cell: Cell, rows: int) -> tuple[int, float, float]:
    """The number of slots that decodes a cell in the least time, that time, and the seconds of one step.

    Tried are all slots that fit, as many as make the last round as full as the others, and half of them.
    """
    from bmx.measure.decode_bound import free_decoding

    count, steps = len(cell.prompts), cell.answer - 1
    if not steps:
        return plan.slots, 0.0, 0.0
    tried = {plan.slots, ceil(count / ceil(count / plan.slots)), ceil(plan.slots / 2)}
    found = {slots: free_decoding(engine, plan, slots, rows, steps) for slots in tried}
    best = min(found, key=lambda slots: ceil(count / slots) * found[slots])
    return best, ceil(count / best) * steps * found[best], found[best]


def _flops(engine: Engine, plan: Plan, cell: Cell) -> int:
    spec, policy, chunk = engine.spec, engine.policy, plan.step.chunk_size
    return sum(
        count * prefill_flops(spec, policy, tokens, policy.rows_needed(tokens, cell.answer), chunk)
        for tokens, count in cell.lengths.items()
    )


def _run(engine: Engine, plan: Plan, cell: Cell, display: Display) -> tuple[Stats, float]:
    """Answer all prompts after a short warm-up: the counters, and seconds in all.

    Raises:
        BmxError: a prompt was not answered in full.
    """
    short = [ids[: plan.step.chunk_size] for ids in cell.prompts[:2]]
    list(engine.run(_requests(short, min(2, cell.answer)), plan))
    count, answer = len(cell.prompts), cell.answer
    stats = Stats(rows_total=count, work_total=cell.tokens + count * answer)
    started = time.perf_counter()
    with display.live(stats), closing(engine.run(_requests(cell.prompts, answer), plan, stats=stats)) as results:
        for result in results:
            if result.error or len(result.token_ids) != answer:
                why = result.error.message if result.error else f"{len(result.token_ids)} tokens"
                raise BmxError(f"prompt {result.id} was not answered in full: {why}")
            stats.count_row(None)
    if stats.shrunk_to:
        display.warn(f"memory ran out: this went on with {stats.slots} of {plan.slots} slots")
    return stats, time.perf_counter() - started


def _requests(prompts: Sequence[Sequence[int]], answer: int) -> list[Request]:
    """Token ids as requests that are answered greedily, past any end token."""
    params = SamplingParams(max_tokens=answer, ignore_eos=True)
    return [Request(id=i, prompt=" ".join(map(str, ids)), raw=True, params=params) for i, ids in enumerate(prompts)]


def _over(amount: float, by: float) -> float | None:
    return amount / by if by else None
