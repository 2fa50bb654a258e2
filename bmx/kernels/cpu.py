"""Attention for CPUs: tiles of queries against contiguous keys, a few large matrix products each.

Knows tensors only; same signatures and results as ``reference``. What pays here was measured: one 2-D product per
kv head and tile (batched ones and strided operands get copied), tiles of 130 to 190 queries whose scores stay in
cache, keys past the tile's last query left out, the softmax in one pass in the tensors' own type, and column sums as
a product with the queries' votes (added up in float32, rounded once per tile; tiles are added up in float32).

Shapes as in ``reference``; R = rows of a tile = its queries x G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmx.kernels import reference
from bmx.kernels.workspace import TILE

attend_slots = reference.attend_slots
SUPPORTED_DTYPES = reference.SUPPORTED_DTYPES
product, gate, rms_norm, rotate = reference.product, reference.gate, reference.rms_norm, reference.rotate
decode, read = reference.decode, reference.read


def attend_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    hidden: Tensor | None = None,
    votes: Tensor | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See ``reference.attend_chunk``."""
    tokens, heads, dim = query.shape
    kv_heads, past, _ = past_key.shape
    group = heads // kv_heads
    keys = torch.cat([past_key, key.transpose(0, 1)], dim=1)  # [K, P+T, D]
    values = torch.cat([past_value, value.transpose(0, 1)], dim=1)
    rows = query.reshape(tokens, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, tokens * group, dim)
    output = torch.empty(kv_heads, tokens * group, values.shape[-1], dtype=query.dtype)
    sums = None if votes is None else torch.zeros(len(votes) + squares, kv_heads, past + tokens)
    ballots = None if votes is None else votes.to(query.dtype).repeat_interleave(group, 1)  # [M, T * G]
    tile = -(-tokens // -(-tokens // TILE))  # tiles as even as can be
    future = _future(tile, group, query.dtype)
    sink_rows = None if sinks is None else sinks.view(kv_heads, group).repeat(1, tile).unsqueeze(-1)
    for head in range(kv_heads):
        for start in range(0, tokens, tile):
            stop = min(start + tile, tokens)
            width, mine = past + stop, slice(start * group, stop * group)
            scores = _scores(rows[head, mine], keys[head, :width], scale)  # [R, width]
            scores = reference.cap(scores, softcap)
            scores[:, past + start :].add_(future[: len(scores), : stop - start])
            if hidden is not None:
                mask = hidden[head, start:stop, :width].repeat_interleave(group, 0)
                scores.masked_fill_(mask, float("-inf"))
            sink = None if sink_rows is None else sink_rows[head, : len(scores)]
            weights = reference.softmax_with_sinks(scores, sink)
            torch.mm(weights, values[head, :width], out=output[head, mine])
            if sums is not None and ballots is not None:
                _add_up(sums[:, head, :width], ballots[:, mine], weights)
    output = output.view(kv_heads, tokens, group, -1).transpose(0, 1).reshape(tokens, heads, -1)
    return output, None if sums is None else sums.div_(group)


def _add_up(sums: Tensor, ballots: Tensor, weights: Tensor) -> None:
    """Add to sums [M or M + 1, N] what a tile's weights [R, N] come to by ballots [M, R], none of which may count."""
    if not ballots.any():
        return
    ways = len(ballots)
    sums[:ways] += torch.mm(ballots, weights)
    if len(sums) > ways:
        sums[ways:] += torch.mm(ballots[:1], weights.square())


def _scores(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """rows [R, D] x keys [N, D] -> scaled scores [R, N]; the scale is applied before anything is rounded."""
    empty = rows.new_empty(())
    return torch.addmm(empty, rows, keys.t(), beta=0, alpha=scale)


def _future(tile: int, group: int, dtype: torch.dtype) -> Tensor:
    """[tile * G, tile]: -inf where a query of the tile would see a later token of it."""
    later = torch.full((tile, tile), float("-inf"), dtype=dtype).triu(1)
    return later.repeat_interleave(group, 0)
