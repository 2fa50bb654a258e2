"""What one slot holds, layer by layer, and its bytes: the one description that planner and pool both read.

Knows sizes; holds no tensor and loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from bmx.kernels.formats import FORMATS, KEY_GROUP, MODEL
from bmx.kv_formats import format_name

NOT_READING = -1  # of a sequence that has no slot to read its prompt in
POSITION_BYTES = 4  # of an int32 position, row or label
PAGE = 4  # tokens of a page of keys
CLUSTER_SIZE = 16  # tokens of a cluster of keys, on average
CLUSTER_GROUP = 64  # tokens that wait until clusters are made of them
BITS_FORMAT = "int2"  # of keys that are there only to choose by
STATE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}  # of a number of a recurrent state
ROW_STAT_BYTES = 4  # of a float32 statistic
ROW_STATS: Mapping[str, float] = {  # what eviction may store for each row, and its value for a new pair
    "mass": 0.0,  # attention received
    "probe": -1.0,  # attention received from the probe; -1 where no probe has followed the token
    "squares": 0.0,  # squared attention received
    "rank": float("inf"),  # the score at the last ranking; new pairs are evicted after all ranked ones
}


class SlotIndex(NamedTuple):
    """Where a sequence's KV cache is: the group of slots, and the slot in it.

    Where pairs are archived, that slot is the archive's, and ``reading`` is the slot in which the prompt is read.
    """

    group: int
    slot: int
    reading: int = NOT_READING


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallLayout:
    """What is kept beside a layer's rows, so that a token can read some of them alone.

    Attributes:
        by: what rows are chosen by: ``pages``, ``clusters`` or ``bits``, which have an index of the keys, or
            ``attention``, which has none.
        sink: number of first tokens that are always read.
        kept: rows that are remembered for the tokens between two choices.
    """

    by: str
    sink: int
    kept: int

    def nbytes(self, capacity: int, kv_heads: int, key_dim: int, itemsize: int) -> int:
        """Bytes beside one slot of a layer.

        Args:
            capacity: rows of a head.
            kv_heads: K.
            key_dim: D.
            itemsize: bytes of a number of the model's type.
        """
        key = key_dim * itemsize
        index = {
            "attention": 0,
            "pages": 2 * -(-capacity // PAGE) * key,
            "clusters": (capacity // CLUSTER_SIZE + CLUSTER_GROUP) * key + capacity * POSITION_BYTES,
            "bits": -(-capacity // KEY_GROUP) * FORMATS[BITS_FORMAT].group_bytes(key_dim) + KEY_GROUP * key,
        }[self.by]
        return kv_heads * (index + self.kept * POSITION_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """One layer's part of a slot.

    Attributes:
        capacity: KV pairs that each kv head holds (C); where they differ, the most.
        kv_heads: K.
        key_dim: D.
        value_dim: E.
        itemsize: bytes of a number in the model's dtype.
        window: newest keys that a query sees (sliding window), or None.
        owner: the layer that holds the rows; a layer that is not its own owner holds nothing.
        last_reader: the last layer that reads this owner's rows.
        by_age: the oldest pair is evicted, since all that a window can still see fits; otherwise the scorer ranks.
        key_format: how keys are stored: ``model`` in the model's dtype, else the name of a format of fewer bits.
        value_format: how values are stored.
        by_channel: keys are scaled by channel over groups of tokens, which works only where nothing is evicted. The
            newest pairs, as many as a group has, are then stored in the model's dtype too.
        row_stats: names of the statistics that eviction stores for each row.
        capacities: KV pairs that each kv head holds; nothing given: ``capacity`` in all of them.
        recall: what is kept beside the rows to choose among them; None where all rows are read.
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
    key_format: str = MODEL
    value_format: str = MODEL
    by_channel: bool = False
    row_stats: tuple[str, ...] = ()
    capacities: tuple[int, ...] = ()
    recall: RecallLayout | None = None

    def __post_init__(self) -> None:
        if not self.capacities:
            object.__setattr__(self, "capacities", (self.capacity,) * self.kv_heads)

    @property
    def rows(self) -> int:
        """KV pairs of all heads together."""
        return sum(self.capacities)

    @property
    def heads_differ(self) -> bool:
        """Whether some kv heads hold more pairs than others."""
        return len(set(self.capacities)) > 1

    @property
    def heads(self) -> tuple[LayerLayout, ...]:
        """Each kv head alone."""
        return tuple(replace(self, capacity=own, capacities=(own,), kv_heads=1) for own in self.capacities)

    @property
    def formats(self) -> tuple[str, str]:
        """The formats of keys and values."""
        return self.key_format, self.value_format

    @property
    def encodes(self) -> bool:
        """Whether keys or values are stored in fewer bits."""
        return self.formats != (MODEL, MODEL)

    @property
    def rotates_keys(self) -> bool:
        """Whether queries and keys are rotated by ``formats.hadamard``: below 8 bits, where each key has one scale."""
        coarse = self.key_format != MODEL and FORMATS[self.key_format].bits < 8
        return coarse and not self.by_channel

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, exact copies of the newest included."""
        exact = KEY_GROUP * ((self.key_dim + self.value_dim) * self.itemsize + POSITION_BYTES)
        return self.stored_bytes + (self.kv_heads * exact if self.by_channel else 0)

    @property
    def stored_bytes(self) -> int:
        """Bytes of keys and values as they are stored: what may lie elsewhere than on the device."""
        value_bytes = self._vector_bytes(self.value_format, self.value_dim)
        if not self.by_channel:
            return self.rows * (self._vector_bytes(self.key_format, self.key_dim) + value_bytes)
        groups = -(-self.capacity // KEY_GROUP)
        keys = groups * FORMATS[self.key_format].group_bytes(self.key_dim)
        return self.kv_heads * (keys + self.capacity * value_bytes)

    def _vector_bytes(self, name: str, dim: int) -> int:
        return dim * self.itemsize if name == MODEL else FORMATS[name].vector_bytes(dim)

    @property
    def full_cache_bytes(self) -> int:
        """Bytes that the keys and values of as many pairs take in the model's own type."""
        return self.rows * (self.key_dim + self.value_dim) * self.itemsize

    @property
    def score_bytes(self) -> int:
        """Bytes of positions and row statistics; where keys are scaled by channel, rows are positions."""
        positions = 0 if self.by_channel else POSITION_BYTES
        return self.rows * (positions + ROW_STAT_BYTES * len(self.row_stats))

    @property
    def recall_bytes(self) -> int:
        """Bytes of what is kept beside the rows to choose among them."""
        recall = self.recall
        return 0 if recall is None else recall.nbytes(self.capacity, self.kv_heads, self.key_dim, self.itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayout:
    """One tensor of fixed size that a layer without attention keeps for each sequence.

    Attributes:
        shape: without the dimension of slots.
        itemsize: bytes of a number.
        recurrent: whether it is the state of a recurrence; otherwise it holds the last inputs of a convolution, in the
            model's type.
    """

    shape: tuple[int, ...]
    itemsize: int
    recurrent: bool

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence's state."""
        return prod(self.shape) * self.itemsize

    @property
    def rounds(self) -> bool:
        """Whether it is computed in more bits than it is stored in, and so rounded wherever a segment ends."""
        return self.recurrent and self.itemsize < STATE_BYTES["float32"]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One slot.

    Attributes:
        layers: its attention layers, including those that read another layer's rows.
        states: what layers without attention keep, in the order of their calls.
    """

    layers: tuple[LayerLayout, ...]
    states: tuple[StateLayout, ...] = ()

    @property
    def capacity(self) -> int:
        """KV pairs of the kv head that holds most."""
        return max(layer.capacity for layer in self.layers)

    @property
    def format(self) -> str:
        """How pairs are stored, as ``kv_format`` names it; layers with a window may hold keys in more bits."""
        return format_name(*next((layer for layer in self.layers if layer.window is None), self.layers[0]).formats)

    @property
    def kv_bytes(self) -> int:
        """Bytes of a slot's keys and values."""
        return sum(layer.kv_bytes for i, layer in enumerate(self.layers) if layer.owner == i)

    @property
    def stored_bytes(self) -> int:
        """Bytes of a slot's keys and values that may lie elsewhere than on the device."""
        return sum(layer.stored_bytes for i, layer in enumerate(self.layers) if layer.owner == i)

    @property
    def score_bytes(self) -> int:
        """Bytes of a slot's positions and row statistics."""
        return sum(layer.score_bytes for i, layer in enumerate(self.layers) if layer.owner == i)

    @property
    def recall_bytes(self) -> int:
        """Bytes of what is kept beside a slot's rows to choose among them."""
        return sum(layer.recall_bytes for i, layer in enumerate(self.layers) if layer.owner == i)

    @property
    def state_bytes(self) -> int:
        """Bytes of what layers without attention keep; the same for every capacity."""
        return sum(state.nbytes for state in self.states)

    @property
    def full_cache_bytes(self) -> int:
        """Bytes that the keys and values of as many pairs take in the model's own type."""
        return sum(layer.full_cache_bytes for i, layer in enumerate(self.layers) if layer.owner == i)

    @property
    def state_format(self) -> str | None:
        """How recurrent states are stored; None without any."""
        sizes = {state.itemsize for state in self.states if state.recurrent}
        return next((name for name, size in STATE_BYTES.items() if size in sizes), None)

    @property
    def cache_bytes(self) -> int:
        """Bytes of a slot's KV pairs and of all that is stored beside them."""
        return self.kv_bytes + self.score_bytes + self.recall_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of a slot."""
        return self.cache_bytes + self.state_bytes
