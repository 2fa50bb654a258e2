"""The memory of a run in closed form, item by item, and what a run may use.

Knows sizes and counts; touches no tensor and no device, and asks the system only how much room an archive has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from math import ceil

from bmx.config import EngineConfig
from bmx.errors import MemoryLimitError
from bmx.hardware import FreeMemory
from bmx.kernels.workspace import SAMPLER_ROWS
from bmx.kv.layout import KVLayout
from bmx.kv.places import DEVICE, HOST, free_bytes
from bmx.model.spec import ModelSpec
from bmx.plan.device import Device

SAMPLER_BYTES = 48  # per logit of those rows: float64 probabilities, sorted, with their ids and sums


@dataclass(frozen=True, slots=True)
class SlotGroup:
    """Slots of one capacity (KV pairs per layer and head).

    Attributes:
        capacity: pairs of a slot.
        slots: how many slots.
        shared: most pairs that a sequence with such a slot reads in a shared slot beside it; 0 where none does.
    """

    capacity: int
    slots: int
    shared: int = 0


def group_for(rows: int, groups: Sequence[SlotGroup], free: Sequence[object]) -> int | None:
    """The index of the group whose free slots are the smallest that hold ``rows``; None if no free slot does.

    Args:
        rows: KV pairs that a sequence needs room for.
        groups: the groups of slots.
        free: of each group, its free slots: how many, or which.
    """
    fitting = [(group.capacity, i) for i, group in enumerate(groups) if free[i] and group.capacity >= rows]
    return min(fitting)[1] if fitting else None


@dataclass(frozen=True, slots=True)
class ReadingSlots:
    """The slots in which prompts are read before they are archived: what each holds, and how many there are."""

    layout: KVLayout
    slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """How large steps may get.

    Attributes:
        chunk_size: most prompt tokens of one sequence.
        max_num_batched_tokens: most tokens of all sequences; one chunk of a prompt is taken in any case.
        probe: tokens of the probe behind each chunk.
    """

    chunk_size: int
    max_num_batched_tokens: int
    probe: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a run, item by item.

    Attributes:
        runtime: what the process holds beside the model: libraries, the tokenizer, a GPU's context.
        weights: parameters and buffers.
        activations: the widest moment of the largest step, the workspace of attention and mixers included.
        logits: logits of a step, and what sampling takes beside them.
        kv: keys and values of all slots.
        scores: positions, accumulated attention and indexes of all slots.
        states: what layers without attention keep in all slots, and in one more for rows of captured steps that idle.
        graphs: what captured decoding keeps for itself on a GPU.
        slack: what allocators lose to rounding, and compiled kernels.
        window: rows that were read ahead where prompts share text, in the host's memory; 0 beside a GPU.
        host: keys and values of an archive in the host's memory, beside a GPU.
        file: keys and values of an archive in a file.
    """

    runtime: int = 0
    weights: int = 0
    activations: int = 0
    logits: int = 0
    kv: int = 0
    scores: int = 0
    states: int = 0
    graphs: int = 0
    slack: int = 0
    window: int = 0
    host: int = 0
    file: int = 0

    @property
    def pool(self) -> int:
        """Bytes of the slots on the device: keys, values, scores and states."""
        return self.kv + self.scores + self.states

    @property
    def step(self) -> int:
        """Bytes of the largest step without slots, captured graphs and rows read ahead: what profiling it measures."""
        return self.total - self.pool - self.graphs - self.window

    @property
    def elsewhere(self) -> int:
        """Bytes that do not count as memory of the device."""
        return self.host + self.file

    @property
    def total(self) -> int:
        """Bytes of all items on the device."""
        sizes: list[int] = [getattr(self, f.name) for f in fields(self)]
        return sum(sizes) - self.elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a run may use.

    Attributes:
        total: bytes in all, what bmx holds already included.
        pool: bytes of the slots, or None for what the rest leaves over.
        slots: most sequences at once, or None.
        source: where ``total`` comes from, for people.
        place: where the keys and values of an archive are: ``device``, ``host`` or a folder.
        room: bytes that they may take there, or None for any.
    """

    total: int
    pool: int | None = None
    slots: int | None = None
    source: str = ""
    place: str = DEVICE
    room: int | None = None

    def missing(self, needed: Memory) -> int:
        """Bytes by which a run is too large; 0 if it fits."""
        over = 0 if self.pool is None else needed.pool - self.pool
        outside = 0 if self.room is None else needed.elsewhere - self.room
        return max(0, over, outside, needed.total - self.total)


def limits(config: EngineConfig, memory: FreeMemory, held: int) -> Limits:
    """What a run may use: the user's limit, or a share of what is free and what bmx holds already.

    An archive that is elsewhere may take the same share of what is free there.

    Args:
        config: the settings.
        memory: the free memory of the device.
        held: bytes that bmx holds already, and that are not among the free ones.
    """
    total = int(min(memory.free + held, memory.total) * config.gpu_memory_utilization)
    held_by_others = f"; {memory.holders}" if memory.holders else ""
    source = f"{config.gpu_memory_utilization:.0%} of what is free, {memory.source}{held_by_others}"
    if config.memory_limit is not None and config.memory_limit < total:
        total, source = config.memory_limit, "memory_limit"
    place = config.kv_archive_place if config.archives else DEVICE
    free = free_bytes(place)
    room = None if free is None else int(free * config.gpu_memory_utilization)
    return Limits(
        total=total,
        pool=config.kv_cache_memory,
        slots=config.max_num_seqs,
        source=source,
        place=place,
        room=room,
    )


def memory_needed(
    spec: ModelSpec,
    layout: Callable[[int], KVLayout],
    groups: Iterable[SlotGroup],
    step: StepSize,
    device: Device,
    prefix_slots: Iterable[SlotGroup] = (),
    reading: ReadingSlots | None = None,
) -> Memory:
    """The memory of a run with these slots.

    Args:
        spec: the model's sizes.
        layout: gives a slot's layout from its capacity in rows.
        groups: the slots of sequences.
        step: how large steps may get.
        device: the device, as the memory formula sees it.
        prefix_slots: slots beside them that hold text which several prompts share.
        reading: slots in which prompts are read before they are archived.
    """
    groups, prefix_slots = tuple(groups), tuple(prefix_slots)
    slots = sum(group.slots for group in groups)
    chunk = step.chunk_size + step.probe
    tokens = max(step.max_num_batched_tokens, slots + chunk)
    keys = max((group.capacity for group in groups), default=0) + chunk
    layouts = [(layout(group.capacity), group.slots) for group in (*groups, *prefix_slots)]
    away = reading is not None and device.archive_place != DEVICE
    stored = sum(slot.stored_bytes * count for slot, count in layouts) if away else 0
    layouts += [(reading.layout, reading.slots)] if reading else []
    one_layer = max(device.workspace(chunk, keys, slots), device.mixing(spec, tokens, slots))
    activations = spec.costs.activation_bytes * tokens + one_layer + device.ranking(keys, slots)
    logits = spec.itemsize * slots * spec.vocab + SAMPLER_BYTES * min(slots, SAMPLER_ROWS) * spec.vocab
    return Memory(
        runtime=device.runtime,
        weights=spec.weight_bytes,
        activations=activations,
        logits=logits,
        kv=sum(slot.kv_bytes * count for slot, count in layouts) - stored,
        scores=sum((slot.cache_bytes - slot.kv_bytes) * count for slot, count in layouts),
        states=sum(slot.state_bytes * count for slot, count in layouts) + layouts[0][0].state_bytes,
        graphs=device.captured(spec, slots, keys),
        slack=device.slack + int(device.share * (activations + logits)),
        window=device.window if any(group.slots for group in prefix_slots) else 0,
        host=stored if device.archive_place == HOST else 0,
        file=0 if device.archive_place == HOST else stored,
    )


def does_not_fit(needed: Memory, limits: Limits) -> MemoryLimitError:
    """The error that says how much is missing for one sequence, and what would be enough."""
    if limits.room is not None and needed.elsewhere > limits.room:
        return _no_room(needed, limits)
    size, limit, what, flag = needed.total, limits.total, "in all", "--memory-limit"
    if size <= limit:
        size, limit, what, flag = needed.pool, limits.pool or 0, "for the KV cache", "--kv-cache-memory"
        what += " and states" if needed.states else ""
    enough = ceil(size / 1e6)
    weights = f", {needed.weights / 1e6:,.0f} MB of it weights" if what == "in all" else ""
    way_out = f"{flag} {enough}M is the least for it; or"
    if flag == "--memory-limit" and limits.source != "memory_limit":
        way_out = "make more memory free for it, or"
    return MemoryLimitError(
        f"one sequence needs {enough:,} MB {what}{weights}; {limit / 1e6:,.0f} MB may be used ({limits.source}): "
        f"{ceil((size - limit) / 1e6):,} MB are missing",
        hint=f"{way_out} lower --kv-budget or --chunk-size, or choose a smaller model; "
        "`bmx plan-batch --check` computes what would fit",
    )


def _no_room(needed: Memory, limits: Limits) -> MemoryLimitError:
    """The error that an archive has no room where it is to be."""
    place = "the host's memory" if limits.place == HOST else limits.place
    return MemoryLimitError(
        f"the archive of one sequence needs {ceil(needed.elsewhere / 1e6):,} MB in {place}; "
        f"{(limits.room or 0) / 1e6:,.0f} MB may be used there",
        hint="make room there, name another place with --kv-archive-place, or choose a --kv-archive of fewer bits",
    )
