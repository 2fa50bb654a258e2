"""Rankings of KV pairs so simple that a kernel can do them by itself: numbers alone, so that plans need no torch."""

from __future__ import annotations

from dataclasses import dataclass

RANKS = ("age", "mass", "average")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionOrder:
    """Who goes first.

    Attributes:
        by: ``age``: the oldest; ``mass``: who received the least attention; ``average``: the least for each query.
        sink, recent: first and newest tokens, which stay.
        window: newest keys that a query sees, or None: what no later one can see goes before all others.
    """

    by: str
    sink: int
    recent: int
    window: int | None
