"""The Triton kernel of a decoding step: a token takes a row of its slot, attends to it, and its attention is added up.

Each program has one kv head of one token to itself, so that nothing is added up in an order that chance decides, and no
number depends on the batch. What changes from step to step is read from the device: a step can be a CUDA graph.

Shapes: B decoding tokens, H query heads, K kv heads, G = H / K, C rows of a head in one slot, D key dim, E value dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels import ranking
from bmx.kernels.formats import MODEL
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.slot_views import Rows, SharedRows
from bmx.kernels.triton_combine import DecodeSizes, add_attention, combine, rows_of_head
from bmx.kernels.triton_operands import (
    BF16_TOKENS,
    Variant,
    packed,
    reads,
    slot_rows,
    stored_rows,
    variant,
)
from bmx.kernels.triton_splits import (
    INTERPRETED,
    LOG2_E,
    PARTIAL,
    SPLITS,
    Splits,
    logits,
    nothing,
    partial_results,
    programs,
    split_of,
    store_nothing,
    store_own,
    store_partial,
)
from bmx.kernels.triton_vectors import (
    in_one_part,
    load,
    load_scales,
    load_stored,
    scales_of_head,
    store,
    store_encoded,
)

INFINITY = tl.constexpr(float("inf"))
UNRANKED, POSITIONS = tl.constexpr(ranking.UNRANKED), tl.constexpr(ranking.POSITIONS)


@triton.jit
def rank(position, received, now, order: tl.constexpr):
    """Scores of pairs: see ``reference_eviction.rank``."""
    score = received
    if order.by == "age":
        score = position.to(tl.float32)
    if order.by == "rank":
        score = tl.where(received == INFINITY, UNRANKED * (1 + position.to(tl.float32) / POSITIONS), received)
    if order.by == "average":
        age = tl.maximum(now - position - order.distance, 1)  # pairs out of the window get -inf below
        score = tl.div_rn(received, age.to(tl.float32))
    score = tl.where((position < order.sink) | (position >= now - order.recent), INFINITY, score)
    gone = (position < 0) | (score != score)  # noqa: PLR0124 - NaN
    if order.window is not None:
        gone = gone | (position <= now - order.window)
    return tl.where(gone, -INFINITY, score)


@triton.jit
def _row_taken(rows, begin, limit, now, order: tl.constexpr, block: tl.constexpr):
    """The row of a new pair: the next one; in a full slot, that of the lowest score, of equals the first."""
    row = now
    if now >= limit:
        least = tl.full([block], INFINITY, tl.float32)
        lowest = tl.arange(0, block)
        for start in range(0, limit, block):
            c = start + tl.arange(0, block)
            position = tl.load(rows.positions + begin + c, mask=c < limit, other=0)
            known = tl.zeros([block], tl.float32)
            if order.by == "rank":
                known = tl.load(rows.ranks + begin + c, mask=c < limit, other=0.0)
            elif order.by != "age" and rows.mass is not None:
                known = tl.load(rows.mass + begin + c, mask=c < limit, other=0.0)
            score = rank(position, known, now, order)
            lower = (score < least) & (c < limit)
            least = tl.where(lower, score, least)
            lowest = tl.where(lower, c, lowest)
        row = tl.min(tl.where(least == tl.min(least, 0), lowest, limit), 0)
    return row


@triton.jit
def _dot_keys(q, keys, scales, c, read, sums, parts: tl.constexpr):
    """Dot products [G, N] of queries in two parts and the keys of rows c; ``sums`` [G] are those of the queries."""
    low, high = load_stored(keys, c, parts.width, read, parts, True, q[0].dtype)
    products = tl.dot(q[0], tl.trans(low), input_precision="ieee")
    if parts.high > 0:
        products = tl.dot(q[1], tl.trans(high), products, input_precision="ieee")
    if parts.format != "model":
        scale, offset = load_scales(scales, c, read, parts)
        products *= scale[None, :]
        if parts.format == "int4":
            products += sums[:, None] * offset[None, :]
    return products


@triton.jit
def add_values(answer, weights, fade, values, scales, c, read, dtype: tl.constexpr, parts: tl.constexpr):
    """The answer [G, E] in two parts, which fades, and the values of rows c, weighted with [G, N]."""
    low, high = answer[0] * fade[:, None], answer[1] * fade[:, None]
    if parts.format != "model":
        scale, offset = load_scales(scales, c, read, parts)
        if parts.format == "int4":
            shift = tl.sum(weights * offset[None, :], 1)[:, None]
            low, high = low + shift, high + shift
        weights *= scale[None, :]
    weights = weights.to(dtype)
    value_low, value_high = load_stored(values, c, parts.width, read, parts, True, dtype)
    low = tl.dot(weights, value_low, low, input_precision="ieee")
    if parts.high > 0:
        high = tl.dot(weights, value_high, high, input_precision="ieee")
    return low, high


@triton.jit
def _own(q, key, value, sinks, heads, valid, scale, softcap: tl.constexpr, sizes: tl.constexpr):
    """The softmax of a token's own pair, and of sinks: with it the maximum is finite from the start.

    Returns:
        The answer [G, E] in two parts, not divided yet; and [G]: the own pair's score, the highest, and the divisor.
    """
    product = tl.sum(q[0].to(tl.float32) * key[0], 1)
    if sizes.keys.high > 0:
        product += tl.sum(q[1].to(tl.float32) * key[1], 1)
    own = logits(product, scale, softcap)
    top = own
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        top = tl.maximum(own, sink)
    total = tl.exp2(own - top)
    answer = (total[:, None] * value[0], total[:, None] * value[1])
    if sinks is not None:
        total += tl.exp2(sink - top)
    return answer, own, top, total


@triton.jit
def _attend(
    q, answer, top, total, keys, key_scales, values, value_scales, positions, scratch, valid, row, begin, end,
    position, width, scale,
    softcap: tl.constexpr, order: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    """A token's query heads q [G, D] attend to the rows ``begin`` .. ``end`` but the one that it takes.

    The softmax goes on from what it is. Vectors are in two parts.

    Returns:
        The answer [G, E], not divided yet; and [G]: the highest score, and the divisor.
    """
    block: tl.constexpr = sizes.block
    key: tl.constexpr = sizes.keys
    value: tl.constexpr = sizes.values
    g = tl.arange(0, sizes.group_full)
    sums = tl.sum(q[0].to(tl.float32), 1)
    if key.high > 0:
        sums += tl.sum(q[1].to(tl.float32), 1)
    for start in range(begin, end, block):
        c = start + tl.arange(0, block)
        read = (c < end) & (c != row)  # the row it takes may be written by now
        scores = logits(_dot_keys(q, keys, key_scales, c, read, sums, key), scale, softcap)  # [G, block]
        seen = read
        if order.window is not None:
            seen = read & (tl.load(positions + c, mask=read, other=0) > position - order.window)
        scores = tl.where(seen[None, :], scores, -INFINITY)
        if scratch is not None:
            tl.store(scratch + g[:, None] * width + c[None, :], scores, mask=valid[:, None] & read[None, :])
        higher = tl.maximum(top, tl.max(scores, 1))
        fade = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * fade + tl.sum(weights, 1)
        answer = add_values(answer, weights, fade, values, value_scales, c, read, q[0].dtype, value)
        top = higher
    return answer, top, total


@triton.jit(do_not_specialize_on_alignment=["slots", "token_positions", "row_limits"])
def _decode(
    output, partial, query, key, value, rows, first, capacity, slots, token_positions, row_limits, sinks, scratch,
    width, scale, decay, softcap: tl.constexpr, order: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    """One kv head of one decoding token: it takes a row, attends to the slot, and its attention is added up.

    With partial results, it attends to every n-th split, of n programs, and ``combine`` does what is left.
    """
    group: tl.constexpr = sizes.group
    key_parts: tl.constexpr = sizes.keys
    value_parts: tl.constexpr = sizes.values
    token, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kv_heads, parts = tl.num_programs(1), tl.num_programs(2)
    slot = tl.load(slots + token)
    g, one = tl.arange(0, sizes.group_full), tl.arange(0, 1)
    valid = g < group
    first_head = (token * kv_heads + head) * group  # this program's first query head of all tokens
    if slot < 0:
        if partial is None:
            store_nothing(output, first_head, 0, 1, group, value_parts)
        return
    begin, limit, position = rows_of_head(first, capacity, token_positions, row_limits, token, slot, head)
    used = tl.minimum(position, limit)  # rows of earlier tokens, the victim's among them
    length, splits = split_of(used, sizes)
    if part > 0 and part >= splits:
        return
    keys, key_scales = rows.key + begin * key_parts.width, scales_of_head(rows.key_scales, begin, key_parts)
    values, value_scales = rows.value + begin * value_parts.width, scales_of_head(rows.value_scales, begin, value_parts)
    positions = rows.positions + begin
    mass = None if rows.mass is None else rows.mass + begin
    row = _row_taken(rows, begin, limit, position, order, sizes.search)

    heads = head * group + g
    q = load(query.data + token * query.token, heads * query.head, valid, key_parts, True)
    own_key = load(key.data + token * key.token + head * key.head, one, one == 0, key_parts, True)
    own_value = load(value.data + token * value.token + head * value.head, one, one == 0, value_parts, True)
    tl.debug_barrier()  # every thread has finished the search
    stores = one == part
    own_key = store_encoded(keys, key_scales, row + one, stores, own_key[0], own_key[1], key_parts)
    own_value = store_encoded(values, value_scales, row + one, stores, own_value[0], own_value[1], value_parts)
    if scratch is not None:
        scratch += first_head * width
    answer, own, top, total = _own(q, own_key, own_value, sinks, heads, valid, scale, softcap, sizes)

    if partial is None:
        tl.store(positions + row, position)
        if rows.ranks is not None:
            tl.store(rows.ranks + begin + row, INFINITY)
        answer, top, total = _attend(
            q, answer, top, total, keys, key_scales, values, value_scales, positions, scratch, valid, row, 0, used,
            position, width, scale, softcap, order, sizes,
        )  # fmt: skip
        low, high = answer[0] / total[:, None], answer[1] / total[:, None]
        store(output + first_head * value_parts.whole, g * value_parts.whole, valid, low, high, value_parts)
        add_attention(mass, scratch, valid, row, used, width, own, top, total, decay, order, sizes)
    else:  # other programs may still search the rows' positions, mass and ranks
        if part == 0:
            store_partial(partial, first_head, 0, g, valid, answer, top, total, value_parts)
            store_own(partial, first_head + g, valid, own, token * kv_heads + head, row)
        for split in range(part, splits, parts):
            start, end = split * length, tl.minimum(split * length + length, used)
            answer, top, total = nothing(answer, top)
            answer, top, total = _attend(
                q, answer, top, total, keys, key_scales, values, value_scales, positions, scratch, valid, row, start,
                end, position, width, scale, softcap, order, sizes,
            )  # fmt: skip
            store_partial(partial, first_head, 1 + split, g, valid, answer, top, total, value_parts)


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
    """See ``contract.KernelModule.decode_step``; nothing waits for the device, and it declines shared rows."""
    if shared is not None or not reads(rows):
        return False
    batch, heads, dim = query.shape
    if not batch:
        return True
    group, width = heads // rows.kv_heads, _round_up(rows.largest, 16)
    scored = accumulate and rows.mass is not None
    scratch = torch.empty(batch, heads, width, dtype=torch.float32, device=query.device) if scored else None
    sizes, launch = _decode_launch(group, dim, value.shape[-1], key.element_size(), *rows.formats, SPLITS)
    splits, partial, parts = sizes.splits.most(rows.largest), None, 1
    if splits > 1:
        partial = partial_results(batch, heads, rows.kv_heads, splits, value.shape[-1], query.device)
        parts = programs(batch * rows.kv_heads, splits, query.device)
    grid, of_slots = (batch, rows.kv_heads, parts), (slot_rows(rows), rows.first, rows.capacity)
    numbers = (slots, positions, row_limits)
    _decode[grid](
        output, partial, packed(query), packed(key), packed(value), *of_slots, *numbers, sinks, scratch, width, scale,
        decay, softcap, order, sizes, **launch,
    )  # fmt: skip
    if partial is not None:
        combine[grid](output, partial, *of_slots, *numbers, scratch, width, decay, order, sizes, num_warps=4)
    return True


@cache
def _decode_launch(
    group: int,
    dim: int,
    value_dim: int,
    itemsize: int,
    key_format: str,
    value_format: str,
    splits: Splits,
) -> tuple[DecodeSizes, dict[str, int]]:
    """Sizes that the decoding kernel is compiled for, and its warps and stages."""
    group_full = max(16, triton.next_power_of_2(group))
    keys, values = in_one_part(dim, key_format), in_one_part(value_dim, value_format)
    vector_bytes = max(keys.low + keys.high, values.low + values.high) * itemsize  # decoded
    wide = group_full >= 64
    sizes = DecodeSizes(
        group=group,
        group_full=group_full,
        keys=keys,
        values=values,
        block=16 if INTERPRETED else min(max(16384 // vector_bytes, 16), 32 if wide else 64),
        search=32 if INTERPRETED else 1024,
        count=32 if INTERPRETED else 4096 // group_full,
        splits=splits,
    )
    return sizes, {"num_warps": 8 if wide else 4, "num_stages": 2 if wide else 3}


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


TYPES = {
    **dict.fromkeys(("query", "key", "value"), BF16_TOKENS),
    **dict.fromkeys(("output", "sinks"), "*bf16"),
    **dict.fromkeys(("first", "capacity"), "*i64"),
    **dict.fromkeys(("slots", "token_positions", "row_limits"), "*i64:8"),
    "partial": PARTIAL,
    "scratch": "*fp32",
    "width": "i32:16",
    "scale": "fp32",
    "decay": "fp32",
}


def compiled_for(dim: int, value_dim: int, shared: int) -> list[Variant]:  # noqa: ARG001
    """The launches of bfloat16 models with keys and values of these sizes."""
    far = EvictionOrder(by="average", sink=4, recent=64, window=None, distance=64, power=2)
    age = EvictionOrder(by="age", sink=0, recent=0, window=None)
    mass = EvictionOrder(by="mass", sink=4, recent=64, window=4096)
    rank_ = EvictionOrder(by="rank", sink=4, recent=64, window=None)
    models: list[
        tuple[int, EvictionOrder, float | None, bool, bool, tuple[str, str]]
    ] = [  # G, order, softcap, sinks, whether slots are split, formats
        (4, far, None, False, False, (MODEL, MODEL)),
        (4, far, None, False, True, (MODEL, MODEL)),
        (1, age, None, False, True, (MODEL, MODEL)),
        (8, mass, 50.0, True, True, (MODEL, MODEL)),
        (71, far, None, False, False, (MODEL, MODEL)),
        (71, far, None, False, True, (MODEL, MODEL)),
        (4, far, None, False, False, ("int8", "int4")),
        (4, far, None, False, True, ("int8", "int4")),
        (4, rank_, None, False, True, ("int8", "int4")),
        (4, far, None, False, True, ("fp8", "fp8")),
        (71, far, None, False, False, ("int4", "int4")),
    ]
    variants = []
    for group, order, softcap, sinks, split, formats in models:
        if group > 64 and max(dim, value_dim) > 128:
            continue  # no model has so many query heads of this size for one of keys
        sizes, launch = _decode_launch(group, dim, value_dim, 2, *formats, SPLITS)
        constants: dict[str, Any] = {"order": order, "sizes": sizes}
        constants |= {} if order is not age else {"scratch": None}
        types = TYPES | {"rows": stored_rows(*formats, mass=order is not age, ranks=order is rank_)}
        decoding = constants | {"softcap": softcap} | ({} if sinks else {"sinks": None})
        variants.append(variant(_decode, types, decoding | ({} if split else {"partial": None}), launch))
        if split:
            variants.append(variant(combine, types, constants, {"num_warps": 4, "num_stages": 3}))
    return variants
