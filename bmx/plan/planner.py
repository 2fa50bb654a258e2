"""The plan of a run: how many slots of which sizes fit a limit, and how large steps may get.

Knows sizes and counts; touches no tensor, no device and no file.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.kv.layout import KVLayout
from bmx.model.spec import ModelSpec
from bmx.plan.capacities import capacities
from bmx.plan.chunks import ending_of, steps_needed
from bmx.plan.device import Device
from bmx.plan.memory import Limits, Memory, ReadingSlots, SlotGroup, StepSize, does_not_fit, memory_needed

MAX_SLOTS = 4096  # a step of more sequences is no faster
FULL_CACHE_CHUNKS = (512, 1024, 256)  # without eviction the answer does not depend on where chunks end
BATCHED_TOKENS = {"cpu": 1280, "cuda": 8192}  # two chunks and the decoding tokens; what fills a GPU
MAX_PREFIX_SLOTS = 3  # most copies of text that prompts share
WORTH_SLOTS = 0.75  # share of the sequences' slots that must be left beside prefix slots


@dataclass(frozen=True, slots=True)
class Length:
    """What a plan must know of one request.

    Attributes:
        prompt_tokens: tokens of the prompt.
        max_tokens: most tokens of the answer.
        rows_needed: rows (KV pairs per layer and head) that its slot must have.
        shared: leading tokens whose state it can share with the request before it, in the order in which they run.
        reading_rows: rows of the slot in which its prompt is read before it is archived; 0 where nothing is archived.
        nested: how many longer texts, each a part of the next, go on from the shared one and are shared too.
    """

    prompt_tokens: int
    max_tokens: int
    rows_needed: int
    shared: int = 0
    reading_rows: int = 0
    nested: int = 0

    @classmethod
    def of(cls, policy: CompressionPolicy, prompt_tokens: int, max_tokens: int) -> Length:
        """The length of a request, with the rows that it needs under a policy.

        Args:
            policy: which KV pairs stay in a slot.
            prompt_tokens: tokens of the prompt.
            max_tokens: most tokens of the answer.
        """
        rows, reading_rows = policy.rows_needed(prompt_tokens, max_tokens), policy.reading_rows(prompt_tokens)
        return cls(prompt_tokens, max_tokens, rows, reading_rows=reading_rows)

    def steps(self, chunk_size: int) -> int:
        """Steps from the first chunk to the last token, if the answer is as long as it may get."""
        return steps_needed(self.prompt_tokens, self.max_tokens, chunk_size, self.ending)

    @property
    def ending(self) -> int:
        """Last tokens of its prompt that are read on its archive."""
        return ending_of(self.prompt_tokens, self.reading_rows)


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
    """The slots and step sizes of a run; nothing of it changes during the run.

    Attributes:
        groups: slots of sequences, by capacity.
        layouts: what a slot of each group holds; those of ``prefix_slots`` come last.
        step: how large steps may get.
        memory: bytes that the run takes.
        limits: bytes and slots that it may use.
        too_large: requests that would not fit even alone; they become errors, the others are answered.
        needs: pairs of (rows of a slot, number of requests that need exactly that number), for requests that fit.
        prefix_slots: slots that hold the state of text which several prompts share.
        reading: slots in which prompts are read before they are archived, those of ``prefix_slots`` last; None where
            nothing is archived.
        profiled: what the largest step was measured to take, if it was measured.
    """

    groups: tuple[SlotGroup, ...]
    layouts: tuple[KVLayout, ...]
    step: StepSize
    memory: Memory
    limits: Limits
    too_large: int = 0
    needs: tuple[tuple[int, int], ...] = ()
    prefix_slots: tuple[SlotGroup, ...] = ()
    reading: ReadingSlots | None = None
    profiled: ProfiledStep | None = field(default=None, compare=False)

    @property
    def slots(self) -> int:
        """Most sequences at once."""
        return sum(group.slots for group in self.groups)

    def alone(self, group: SlotGroup, layout: KVLayout) -> Plan:
        """The same plan with one group of slots instead of all; ``layout`` is what a slot of it holds."""
        reading = self.reading and replace(self.reading, slots=1)
        return replace(self, groups=(group,), layouts=(layout,), prefix_slots=(), reading=reading)

    @property
    def fill(self) -> float:
        """Share of the slots' rows in use when each sequence has the smallest slot that holds it."""
        capacities = sorted(group.capacity for group in self.groups)
        held = sum(capacities[bisect_left(capacities, rows)] * count for rows, count in self.needs)
        return sum(rows * count for rows, count in self.needs) / held if held else 1.0


