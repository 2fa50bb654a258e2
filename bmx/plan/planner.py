"""What fits: the memory of a run, item by item, and its inverse, the slots that a limit allows.

Knows sizes and counts; touches no tensor, no device and no file.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from math import ceil
from typing import Any

from bmx.config import CHUNK_SIZE, EngineConfig
from bmx.errors import MemoryLimitError
from bmx.hardware import FreeMemory
from bmx.kv.layout import KVLayout
from bmx.model.spec import ModelSpec
from bmx.plan.device import Device

MAX_GROUPS = 16
ENOUGH = 0.08  # share of the rows that may stay unused: no further group is made for less
MAX_SLOTS = 4096  # beyond this many rows a step gains nothing
ROW_ALIGNMENT = 16
MAX_CANDIDATES = 128
FULL_CACHE_CHUNKS = (512, 1024, 256)  # without eviction the answer does not depend on where chunks end
BATCHED_TOKENS = {"cpu": 1280, "cuda": 8192}  # two chunks and the decoding tokens; what fills a GPU
SPARE_SLOTS = 2  # most copies of text that prompts share
WORTH_SLOTS = 0.75  # share of the slots that must be left beside them
SAMPLER_ROWS = 16  # rows whose logits are sampled together
SAMPLER_BYTES = 48  # per logit of those rows: float64 probabilities, sorted, with their ids and sums


@dataclass(frozen=True, slots=True)
class SlotGroup:
    """Slots of one capacity (KV pairs per layer and head)."""

    capacity: int
    slots: int


@dataclass(frozen=True, slots=True)
class Length:
    """What a plan needs to know of one request: its tokens, the most it may answer, the rows of a slot it needs.

    ``shared``: leading tokens whose state it can share with the request before it.
    """

    prompt_tokens: int
    max_tokens: int
    rows_needed: int
    shared: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a run, item by item.

    Attributes:
        runtime: what the process holds beside the model: libraries, the tokenizer, a GPU's context.
        weights: parameters and buffers.
        activations: the widest moment of the largest step, attention's workspace included.
        logits: logits of a step, and what sampling takes beside them.
        kv: keys and values of all slots.
        scores: accumulated attention and positions of all slots.
        graphs: what captured decoding keeps for itself on a GPU.
        slack: what allocators lose to rounding, and compiled kernels.
    """

    runtime: int = 0
    weights: int = 0
    activations: int = 0
    logits: int = 0
    kv: int = 0
    scores: int = 0
    graphs: int = 0
    slack: int = 0

    @property
    def pool(self) -> int:
        """Bytes of the slots: keys, values and scores."""
        return self.kv + self.scores

    @property
    def step(self) -> int:
        """Bytes of the largest step where there are no slots and nothing is captured: what a rehearsal should see."""
        return self.total - self.pool - self.graphs

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a run may use.

    Attributes:
        total: bytes in all, what bmx holds already included.
        pool: bytes of the slots, or None for what the rest leaves over.
        slots: most sequences at once, or None.
        source: where ``total`` comes from, for people.
    """

    total: int
    pool: int | None = None
    slots: int | None = None
    source: str = ""

    def missing(self, needed: Memory) -> int:
        """Bytes by which a run is too large; 0 if it fits."""
        over = 0 if self.pool is None else needed.pool - self.pool
        return max(0, over, needed.total - self.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """How large steps may get: prompt tokens of one sequence, and tokens in all; and the probe's behind each chunk."""

    chunk_size: int
    max_num_batched_tokens: int
    probe: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledStep:
    """Bytes of a plan's largest step without slots: as predicted, and as measured.

    Attributes:
        predicted: bytes by the closed form.
        measured: bytes at the peak of a real step; None if memory ran out in it.
    """

    predicted: int
    measured: int | None

    @property
    def fits(self) -> bool:
        """Whether the step could be computed."""
        return self.measured is not None

    @property
    def excess(self) -> int:
        """Bytes by which the step took more than predicted; 0 if it did not."""
        return max(0, (self.measured or 0) - self.predicted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was decided: nothing of it changes during the run.

    Attributes:
        groups: slots by capacity; ``layouts`` what a slot of each holds.
        step: how large steps may get.
        memory: what it takes, within ``limits``.
        too_large: sequences that would not fit even alone; they will be errors, the others are answered.
        needs: of the others, (rows of a slot, how many sequences need so many).
        prefix_slots: extra slots that hold the state of text that several prompts share; their layouts come last.
        profiled: what the largest step was measured to take, if it was.
    """

    groups: tuple[SlotGroup, ...]
    layouts: tuple[KVLayout, ...]
    step: StepSize
    memory: Memory
    limits: Limits
    too_large: int = 0
    needs: tuple[tuple[int, int], ...] = ()
    prefix_slots: tuple[SlotGroup, ...] = ()
    profiled: ProfiledStep | None = field(default=None, compare=False)

    @property
    def slots(self) -> int:
        """Sequences at once."""
        return sum(group.slots for group in self.groups)

    @property
    def fill(self) -> float:
        """Share of the slots' rows in use when each sequence has the smallest slot that holds it."""
        chosen = sorted(group.capacity for group in self.groups)
        held = sum(chosen[bisect_left(chosen, rows)] * count for rows, count in self.needs)
        return sum(rows * count for rows, count in self.needs) / held if held else 1.0


def step_sizes(config: EngineConfig, kind: str, lengths: Sequence[Length], probe: int = 0) -> list[StepSize]:
    """The sizes of steps to choose from, the fastest first where memory does not matter; none larger than the work.

    Chunks have the size that was asked for: where they end decides what is evicted, and so the answers, which must
    not depend on the machine. Without eviction they do not, and the chunk is free.
    """
    free = config.chunking_is_free and config.chunk_size is None
    longest, together = (f(length.prompt_tokens for length in lengths) for f in (max, sum))
    most = config.max_num_batched_tokens or BATCHED_TOKENS[kind]
    totals = [most] if config.max_num_batched_tokens else [most >> i for i in range(6)]
    found = []
    for chunk in FULL_CACHE_CHUNKS if free else (config.chunk_size or CHUNK_SIZE,):
        chunk_size = min(chunk, longest, most if free else chunk)
        wanted = dict.fromkeys(max(chunk_size + probe, min(tokens, together)) for tokens in totals)
        found += [StepSize(chunk_size=chunk_size, max_num_batched_tokens=tokens, probe=probe) for tokens in wanted]
    return list(dict.fromkeys(found))


def limits(config: EngineConfig, memory: FreeMemory, held: int) -> Limits:
    """What a run may use: the user's limit, or a share of what is free and what bmx holds already.

    Args:
        held: bytes of ``memory`` that are bmx's own.
    """
    total = int((memory.free + held) * config.gpu_memory_utilization)
    held_by_others = f"; {memory.holders}" if memory.holders else ""
    source = f"{config.gpu_memory_utilization:.0%} of what is free, {memory.source}{held_by_others}"
    if config.memory_limit is not None and config.memory_limit < total:
        total, source = config.memory_limit, "memory_limit"
    return Limits(total=total, pool=config.kv_cache_memory, slots=config.max_num_seqs, source=source)


def memory_needed(
    spec: ModelSpec,
    layout: Callable[[int], KVLayout],
    groups: Iterable[SlotGroup],
    step: StepSize,
    device: Device,
    prefix_slots: Iterable[SlotGroup] = (),
) -> Memory:
    """The memory of a run with these slots, in closed form.

    Args:
        layout: a slot's layout from its capacity.
        prefix_slots: slots that no sequence has.
    """
    groups = tuple(groups)
    slots = sum(group.slots for group in groups)
    chunk = step.chunk_size + step.probe
    tokens = max(step.max_num_batched_tokens, slots + chunk)
    keys = max((group.capacity for group in groups), default=0) + chunk
    layouts = [(layout(group.capacity), group.slots) for group in (*groups, *prefix_slots)]
    activations = spec.costs.activation_bytes * tokens + device.workspace(chunk, keys, slots)
    logits = spec.itemsize * slots * spec.vocab + SAMPLER_BYTES * min(slots, SAMPLER_ROWS) * spec.vocab
    return Memory(
        runtime=device.runtime,
        weights=spec.weight_bytes,
        activations=activations,
        logits=logits,
        kv=sum(one.kv_bytes * count for one, count in layouts),
        scores=sum(one.score_bytes * count for one, count in layouts),
        graphs=device.captured(spec, slots, keys),
        slack=device.slack + int(device.share * (activations + logits)),
    )


def plan(
    spec: ModelSpec,
    layout: Callable[[int], KVLayout],
    limits: Limits,
    lengths: Sequence[Length],
    step: StepSize,
    device: Device,
) -> Plan:
    """The slots that fit the limits, in a few groups that suit these sequences.

    Raises:
        MemoryLimitError: not one slot fits; says how much is missing.
    """

    def memory(groups: tuple[SlotGroup, ...], prefix_slots: tuple[SlotGroup, ...] = ()) -> Memory:
        return memory_needed(spec, layout, groups, step, device, prefix_slots)

    def fits(groups: tuple[SlotGroup, ...], prefix_slots: tuple[SlotGroup, ...] = ()) -> bool:
        return not limits.missing(memory(groups, prefix_slots))

    sizes = sorted({length.rows_needed for length in lengths})
    fitting = sizes[: bisect_left(sizes, True, key=lambda rows: not fits((SlotGroup(rows, 1),)))]
    if not fitting:
        raise does_not_fit(memory((SlotGroup(sizes[0], 1),)), limits)
    served = [length for length in lengths if length.rows_needed <= fitting[-1]]
    capacity = capacities([length.rows_needed for length in served])
    demand = _demand(served, capacity, step.chunk_size)
    most = min(limits.slots or MAX_SLOTS, len(served))
    groups, prefix_slots = _largest(demand, most, fits), _prefix_slots(served, max(capacity))
    if prefix_slots and fits((SlotGroup(max(capacity), 1),), prefix_slots):
        beside = _largest(demand, most, lambda groups: fits(groups, prefix_slots))
        worth = sum(group.slots for group in beside) >= WORTH_SLOTS * sum(group.slots for group in groups)
        groups, prefix_slots = (beside, prefix_slots) if worth else (groups, ())
    else:
        prefix_slots = ()
    return Plan(
        groups=groups,
        layouts=tuple(layout(group.capacity) for group in (*groups, *prefix_slots)),
        step=step,
        memory=memory(groups, prefix_slots),
        limits=limits,
        too_large=len(lengths) - len(served),
        needs=tuple(sorted(Counter(length.rows_needed for length in served).items())),
        prefix_slots=prefix_slots,
    )


def _prefix_slots(lengths: Sequence[Length], largest: int) -> tuple[SlotGroup, ...]:
    """Slots for the longest text that prompts share, more than one if it is not the same in all of them."""
    shared = {length.shared for length in lengths[1:]}
    longest = max(shared, default=0)
    return (SlotGroup(min(largest, longest), min(SPARE_SLOTS, len(shared))),) if longest else ()


@dataclass(frozen=True, slots=True)
class Demand:
    """What a group of slots is asked for: sequences, and the steps that they will stay in all."""

    sequences: int
    steps: int

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.sequences + other.sequences, self.steps + other.steps)


