"""The memory of slots whose keys are scaled by channel: that of all groups of a layer in one piece, where it can be.

Shapes: S slots of a group, K kv heads, C rows of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bmx.kernels.formats import FORMATS, KEY_GROUP, Stored
from bmx.kernels.slot_views import ChannelRows
from bmx.kv.layout import LayerLayout
from bmx.kv.places import Place
from bmx.kv.slot_tables import HeadNumbers, SlotTables, slot_table
from bmx.kv.stores import ByChannel, ExactWindow, RowStore


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroup:
    """The slots of one group.

    Attributes:
        keys: store of [S, K, C, D].
        values: store of [S, K, C, E].
        newest: exact copies of the newest pairs.
        rows: the same tensors, as kernels see them; None where they are not on the device.
    """

    keys: ByChannel
    values: RowStore
    newest: ExactWindow
    rows: ChannelRows | None


def allocate_channels(
    sizes: Sequence[tuple[LayerLayout, int]], dtype: torch.dtype, device: torch.device, place: Place, tables: SlotTables
) -> tuple[ChannelRows, tuple[ChannelGroup, ...]]:
    """Empty slots of one layer, of all groups, and those of each group.

    Args:
        sizes: of each group, the layer's layout and the number of slots.
        dtype: of keys and values, before they are encoded.
        device: that computes.
        place: where keys and values are.
        tables: of earlier layers.
    """
    layout, count = sizes[0][0], sum(slots for _, slots in sizes)
    heads, form = layout.kv_heads, FORMATS[layout.key_format]
    first, row_count = _first(sizes, [own.capacity for own, _ in sizes])
    first_group, groups = _first(sizes, [-(-own.capacity // KEY_GROUP) for own, _ in sizes])
    capacities = tuple((own.capacity,) * heads for own, slots in sizes for _ in range(slots))
    first_rows, capacity = slot_table(first, capacities, device, tables)
    newest = ExactWindow.allocate(layout, count, dtype, device)
    rows = ChannelRows(
        codes=place.zeros((groups, KEY_GROUP, form.code_bytes(layout.key_dim)), torch.uint8),
        scales=place.zeros((groups, layout.key_dim, 2), torch.float16),
        key_format=layout.key_format,
        values=Stored.zeros(layout.value_format, (row_count,), layout.value_dim, dtype, device, place.zeros),
        exact_keys=newest.keys,
        exact_values=newest.values,
        exact_rows=newest.rows,
        first=first_rows,
        first_group=slot_table(first_group, capacities, device, tables)[0],
        capacity=capacity,
        largest=max(own.capacity for own, _ in sizes),
    )
    groups_of_slots, begin = list[ChannelGroup](), 0
    for own, slots in sizes:
        begins = (first_group[begin][0], first[begin][0]) if slots else (0, 0)
        groups_of_slots.append(_group(rows.of(slice(begin, begin + slots)), own, begins, place.is_on(device)))
        begin += slots
    return rows, tuple(groups_of_slots)


def _first(sizes: Sequence[tuple[LayerLayout, int]], lengths: Sequence[int]) -> tuple[HeadNumbers, int]:
    """The first of each slot's and head's rows, or groups of rows, of these numbers in each group; and their sum."""
    first, begin = list[tuple[int, ...]](), 0
    for (own, slots), length in zip(sizes, lengths, strict=True):
        for _ in range(slots):
            first.append(tuple(begin + head * length for head in range(own.kv_heads)))
            begin += own.kv_heads * length
    return tuple(first), begin


def _group(rows: ChannelRows, layout: LayerLayout, begins: tuple[int, int], on_device: bool) -> ChannelGroup:
    """The slots of one group; ``begins`` are the first of their groups of keys, and of their values."""
    shape, groups = rows.exact_rows.shape[:2], -(-layout.capacity // KEY_GROUP)
    dtype, device = rows.exact_keys.dtype, rows.exact_keys.device
    own = slice(begins[0], begins[0] + shape.numel() * groups)
    codes, scales = (part[own].view(*shape, groups, *part.shape[1:]) for part in (rows.codes, rows.scales))
    newest = ExactWindow(rows.exact_keys, rows.exact_values, rows.exact_rows)
    values = rows.values.rows(begins[1], (*shape, layout.capacity))
    return ChannelGroup(
        ByChannel(FORMATS[layout.key_format], codes, scales, newest.keys, dtype, device),
        RowStore(values, layout.value_dim, dtype, device),
        newest,
        rows if on_device else None,
    )
