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
from bmx.kernels.scores import cap, softmax_with_sinks
from bmx.kernels.workspace import TILE

attend_slots, decode_step, prefill_step = reference.attend_slots, reference.decode_step, reference.prefill_step
decode_by_channel, append_by_channel = reference.decode_by_channel, reference.append_by_channel
read_by_channel = reference.read_by_channel
product, gate, rms_norm, rotate = reference.product, reference.gate, reference.rms_norm, reference.rotate
draw = reference.draw
convolve, delta_rule, state_space = reference.convolve, reference.delta_rule, reference.state_space
gated_norm, norm_of_gated, offset_norm = reference.gated_norm, reference.norm_of_gated, reference.offset_norm


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
    past_places: Tensor | None = None,
    distance: int = 0,
    power: int = 1,
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
            scores = cap(scores, softcap)
            scores[:, past + start :].add_(future[: len(scores), : stop - start])
            if hidden is not None:
                mask = hidden[head, start:stop, :width].repeat_interleave(group, 0)
                scores.masked_fill_(mask, float("-inf"))
            sink = None if sink_rows is None else sink_rows[head, : len(scores)]
            weights = softmax_with_sinks(scores, sink)
            torch.mm(weights, values[head, :width], out=output[head, of_tile])
            if sums is not None and row_weights is not None and row_weights[:, of_tile].any():
                if distance:
                    places = None if past_places is None else past_places[head]
                    _leave_out_near(weights, places, start, stop, group, distance)
                _add_up(sums[:, head, :width], row_weights[:, of_tile], weights, power)
    output = output.view(kv_heads, tokens, group, -1).transpose(0, 1).reshape(tokens, heads, -1)
    return output, None if sums is None else sums.div_(group)


def _leave_out_near(
    probabilities: Tensor, past_places: Tensor | None, start: int, stop: int, group: int, distance: int
) -> None:
    """Set a tile's probabilities of near keys to 0.

    Args:
        probabilities: [R, P + stop]; written.
        past_places: [P], as in ``contract.KernelModule.attend_chunk``; None for no rows.
        start: the tile's first token.
        stop: the token after its last.
        group: G.
        distance: in tokens.
    """
    past = probabilities.shape[1] - stop
    tokens = torch.arange(start, stop).repeat_interleave(group).unsqueeze(1)  # [R, 1]
    first = max(0, start - distance + 1)  # own keys before it are far from all of the tile's queries
    own = probabilities[:, past + first :]
    own.masked_fill_(tokens - torch.arange(first, stop) < distance, 0)
    if past_places is not None and start < distance - 1:
        near = min(stop, distance - 1) - start  # rows of a slot are far from later queries
        probabilities[: near * group, :past].masked_fill_(tokens[: near * group] - past_places < distance, 0)


def _add_up(sums: Tensor, row_weights: Tensor, probabilities: Tensor, power: int) -> None:
    """Add a tile's weighted probabilities to the column sums.

    Args:
        sums: [M, N], or [M + 1, N] with the squares last.
        row_weights: [M, R].
        probabilities: [R, N].
        power: of a probability, as it is summed.
    """
    ways = len(row_weights)
    squares = probabilities.square() if power == 2 or len(sums) > ways else None
    sums[:ways] += torch.mm(row_weights, probabilities if squares is None or power == 1 else squares)
    if len(sums) > ways and squares is not None:
        sums[ways:] += torch.mm(row_weights[:1], squares)


def _scores(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """rows [R, D] x keys [N, D] -> scaled scores [R, N]; the scale is applied before anything is rounded."""
    empty = rows.new_empty(())
    return torch.addmm(empty, rows, keys.t(), beta=0, alpha=scale)


def _future(tile: int, group: int, dtype: torch.dtype) -> Tensor:
    """[tile * G, tile]: -inf where a query of the tile would see a later token of it."""
    later = torch.full((tile, tile), float("-inf"), dtype=dtype).triu(1)
    return later.repeat_interleave(group, 0)
