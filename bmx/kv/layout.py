"""What one slot holds, layer by layer, and its bytes: the one description that planner and pool both read.

Knows sizes; holds no tensor and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

FormatName = Literal["auto", "fp8", "int8", "int4"]
BITS: Mapping[str, int] = {"fp8": 8, "int8": 8, "int4": 4}
SCALE_BYTES = 2  # of a float16 scale or offset
KEY_GROUP = 32  # tokens whose keys share the scales of their channels, where nothing is evicted
POSITION_BYTES = 4  # of an int32 position
ROW_STAT_BYTES = 4  # of one float32 note
ROW_STATS: Mapping[str, float] = {  # what eviction may remember of each pair, and what is noted of a new one
    "mass": 0.0,  # attention received
    "probe": -1.0,  # attention received from the probe; of a later token, none
    "squares": 0.0,  # squared attention received
    "rank": float("inf"),  # what it was ranked at; a new one goes after all that were
}


class SlotIndex(NamedTuple):
    """Where a sequence's KV cache is: the group of slots, and the slot in it."""

    group: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """One layer's part of a slot.

    Attributes:
        capacity: KV pairs that each kv head holds (C).
        kv_heads, key_dim, value_dim: K, D, E.
        itemsize: bytes of a number in the model's own type.
        format: how pairs are stored: ``auto`` in the model's own type, else in fewer bits.
        exact: newest pairs that are kept in the model's own type as well, where others are not (W).
        by_channel: keys are scaled by channel and group of tokens, which works only where nothing is evicted.
        row_stats: what eviction remembers of each pair, by name.
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
    format: FormatName = "auto"
    exact: int = 0
    by_channel: bool = False
    row_stats: tuple[str, ...] = ()

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        if self.format == "auto":
            return self.capacity * self.kv_heads * (self.key_dim + self.value_dim) * self.itemsize
        exact = self.exact * ((self.key_dim + self.value_dim) * self.itemsize + POSITION_BYTES)
        return self.kv_heads * (self._key_bytes + self._stored(self.value_dim) * self.capacity + exact)

    @property
    def _key_bytes(self) -> int:
        """Bytes of a head's keys."""
        if not self.by_channel:
            return self._stored(self.key_dim) * self.capacity
        groups = -(-self.capacity // KEY_GROUP)
        return groups * (KEY_GROUP * self._codes(self.key_dim) + 2 * SCALE_BYTES * self.key_dim)

    def _stored(self, dim: int) -> int:
        """Bytes of one vector: its codes, a scale, and an offset where codes are few."""
        return self._codes(dim) + SCALE_BYTES * (2 if BITS[self.format] < 8 else 1)

    def _codes(self, dim: int) -> int:
        return -(-dim * BITS[self.format] // 8)

    @property
    def score_bytes(self) -> int:
        """Bytes of what eviction needs to remember."""
        return self.capacity * self.kv_heads * (POSITION_BYTES + ROW_STAT_BYTES * len(self.row_stats))


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
