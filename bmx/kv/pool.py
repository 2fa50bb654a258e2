"""The tensors of all slots: allocated once, written in place, never compacted.

Knows shapes and rows; knows nothing of scores' meaning, sequences or models. Rows of a slot are order-free: a key
carries its rotary position in itself, so eviction is a write over the row that goes.

Shapes: S slots of a group, K kv heads, C rows, W exact rows, D key dim, E value dim, B slots addressed, T chunk tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import accumulate

import torch
from torch import Tensor

from bmx.kernels.slot_views import Rows
from bmx.kv.formats import ByChannel, Plain, Store, allocate
from bmx.kv.layout import KEY_GROUP, ROW_STATS, KVLayout, LayerLayout

EMPTY = -1


@dataclass(frozen=True, slots=True, eq=False)
class ExactWindow:
    """The newest pairs of each slot in the model's own type, beside their codes: pair p lies at p mod W.

    Attributes:
        keys: [S, K, W, D]; values [S, K, W, E].
        rows: [S, K, W] int32, the row that each has in its slot, -1 for none.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes + self.rows.nbytes

    def lay_over(self, stored: Tensor, exact: Tensor, rows: Tensor) -> Tensor:
        """Vectors [..., K, C, D] in which those of the newest pairs [..., K, W, D] have taken their rows [..., K, W].

        A place that holds no pair yet goes to the row of its own number, which is as empty.
        """
        exact, rows = exact[..., : stored.shape[-2], :], rows[..., : stored.shape[-2]]
        own = torch.arange(rows.shape[-1], device=rows.device)
        at = torch.where(rows < 0, own, rows.long())
        return stored.scatter_(-2, at.unsqueeze(-1).expand(exact.shape), exact)


