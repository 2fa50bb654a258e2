"""What the attention asks of the policy in a layer: to store a prompt chunk, or to make room for decoding tokens.

Shapes: K kv heads, G query heads of each, P rows in use, T chunk tokens, M sums of attention, B decoding slots,
N spans, D key dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """A prompt chunk whose attention is computed, and whose surviving pairs are to be stored.

    Attributes:
        slot: the slot of its sequence, in the group.
        start: tokens of the sequence before the chunk.
        row_limit: rows of the slot that the sequence may use.
        spans: positions [start, stop) that are never evicted.
        key: [T, K, D], the chunk's own keys.
        value: [T, K, E], their values.
        queries: [T, K, G, D], the chunk's queries.
        scale: factor of the dot products.
        sums: [M, K, P + T] attention received from the chunk's queries, slot rows first, or None if it is not needed.
        elsewhere: how many of the tokens before the chunk have their pairs in a shared slot, and not in this one.
    """

    slot: int
    start: int
    row_limit: int
    spans: tuple[tuple[int, int], ...]
    key: Tensor
    value: Tensor
    queries: Tensor
    scale: float
    sums: Tensor | None
    elsewhere: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionRequest:
    """Decoding tokens of a group, one per slot, each of which needs a row.

    Attributes:
        slots: [B] slots of the group.
        positions: [B], of the tokens: equal to the tokens seen before.
        slots_host: the slots, on the host.
        positions_host: the positions, on the host.
        row_limits_host: rows of its slot that each sequence may use.
        row_limits: [B] the same, or None where each may use all of its slot.
        spans: [B, N, 2] positions [start, stop) that are never evicted, or None.
    """

    slots: Tensor
    positions: Tensor
    slots_host: tuple[int, ...]
    positions_host: tuple[int, ...]
    row_limits_host: tuple[int, ...]
    row_limits: Tensor | None = None
    spans: Tensor | None = None
