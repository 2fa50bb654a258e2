"""What one slot holds, layer by layer, and its bytes: the one description that planner and pool both read.

Knows sizes; holds no tensor and imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

SCORE_BYTES = 4 + 4  # accumulated attention (float32) and position (int32) of one KV pair


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """One layer's part of a slot.

    Attributes:
        capacity: KV pairs that each kv head holds (C).
        kv_heads, key_dim, value_dim: K, D, E.
        itemsize: bytes of one stored number.
        window: newest keys that a query may see, or None.
        owner: the layer that holds the rows; a layer that is not its own owner holds nothing.
        last_reader: the last layer that reads this owner's rows.
        by_age: evict the oldest, since all that a window can still see fits; otherwise the policy's scorer ranks.
    """

    capacity: int
    kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    window: int | None
    owner: int
    last_reader: int
    by_age: bool

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.capacity * self.kv_heads * (self.key_dim + self.value_dim) * self.itemsize

    @property
    def score_bytes(self) -> int:
        """Bytes of what eviction needs to remember."""
        return self.capacity * self.kv_heads * SCORE_BYTES


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One slot: its layers, those that share another's rows included."""

    layers: tuple[LayerLayout, ...]

    @property
    def kv_bytes(self) -> int:
        """Bytes of a slot's keys and values."""
        return sum(layer.kv_bytes for i, layer in enumerate(self.layers) if layer.owner == i)

    @property
    def score_bytes(self) -> int:
        """Bytes of a slot's scores and positions."""
        return sum(layer.score_bytes for i, layer in enumerate(self.layers) if layer.owner == i)

    @property
    def nbytes(self) -> int:
        """Bytes of a slot."""
        return self.kv_bytes + self.score_bytes