def step_sizes(config: EngineConfig, kind: str, lengths: Sequence[Length], probe: int = 0) -> list[StepSize]:
    """The step sizes to choose from, the fastest first where memory does not matter. No size is larger than the work.

    The ends of chunks decide what is evicted, and so the answers, which must not depend on the machine: chunks have
    the configured size. Where nothing is evicted, the chunk size is free.

    Args:
        config: the settings.
        kind: ``cpu`` or ``cuda``.
        lengths: of the requests.
        probe: tokens of the probe behind each chunk.
    """
    free = config.chunking_is_free and config.chunk_size is None
    longest = max(length.prompt_tokens for length in lengths)
    all_prompts = sum(length.prompt_tokens for length in lengths)
    most = config.max_num_batched_tokens or BATCHED_TOKENS[kind]
    totals = [most] if config.max_num_batched_tokens else [most >> i for i in range(6)]
    sizes = []
    for chunk in FULL_CACHE_CHUNKS if free else (config.eviction_chunk_size,):
        chunk_size = min(chunk, longest, most if free else chunk)
        batched = [max(chunk_size + probe, min(tokens, all_prompts)) for tokens in totals]
        sizes += [StepSize(chunk_size=chunk_size, max_num_batched_tokens=tokens, probe=probe) for tokens in batched]
    return list(dict.fromkeys(sizes))


def plan(
    spec: ModelSpec,
    layout: Callable[[int], KVLayout],
    limits: Limits,
    lengths: Sequence[Length],
    step: StepSize,
    device: Device,
    reading_layout: Callable[[int], KVLayout] | None = None,
) -> Plan:
    """The plan with the most slots that fit the limits, in a few groups that suit these requests.

    Args:
        spec: the model's sizes.
        layout: gives a slot's layout from its capacity in rows.
        limits: bytes and slots that may be used.
        lengths: of the requests.
        step: how large steps may get.
        device: the device, as the memory formula sees it.
        reading_layout: gives the layout of a slot in which prompts are read before they are archived.

    Raises:
        MemoryLimitError: not even one slot fits; the message says how much is missing.
    """
    sizes = sorted({length.rows_needed for length in lengths})
    served = [*lengths]

    def reading(groups: tuple[SlotGroup, ...], prefix_slots: tuple[SlotGroup, ...] = ()) -> ReadingSlots | None:
        return reading_layout and reading_slots(reading_layout, served, step, groups, prefix_slots)

    def memory(groups: tuple[SlotGroup, ...], prefix_slots: tuple[SlotGroup, ...] = ()) -> Memory:
        return memory_needed(spec, layout, groups, step, device, prefix_slots, reading(groups, prefix_slots))

    def fits(groups: tuple[SlotGroup, ...], prefix_slots: tuple[SlotGroup, ...] = ()) -> bool:
        return not limits.missing(memory(groups, prefix_slots))

    largest = _largest_fitting(sizes, lambda rows: fits((SlotGroup(rows, 1),)))
    if largest is None:
        raise does_not_fit(memory((SlotGroup(sizes[0], 1),)), limits)
    served = [length for length in lengths if length.rows_needed <= largest]
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
        reading=reading(groups, prefix_slots),
    )


def reading_slots(
    layout: Callable[[int], KVLayout],
    lengths: Sequence[Length],
    step: StepSize,
    groups: tuple[SlotGroup, ...],
    prefix_slots: tuple[SlotGroup, ...] = (),
) -> ReadingSlots:
    """The slots in which prompts are read: as many as a step reads prompts, one more, and one for each prefix slot.

    Args:
        layout: gives such a slot's layout from its capacity in rows.
        lengths: of the requests; the largest of them fits.
        step: how large steps may get.
        groups: the archive's slots, which are no fewer.
        prefix_slots: those that hold text which several prompts share.
    """
    typical = sum(length.prompt_tokens for length in lengths) // max(1, len(lengths))
    at_once = step.max_num_batched_tokens // max(1, min(step.chunk_size, typical)) + 1
    count = min(at_once, sum(group.slots for group in groups)) + sum(group.slots for group in prefix_slots)
    return ReadingSlots(layout(max(length.reading_rows for length in lengths)), count)


