"""The specification: every kernel in plain torch, one whole matrix at a time, written to be read.

Implements all of ``contract.KernelModule``, where arguments and results are explained; faster kernels are tested
against it. Knows tensors only.

Shapes: T chunk tokens, B decoding tokens, S slots, H query heads, K kv heads, G = H / K, C rows of a slot,
P rows in use, D key dim, E value dim, M sums of attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bmx.kernels import drawing, fp8_products, reference_mixers
from bmx.kernels.fbgemm import MOST, row_scales
from bmx.kernels.linear import Linear
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.reference_eviction import evict, rank
from bmx.kernels.slot_views import ChannelRows, Chunks, Rows, SlotView, query_heads

draw = drawing.draw
convolve, delta_rule, state_space = reference_mixers.convolve, reference_mixers.delta_rule, reference_mixers.state_space
gated_norm, offset_norm = reference_mixers.gated_norm, reference_mixers.offset_norm
norm_of_gated = reference_mixers.norm_of_gated


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
    tokens, heads, _ = query.shape
    kv_heads, past, _ = past_key.shape
    keys = torch.cat([past_key, key.transpose(0, 1)], dim=1)  # [K, P+T, D]
    values = torch.cat([past_value, value.transpose(0, 1)], dim=1)
    grouped = query.reshape(tokens, kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3)  # [K, G, T, D]
    scores = scaled_scores(grouped.flatten(1, 2), keys, scale).view(*grouped.shape[:3], -1)  # [K, G, T, P+T]
    scores = cap(scores.float(), softcap)
    future = torch.ones(tokens, past + tokens, dtype=torch.bool, device=query.device).triu(past + 1)
    scores.masked_fill_(future, float("-inf"))
    if hidden is not None:
        scores.masked_fill_(hidden.unsqueeze(1), float("-inf"))
    sink_logits = None if sinks is None else sinks.view(kv_heads, -1, 1, 1)
    weights = softmax_with_sinks(scores, sink_logits)
    output = torch.matmul(weights.to(value.dtype), values.unsqueeze(1))  # [K, G, T, E]
    output = output.permute(2, 0, 1, 3).reshape(tokens, heads, -1)
    if query_weights is None:
        return output, None
    if distance:
        weights = weights.masked_fill(near_keys(past_places, kv_heads, tokens, distance, query.device).unsqueeze(1), 0)
    sums = torch.einsum("mt,ktn->mkn", query_weights, weights.pow(power).mean(1))
    if squares:
        squared = torch.einsum("t,ktn->kn", query_weights[0], weights.square().mean(1))
        sums = torch.cat([sums, squared.unsqueeze(0)])
    return output, sums


def near_keys(past_places: Tensor | None, kv_heads: int, tokens: int, distance: int, device: torch.device) -> Tensor:
    """[K, T, P + T] bool: keys that a chunk's query does not count for: it lies less than ``distance`` after.

    Args:
        past_places: [K, P], as in ``contract.KernelModule.attend_chunk``; None for no rows.
        kv_heads: K.
        tokens: of the chunk.
        distance: in tokens.
        device: where the result is.
    """
    own = torch.arange(tokens, device=device)
    places = own.expand(kv_heads, -1)
    if past_places is not None:
        places = torch.cat([past_places, places], dim=1)
    return own.view(1, -1, 1) - places.unsqueeze(1) < distance


def out_of_window(positions: Tensor, start: int, tokens: int, window: int | None) -> Tensor | None:
    """[K, T, P + T] bool: keys that a sliding window hides from a chunk's queries; None if it hides none.

    Args:
        positions: [K, P], of the slot's rows in use.
        start: position of the chunk's first token.
        tokens: of the chunk.
        window: newest keys that a query sees, or None.
    """
    if window is None or start + tokens <= window:
        return None
    own = torch.arange(start, start + tokens, device=positions.device)
    keys = torch.cat([positions, own.expand(len(positions), -1)], dim=1)  # [K, P+T]
    return keys.unsqueeze(1) <= own.view(1, -1, 1) - window


def attend_slots(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    hidden: Tensor | None = None,
    want_mass: bool = False,
    squares: bool = False,
    power: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """See ``contract.KernelModule.attend_slots``.

    Copying the keys of some slots costs more than attending to all: from half of them on, slots that do not decode take
    part with a query of zeros.
    """
    powers = ([power] if want_mass else []) + ([2] if want_mass and squares else [])
    attend = partial(_attend_slots, scale=scale, softcap=softcap, sinks=sinks, powers=powers)
    if slots is None:
        return attend(query, keys, values, hidden)
    if 2 * len(slots) < len(keys):
        return attend(query, keys[slots], values[slots], hidden)
    queries = query.new_zeros(len(keys), *query.shape[1:]).index_copy_(0, slots, query)
    if hidden is not None:
        nothing = hidden.new_zeros(len(keys), *hidden.shape[1:])
        hidden = nothing.index_copy_(0, slots, hidden.expand(len(slots), *hidden.shape[1:]))
    output, sums = attend(queries, keys, values, hidden)
    return output[slots], None if sums is None else sums[:, slots]


def _attend_slots(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    powers: list[int],
) -> tuple[Tensor, Tensor | None]:
    """``attend_slots`` with one token for every slot, in order, and sums of these powers of probabilities."""
    batch, kv_heads, capacity, dim = keys.shape
    grouped = query.reshape(batch * kv_heads, -1, dim)  # [B*K, G, D]
    scores = scaled_scores(grouped, keys.flatten(0, 1), scale).view(batch, kv_heads, -1, capacity)  # [B, K, G, C]
    scores = cap(scores.float(), softcap)
    if hidden is not None:
        scores.masked_fill_(hidden.unsqueeze(-2), float("-inf"))
    weights = softmax_with_sinks(scores, None if sinks is None else sinks.view(kv_heads, -1, 1))
    output = torch.matmul(weights.to(values.dtype), values)  # [B, K, G, E]
    output = output.reshape(batch, query.shape[1], -1)
    return output, torch.stack([weights.pow(power).mean(2) for power in powers]) if powers else None


def decode_step(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    slots: Tensor,
    positions: Tensor,
    row_limits: Tensor,
    *,
    scale: float,
    order: EvictionOrder,
    decay: float,
    accumulate: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> bool:
    """See ``contract.KernelModule.decode_step``; one token after another."""
    options: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "order": order,
        "decay": decay,
        "accumulate": accumulate,
    }
    tokens = zip(slots.tolist(), positions.tolist(), row_limits.tolist(), strict=True)
    for token, (slot, position, row_limit) in enumerate(tokens):
        if slot < 0:
            output[token] = 0
            continue
        for heads, view in rows.slot(slot):
            asking = query_heads(heads, query.shape[1] // rows.kv_heads)
            vectors = query[token, asking], key[token, heads], value[token, heads]
            of_sinks = None if sinks is None else sinks[asking]
            output[token, asking] = _decode_token(*vectors, view, position, row_limit, sinks=of_sinks, **options)
    return True


def _decode_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    view: SlotView,
    position: int,
    row_limit: int,
    *,
    scale: float,
    order: EvictionOrder,
    decay: float,
    accumulate: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The part of ``decode_step`` of one token and the kv heads of a view; returns the output [H, E]."""
    keys, values, row_positions, mass, ranks = view
    heads = torch.arange(len(key), device=query.device)
    limit = min(row_limit, row_positions.shape[1])
    if position < limit:
        row = torch.full_like(heads, position)
    else:
        known = ranks if order.by == "rank" else mass
        known = None if known is None else known[:, :limit]
        row = rank(row_positions[:, :limit], known, position, order).argmin(1)  # [K], of equals the first
    keys.write((heads, row), key)
    values.write((heads, row), value)
    row_positions[heads, row] = position
    if mass is not None:
        mass[heads, row] = 0
    if ranks is not None:
        ranks[heads, row] = float("inf")
    used = slice(min(position + 1, limit))
    answer, sums = attend_slots(
        query.unsqueeze(0),
        keys.read((None, slice(None), used), key.shape[-1], key.dtype),
        values.read((None, slice(None), used), value.shape[-1], value.dtype),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        hidden=None if order.window is None else row_positions[:, used].unsqueeze(0) <= position - order.window,
        want_mass=accumulate,
        power=order.power,
    )
    if mass is not None and sums is not None:
        mass[:, used] = mass[:, used] * decay + sums[0, 0]
    return answer[0]


