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
from bmx.kernels.scores import cap, near_keys, out_of_window, scaled_scores, softmax_with_sinks
from bmx.kernels.slot_views import ChannelRows, Chunks, Rows, SharedRows, SlotView, query_heads

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
    shared: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See ``contract.KernelModule.attend_slots``.

    Copying the keys of some slots costs more than attending to all: from half of them on, slots that do not decode take
    part with a query of zeros.
    """
    powers = ([power] if want_mass else []) + ([2] if want_mass and squares else [])
    attend = partial(_attend_slots, scale=scale, softcap=softcap, sinks=sinks, powers=powers, shared=shared)
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
    shared: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """``attend_slots`` with one token for every slot, in order, and sums of these powers of probabilities."""
    batch, kv_heads, capacity, dim = keys.shape
    grouped = query.reshape(batch * kv_heads, -1, dim)  # [B*K, G, D]
    scores = scaled_scores(grouped, keys.flatten(0, 1), scale).view(batch, kv_heads, -1, capacity)  # [B, K, G, C]
    scores = cap(scores.float(), softcap)
    if hidden is not None:
        scores.masked_fill_(hidden.unsqueeze(-2), float("-inf"))
    of_sinks = None if sinks is None else sinks.view(kv_heads, -1, 1)
    if shared is not None:
        return _with_shared(query, scores, values, shared, scale, softcap, of_sinks), None
    weights = softmax_with_sinks(scores, of_sinks)
    output = torch.matmul(weights.to(values.dtype), values)  # [B, K, G, E]
    output = output.reshape(batch, query.shape[1], -1)
    return output, torch.stack([weights.pow(power).mean(2) for power in powers]) if powers else None


def _with_shared(
    query: Tensor,
    scores: Tensor,
    values: Tensor,
    shared: tuple[Tensor, Tensor],
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of decoding tokens [B, H, E] to rows that all of them share, and to their own slots.

    Args:
        query: [B, H, D].
        scores: [B, K, G, C], of the rows of their slots.
        values: [B, K, C, E], of the same rows.
        shared: keys [K, P, D] and values [K, P, E].
        scale: factor of the dot products.
        softcap: as in ``attend_slots``.
        sinks: [K, G, 1], or None.
    """
    batch, kv_heads, group, _ = scores.shape
    keys, of_shared = shared
    asked = query.view(batch, kv_heads, group, -1).transpose(0, 1).flatten(1, 2)  # [K, B*G, D]
    others = cap(scaled_scores(asked, keys, scale).float(), softcap).view(kv_heads, batch, group, -1).transpose(0, 1)
    weights = softmax_with_sinks(torch.cat([others, scores], dim=-1), sinks).to(values.dtype)
    first, own = torch.split(weights, [keys.shape[1], scores.shape[-1]], dim=-1)
    output = torch.matmul(first.transpose(0, 1).flatten(1, 2), of_shared)  # [K, B*G, E]
    output = output.view(kv_heads, batch, group, -1).transpose(0, 1) + torch.matmul(own, values)
    return output.reshape(batch, kv_heads * group, -1)


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
    shared: SharedRows | None = None,
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
        before = 0 if shared is None else int(shared.rows[token])
        elsewhere = int(shared.slots[token]) if shared is not None and before else slot
        for heads, view in rows.slot(slot):
            asking = query_heads(heads, query.shape[1] // rows.kv_heads)
            vectors = query[token, asking], key[token, heads], value[token, heads]
            options["sinks"] = None if sinks is None else sinks[asking]
            seen = (*vectors, view, rows.view(elsewhere, heads.start), before, position, row_limit)
            output[token, asking] = _decode_token(*seen, **options)
    return True


def _decode_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    view: SlotView,
    other: SlotView,
    before: int,
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
    """The part of ``decode_step`` of one token and the kv heads of a view; returns the output [H, E].

    The first ``before`` rows of another slot's view are read first.
    """
    keys, values, row_positions, mass, ranks = view
    heads = torch.arange(len(key), device=query.device)
    limit = min(row_limit, row_positions.shape[1])
    if position - before < limit:
        row = torch.full_like(heads, position - before)
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
    used = min(position - before + 1, limit)
    read_keys, read_values, positions = _read_both(view, used, other, before, key, value)
    answer, sums = attend_slots(
        query.unsqueeze(0),
        read_keys.unsqueeze(0),
        read_values.unsqueeze(0),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        hidden=None if order.window is None else positions.unsqueeze(0) <= position - order.window,
        want_mass=accumulate and not before,
        power=order.power,
    )
    if mass is not None and sums is not None:
        mass[:, :used] = mass[:, :used] * decay + sums[0, 0]
    return answer[0]


def _read_both(
    view: SlotView, used: int, other: SlotView, before: int, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [K, P, D], values [K, P, E] and positions [K, P] of the first rows of another slot, then of one's own.

    Args:
        view: of one's own slot.
        used: how many rows of it.
        other: of the other slot.
        before: how many rows of that.
        key: [..., D], whose size and type the keys have.
        value: [..., E], whose size and type the values have.
    """
    both = [(part, (slice(None), slice(count))) for part, count in ((other, before), (view, used)) if count or not used]
    return (
        torch.cat([part.keys.read(rows, key.shape[-1], key.dtype) for part, rows in both], dim=1),
        torch.cat([part.values.read(rows, value.shape[-1], value.dtype) for part, rows in both], dim=1),
        torch.cat([part.positions[rows] for part, rows in both], dim=1),
    )


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
    for n, (heads, view) in chunks.views(rows):
        own = slice(chunks.offsets[n], chunks.offsets[n] + chunks.lengths[n])
        asking = query_heads(heads, query.shape[1] // rows.kv_heads)
        start, mass, capacity = chunks.starts[n], view.mass, view.positions.shape[1]
        other, before = chunks.shared_by(n)
        used = min(start - before, chunks.row_limits[n], capacity)
        keys, values, positions = _read_both(view, used, rows.view(other, heads.start), before, key, value)
        output[own, asking], sums = attend_chunk(
            query[own, asking],
            key[own, heads],
            value[own, heads],
            keys,
            values,
            scale=scale,
            softcap=softcap,
            sinks=None if sinks is None else sinks[asking],
            hidden=out_of_window(positions, start, chunks.lengths[n], order.window),
            query_weights=weights[own].unsqueeze(0) if mass is not None and chunks.evicts(n, capacity) else None,
            past_places=positions - start,
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
