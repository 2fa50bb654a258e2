"""What fits: the memory of a run, item by item, and its inverse, the slots that a limit allows.

Knows sizes and counts; touches no tensor, no device and no file.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from math import ceil

from bmx.errors import MemoryLimitError
from bmx.kv.layout import KVLayout
from bmx.model.spec import ModelSpec

MAX_GROUPS = 4
MAX_SLOTS = 4096  # beyond this many rows a step gains nothing
ROW_ALIGNMENT = 16
MAX_CANDIDATES = 128
SAMPLER_ROWS = 16  # rows whose logits are sampled together
SAMPLER_BYTES = 48  # per logit of those rows: float64 probabilities, sorted, with their ids and sums
ALLOCATOR_SLACK = 0.02


@dataclass(frozen=True, slots=True)
class SlotGroup:
    """Slots of one capacity (KV pairs per layer and head)."""

    capacity: int
    slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a run, item by item.

    Attributes:
        runtime: what the process held before the model was loaded.
        weights: parameters and buffers.
        activations: the widest moment of the largest step, attention's workspace included.
        logits: logits of a step, and what sampling takes beside them.
        kv: keys and values of all slots.
        scores: accumulated attention and positions of all slots.
        slack: what allocators lose to rounding.
    """

    runtime: int = 0
    weights: int = 0
    activations: int = 0
    logits: int = 0
    kv: int = 0
    scores: int = 0
    slack: int = 0

    @property
    def pool(self) -> int:
        """Bytes of the slots: keys, values and scores."""
        return self.kv + self.scores

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was decided: nothing of it changes during the run.

    ``too_large`` sequences would not fit even alone; they will be errors, the others are answered.
    """

    groups: tuple[SlotGroup, ...]
    chunk_size: int
    max_num_batched_tokens: int
    memory: Memory
    limits: Limits
    too_large: int = 0

    @property
    def slots(self) -> int:
        """Sequences at once."""
        return sum(group.slots for group in self.groups)


Workspace = Callable[[int, int, int], int]
"""Bytes of one layer's attention, from a chunk's tokens, the keys that a query sees, and the slots."""


def memory_needed(
    spec: ModelSpec,
    layout: Callable[[int], KVLayout],
    groups: Iterable[SlotGroup],
    *,
    chunk_size: int,
    max_num_batched_tokens: int,
    runtime: int,
    workspace: Workspace,
) -> Memory:
    """The memory of a run with these slots (closed form; activations after measurements on Llama-like blocks).

    Args:
        layout: a slot's layout from its capacity.
        runtime: bytes held before the model was loaded.
        workspace: bytes of one layer's attention.
    """
    groups = tuple(groups)
    slots = sum(group.slots for group in groups)
    tokens = max(max_num_batched_tokens, slots + chunk_size)
    rotary = max(layer.key_dim for layer in spec.layers)
    keys = max((group.capacity for group in groups), default=0) + chunk_size
    step = spec.itemsize * tokens * (3 * spec.intermediate + 4 * spec.hidden + 2 * rotary)
    kv = sum(layout(group.capacity).kv_bytes * group.slots for group in groups)
    scores = sum(layout(group.capacity).score_bytes * group.slots for group in groups)
    activations = step + workspace(chunk_size, keys, slots)
    logits = spec.itemsize * slots * spec.vocab + SAMPLER_BYTES * min(slots, SAMPLER_ROWS) * spec.vocab
    return Memory(
        runtime=runtime,
        weights=spec.weight_bytes,
        activations=activations,
        logits=logits,
        kv=kv,
        scores=scores,
        slack=int(ALLOCATOR_SLACK * (activations + logits)),
    )


def plan(
    spec: ModelSpec,
    layout: Callable[[int], KVLayout],
    limits: Limits,
    rows_needed: Sequence[int],
    *,
    chunk_size: int,
    max_num_batched_tokens: int,
    runtime: int,
    workspace: Workspace,
) -> Plan:
    """The slots that fit the limits, in a few groups that suit these sequences.

    Args:
        rows_needed: for every sequence of the run, the rows of a slot that it needs.

    Raises:
        MemoryLimitError: not one slot fits; says how much is missing.
    """

    def memory(groups: tuple[SlotGroup, ...]) -> Memory:
        return memory_needed(
            spec,
            layout,
            groups,
            chunk_size=chunk_size,
            max_num_batched_tokens=max_num_batched_tokens,
            runtime=runtime,
            workspace=workspace,
        )

    def fits(groups: tuple[SlotGroup, ...]) -> bool:
        needed = memory(groups)
        return needed.total <= limits.total and (limits.pool is None or needed.pool <= limits.pool)

    sizes = sorted(set(rows_needed))
    fitting = sizes[: bisect_left(sizes, True, key=lambda rows: not fits((SlotGroup(rows, 1),)))]
    if not fitting:
        raise _does_not_fit(memory((SlotGroup(sizes[0], 1),)), limits)
    served = [rows for rows in rows_needed if rows <= fitting[-1]]
    groups = _largest(Counter(capacities(served)), min(limits.slots or MAX_SLOTS, len(served)), fits)
    return Plan(
        too_large=len(rows_needed) - len(served),
        groups=groups,
        chunk_size=chunk_size,
        max_num_batched_tokens=max_num_batched_tokens,
        memory=memory(groups),
        limits=limits,
    )


def capacities(rows_needed: Sequence[int]) -> list[int]:
    """The capacity of the group that each sequence belongs to: at most four, so chosen that least is wasted.

    The least total of unused rows over all ways to cut the sorted needs into groups (dynamic programming over at
    most 128 candidate capacities).
    """
    largest = max(rows_needed)
    rounded = [min(-(-rows // ROW_ALIGNMENT) * ROW_ALIGNMENT, largest) for rows in rows_needed]
    distinct = sorted(set(rounded))
    step = -(-len(distinct) // MAX_CANDIDATES)
    candidates = sorted({*distinct[step - 1 :: step], largest})
    count = Counter(candidates[bisect_left(candidates, rows)] for rows in rounded)
    chosen = _least_waste(candidates, [count[c] for c in candidates])
    return [chosen[bisect_left(chosen, rows)] for rows in rounded]


def _least_waste(candidates: list[int], counts: list[int]) -> list[int]:
    """The at most four candidates (the last among them) that hold everything with the fewest unused rows."""
    best: list[tuple[int, list[int]]] = [(0, [])]  # of the first i candidates: rows in all, capacities chosen
    rounds: list[list[tuple[int, list[int]]]] = []
    infinite: tuple[int, list[int]] = (2**62, [])
    previous = best + [infinite] * len(candidates)
    for _ in range(min(MAX_GROUPS, len(candidates))):
        current = [infinite] * (len(candidates) + 1)
        for stop, capacity in enumerate(candidates, 1):
            members = 0
            for start in range(stop - 1, -1, -1):
                members += counts[start]
                rows, chosen = previous[start]
                current[stop] = min(current[stop], (rows + members * capacity, [*chosen, capacity]))
        rounds.append(current)
        previous = current
    return min((r[-1] for r in rounds), key=lambda r: (r[0], len(r[1])))[1]


def _largest(
    demand: Counter[int],
    most: int,
    fits: Callable[[tuple[SlotGroup, ...]], bool],
) -> tuple[SlotGroup, ...]:
    """As many slots as fit, each group's share as its share of the sequences; fewer groups if need be.

    One slot of the largest capacity must fit.
    """
    names = sorted(demand)
    while True:
        shares = {name: demand[name] for name in names}
        low, high = 0, min(most, sum(shares.values()))
        while low < high:  # the largest number of slots that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(_split(shares, middle)) else (low, middle - 1)
        if low >= len(names):
            return _split(shares, low)
        demand[names[1]] += demand[names[0]]  # the smallest joins the next
        names = names[1:]


def _split(shares: dict[int, int], slots: int) -> tuple[SlotGroup, ...]:
    """``slots`` slots over the groups in proportion to their sequences, at least one each while there are enough."""
    counts = {name: min(1, max(0, slots - i)) for i, name in enumerate(sorted(shares, reverse=True))}
    for _ in range(slots - sum(counts.values())):
        open_groups = [name for name in shares if counts[name] < shares[name]]
        if not open_groups:
            break
        counts[max(open_groups, key=lambda name: shares[name] / counts[name])] += 1
    return tuple(SlotGroup(name, counts[name]) for name in sorted(counts) if counts[name])


def _does_not_fit(needed: Memory, limits: Limits) -> MemoryLimitError:
    limit, size = (limits.total, needed.total) if needed.total > limits.total else (limits.pool or 0, needed.pool)
    what = "in all" if limit == limits.total else "for the KV cache"
    return MemoryLimitError(
        f"one sequence needs {size / 1e6:,.0f} MB {what}, {limit / 1e6:,.0f} MB may be used ({limits.source}): "
        f"{ceil((size - limit) / 1e6):,} MB are missing",
        hint="lower --kv-budget or --chunk-size, raise --memory-limit, or choose a smaller model",
    )
