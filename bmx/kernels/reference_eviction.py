"""The specification of eviction, in plain torch: which pair goes first, and which of a slot and its chunk stay.

A part of ``reference``. Knows tensors only.

Shapes: T packed tokens, K kv heads, P rows in use, N pairs, D key dim, E value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmx.kernels.ranking import POSITIONS, UNRANKED, EvictionOrder
from bmx.kernels.slot_views import Chunks, Rows


def evict(
    key: Tensor,
    value: Tensor,
    rows: Rows,
    chunks: Chunks,
    sums: Tensor | None,
    ranks: Tensor | None = None,
    *,
    order: EvictionOrder,
) -> bool:
    """Keep the best pairs of each slot and its chunk, once the chunks have attended.

    As many are kept as the row limit says; of equals, the first, rows before tokens. The survivors of a chunk take, in
    order, the rows of evicted pairs, then empty rows. The mass and ranks of rows in use are up to date already.

    Args:
        key: [T, K, D], of all packed tokens, each vector contiguous.
        value: [T, K, E], of all packed tokens, each vector contiguous.
        rows: the layer's slots; written.
        chunks: the prompt chunks.
        sums: [K, T] float32, attention that the chunks' own keys received; None for 0.
        ranks: [K, T] float32, those of the packed tokens, where pairs are ranked.
        order: which pair is evicted first.

    Returns:
        Whether it was done; if not, nothing was changed.
    """
    for n, (heads, (keys, values, positions, mass, row_ranks)) in chunks.views(rows):
        start, tokens = chunks.starts[n], chunks.lengths[n]
        own, limit = slice(chunks.offsets[n], chunks.offsets[n] + tokens), min(chunks.row_limits[n], positions.shape[1])
        used = min(start - chunks.shared_by(n)[1], limit)
        own_positions = torch.arange(start, start + tokens, dtype=torch.int32, device=key.device)
        candidates = torch.cat([positions[:, :used], own_positions.expand(len(positions), -1)], 1)  # [K, P + T]
        none = positions.new_zeros(len(positions), tokens, dtype=torch.float32)
        stats = [(mass, none if sums is None else sums[heads, own])]
        stats += [(row_ranks, none + float("inf") if ranks is None else ranks[heads, own])]
        held, new = stats[order.by == "rank"]
        known = None if held is None else torch.cat([held[:, :used], new], 1)
        best = rank(candidates, known, start + tokens, order).argsort(dim=1, descending=True, stable=True)[:, :limit]
        stays = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, best, True)
        for head in range(len(positions)):
            survivors = stays[head, used:].nonzero().squeeze(1)
            free = torch.cat([~stays[head, :used], stays.new_ones(limit - used)]).nonzero().squeeze(1)
            row = free[: len(survivors)]
            keys.write((head, row), key[own, heads][survivors, head])
            values.write((head, row), value[own, heads][survivors, head])
            positions[head, row] = own_positions[survivors]
            for stat, own_stat in stats:
                if stat is not None:
                    stat[head, row] = own_stat[head, survivors]
    return True


def rank(positions: Tensor, known: Tensor | None, now: int, order: EvictionOrder) -> Tensor:
    """Scores of KV pairs [K, N] float32; the lowest is evicted first.

    Args:
        positions: [K, N] int32, of the pairs' tokens; -1 for an empty row.
        known: [K, N] float32, attention that the pairs received, or their scores at the last ranking; None for 0.
        now: tokens of the sequence so far.
        order: which pair is evicted first.

    Returns:
        -inf for empty rows and pairs out of the window; of the others, +inf for sink and recent tokens, -inf for NaN.
    """
    known = torch.zeros_like(positions, dtype=torch.float32) if known is None else known
    scores = positions.float() if order.by == "age" else known
    if order.by == "rank":
        scores = scores.where(scores != float("inf"), UNRANKED * (1 + positions / POSITIONS))
    if order.by == "average":
        most = None if order.window is None else max(1, order.window - order.distance)
        scores = (
            scores / (now - positions - order.distance).clamp(1, most).float()
        )  # queries that count and could see it
    scores = scores.masked_fill((positions < order.sink) | (positions >= now - order.recent), float("inf"))
    gone = (positions < 0) | scores.isnan()
    if order.window is not None:
        gone = gone | (positions <= now - order.window)
    return scores.masked_fill(gone, float("-inf"))