@dataclass(frozen=True, slots=True, eq=False)
class LayerSlots:
    """One layer of one group of slots.

    Attributes:
        keys, values: stores of [S, K, C] vectors.
        positions: [S, K, C] int32, the token's position in its sequence, -1 where the row is empty.
        row_stats: by name, [S, K, C] float32: what eviction remembers.
        newest: exact copies of the newest pairs, where others are stored in fewer bits.
    """

    layout: LayerLayout
    keys: Store
    values: Store
    positions: Tensor
    row_stats: Mapping[str, Tensor]
    newest: ExactWindow | None

    @classmethod
    def allocate(cls, layout: LayerLayout, slots: int, dtype: torch.dtype, device: torch.device) -> LayerSlots:
        """Empty rows for ``slots`` slots."""
        shape = (slots, layout.kv_heads, layout.capacity)
        newest = None
        if layout.exact:
            near = (slots, layout.kv_heads, layout.exact)
            newest = ExactWindow(
                torch.zeros(*near, layout.key_dim, dtype=dtype, device=device),
                torch.zeros(*near, layout.value_dim, dtype=dtype, device=device),
                torch.full(near, EMPTY, dtype=torch.int32, device=device),
            )
        return cls(
            layout,
            allocate(layout.format, shape, layout.key_dim, dtype, device, layout.by_channel),
            allocate(layout.format, shape, layout.value_dim, dtype, device, by_channel=False),
            torch.full(shape, EMPTY, dtype=torch.int32, device=device),
            {name: torch.full(shape, ROW_STATS[name], device=device) for name in layout.row_stats},
            newest,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        newest = self.newest.nbytes if self.newest else 0
        row_stats = sum(stat.nbytes for stat in self.row_stats.values())
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes + row_stats + newest

    @property
    def slots(self) -> int:
        """S."""
        return len(self.positions)

    @property
    def as_they_are(self) -> bool:
        """Whether vectors are stored in the model's own type, so that reading all slots copies nothing."""
        return self.layout.format == "auto"

    def read(self, slot: int, rows: int) -> tuple[Tensor, Tensor]:
        """The first rows of one slot: keys [K, rows, D] and values [K, rows, E]."""
        if self.newest is None:
            return self.keys.read((slot, slice(None), slice(rows))), self.values.read((slot, slice(None), slice(rows)))
        keys, values = self.read_slots(slice(slot, slot + 1))
        return keys[0, :, :rows], values[0, :, :rows]

    def read_slots(self, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Whole slots: keys [B, K, C, D] and values [B, K, C, E]."""
        keys, values, newest = self.keys.read(slots), self.values.read(slots), self.newest
        if newest is None:
            return keys, values
        rows = newest.rows[slots]
        return newest.lay_over(keys, newest.keys[slots], rows), newest.lay_over(values, newest.values[slots], rows)

    def write(self, slots: Tensor, rows: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Put one token into each of B slots, each kv head into its own row.

        Args:
            slots: [B]; rows [B, K] or [B, 1]; key [B, K, D]; value [B, K, E]; positions [B].
        """
        heads = torch.arange(self.layout.kv_heads, device=rows.device)
        at = (slots.unsqueeze(1), heads, rows)
        self.values.write(at, value)
        self.positions[at] = positions.unsqueeze(1).to(torch.int32)
        for name, stat in self.row_stats.items():
            stat[at] = ROW_STATS[name]
        if self.newest is not None:
            near = (slots.unsqueeze(1), heads, (positions % self.layout.exact).unsqueeze(1))
            self.newest.keys[near], self.newest.values[near] = key, value
            self.newest.rows[near] = rows.to(torch.int32).expand(-1, len(heads))
        if not isinstance(self.keys, ByChannel):
            self.keys.write(at, key)
            return
        ends, group = positions % KEY_GROUP == KEY_GROUP - 1, positions // KEY_GROUP
        self.keys.write_some((slots.unsqueeze(1), heads, group.unsqueeze(1)), self._near.keys[slots], ends)

    def append(
        self, slot: int, used: int, key: Tensor, value: Tensor, positions: Tensor, row_stats: Mapping[str, Tensor]
    ) -> None:
        """Put a chunk into the empty rows behind the ``used`` ones.

        Args:
            key: [T, K, D]; value [T, K, E]; positions [T]; notes by name [K, T].
        """
        rows = slice(used, used + key.shape[0])
        at = (slot, slice(None), rows)
        if isinstance(self.keys, ByChannel):
            self._append_groups(slot, used, key.transpose(0, 1))
        else:
            self.keys.write(at, key.transpose(0, 1))
        self.values.write(at, value.transpose(0, 1))
        self.positions[at] = positions.to(torch.int32)
        for name, stat in self.row_stats.items():
            stat[at] = row_stats[name]
        self._copy_newest(slot, key, value, positions)

    def _append_groups(self, slot: int, used: int, key: Tensor) -> None:
        """Write the groups of keys [K, T, D] that become full; what begins them lies among the newest."""
        begun = used % KEY_GROUP
        keys = torch.cat([self._near.keys[slot, :, :begun], key], dim=1)
        groups, first = keys.shape[1] // KEY_GROUP, used // KEY_GROUP
        if groups:
            whole = keys[:, : groups * KEY_GROUP].reshape(len(keys), groups, KEY_GROUP, -1)
            self.keys.write((slot, slice(None), slice(first, first + groups)), whole)

    def replace(
        self,
        slot: int,
        keep: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        row_stats: Mapping[str, Tensor],
    ) -> None:
        """Put the surviving tokens of a chunk into the rows of the slot that do not survive.

        Args:
            keep: [K, R + T] bool, exactly R True per head: which of the slot's first R rows and which tokens stay.
            key: [T, K, D]; value [T, K, E]; positions [T]; notes by name [K, T].
        """
        tokens = len(positions)
        going = ~keep[:, :-tokens]
        coming = keep[:, -tokens:].byte().argsort(dim=1, descending=True, stable=True)  # those that stay come first
        chosen = coming.gather(1, (going.cumsum(1) - 1).clamp(0, tokens - 1))  # as many per head, in the same order
        self.keys.replace(slot, going, chosen, key)
        self.values.replace(slot, going, chosen, value)
        rows = going.shape[1]
        lies = self.positions[slot, :, :rows]
        lies.copy_(torch.where(going, positions[chosen].to(torch.int32), lies))
        for name, stat in self.row_stats.items():
            mine = stat[slot, :, :rows]
            mine.copy_(torch.where(going, row_stats[name].gather(1, chosen), mine))
        self._copy_newest(slot, key, value, positions)

    def _copy_newest(self, slot: int, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Remember the last tokens of a chunk as they are, and in which rows they lie."""
        newest, exact = self.newest, self.layout.exact
        if newest is None:
            return
        last = positions[-exact:]
        at = (slot, slice(None), last % exact)
        newest.keys[at] = key[-exact:].transpose(0, 1)
        newest.values[at] = value[-exact:].transpose(0, 1)
        lies = self.positions[slot].unsqueeze(-1) == last.to(torch.int32)  # [K, C, W]
        newest.rows[at] = torch.where(lies.any(1), lies.byte().argmax(1), EMPTY).to(torch.int32)

    @property
    def _near(self) -> ExactWindow:
        if self.newest is None:
            raise RuntimeError("keys by channel need exact copies of the newest")
        return self.newest

    def reset(self, slot: int) -> None:
        """Empty one slot. Values go too: a NaN among them would outlive any weight of zero."""
        self.values.clear(slot)
        self.positions[slot] = EMPTY
        for name, stat in self.row_stats.items():
            stat[slot] = ROW_STATS[name]
        if self.newest is not None:
            self.newest.rows[slot] = EMPTY
            self.newest.values[slot] = 0.0

    def copy_state(self, slot: int, source: LayerSlots, other: int, tokens: int) -> None:
        """Make an empty slot hold what a slot of the same layer, in this group or another, holds of its sequence.

        Args:
            source: that group's rows; ``other`` the slot there.
            tokens: of the sequence so far; no more of its pairs than fit here are left.
        """
        rows = min(tokens, self.layout.capacity, source.layout.capacity)
        for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
            units = -(-rows // KEY_GROUP) if isinstance(mine, ByChannel) else rows
            for to, what in zip(_tensors(mine), _tensors(theirs), strict=True):
                to[slot, :, :units] = what[other, :, :units]
        self.positions[slot, :, :rows] = source.positions[other, :, :rows]
        for name in self.row_stats.keys() & source.row_stats.keys():
            self.row_stats[name][slot, :, :rows] = source.row_stats[name][other, :, :rows]
        if self.newest is None or source.newest is None:
            return
        exact, theirs_exact = self.layout.exact, source.layout.exact
        last = torch.arange(max(0, tokens - min(exact, theirs_exact)), tokens, device=self.positions.device)
        to_at, at = (slot, slice(None), last % exact), (other, slice(None), last % theirs_exact)
        self.newest.keys[to_at] = source.newest.keys[at]
        self.newest.values[to_at] = source.newest.values[at]
        self.newest.rows[to_at] = source.newest.rows[at]


def _tensors(store: Store) -> list[Tensor]:
    """What a store is made of: slots, heads, and rows or groups of rows come first."""
    parts = (getattr(store, part.name) for part in fields(store))  # type: ignore[arg-type]
    return [part for part in parts if isinstance(part, Tensor)]


Parts = list[tuple[LayerLayout, int]]  # one layer's layout in each group, with the group's slots
Tables = dict[tuple[object, ...], tuple[Tensor, Tensor]]  # where each slot begins, and its rows; layers share them


def _allocate(
    parts: Parts, dtype: torch.dtype, device: torch.device, tables: Tables
) -> tuple[tuple[LayerSlots, ...], Rows | None]:
    """One layer's slots in all groups; in one piece where they are ranked alike and stored as they are."""
    alike = len({(part.row_stats, part.by_age) for part, _ in parts}) == 1
    if alike and parts[0][0].format == "auto":
        return _in_one_piece(parts, dtype, device, tables)
    return tuple(LayerSlots.allocate(part, count, dtype, device) for part, count in parts), None


def _in_one_piece(
    parts: Parts, dtype: torch.dtype, device: torch.device, tables: Tables
) -> tuple[tuple[LayerSlots, ...], Rows]:
    """One layer's slots in all groups as views of the same tensors."""
    layout, heads = parts[0][0], parts[0][0].kv_heads
    sizes = [count * heads * part.capacity for part, count in parts]
    total = sum(sizes)
    keys, values = (torch.zeros(total, dim, dtype=dtype, device=device) for dim in (layout.key_dim, layout.value_dim))
    positions = torch.full((total,), EMPTY, dtype=torch.int32, device=device)
    row_stats = {name: torch.full((total,), ROW_STATS[name], device=device) for name in layout.row_stats}
    found = []
    for (part, count), stop in zip(parts, accumulate(sizes), strict=True):
        shape, rows = (count, heads, part.capacity), slice(stop - count * heads * part.capacity, stop)
        found.append(
            LayerSlots(
                part,
                Plain(keys[rows].view(*shape, -1)),
                Plain(values[rows].view(*shape, -1)),
                positions[rows].view(shape),
                {name: stat[rows].view(shape) for name, stat in row_stats.items()},
                None,
            )
        )
    capacities = tuple(part.capacity for part, count in parts for _ in range(count))
    if (heads, capacities) not in tables:
        begin = list(accumulate((heads * rows for rows in capacities), initial=0))[:-1]
        tables[heads, capacities] = (torch.tensor(begin, device=device), torch.tensor(capacities, device=device))
    first, capacity = tables[heads, capacities]
    one_piece = Rows(
        keys=keys,
        values=values,
        positions=positions,
        mass=row_stats.get("mass"),
        first=first,
        capacity=capacity,
        kv_heads=heads,
        largest=max(capacities),
        capacities=capacities,
    )
    return tuple(found), one_piece


class KVPool:
    """All slots of a run, in groups of equal capacity.

    Args:
        layouts: one layout per group.
        slots: how many slots each group has.
        dtype: of keys and values.
        device: where the tensors live.

    Attributes:
        groups: by group, each layer's slots.
        slot_offsets: slots of the groups before each; slot s of group g is number slot_offsets[g] + s.
        rows: by layer, the slots of all groups in one piece, where they are ranked alike and stored as they are.
    """

    def __init__(
        self, layouts: tuple[KVLayout, ...], slots: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slot_offsets = tuple(accumulate(slots, initial=0))
        own: dict[int, tuple[tuple[LayerSlots, ...], Rows | None]] = {}
        tables: Tables = {}
        for i, layer in enumerate(layouts[0].layers):
            if layer.owner == i:
                parts = [(layout.layers[i], count) for layout, count in zip(layouts, slots, strict=True)]
                own[i] = _allocate(parts, dtype, device, tables)
        owners = [layer.owner for layer in layouts[0].layers]
        self.groups = tuple(tuple(own[owner][0][group] for owner in owners) for group in range(len(layouts)))
        self.rows = tuple(own[owner][1] for owner in owners)

    def layer(self, group: int, layer: int) -> LayerSlots:
        """The rows that this layer reads, in this group."""
        return self.groups[group][layer]

    def reset(self, group: int, slot: int) -> None:
        """Empty one slot for its next sequence."""
        for part in set(self.groups[group]):
            part.reset(slot)

    def copy_state(self, source: tuple[int, int], target: tuple[int, int], tokens: int) -> None:
        """Make the slot ``target`` (group and slot) hold what ``source`` holds of a sequence of so many tokens."""
        self.reset(*target)
        for mine, theirs in set(zip(self.groups[target[0]], self.groups[source[0]], strict=True)):
            mine.copy_state(target[1], theirs, source[1], tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots: what the layouts promised."""
        return sum(part.nbytes for group in self.groups for part in set(group))