def prefill_step(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    chunks: Chunks,
    *,
    scale: float,
    order: EvictionOrder,
    ranking: Callable[[Tensor | None], Tensor] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> bool:
    """See ``contract.KernelModule.prefill_step``; one chunk after another."""
    own_sums = None if rows.mass is None else rows.mass.new_zeros(rows.kv_heads, len(key))
    weights = query.new_ones(len(query), dtype=torch.float32) if chunks.query_weights is None else chunks.query_weights
    for n, (heads, (keys, values, positions, mass, _)) in chunks.views(rows):
        own = slice(chunks.offsets[n], chunks.offsets[n] + chunks.lengths[n])
        asking = query_heads(heads, query.shape[1] // rows.kv_heads)
        start, capacity = chunks.starts[n], positions.shape[1]
        used = min(start, chunks.row_limits[n], capacity)
        output[own, asking], sums = attend_chunk(
            query[own, asking],
            key[own, heads],
            value[own, heads],
            keys.read((slice(None), slice(used)), key.shape[-1], key.dtype),
            values.read((slice(None), slice(used)), value.shape[-1], value.dtype),
            scale=scale,
            softcap=softcap,
            sinks=None if sinks is None else sinks[asking],
            hidden=out_of_window(positions[:, :used], start, chunks.lengths[n], order.window),
            query_weights=weights[own].unsqueeze(0) if mass is not None and chunks.evicts(n, capacity) else None,
            past_places=positions[:, :used] - start,
            distance=order.distance,
            power=order.power,
        )
        if sums is not None and mass is not None and own_sums is not None:
            decay = 1.0 if chunks.decay is None else chunks.decay[n]
            mass[:, :used] = mass[:, :used] * decay + sums[0, :, :used]
            own_sums[heads, own] = sums[0, :, used:]
    ranks = None if ranking is None else ranking(own_sums)
    return evict(key, value, rows, chunks, own_sums, ranks, order=order)


def decode_by_channel(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: ChannelRows,
    slots: Tensor,
    positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> bool:
    """Declines: ``kv.pool.LayerSlots`` is the specification of ``contract.KernelModule.decode_by_channel``."""
    del output, query, key, value, rows, slots, positions, scale, softcap, sinks
    return False


def append_by_channel(key: Tensor, value: Tensor, rows: ChannelRows, slot: int, start: int) -> bool:
    """Declines: ``kv.pool.LayerSlots`` is the specification of ``contract.KernelModule.append_by_channel``."""
    del key, value, rows, slot, start
    return False


def read_by_channel(rows: ChannelRows, slot: int, count: int) -> tuple[Tensor, Tensor] | None:
    """Declines: ``kv.pool.LayerSlots`` is the specification of ``contract.KernelModule.read_by_channel``."""
    del rows, slot, count
    return None


def product(layers: tuple[Linear, ...], gated: bool = False) -> Callable[[Tensor], list[Tensor]]:
    """See ``contract.KernelModule.product``."""
    if layers[0].weight.dtype == torch.float8_e4m3fn:
        multiply = fp8_products.product(layers)
    else:
        multiply = lambda x: [_linear(x, layer) for layer in layers]  # noqa: E731
    return (lambda x: [gate(*multiply(x))]) if gated else multiply


def _linear(x: Tensor, layer: Linear) -> Tensor:
    """A linear layer [..., I] -> [..., O]; inputs of int8 weights are rounded to 8 bits too.

    Each row of the input is rounded to 256 levels from its least to its greatest number, zero among them; sums are
    exact integers. No run comes here with int8 weights: see ``int8``.
    """
    if layer.scales is None:
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    rows = x.reshape(-1, x.shape[-1]).float()
    steps, zeros = row_scales(rows, MOST)
    codes = ((rows / steps).round() + zeros).clamp(0, MOST)
    sums = (codes - zeros).double() @ layer.weight.double().t()
    y = sums.float() * steps * layer.scales
    y = y if layer.bias is None else y + layer.bias
    return y.to(x.dtype).view(*x.shape[:-1], len(layer.weight))


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """See ``contract.KernelModule.gate``."""
    return torch.nn.functional.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``contract.KernelModule.rms_norm``."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``contract.KernelModule.rotate``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


def scaled_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled dot products [N, M, C]; the scale is applied before anything is rounded or overflows.

    Args:
        query: [N, M, D].
        key: [N, C, D].
        scale: factor of the dot products.
    """
    return torch.baddbmm(query.new_empty(()), query, key.transpose(-1, -2), beta=0, alpha=scale)


def cap(scores: Tensor, softcap: float | None) -> Tensor:
    """Soft-capped scores; unchanged without a cap."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension; ``sinks`` (broadcastable) joins the denominator only."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
