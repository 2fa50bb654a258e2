"""Where the rows of each slot and kv head begin, in memory that all slots of a layer share.

Shapes: S slots of all groups, K kv heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmx.kv.layout import LayerLayout

HeadNumbers = tuple[tuple[int, ...], ...]  # [S][K]
SlotTables = dict[tuple[HeadNumbers, HeadNumbers], tuple[Tensor, Tensor]]  # first rows and capacities, for all layers


def first_rows(begins: Sequence[int], parts: Sequence[LayerLayout], slot: int) -> tuple[int, ...]:
    """The first row of each kv head of a slot; ``begins`` are the first rows of a group's parts."""
    return tuple(
        begin + slot * part.rows + head * part.capacity
        for begin, part in zip(begins, parts, strict=True)
        for head in range(part.kv_heads)
    )


def slot_table(
    first: HeadNumbers, capacities: HeadNumbers, device: torch.device, tables: SlotTables
) -> tuple[Tensor, Tensor]:
    """The first row of each slot and head [S, K], and its capacity [S, K]; layers with the same sizes share them."""
    key = (first, capacities)
    if key not in tables:
        tables[key] = (torch.tensor(first, device=device), torch.tensor(capacities, device=device))
    return tables[key]
