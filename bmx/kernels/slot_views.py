"""What kernels see of a layer's slots and of the prompt chunks of a step. Knows tensors; computes nothing.

Shapes: R rows of all slots and heads, S slots, K kv heads, C rows of a head in one slot, D key dim, E value dim,
N chunks or groups of keys, T packed tokens of a step, G exact rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from bmx.kernels.formats import MODEL, Stored

if TYPE_CHECKING:
    from torch import Tensor


class SlotView(NamedTuple):
    """Views of one slot: of all kv heads, or of one alone (K is 1).

    Attributes:
        keys: [K, C, D], as they are stored.
        values: [K, C, E], as they are stored.
        positions: [K, C].
        mass: [K, C], or None.
        ranks: [K, C], or None.
    """

    keys: Stored
    values: Stored
    positions: Tensor
    mass: Tensor | None
    ranks: Tensor | None


class SharedRows(NamedTuple):
    """Rows of other slots that decoding tokens read, in place, before those of their own.

    Attributes:
        slots: [B] int64, the slot that each token reads beside its own.
        rows: [B] int64, how many of its first rows: the positions before those of the token's own slot. 0 for none.
    """

    slots: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """All slots of one layer, of every capacity, in one piece of memory.

    Row c of kv head k of slot s is row ``first[s, k] + c``. A sequence fills the rows of a head in order until it
    evicts; from then on survivors lie in any order.

    Attributes:
        keys: [R, D] in the model's dtype, or codes [R, bytes] uint8; ``formats`` says what they mean.
        values: [R, E] in the model's dtype, or codes.
        positions: [R] int32, the token's position in its sequence; -1 where the row is empty.
        mass: [R] float32, attention received from queries so far; None where the eviction order does not need it.
        first: [S, K] int64, first row of each kv head of each slot.
        capacity: [S, K] int64, rows of each kv head in each slot.
        kv_heads: K.
        capacities: ``capacity`` on the host.
        largest: the largest capacity.
        apart: whether heads differ in capacity in some slot; if not, those of a slot lie one after another.
        key_scales: [R, 1 or 2] float16, scale and offset of each key's codes; None in the model's dtype.
        value_scales: the same of the values.
        key_format: ``model``, or the name of the keys' format.
        value_format: ``model``, or the name of the values' format.
        ranks: [R] float32, scores at the last ranking, +inf for pairs that came after it; None where none are stored.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    mass: Tensor | None
    first: Tensor
    capacity: Tensor
    kv_heads: int
    capacities: tuple[tuple[int, ...], ...]
    largest: int
    apart: bool = False
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    key_format: str = MODEL
    value_format: str = MODEL
    ranks: Tensor | None = None

    @property
    def formats(self) -> tuple[str, str]:
        """The formats of keys and values."""
        return self.key_format, self.value_format

    def slot(self, slot: int) -> Iterator[tuple[slice, SlotView]]:
        """Views of one slot, and the kv heads that they show: of all heads, or of one after another."""
        for head in range(self.kv_heads if self.apart else 1):
            yield slice(head, head + 1) if self.apart else slice(0, self.kv_heads), self.view(slot, head)

    def view(self, slot: int, head: int) -> SlotView:
        """One slot, from this head on: of all heads, or of one alone."""
        first, shape = int(self.first[slot, head]), (1 if self.apart else self.kv_heads, self.capacities[slot][head])
        own = slice(first, first + shape[0] * shape[1])
        return SlotView(
            Stored(self.keys, self.key_scales, self.key_format).rows(first, shape),
            Stored(self.values, self.value_scales, self.value_format).rows(first, shape),
            self.positions[own].view(shape),
            None if self.mass is None else self.mass[own].view(shape),
            None if self.ranks is None else self.ranks[own].view(shape),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelRows:
    """Slots of one layer whose keys are scaled by channel, of every capacity: nothing is evicted, a row is a position.

    The groups of keys of all slots lie in one piece of memory, and so do the values. The newest pairs of each slot are
    held in the model's dtype too: those of position p are at p mod G, with G = ``KEY_GROUP``.

    Attributes:
        codes: [N, G, bytes] uint8, the keys' codes, in groups of G rows.
        scales: [N, D, 2] float16, scale and offset of each channel of a group.
        key_format: the name of the keys' format.
        values: [R, E], as they are stored.
        exact_keys: [S, K, G, D].
        exact_values: [S, K, G, E].
        exact_rows: [S, K, G] int32, the row that each exact pair has in its slot, -1 for none.
        first: [S, K] int64, the first value of each kv head of each slot.
        first_group: [S, K] int64, its first group of keys.
        capacity: [S, K] int64, its rows.
        largest: the largest capacity.
    """

    codes: Tensor
    scales: Tensor
    key_format: str
    values: Stored
    exact_keys: Tensor
    exact_values: Tensor
    exact_rows: Tensor
    first: Tensor
    first_group: Tensor
    capacity: Tensor
    largest: int

    def of(self, slots: slice) -> ChannelRows:
        """The same of some slots alone, numbered from the first of them."""
        names = ("exact_keys", "exact_values", "exact_rows", "first", "first_group", "capacity")
        return replace(self, **{name: getattr(self, name)[slots] for name in names})

    @property
    def formats(self) -> tuple[str, str]:
        """The formats of keys and values."""
        return self.key_format, self.values.format


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunks:
    """The prompt chunks of a step, each the next tokens of another slot's sequence. Six columns of N numbers.

    Attributes:
        offsets: packed row of each chunk's first token.
        lengths: tokens of the chunk.
        slots: number of the sequence's slot.
        starts: tokens of the sequence before the chunk.
        row_limits: rows of a head that the sequence may use, if its slot has as many.
        totals: tokens of the sequence when its answer has its maximum length.
        table: [6, N] int64, the same six columns, in this order, on the device.
        shared: slot of each chunk, and how many of its first rows, that it reads before its own slot: the positions
            before those of its own. Nothing where no chunk reads another slot; 0 rows for a chunk that reads none.
        query_weights: [T] float32, the weight of each packed token's attention; None if all weigh 1.
        decay: [N] float32, factor on the earlier mass, before the chunk's attention is added; None for 1.
    """

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    starts: tuple[int, ...]
    row_limits: tuple[int, ...]
    totals: tuple[int, ...]
    table: Tensor
    shared: tuple[tuple[int, int], ...] = ()
    query_weights: Tensor | None = None
    decay: Tensor | None = None

    def evicts(self, chunk: int, capacity: int) -> bool:
        """Whether a chunk's sequence ever evicts in a head of this capacity."""
        return self.totals[chunk] > min(self.row_limits[chunk], capacity)

    def shared_by(self, chunk: int) -> tuple[int, int]:
        """The slot that a chunk reads before its own, and how many of its rows: 0 for none."""
        return self.shared[chunk] if self.shared else (0, 0)

    def views(self, rows: Rows) -> Iterator[tuple[int, tuple[slice, SlotView]]]:
        """Each chunk's number, and kv heads and views of its slot, as ``Rows.slot`` gives them."""
        return ((chunk, view) for chunk, slot in enumerate(self.slots) for view in rows.slot(slot))

    def may_evict(self, rows: Rows) -> list[bool]:
        """Whether each chunk's sequence ever evicts in some head of this layer."""
        return [self.evicts(chunk, min(rows.capacities[slot])) for chunk, slot in enumerate(self.slots)]


def query_heads(kv_heads: slice, group: int) -> slice:
    """The query heads of consecutive kv heads; ``group`` of each."""
    return slice(kv_heads.start * group, kv_heads.stop * group)
