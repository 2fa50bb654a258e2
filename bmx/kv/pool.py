"""The tensors of all slots: allocated once, written in place, never compacted.

Knows shapes and rows; knows nothing of how pairs are ranked, of sequences or of models. Rows of a slot are order-free:
a key carries its rotary position, so evicting a pair is writing another one over it.

Shapes: S slots of a group, K kv heads, C rows, R rows in use, D key dim, E value dim, B slots addressed, T tokens of a
chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bmx.kernels.formats import Stored
from bmx.kernels.slot_views import ChannelRows, Rows
from bmx.kv.channel_memory import ChannelGroup, allocate_channels
from bmx.kv.index import Index, allocate_index
from bmx.kv.layout import ROW_STATS, KVLayout, LayerLayout, SlotIndex
from bmx.kv.places import DeviceMemory, Place, open_place
from bmx.kv.slot_tables import SlotTables, first_rows, slot_table
from bmx.kv.stores import EMPTY, ExactWindow, RowStore, Shape, Store


@dataclass(frozen=True, slots=True, eq=False)
class LayerSlots:
    """One layer of one group of slots.

    Attributes:
        layout: what a slot holds of this layer.
        keys: store of [S, K, C, D].
        values: store of [S, K, C, E].
        positions: [S, K, C] int32, the token's position in its sequence, -1 where the row is empty. Where keys are
            scaled by channel nothing is evicted: each row has its own number, for all slots once.
        row_stats: by name, [S, K, C] float32: what eviction stores for each row.
        newest: exact copies of the newest pairs, where keys are scaled by channel; else None.
        channel_rows: the same tensors, as kernels see them, where keys are scaled by channel and on the device; else
            None.
        index: of the keys, where tokens choose by it which rows they read; else None.
        chosen: [S, K, O] int32, rows that the tokens until the next choice read too, where they are remembered.
    """

    layout: LayerLayout
    keys: Store
    values: Store
    positions: Tensor
    row_stats: Mapping[str, Tensor]
    newest: ExactWindow | None
    channel_rows: ChannelRows | None = None
    index: Index | None = None
    chosen: Tensor | None = None

    @classmethod
    def allocate(
        cls, layout: LayerLayout, slots: int, dtype: torch.dtype, device: torch.device, place: Place | None = None
    ) -> LayerSlots:
        """Empty slots.

        Args:
            layout: what a slot holds of this layer.
            slots: S.
            dtype: of keys and values.
            device: where the tensors are.
            place: where keys and values are; on the device if left out.
        """
        shape, place = (slots, layout.kv_heads, layout.capacity), place or DeviceMemory(device)
        if layout.by_channel:
            return cls.by_channel(layout, allocate_channels([(layout, slots)], dtype, device, place, {})[1][0])
        keys = Stored.zeros(layout.key_format, shape, layout.key_dim, dtype, device, place.zeros)
        values = Stored.zeros(layout.value_format, shape, layout.value_dim, dtype, device, place.zeros)
        return cls(
            layout,
            RowStore(keys, layout.key_dim, dtype, device),
            RowStore(values, layout.value_dim, dtype, device),
            torch.full(shape, EMPTY, dtype=torch.int32, device=device),
            {name: torch.full(shape, ROW_STATS[name], device=device) for name in layout.row_stats},
            None,
            index=allocate_index(layout, slots, dtype, device),
            chosen=_allocate_chosen(layout, slots, device),
        )

    @classmethod
    def by_channel(cls, layout: LayerLayout, group: ChannelGroup) -> LayerSlots:
        """Slots whose keys are scaled by channel.

        Args:
            layout: what a slot holds of this layer.
            group: their memory.
        """
        device, slots = group.newest.keys.device, len(group.newest.keys)
        shape = (slots, layout.kv_heads, layout.capacity)
        return cls(
            layout,
            group.keys,
            group.values,
            torch.arange(layout.capacity, dtype=torch.int32, device=device).expand(shape),
            {name: torch.full(shape, ROW_STATS[name], device=device) for name in layout.row_stats},
            group.newest,
            group.rows,
            allocate_index(layout, slots, group.keys.dtype, device),
            _allocate_chosen(layout, slots, device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        newest = self.newest.nbytes if self.newest else 0
        row_stats = sum(stat.nbytes for stat in self.row_stats.values())
        recall = (self.index.nbytes if self.index else 0) + (0 if self.chosen is None else self.chosen.nbytes)
        positions = 0 if self.layout.by_channel else self.positions.nbytes
        return self.keys.nbytes + self.values.nbytes + positions + row_stats + newest + recall

    @property
    def slots(self) -> int:
        """S."""
        return len(self.positions)

    @property
    def reads_in_place(self) -> bool:
        """Whether reading all slots copies nothing: vectors are stored in the model's dtype, and on the device."""
        return not self.layout.encodes and self.keys.parts[0].device == self.positions.device

    def read(self, slot: int, rows: int) -> tuple[Tensor, Tensor]:
        """The first ``rows`` rows of one slot, at least those in use: keys [K, R, D] and values [K, R, E]."""
        if self.newest is None:
            return self.keys.read(slot, rows), self.values.read(slot, rows)
        keys, values = self.read_slots(slice(slot, slot + 1), rows)
        return keys[0], values[0]

    def read_slots(self, slots: Tensor | slice, rows: int) -> tuple[Tensor, Tensor]:
        """The first ``rows`` rows of slots, at least those in use: keys [B, K, R, D] and values [B, K, R, E]."""
        keys, values = self.keys.read(slots, rows), self.values.read(slots, rows)
        return (keys, values) if self.newest is None else self.newest.overlay(slots, keys, values)

    def read_rows(self, slots: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows of slots, each kv head's own, where nothing is evicted: row = position.

        Args:
            slots: [B].
            rows: [B, K, N].

        Returns:
            Keys [B, K, N, D] and values [B, K, N, E].
        """
        index = (slots.view(-1, 1, 1), torch.arange(rows.shape[1], device=rows.device).unsqueeze(1), rows)
        keys, values = self.keys.read_rows(index), self.values.read_rows(index)
        return (keys, values) if self.newest is None else self.newest.replace_rows(index, keys, values)

    def write(self, slots: Tensor, rows: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Write one token into each of B slots, in each kv head into its own row.

        Args:
            slots: [B].
            rows: [B, K] or [B, 1].
            key: [B, K, D].
            value: [B, K, E].
            positions: [B], of the tokens in their sequences.
        """
        index = (slots.unsqueeze(1), torch.arange(self.layout.kv_heads, device=rows.device), rows)
        if not self.layout.by_channel:
            self.positions[index] = positions.unsqueeze(1).to(torch.int32)
        for name, stat in self.row_stats.items():
            stat[index] = ROW_STATS[name]
        if self.newest is not None:  # before the keys, which may be encoded from there
            self.newest.write_tokens(index, positions, key, value)
        self.keys.write_tokens(index, positions, key)
        self.values.write_tokens(index, positions, value)

    def append(
        self, slot: int, used: int, key: Tensor, value: Tensor, positions: Tensor, row_stats: Mapping[str, Tensor]
    ) -> None:
        """Write a chunk into the empty rows of a slot.

        Args:
            slot: of this group.
            used: rows in use; the chunk is written behind them.
            key: [T, K, D].
            value: [T, K, E].
            positions: [T].
            row_stats: by name [K, T].
        """
        self.keys.append(slot, used, key.transpose(0, 1))
        self.values.append(slot, used, value.transpose(0, 1))
        index = (slot, slice(None), slice(used, used + len(positions)))
        if not self.layout.by_channel:
            self.positions[index] = positions.to(torch.int32)
        for name, stat in self.row_stats.items():
            stat[index] = row_stats[name]
        if self.newest is not None:
            self.newest.write_chunk(slot, self.positions[slot], positions, key, value)
        if self.index is not None:
            self.index.append(slot, used, key.transpose(0, 1))

    def replace(
        self, slot: int, keep: Tensor, key: Tensor, value: Tensor, positions: Tensor, row_stats: Mapping[str, Tensor]
    ) -> None:
        """Write the surviving tokens of a chunk over the rows of a slot that are evicted.

        Args:
            slot: of this group.
            keep: [K, R + T] bool, exactly R True per head: which of the slot's first R rows, and which tokens, survive.
            key: [T, K, D].
            value: [T, K, E].
            positions: [T].
            row_stats: by name [K, T].
        """
        tokens = len(positions)
        evicted = ~keep[:, :-tokens]
        survivors = keep[:, -tokens:].byte().argsort(dim=1, descending=True, stable=True)  # surviving tokens first
        chosen = survivors.gather(1, (evicted.cumsum(1) - 1).clamp(0, tokens - 1))  # the n-th for the n-th evicted row
        self.keys.replace(slot, evicted, chosen, key)
        self.values.replace(slot, evicted, chosen, value)
        rows = evicted.shape[1]
        held = self.positions[slot, :, :rows]
        held.copy_(torch.where(evicted, positions[chosen].to(torch.int32), held))
        for name, stat in self.row_stats.items():
            stored = stat[slot, :, :rows]
            stored.copy_(torch.where(evicted, row_stats[name].gather(1, chosen), stored))
        if self.newest is not None:
            self.newest.write_chunk(slot, self.positions[slot], positions, key, value)

    def reset(self, slot: int) -> None:
        """Empty one slot. Values are zeroed too: a NaN times a weight of zero is a NaN."""
        self.values.clear(slot)
        if not self.layout.by_channel:
            self.positions[slot] = EMPTY
        for name, stat in self.row_stats.items():
            stat[slot] = ROW_STATS[name]
        if self.newest is not None:
            self.newest.clear(slot)

    def copy_state(self, slot: int, source: LayerSlots, source_slot: int, tokens: int) -> None:
        """Copy what a slot of the same layer holds of its sequence to an empty slot of this group.

        Args:
            slot: the empty slot.
            source: the other slot's group, which may be this one.
            source_slot: the other slot.
            tokens: of the sequence so far; both slots hold all pairs of them that are left.
        """
        rows = min(tokens, self.layout.capacity, source.layout.capacity)
        self.keys.copy_rows(slot, source.keys, source_slot, rows)
        self.values.copy_rows(slot, source.values, source_slot, rows)
        if not self.layout.by_channel:
            self.positions[slot, :, :rows] = source.positions[source_slot, :, :rows]
        for name in self.row_stats.keys() & source.row_stats.keys():
            self.row_stats[name][slot, :, :rows] = source.row_stats[name][source_slot, :, :rows]
        if self.newest is not None and source.newest is not None:
            self.newest.copy_newest(slot, source.newest, source_slot, tokens)
        if self.index is not None and source.index is not None:
            self.index.copy_state(slot, source.index, source_slot)


TENSORS = 4  # that hold the keys and values of a layer's slots of one group: numbers and scales of each
Parts = tuple[LayerSlots, ...]  # a layer's slots in one group: all heads together, or each alone
Sizes = list[tuple[LayerLayout, int]]  # one layer's layout in each group, with the group's number of slots


def _allocate_layer(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, place: Place, tables: SlotTables
) -> tuple[tuple[Parts, ...], Rows | ChannelRows | None]:
    """One layer's slots in all groups; views of one piece of memory if they are ranked alike and on the device."""
    ranked_alike = len({(layout.row_stats, layout.by_age) for layout, _ in sizes}) == 1
    layout, apart = sizes[0][0], any(own.heads_differ for own, _ in sizes)
    parts = [(own.heads if apart else (own,), count) for own, count in sizes]
    if layout.by_channel and not apart and place.is_on(device):
        channels, memory = allocate_channels(sizes, dtype, device, place, tables)
        of_groups = zip(sizes, memory, strict=True)
        return tuple((LayerSlots.by_channel(own, group),) for (own, _), group in of_groups), channels
    if not ranked_alike or layout.by_channel or not place.is_on(device):
        slots = (tuple(LayerSlots.allocate(p, count, dtype, device, place) for p in of) for of, count in parts)
        return tuple(slots), None
    total = sum(own.rows * count for own, count in sizes)
    keys = Stored.zeros(layout.key_format, (total,), layout.key_dim, dtype, device, place.zeros)
    values = Stored.zeros(layout.value_format, (total,), layout.value_dim, dtype, device, place.zeros)
    positions = torch.full((total,), EMPTY, dtype=torch.int32, device=device)
    row_stats = {name: torch.full((total,), ROW_STATS[name], device=device) for name in layout.row_stats}

    def part_from(begin: int, part: LayerLayout, count: int) -> LayerSlots:
        shape = (count, part.kv_heads, part.capacity)
        return LayerSlots(
            part,
            RowStore(keys.rows(begin, shape), part.key_dim, dtype, device),
            RowStore(values.rows(begin, shape), part.value_dim, dtype, device),
            _view(positions, begin, shape),
            {name: _view(stat, begin, shape) for name, stat in row_stats.items()},
            None,
            index=allocate_index(part, count, dtype, device),
            chosen=_allocate_chosen(part, count, device),
        )

    groups, first, begin = list[Parts](), list[tuple[int, ...]](), 0
    for own, count in parts:
        *begins, begin = accumulate((part.rows * count for part in own), initial=begin)
        groups.append(tuple(part_from(at, part, count) for at, part in zip(begins, own, strict=True)))
        first += [first_rows(begins, own, slot) for slot in range(count)]
    capacities = tuple(own.capacities for own, count in sizes for _ in range(count))
    begin_of_head, capacity = slot_table(tuple(first), capacities, device, tables)
    rows = Rows(
        keys=keys.numbers,
        values=values.numbers,
        key_scales=keys.scales,
        value_scales=values.scales,
        key_format=keys.format,
        value_format=values.format,
        positions=positions,
        mass=row_stats.get("mass"),
        ranks=row_stats.get("rank"),
        first=begin_of_head,
        capacity=capacity,
        kv_heads=layout.kv_heads,
        largest=max(map(max, capacities)),
        capacities=capacities,
        apart=apart,
    )
    return tuple(groups), rows


def _allocate_chosen(layout: LayerLayout, slots: int, device: torch.device) -> Tensor | None:
    """Room for the chosen rows of each slot; None where they are not remembered."""
    if layout.recall is None or not layout.recall.kept:
        return None
    return torch.full((slots, layout.kv_heads, layout.recall.kept), EMPTY, dtype=torch.int32, device=device)


def _view(flat: Tensor, begin: int, shape: Shape) -> Tensor:
    """Rows of a tensor [R] from ``begin`` on, as [S, K, C]."""
    slots, heads, capacity = shape
    return flat[begin : begin + slots * heads * capacity].view(shape)


class KVPool:
    """All slots of a run, in groups of equal capacity.

    Args:
        layouts: one layout per group.
        slots: how many slots each group has.
        dtype: of keys and values.
        device: where the tensors are.
        place: where keys and values are; on the device if left out.

    Attributes:
        dtype: of keys and values, before they are encoded.
        groups: by group, each layer's slots in parts.
        slot_offsets: number of slots in the groups before each; slot s of group g has number slot_offsets[g] + s.
        rows: by layer, the slots of all groups in one piece, where groups are ranked alike and pairs are stored row by
            row; else None.
        channel_rows: by layer, the slots of all groups in one piece, where keys are scaled by channel and on the
            device; else None.
    """

    def __init__(
        self,
        layouts: tuple[KVLayout, ...],
        slots: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        place: Place | None = None,
    ) -> None:
        self.dtype, place = dtype, place or DeviceMemory(device)
        self._elsewhere = not isinstance(place, DeviceMemory)
        self.slot_offsets = tuple(accumulate(slots, initial=0))
        tables: SlotTables = {}
        owned: dict[int, tuple[tuple[Parts, ...], Rows | ChannelRows | None]] = {}
        for i, layer in enumerate(layouts[0].layers):
            if layer.owner == i:
                sizes = [(layout.layers[i], count) for layout, count in zip(layouts, slots, strict=True)]
                owned[i] = _allocate_layer(sizes, dtype, device, place, tables)
        owners = [layer.owner for layer in layouts[0].layers]
        self.groups = tuple(tuple(owned[owner][0][group] for owner in owners) for group in range(len(layouts)))
        pieces = [owned[owner][1] for owner in owners]
        self.rows = tuple(piece if isinstance(piece, Rows) else None for piece in pieces)
        self.channel_rows = tuple(piece if isinstance(piece, ChannelRows) else None for piece in pieces)

    @classmethod
    def placed(
        cls, layouts: tuple[KVLayout, ...], slots: tuple[int, ...], dtype: torch.dtype, device: torch.device, place: str
    ) -> KVPool:
        """A pool whose keys and values are in the place that a setting names; room for all of them is taken first.

        Args:
            layouts: one layout per group.
            slots: how many slots each group has.
            dtype: of keys and values.
            device: the device that computes.
            place: ``device``, ``host`` or a folder.

        Raises:
            OutputError: a disk has no room for them.
            UsageError: there is no such place for this device.
        """
        nbytes = sum(layout.stored_bytes * count for layout, count in zip(layouts, slots, strict=True))
        tensors = TENSORS * sum(len(layout.layers) for layout in layouts)
        return cls(layouts, slots, dtype, device, open_place(place, device, nbytes, tensors))

    def layer(self, group: int, layer: int) -> Parts:
        """The slots that a layer reads in a group: its own, or those of the layer whose rows it shares.

        All kv heads are one part; in a layer whose heads differ in capacity in any group, each is a part of its own.
        """
        return self.groups[group][layer]

    def reset(self, group: int, slot: int) -> None:
        """Empty one slot for its next sequence."""
        for part in self._parts(group):
            part.reset(slot)

    def copy_state(self, source: SlotIndex, target: SlotIndex, tokens: int) -> None:
        """Copy what one slot holds of a sequence to another, whatever was in it.

        Args:
            source: the slot to copy from.
            target: the slot to copy to.
            tokens: of the sequence so far.
        """
        self.reset(target.group, target.slot)
        pairs = set(zip(self.groups[target.group], self.groups[source.group], strict=True))
        for part, other in (pair for parts in pairs for pair in zip(*parts, strict=True)):
            part.copy_state(target.slot, other, source.slot, tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, wherever they are: what the layouts promised."""
        return sum(part.nbytes for group in range(len(self.groups)) for part in self._parts(group))

    @property
    def device_bytes(self) -> int:
        """Bytes of all slots on the device: without keys and values that have another place."""
        parts = [part for group in range(len(self.groups)) for part in self._parts(group)]
        return self.nbytes - self._elsewhere * sum(part.keys.nbytes + part.values.nbytes for part in parts)

    def _parts(self, group: int) -> Iterator[LayerSlots]:
        """All parts of a group, each once."""
        return (part for parts in set(self.groups[group]) for part in parts)