def _largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of these sizes that fits; None if not even the smallest does.

    Args:
        sizes: in ascending order.
        fits: whether a size fits; if one does, all smaller ones do.
    """
    largest, low, high = None, 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            largest, low = sizes[middle], middle + 1
        else:
            high = middle
    return largest


def _prefix_slots(lengths: Sequence[Length], largest: int) -> tuple[SlotGroup, ...]:
    """Slots for the text that prompts share: one for each text that goes on in another, as long as the longest.

    Those that run come one after the other, so that no other copies are of use. Where texts of several lengths are
    shared, two slots are made for them, though none goes on in another.

    Args:
        lengths: of the requests that are answered.
        largest: capacity of the largest slot.
    """
    longest: dict[int, int] = {}  # shared text, by the number of texts nested in it
    for length in lengths:
        longest[length.nested] = max(longest.get(length.nested, 0), length.shared)
    rows = sorted(min(largest, tokens) for tokens in longest.values() if tokens)[-MAX_PREFIX_SLOTS:]
    if len(rows) == 1 and len({length.shared for length in lengths[1:]}) > 1:
        rows *= 2
    return tuple(SlotGroup(capacity, slots) for capacity, slots in sorted(Counter(rows).items()))


@dataclass(frozen=True, slots=True)
class Demand:
    """The load on one group of slots: the number of sequences, and the slot-steps that they will occupy."""

    sequences: int
    steps: int

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.sequences + other.sequences, self.steps + other.steps)


def _demand(lengths: Sequence[Length], capacity: Sequence[int], chunk_size: int) -> dict[int, Demand]:
    """The demand by capacity: a sequence occupies its slot for each of its chunks and for each token of its answer.

    Args:
        lengths: of the requests.
        capacity: of the slots that each of them belongs in.
        chunk_size: most prompt tokens of a step.
    """
    demand: dict[int, Demand] = {}
    for length, rows in zip(lengths, capacity, strict=True):
        demand[rows] = demand.get(rows, Demand(0, 0)) + Demand(1, length.steps(chunk_size))
    return demand


def _largest(
    demand: dict[int, Demand],
    most: int,
    fits: Callable[[tuple[SlotGroup, ...]], bool],
) -> tuple[SlotGroup, ...]:
    """As many slots as fit, shared out in proportion to the groups' slot-steps; with fewer groups if need be.

    One slot of the largest capacity must fit.

    Args:
        demand: the load by capacity.
        most: most slots in all.
        fits: whether slots fit the limits.
    """
    capacities = sorted(demand)

    def split(slots: int) -> tuple[SlotGroup, ...]:
        return _split(demand, capacities, slots)

    while True:
        wanted = min(most, sum(demand[capacity].sequences for capacity in capacities))
        slots = _largest_fitting(range(1, wanted + 1), lambda slots: fits(split(slots))) or 0
        if slots >= len(capacities):
            return split(slots)
        smallest, second = capacities[:2]
        demand = demand | {second: demand[smallest] + demand[second]}
        capacities = capacities[1:]


def _split(demand: dict[int, Demand], capacities: Sequence[int], slots: int) -> tuple[SlotGroup, ...]:
    """Share out slots over the groups in proportion to their slot-steps, at least one each while there are enough.

    Args:
        demand: the load by capacity.
        capacities: of the groups.
        slots: how many in all.
    """
    counts = {capacity: min(1, max(0, slots - i)) for i, capacity in enumerate(sorted(capacities, reverse=True))}
    for _ in range(slots - sum(counts.values())):
        open_groups = [capacity for capacity in capacities if counts[capacity] < demand[capacity].sequences]
        if not open_groups:
            break
        counts[max(open_groups, key=lambda capacity: demand[capacity].steps / counts[capacity])] += 1
    return tuple(SlotGroup(capacity, counts[capacity]) for capacity in sorted(counts) if counts[capacity])


def shrunk(plan: Plan, spec: ModelSpec, layout: Callable[[int], KVLayout], device: Device) -> Plan | None:
    """A plan with three quarters of the slots, steps of half the size, and no prefix slots.

    Args:
        plan: the plan under which memory ran out.
        spec: the model's sizes.
        layout: gives a slot's layout from its capacity in rows.
        device: the device, as the memory formula sees it.

    Returns:
        The smaller plan; None if this one has one slot and steps of one chunk.
    """
    step = plan.step
    tokens = max(step.chunk_size + step.probe, step.max_num_batched_tokens // 2)
    if plan.slots == 1 and tokens == step.max_num_batched_tokens:
        return None
    slots = max(1, plan.slots * 3 // 4)
    demand = {group.capacity: Demand(group.slots, group.slots) for group in plan.groups}
    groups = _split(demand, sorted(demand), slots)
    step = replace(step, max_num_batched_tokens=tokens)
    reading = plan.reading and replace(plan.reading, slots=min(plan.reading.slots, slots))
    return replace(
        plan,
        groups=groups,
        layouts=tuple(layout(group.capacity) for group in groups),
        step=step,
        memory=memory_needed(spec, layout, groups, step, device, (), reading),
        prefix_slots=(),
        reading=reading,
    )


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan for JSON, memory item by item in bytes."""
    memory, layout = plan.memory, plan.layouts[0]
    return {
        **({} if layout.format == "model" else {"kv_format": layout.format}),
        "slots": plan.slots,
        "groups": [{"capacity": group.capacity, "slots": group.slots} for group in plan.groups],
        "spare": [{"capacity": group.capacity, "slots": group.slots} for group in plan.prefix_slots],
        **({"states": {"slot_bytes": layout.state_bytes, "format": layout.state_format}} if layout.states else {}),
        **({"reading": {"format": plan.reading.layout.format, "slots": plan.reading.slots}} if plan.reading else {}),
        "chunk_size": plan.step.chunk_size,
        "max_num_batched_tokens": plan.step.max_num_batched_tokens,
        "memory": {f.name: getattr(memory, f.name) for f in fields(memory)} | {"total": memory.total},
        "limit": {"bytes": plan.limits.total, "kv_bytes": plan.limits.pool, "source": plan.limits.source},
        **({"archive_place": plan.limits.place, "archive_room": plan.limits.room} if plan.memory.elsewhere else {}),
        "too_large": plan.too_large,
        "fill": round(plan.fill, 4),
    }
