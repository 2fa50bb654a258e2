"""The orders of eviction that a kernel can compute by itself. Numbers alone, so that plans need no torch."""

from __future__ import annotations

from dataclasses import dataclass

RANKS = ("age", "mass", "average")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionOrder:
    """Which KV pair is evicted first.

    Attributes:
        by: ``age``: the oldest; ``mass``: the one that received the least attention; ``average``: the least attention
            per query that counts for it and could have seen it.
        sink: first tokens of a sequence, which are never evicted.
        recent: newest tokens, which are never evicted.
        window: newest keys that a query sees, or None for all; pairs out of the window are evicted before all others.
        distance: a prompt's query counts for a key if it lies at least that many tokens after it; at most ``recent``.
        power: of a probability, as it is summed: 1 or 2; a root of the average would change no order.
    """

    by: str
    sink: int
    recent: int
    window: int | None
    distance: int = 0
    power: int = 1
