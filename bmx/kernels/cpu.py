"""Attention for CPUs: tiles of queries against contiguous keys, a few large matrix products each.

Knows tensors only; all but ``attend_chunk`` is ``reference``. What pays here was measured: one 2-D product per kv head
and tile (batched products and strided operands get copied), tiles of 130 to 190 queries whose scores stay in cache,
keys past the tile's last query left out, the softmax in one pass in the tensors' own type, and column sums as a product
with the queries' weights (added up in float32, rounded once per tile; tiles are added up in float32).

Shapes as in ``contract``; R = rows of a tile = its queries x G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmx.kernels import reference
from bmx.kernels.workspace import TILE

attend_slots, decode_step, prefill_step = reference.attend_slots, reference.decode_step, reference.prefill_step
product, gate, rms_norm, rotate = reference.product, reference.gate, reference.rms_norm, reference.rotate


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
    query_weights: Tensor | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See ``contract.KernelModule.attend_chunk``."""
    tokens, heads, dim = query.shape
    kv_heads, past, _ = past_key.shape
    group = heads // kv_heads
    keys = torch.cat([past_key, key.transpose(0, 1)], dim=1)  # [K, P+T, D]
    values = torch.cat([past_value, value.transpose(0, 1)], dim=1)
    rows = query.reshape(tokens, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, tokens * group, dim)
    output = torch.empty(kv_heads, tokens * group, values.shape[-1], dtype=query.dtype)
    row_weights = sums = None
    if query_weights is not None:
        row_weights = query_weights.to(query.dtype).repeat_interleave(group, 1)  # [M, T * G]
        sums = torch.zeros(len(query_weights) + squares, kv_heads, past + tokens)
    tile = -(-tokens // -(-tokens // TILE))  # tiles as even as can be
    future = _future(tile, group, query.dtype)
    sink_rows = None if sinks is None else sinks.view(kv_heads, group).repeat(1, tile).unsqueeze(-1)
    for head in range(kv_heads):
        for start in range(0, tokens, tile):
            stop = min(start + tile, tokens)
            width, of_tile = past + stop, slice(start * group, stop * group)
            scores = _scores(rows[head, of_tile], keys[head, :width], scale)  # [R, width]
            scores = reference.cap(scores, softcap)
            scores[:, past + start :].add_(future[: len(scores), : stop - start])
            if hidden is not None:
                mask = hidden[head, start:stop, :width].repeat_interleave(group, 0)
                scores.masked_fill_(mask, float("-inf"))
            sink = None if sink_rows is None else sink_rows[head, : len(scores)]
            weights = reference.softmax_with_sinks(scores, sink)
            torch.mm(weights, values[head, :width], out=output[head, of_tile])
            if sums is not None and row_weights is not None:
                _add_up(sums[:, head, :width], row_weights[:, of_tile], weights)
    output = output.view(kv_heads, tokens, group, -1).transpose(0, 1).reshape(tokens, heads, -1)
    return output, None if sums is None else sums.div_(group)


def _add_up(sums: Tensor, row_weights: Tensor, probabilities: Tensor) -> None:
    """Add a tile's weighted probabilities to the column sums; nothing if all weights are 0.

    Args:
        sums: [M, N], or [M + 1, N] with the squares last.
        row_weights: [M, R].
        probabilities: [R, N].
    """
    if not row_weights.any():
        return
    ways = len(row_weights)
    sums[:ways] += torch.mm(row_weights, probabilities)
    if len(sums) > ways:
        sums[ways:] += torch.mm(row_weights[:1], probabilities.square())


def _scores(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """rows [R, D] x keys [N, D] -> scaled scores [R, N]; the scale is applied before anything is rounded."""
    empty = rows.new_empty(())
    return torch.addmm(empty, rows, keys.t(), beta=0, alpha=scale)


def _future(tile: int, group: int, dtype: torch.dtype) -> Tensor:
    """[tile * G, tile]: -inf where a query of the tile would see a later token of it."""
    later = torch.full((tile, tile), float("-inf"), dtype=dtype).triu(1)
    return later.repeat_interleave(group, 0)
