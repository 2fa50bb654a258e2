"""What one slot holds, layer by layer, and its bytes: the one description that planner and pool both read.

Knows sizes; holds no tensor and loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bmx.kv.formats import FORMATS, KEY_GROUP, Format

POSITION_BYTES = 4  # of an int32 position
ROW_STAT_BYTES = 4  # of a float32 statistic
ROW_STATS: Mapping[str, float] = {  # what eviction may store for each row, and its value for a new pair
    "mass": 0.0,  # attention received
    "probe": -1.0,  # attention received from the probe; -1 where no probe has followed the token
    "squares": 0.0,  # squared attention received
    "rank": float("inf"),  # the score at the last ranking; new pairs are evicted after all ranked ones
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
        kv_heads: K.
        key_dim: D.
        value_dim: E.
        itemsize: bytes of a number in the model's dtype.
        window: newest keys that a query sees (sliding window), or None.
        owner: the layer that holds the rows; a layer that is not its own owner holds nothing.
        last_reader: the last layer that reads this owner's rows.
        by_age: the oldest pair is evicted, since all that a window can still see fits; otherwise the scorer ranks.
        format: how pairs are stored: ``auto`` in the model's dtype, else encoded in fewer bits.
        exact: newest pairs that are stored in the model's dtype too, where pairs are encoded (W).
        by_channel: keys are scaled by channel over groups of tokens, which works only where nothing is evicted; needs
            ``exact`` to be a whole group.
        row_stats: names of the statistics that eviction stores for each row.
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
    format: str = "auto"
    exact: int = 0
    by_channel: bool = False
    row_stats: tuple[str, ...] = ()

    @property
    def encoding(self) -> Format | None:
        """The format's encoding; None where pairs are stored in the model's dtype."""
        return FORMATS.get(self.format)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        exact_pair = (self.key_dim + self.value_dim) * self.itemsize
        encoding = self.encoding
        if encoding is None:
            return self.capacity * self.kv_heads * exact_pair
        if self.by_channel:
            keys = -(-self.capacity // KEY_GROUP) * encoding.group_bytes(self.key_dim)
        else:
            keys = self.capacity * encoding.vector_bytes(self.key_dim)
        values = self.capacity * encoding.vector_bytes(self.value_dim)
        return self.kv_heads * (keys + values + self.exact * (exact_pair + POSITION_BYTES))

    @property
    def score_bytes(self) -> int:
        """Bytes of positions and row statistics."""
        return self.capacity * self.kv_heads * (POSITION_BYTES + ROW_STAT_BYTES * len(self.row_stats))


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One slot: its layers, including those that read another layer's rows."""

    layers: tuple[LayerLayout, ...]

    @property
    def kv_bytes(self) -> int:
        """Bytes of a slot's keys and values."""
        return sum(layer.kv_bytes for i, layer in enumerate(self.layers) if layer.owner == i)

    @property
    def score_bytes(self) -> int:
        """Bytes of a slot's positions and row statistics."""
        return sum(layer.score_bytes for i, layer in enumerate(self.layers) if layer.owner == i)

    @property
    def nbytes(self) -> int:
        """Bytes of a slot."""
        return self.kv_bytes + self.score_bytes
