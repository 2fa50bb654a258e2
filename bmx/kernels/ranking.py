"""The orders of eviction that a kernel can compute by itself. Numbers alone, so that plans need no torch."""

from __future__ import annotations

from dataclasses import dataclass

FORMULAS = ("age", "mass", "average")  # computed from what kernels know of a pair
RANKS = (*FORMULAS, "rank")
UNRANKED = 1e30  # the score of pairs that came after the last ranking: above all ranked pairs
POSITIONS = 2.0**23  # positions that a float32 still tells apart when they are added to UNRANKED


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionOrder:
    """Which KV pair is evicted first.

    Attributes:
        by: ``age``: the oldest; ``mass``: the one that received the least attention; ``average``: the least attention
            per query that counts for it and could have seen it; ``rank``: the one with the lowest score at the last
            ranking, which is not the kernels' work. Pairs that came after it have the rank +inf, and are evicted after
            all ranked ones, the oldest first.
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
