"""Attention of decoding tokens that read chosen rows of their slots instead of all of them.

Knows slots, the choice and the kernels; knows nothing of sequences or of why a token is due to choose.

Shapes: B decoding tokens, Q of them that are due, K kv heads, H query heads, C rows of a slot, R rows that are looked
at, O rows chosen beside the first and the newest, D key dim, E value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmx.compress.recall import Recall, estimated_attention, hidden_by_pages, with_neighbours
from bmx.engine.packed import DecodeGroup
from bmx.kernels.contract import KernelModule
from bmx.kv.pool import LayerSlots


class RecallingAttention:
    """Reads chosen rows: of slots that evict nothing, where row = position, those alone.

    Layers that read another layer's rows read those that its own queries have chosen.

    Args:
        recall: how rows are chosen.
        kernels: compute the attention.
    """

    def __init__(self, recall: Recall, kernels: KernelModule) -> None:
        self._recall = recall
        self._kernels = kernels

    def __call__(
        self, part: LayerSlots, group: DecodeGroup, query: Tensor, owns_rows: bool, options: dict[str, Any]
    ) -> Tensor:
        """Attention of one token per slot, whose own pair is stored already: output [B, H, E].

        Args:
            part: the layer's slots; the rows chosen for later tokens are written.
            group: the tokens.
            query: [B, H, D].
            owns_rows: whether the layer is the one that owns the rows, so that its queries choose.
            options: scale, soft cap and sinks, as the kernels take them.
        """
        if self._recall.by == "attention":
            return self._after_reading_all(part, group, query, owns_rows, options)
        if owns_rows and group.due is not None:
            chosen = self._by_index(part, group, query, options)
            if part.chosen is None:  # every token chooses for itself
                return self._read(part, group.slots, group.positions, query, chosen, options)
            part.chosen[group.slots[group.due]] = chosen
        return self._read(part, group.slots, group.positions, query, _remembered(part, group.slots), options)

    def unread(self, part: LayerSlots, group: DecodeGroup, query: Tensor, keys: Tensor, scale: float) -> Tensor:
        """The rows [B, K, C] of slots which evict that tokens do not read, by the bounds of pages.

        Args:
            part: the layer's slots.
            group: the tokens.
            query: [B, H, D].
            keys: [B, K, C, D], the first rows of the tokens' slots.
            scale: factor of the dot products.
        """
        positions, used = part.positions[group.slots, :, : keys.shape[2]], group.used_rows(part.layout.capacity)
        return hidden_by_pages(self._recall, query, keys, positions, used, scale)

    def _by_index(self, part: LayerSlots, group: DecodeGroup, query: Tensor, options: dict[str, Any]) -> Tensor:
        """The rows [Q, K, O] that due tokens choose by what the index estimates."""
        if part.index is None:
            raise RuntimeError(f"rows cannot be chosen by {self._recall.by}: the layer has no index")
        positions = group.positions[group.due]
        products = part.index.products(query[group.due], group.slots[group.due], positions, _rows_in_use(part, group))
        scores = estimated_attention(products, positions, **options)
        return self._recall.choose(scores, positions, part.layout.capacity)

    def _after_reading_all(
        self, part: LayerSlots, group: DecodeGroup, query: Tensor, owns_rows: bool, options: dict[str, Any]
    ) -> Tensor:
        """Due tokens read all rows, and what they attend to is what the others read."""
        if group.due is None:
            return self._read(part, group.slots, group.positions, query, _remembered(part, group.slots), options)
        slots, positions, rows = group.slots[group.due], group.positions[group.due], _rows_in_use(part, group)
        output, sums = self._kernels.attend_slots(
            query[group.due],
            *part.read_slots(slots, rows),
            hidden=torch.arange(rows, device=query.device) > positions.view(-1, 1, 1),
            want_mass=part.chosen is not None and owns_rows,
            **options,
        )
        if part.chosen is None or len(slots) == 0:
            return output
        if sums is not None:
            scores = with_neighbours(sums[0])
            part.chosen[slots] = self._recall.choose(scores, positions, part.layout.capacity)
        if len(slots) == len(query):
            return output
        others = self._read(part, group.slots, group.positions, query, _remembered(part, group.slots), options)
        others[group.due] = output
        return others

    def _read(
        self,
        part: LayerSlots,
        slots: Tensor,
        positions: Tensor,
        query: Tensor,
        chosen: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        """Attention to the first, the chosen and the newest rows: output [B, H, E]."""
        rows, hidden = self._recall.reading(chosen, positions)
        keys, values = part.read_rows(slots, rows)
        output, _ = self._kernels.attend_slots(query, keys, values, hidden=hidden, **options)
        return output


def _remembered(part: LayerSlots, slots: Tensor) -> Tensor:
    """The rows [B, K, O] that earlier tokens of these slots chose."""
    if part.chosen is None:
        raise RuntimeError("no rows were chosen for this layer's slots")
    return part.chosen[slots]


def _rows_in_use(part: LayerSlots, group: DecodeGroup) -> int:
    """The most rows that any of these slots uses (R)."""
    return min(max(group.positions_host) + 1, part.layout.capacity)
