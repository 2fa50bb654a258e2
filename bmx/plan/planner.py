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
from bmx.config import MAX_SLOTS, EngineConfig
from bmx.kv.layout import KVLayout, SlotIndex
from bmx.model.spec import ModelSpec
from bmx.plan.capacities import capacities
from bmx.plan.chunks import ending_of, steps_needed
from bmx.plan.device import Device
from bmx.plan.memory import Limits, Memory, ReadingSlots, SlotGroup, StepSize, does_not_fit, memory_needed
from bmx.plan.shared_text import SharedText, shared_text
from bmx.plan.slot_counts import Demand, largest_fitting, most_slots, split_slots

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
        in_place: leading tokens that it and the request before or after it can read in one slot; 0 for none.
    """

    prompt_tokens: int
    max_tokens: int
    rows_needed: int
    shared: int = 0
    reading_rows: int = 0
    nested: int = 0
    in_place: int = 0

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
        layouts: what a slot of each of ``all_groups`` holds.
        step: how large steps may get.
        memory: bytes that the run takes.
        limits: bytes and slots that it may use.
        too_large: requests that would not fit even alone; they become errors, the others are answered.
        needs: pairs of (rows of a slot, number of requests that need exactly that number), for requests that fit.
        prefix_slots: slots that hold the state of text which several prompts share, to be copied.
        shared_slots: slots that hold such text to be read in place.
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
    shared_slots: tuple[SlotGroup, ...] = ()
    reading: ReadingSlots | None = None
    profiled: ProfiledStep | None = field(default=None, compare=False)

    @property
    def slots(self) -> int:
        """Most sequences at once."""
        return sum(group.slots for group in self.groups)

    @property
    def all_groups(self) -> tuple[SlotGroup, ...]:
        """All groups of slots, in the order of their numbers."""
        return (*self.groups, *self.prefix_slots, *self.shared_slots)

    @property
    def shared_indexes(self) -> tuple[SlotIndex, ...]:
        """Where the shared slots are."""
        first = len(self.groups) + len(self.prefix_slots)
        return tuple(SlotIndex(first + i, n) for i, part in enumerate(self.shared_slots) for n in range(part.slots))

    def alone(self, group: SlotGroup, layout: KVLayout) -> Plan:
        """The same plan with one group of slots instead of all; ``layout`` is what a slot of it holds."""
        reading = self.reading and replace(self.reading, slots=1)
        return replace(self, groups=(group,), layouts=(layout,), prefix_slots=(), shared_slots=(), reading=reading)

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
    shares: bool = False,
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
        shares: whether kernels can read text that prompts share in one slot.

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

    largest = largest_fitting(sizes, lambda rows: fits((SlotGroup(rows, 1),)))
    if largest is None:
        raise does_not_fit(memory((SlotGroup(sizes[0], 1),)), limits)
    served = [length for length in lengths if length.rows_needed <= largest]
    capacity = capacities([length.rows_needed for length in served])
    demand = _demand(served, capacity, step.chunk_size)
    most = min(limits.slots or MAX_SLOTS, len(served))
    slots = _with_copies(
        _Slots(most_slots(demand, most, fits)), _prefix_slots(served, max(capacity)), demand, most, fits
    )
    in_place = _in_place(served, most, step.chunk_size, fits) if shares else None
    if in_place and in_place.count > slots.count:
        slots = in_place
    needs = Counter(length.rows_needed for length in slots.lengths or served)
    spare = (*slots.prefix_slots, *slots.shared_slots)
    return Plan(
        groups=slots.groups,
        layouts=tuple(layout(group.capacity) for group in (*slots.groups, *spare)),
        step=step,
        memory=memory(slots.groups, spare),
        limits=limits,
        too_large=len(lengths) - len(served),
        needs=tuple(sorted(needs.items())),
        prefix_slots=slots.prefix_slots,
        shared_slots=slots.shared_slots,
        reading=reading(slots.groups, spare),
    )


Groups = tuple[SlotGroup, ...]


@dataclass(frozen=True, slots=True)
class _Slots:
    """The slots of a plan, as those of ``Plan``, and the lengths with the rows that are left to slots of their own."""

    groups: Groups
    prefix_slots: Groups = ()
    shared_slots: Groups = ()
    lengths: tuple[Length, ...] = ()

    @property
    def count(self) -> int:
        """Slots of sequences."""
        return sum(group.slots for group in self.groups)


def _with_copies(
    slots: _Slots, prefix_slots: Groups, demand: dict[int, Demand], most: int, fits: Callable[..., bool]
) -> _Slots:
    """The slots beside such as hold copies of shared text, if enough of them are left.

    Args:
        slots: those without copies.
        prefix_slots: for the copies.
        demand: the load by capacity.
        most: most slots in all.
        fits: whether slots of sequences and for copies fit the limits.
    """
    if not prefix_slots or not fits((SlotGroup(max(demand), 1),), prefix_slots):
        return slots
    beside = _Slots(most_slots(demand, most, lambda groups: fits(groups, prefix_slots)), prefix_slots)
    return beside if beside.count >= WORTH_SLOTS * slots.count else slots


def _in_place(served: Sequence[Length], most: int, chunk_size: int, fits: Callable[..., bool]) -> _Slots | None:
    """Slots for what prompts do not share, beside slots that hold what they do; None if they share nothing so.

    One slot at least is as large as the largest sequence: for one that shares nothing, or whose shared text finds no
    slot in time.

    Args:
        served: lengths of the requests that are answered.
        most: most slots in all.
        chunk_size: most prompt tokens of a step.
        fits: whether slots of sequences and such beside them fit the limits.
    """
    text, lengths = own_lengths(served)
    whole = max(length.rows_needed for length in served)
    if text is None:
        return None
    copies = _prefix_slots([own for own, tokens in zip(served, text.tokens, strict=True) if not tokens], whole)
    shared_slots = (SlotGroup(text.longest, text.slots),)
    if not fits((SlotGroup(whole, 1),), (*copies, *shared_slots)):
        return None
    *capacity, _ = capacities([*(length.rows_needed for length in lengths), whole])
    demand = _demand(lengths, capacity, chunk_size)
    demand[whole] = demand.get(whole, Demand(0, 0)) + Demand(1, 1)
    groups = most_slots(demand, min(most, text.readers + 1), lambda groups: fits(groups, (*copies, *shared_slots)))
    shared = {rows: tokens for rows, tokens in sorted(zip(capacity, text.tokens, strict=True)) if tokens}
    groups = tuple(replace(group, shared=shared.get(group.capacity, 0)) for group in groups)
    return _Slots(groups, copies, shared_slots, tuple(lengths)) if any(group.shared for group in groups) else None


def own_lengths(lengths: Sequence[Length]) -> tuple[SharedText | None, list[Length]]:
    """What requests read in place, and their lengths with the rows that they need beside it.

    Args:
        lengths: of the requests.

    Returns:
        None and the same lengths, if they share nothing so.
    """
    text = shared_text([length.in_place for length in lengths], [length.shared for length in lengths])
    if text is None:
        return None, list(lengths)
    own = zip(lengths, text.tokens, strict=True)
    return text, [replace(length, rows_needed=length.rows_needed - tokens) for length, tokens in own]


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


def shrunk(plan: Plan, spec: ModelSpec, layout: Callable[[int], KVLayout], device: Device) -> Plan | None:
    """A plan with three quarters of the slots, steps of half the size, and no slots for copies.

    Shared slots stay while there are slots that need them.

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
    shared = {group.capacity: group.shared for group in plan.groups}
    groups = tuple(
        replace(group, shared=shared[group.capacity]) for group in split_slots(demand, sorted(demand), slots)
    )
    shared_slots = plan.shared_slots if any(group.shared for group in groups) else ()
    step = replace(step, max_num_batched_tokens=tokens)
    reading = plan.reading and replace(plan.reading, slots=min(plan.reading.slots, slots))
    return replace(
        plan,
        groups=groups,
        layouts=tuple(layout(group.capacity) for group in (*groups, *shared_slots)),
        step=step,
        memory=memory_needed(spec, layout, groups, step, device, shared_slots, reading),
        prefix_slots=(),
        shared_slots=shared_slots,
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
        **({"shared": _shared_record(plan)} if plan.shared_slots else {}),
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


def _shared_record(plan: Plan) -> list[dict[str, int]]:
    """The shared slots for JSON."""
    return [{"capacity": group.capacity, "slots": group.slots} for group in plan.shared_slots]