def _demand(lengths: Sequence[Length], capacity: Sequence[int], chunk_size: int) -> dict[int, Demand]:
    """Demand by capacity: a sequence stays for its chunks and for each token of its answer."""
    demand: dict[int, Demand] = {}
    for length, rows in zip(lengths, capacity, strict=True):
        steps = length.max_tokens + ceil(length.prompt_tokens / chunk_size)
        demand[rows] = demand.get(rows, Demand(0, 0)) + Demand(1, steps)
    return demand


def capacities(rows_needed: Sequence[int]) -> list[int]:
    """The capacity of the group that each sequence belongs to: so many groups that little is wasted, at most 16.

    For each number of groups, the least total of unused rows over all ways to cut the sorted needs (dynamic
    programming over at most 128 candidate capacities); the first number that leaves 8 % or less unused is taken.
    """
    largest = max(rows_needed)
    rounded = [min(-(-rows // ROW_ALIGNMENT) * ROW_ALIGNMENT, largest) for rows in rows_needed]
    distinct = sorted(set(rounded))
    step = -(-len(distinct) // MAX_CANDIDATES)
    candidates = sorted({*distinct[step - 1 :: step], largest})
    count = Counter(candidates[bisect_left(candidates, rows)] for rows in rounded)
    chosen = _least_waste(candidates, [count[c] for c in candidates], enough=sum(rows_needed) / (1 - ENOUGH))
    return [chosen[bisect_left(chosen, rows)] for rows in rounded]


def _least_waste(candidates: list[int], counts: list[int], enough: float) -> list[int]:
    """As few of the candidates (the last among them) as hold everything in ``enough`` rows, or nearly, if 16 do not."""
    infinite: tuple[int, list[int]] = (2**62, [])
    previous: list[tuple[int, list[int]]] = [(0, []), *[infinite] * len(candidates)]
    best = infinite
    for _ in range(min(MAX_GROUPS, len(candidates))):
        current = [infinite] * (len(candidates) + 1)  # of the first i candidates: rows in all, capacities chosen
        for stop, capacity in enumerate(candidates, 1):
            members = 0
            for start in range(stop - 1, -1, -1):
                members += counts[start]
                rows, chosen = previous[start]
                if rows + members * capacity < current[stop][0]:
                    current[stop] = (rows + members * capacity, [*chosen, capacity])
        best = min(best, current[-1], key=lambda found: found[0])
        if best[0] <= enough:
            break
        previous = current
    return best[1]


def _largest(
    demand: dict[int, Demand],
    most: int,
    fits: Callable[[tuple[SlotGroup, ...]], bool],
) -> tuple[SlotGroup, ...]:
    """As many slots as fit, each group's share as its share of the steps; fewer groups if need be.

    One slot of the largest capacity must fit.
    """
    names = sorted(demand)
    while True:
        low, high = 0, min(most, sum(demand[name].sequences for name in names))
        while low < high:  # the largest number of slots that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(_split(demand, names, middle)) else (low, middle - 1)
        if low >= len(names):
            return _split(demand, names, low)
        demand = demand | {names[1]: demand[names[0]] + demand[names[1]]}  # the smallest joins the next
        names = names[1:]


def _split(demand: dict[int, Demand], names: Sequence[int], slots: int) -> tuple[SlotGroup, ...]:
    """``slots`` slots over the groups in proportion to their steps, at least one each while there are enough."""
    counts = {name: min(1, max(0, slots - i)) for i, name in enumerate(sorted(names, reverse=True))}
    for _ in range(slots - sum(counts.values())):
        open_groups = [name for name in names if counts[name] < demand[name].sequences]
        if not open_groups:
            break
        counts[max(open_groups, key=lambda name: demand[name].steps / counts[name])] += 1
    return tuple(SlotGroup(name, counts[name]) for name in sorted(counts) if counts[name])


def shrunk(made: Plan, spec: ModelSpec, layout: Callable[[int], KVLayout], device: Device) -> Plan | None:
    """A plan with three quarters of the slots and steps of half the size; None for one slot and steps of one chunk.

    Spare slots go.
    """
    step = made.step
    tokens = max(step.chunk_size + step.probe, step.max_num_batched_tokens // 2)
    if made.slots == 1 and tokens == step.max_num_batched_tokens:
        return None
    slots = max(1, made.slots * 3 // 4)
    demand = {group.capacity: Demand(group.slots, group.slots) for group in made.groups}
    groups = _split(demand, sorted(demand), slots)
    step = replace(step, max_num_batched_tokens=tokens)
    return replace(
        made,
        groups=groups,
        layouts=tuple(layout(group.capacity) for group in groups),
        step=step,
        memory=memory_needed(spec, layout, groups, step, device),
        prefix_slots=(),
    )


def does_not_fit(needed: Memory, limits: Limits) -> MemoryLimitError:
    """The error that says how much is missing for one sequence, and what would be enough."""
    size, limit, what, flag = needed.total, limits.total, "in all", "--memory-limit"
    if size <= limit:
        size, limit, what, flag = needed.pool, limits.pool or 0, "for the KV cache", "--kv-cache-memory"
    enough = ceil(size / 1e6)
    weights = f", {needed.weights / 1e6:,.0f} MB of it weights" if what == "in all" else ""
    return MemoryLimitError(
        f"one sequence needs {enough:,} MB {what}{weights}; {limit / 1e6:,.0f} MB may be used ({limits.source}): "
        f"{ceil((size - limit) / 1e6):,} MB are missing",
        hint=f"{flag} {enough}M is the least for it; or lower --kv-budget or --chunk-size, or choose a smaller model; "
        "`bmx plan-batch --check` computes what would fit",
    )


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan for JSON, memory item by item in bytes."""
    memory = plan.memory
    return {
        "slots": plan.slots,
        "groups": [{"capacity": group.capacity, "slots": group.slots} for group in plan.groups],
        "spare": [{"capacity": group.capacity, "slots": group.slots} for group in plan.prefix_slots],
        "chunk_size": plan.step.chunk_size,
        "max_num_batched_tokens": plan.step.max_num_batched_tokens,
        "memory": {f.name: getattr(memory, f.name) for f in fields(memory)} | {"total": memory.total},
        "limit": {"bytes": plan.limits.total, "kv_bytes": plan.limits.pool, "source": plan.limits.source},
        "too_large": plan.too_large,
        "fill": round(plan.fill, 4),
    }
