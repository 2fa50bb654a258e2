"""The tensors of all slots: allocated once, written in place, never compacted.

Knows shapes and rows; knows nothing of scores' meaning, sequences or models. Rows of a slot are order-free: a key
carries its rotary position in itself, so eviction is a write over the row that goes.

Shapes: S slots of a group, K kv heads, C rows, D key dim, E value dim, B slots addressed, T chunk tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bmx.kv.layout import KVLayout, LayerLayout

EMPTY = -1


@dataclass(frozen=True, slots=True, eq=False)
class LayerSlots:
    """One layer of one group of slots.

    Attributes:
        keys: [S, K, C, D]; values [S, K, C, E].
        positions: [S, K, C] int32, the token's position in its sequence, -1 where the row is empty.
        mass: [S, K, C] float32, attention received so far.
    """

    layout: LayerLayout
    keys: Tensor
    values: Tensor
    positions: Tensor
    mass: Tensor

    @classmethod
    def allocate(cls, layout: LayerLayout, slots: int, dtype: torch.dtype, device: torch.device) -> LayerSlots:
        """Empty rows for ``slots`` slots."""
        shape = (slots, layout.kv_heads, layout.capacity)
        return cls(
            layout,
            torch.zeros(*shape, layout.key_dim, dtype=dtype, device=device),
            torch.zeros(*shape, layout.value_dim, dtype=dtype, device=device),
            torch.full(shape, EMPTY, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the four tensors."""
        return sum(t.nbytes for t in (self.keys, self.values, self.positions, self.mass))

    def write(self, slots: Tensor, rows: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Put one token into each of B slots, each kv head into its own row.

        Args:
            slots: [B]; rows [B, K] or [B, 1]; key [B, K, D]; value [B, K, E]; positions [B].
        """
        at = (slots.unsqueeze(1), torch.arange(self.layout.kv_heads, device=rows.device), rows)
        self.keys[at] = key
        self.values[at] = value
        self.positions[at] = positions.unsqueeze(1).to(torch.int32)
        self.mass[at] = 0.0

    def append(self, slot: int, used: int, key: Tensor, value: Tensor, positions: Tensor, mass: Tensor | None) -> None:
        """Put a chunk into the empty rows behind the ``used`` ones.

        Args:
            key: [T, K, D]; value [T, K, E]; positions [T]; mass [K, T] or None for zero.
        """
        rows = slice(used, used + key.shape[0])
        self.keys[slot, :, rows] = key.transpose(0, 1)
        self.values[slot, :, rows] = value.transpose(0, 1)
        self.positions[slot, :, rows] = positions.to(torch.int32)
        self.mass[slot, :, rows] = 0.0 if mass is None else mass

    def replace(self, slot: int, keep: Tensor, key: Tensor, value: Tensor, positions: Tensor, mass: Tensor) -> None:
        """Put the surviving tokens of a chunk into the rows of the slot that do not survive.

        Args:
            keep: [K, C + T] bool, exactly C True per head: which rows of the slot and which tokens of the chunk stay.
            key: [T, K, D]; value [T, K, E]; positions [T]; mass [K, T].
        """
        head, row = (~keep[:, : self.layout.capacity]).nonzero(as_tuple=True)
        _, token = keep[:, self.layout.capacity :].nonzero(as_tuple=True)  # as many per head, in the same order
        self.keys[slot, head, row] = key[token, head]
        self.values[slot, head, row] = value[token, head]
        self.positions[slot, head, row] = positions[token].to(torch.int32)
        self.mass[slot, head, row] = mass[head, token]


class KVPool:
    """All slots of a run, in groups of equal capacity.

    Args:
        layouts: one layout per group.
        slots: how many slots each group has.
        dtype: of keys and values.
        device: where the tensors live.
    """

    def __init__(
        self, layouts: tuple[KVLayout, ...], slots: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.groups = tuple(
            self._group(layout, count, dtype, device) for layout, count in zip(layouts, slots, strict=True)
        )

    @staticmethod
    def _group(layout: KVLayout, slots: int, dtype: torch.dtype, device: torch.device) -> tuple[LayerSlots, ...]:
        own = {
            i: LayerSlots.allocate(layer, slots, dtype, device)
            for i, layer in enumerate(layout.layers)
            if layer.owner == i
        }
        return tuple(own[layer.owner] for layer in layout.layers)

    def layer(self, group: int, layer: int) -> LayerSlots:
        """The rows that this layer reads, in this group."""
        return self.groups[group][layer]

    def reset(self, group: int, slot: int) -> None:
        """Empty one slot for its next sequence. Values go too: a NaN among them would outlive any weight of zero."""
        for part in set(self.groups[group]):
            part.values[slot] = 0.0
            part.positions[slot] = EMPTY
            part.mass[slot] = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots: what the layouts promised."""
        return sum(part.nbytes for group in self.groups for part in set(group))
