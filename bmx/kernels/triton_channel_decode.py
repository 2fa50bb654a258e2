"""The Triton kernel of a decoding step on slots whose keys are scaled by channel.

A program has a kv head of one token, or some splits of it. Rows that are read as codes are older than those that a step
writes, so programs of a slot do not wait for each other: the newest pairs, the token's own among them, are read exactly
by the first of them.

Shapes: H query heads, K kv heads, G = H / K, N = ``KEY_GROUP`` rows of a group, D key dim, E value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels.formats import MODEL
from bmx.kernels.slot_views import ChannelRows
from bmx.kernels.triton_channels import (
    CHANNEL_SPLITS,
    N,
    append_exact,
    append_groups,
    argument_types,
    channel_memory,
    decoded_keys,
    launch_of,
    read_groups,
    store_group,
    takes,
)
from bmx.kernels.triton_decode import add_values
from bmx.kernels.triton_operands import Variant, packed, variant
from bmx.kernels.triton_splits import (
    LOG2_E,
    LOWEST,
    logits,
    partial_results,
    programs,
    split_of,
    store_combined,
    store_nothing,
    store_partial,
)
from bmx.kernels.triton_vectors import load, scales_of_head, store, store_encoded

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _store_token(rows, key, value, values, value_scales, exact, token, head, position, sizes: tl.constexpr):
    """Store a token's pair: the value as it is stored, and both exactly; ``exact`` is the head's first exact row."""
    key_parts: tl.constexpr = sizes.keys
    value_parts: tl.constexpr = sizes.values
    one = tl.arange(0, 1)
    key_low, key_high = load(key.data + token * key.token + head * key.head, one, one == 0, key_parts, True)
    low, high = load(value.data + token * value.token + head * value.head, one, one == 0, value_parts, True)
    store_encoded(values, value_scales, position + one, one == 0, low, high, value_parts)
    entry = exact + position % N
    store(rows.exact_key + entry * key_parts.whole, one, one == 0, key_low, key_high, key_parts)
    store(rows.exact_value + entry * value_parts.whole, one, one == 0, low, high, value_parts)
    tl.store(rows.exact_row + entry, position)
    tl.debug_barrier()  # other threads read what is written here


@triton.jit
def _attend_exact(
    q, rows, codes, scales, exact, sinks, heads, valid, position, scale, softcap: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    """Queries [G, D] attend to the newest pairs, the token's own among them, and to sinks.

    If the token's key is the last of its group, the group is encoded.

    Returns:
        The answer [G, E] in two parts, not divided yet; and [G]: the highest score, and the divisor.
    """
    key_parts: tl.constexpr = sizes.keys
    value_parts: tl.constexpr = sizes.values
    n = tl.arange(0, N)
    read = n <= position
    low, high = load(rows.exact_key + exact * key_parts.whole, n * key_parts.whole, read, key_parts, True)
    if position % N == N - 1:
        group = (position // N).to(tl.int64)
        store_group(codes + group * N * key_parts.width, scales + group * 2 * key_parts.whole, low, high, key_parts)
    products = tl.dot(q[0], tl.trans(low), input_precision="ieee")
    if key_parts.high > 0:
        products = tl.dot(q[1], tl.trans(high), products, input_precision="ieee")
    scores = tl.where(read[None, :], logits(products, scale, softcap), -INFINITY)
    top = tl.max(scores, 1)
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
    weights = tl.exp2(scores - top[:, None])
    total = tl.sum(weights, 1)
    if sinks is not None:
        total += tl.exp2(sink - top)
    low, high = load(rows.exact_value + exact * value_parts.whole, n * value_parts.whole, read, value_parts, True)
    answer = tl.dot(weights.to(low.dtype), low, input_precision="ieee")
    answer_high = answer
    if value_parts.high > 0:
        answer_high = tl.dot(weights.to(low.dtype), high, input_precision="ieee")
    return (answer, answer_high), top, total


@triton.jit
def _attend_coded(
    q, answer, top, total, codes, scales, values, value_scales, begin, end, scale,
    softcap: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    """Queries [G, D] attend to the rows ``begin`` (the first of a group) .. ``end``; the softmax goes on."""
    key_parts: tl.constexpr = sizes.keys
    value_parts: tl.constexpr = sizes.values
    for start in range(begin, end, N):
        c = start + tl.arange(0, N)
        read, group = c < end, start // N
        of_group = codes + group * N * key_parts.width, scales + group * 2 * key_parts.whole
        low, high = decoded_keys(of_group[0], of_group[1], read, key_parts, q[0].dtype)
        products = tl.dot(q[0], tl.trans(low), input_precision="ieee")
        if key_parts.high > 0:
            products = tl.dot(q[1], tl.trans(high), products, input_precision="ieee")
        scores = tl.where(read[None, :], logits(products, scale, softcap), -INFINITY)
        higher = tl.maximum(top, tl.max(scores, 1))
        fade = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * fade + tl.sum(weights, 1)
        answer = add_values(answer, weights, fade, values, value_scales, c, read, q[0].dtype, value_parts)
        top = higher
    return answer, top, total


@triton.jit(do_not_specialize_on_alignment=["slots", "token_positions"])
def _decode(
    output, partial, query, key, value, rows, first, first_group, slots, token_positions, sinks, scale,
    softcap: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    """One kv head of one decoding token: its pair is stored, and it attends to the slot, or to every n-th split."""
    group: tl.constexpr = sizes.group
    group_full: tl.constexpr = sizes.group_full
    key_parts: tl.constexpr = sizes.keys
    value_parts: tl.constexpr = sizes.values
    low_size: tl.constexpr = value_parts.low
    high_size: tl.constexpr = value_parts.high if value_parts.high > 0 else value_parts.low
    token, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kv_heads, parts = tl.num_programs(1), tl.num_programs(2)
    slot = tl.load(slots + token)
    first_head = (token * kv_heads + head) * group  # this program's first query head of all tokens
    if slot < 0:
        if partial is None:
            store_nothing(output, first_head, 0, 1, group, value_parts)
        return
    position = tl.load(token_positions + token).to(tl.int32)
    coded = tl.maximum(position + 1 - N, 0)  # rows that are read as codes
    length, splits = split_of(coded, sizes)
    if part > 0 and part >= splits:
        return
    of_head = slot * kv_heads + head
    exact, begin, begin_group = of_head * N, tl.load(first + of_head), tl.load(first_group + of_head)
    codes, scales = rows.codes + begin_group * N * key_parts.width, rows.scales + begin_group * 2 * key_parts.whole
    values, value_scales = rows.value + begin * value_parts.width, scales_of_head(rows.value_scales, begin, value_parts)
    g = tl.arange(0, group_full)
    valid, heads = g < group, head * group + g
    q = load(query.data + token * query.token, heads * query.head, valid, key_parts, True)
    if part == 0:
        _store_token(rows, key, value, values, value_scales, exact, token, head, position, sizes)
    if partial is None:
        answer, top, total = _attend_exact(
            q, rows, codes, scales, exact, sinks, heads, valid, position, scale, softcap, sizes
        )
        answer, top, total = _attend_coded(
            q, answer, top, total, codes, scales, values, value_scales, 0, coded, scale, softcap, sizes
        )
        low, high = answer[0] / total[:, None], answer[1] / total[:, None]
        store(output + first_head * value_parts.whole, g * value_parts.whole, valid, low, high, value_parts)
    else:
        if part == 0:
            newest, newest_top, newest_total = _attend_exact(
                q, rows, codes, scales, exact, sinks, heads, valid, position, scale, softcap, sizes
            )
            store_partial(partial, first_head, 0, g, valid, newest, newest_top, newest_total, value_parts)
        for split in range(part, splits, parts):
            start, end = split * length, tl.minimum(split * length + length, coded)
            none = tl.zeros([group_full], tl.float32)
            zeros = tl.zeros([group_full, low_size], tl.float32), tl.zeros([group_full, high_size], tl.float32)
            answer, top, total = _attend_coded(
                q, zeros, none + LOWEST, none, codes, scales, values, value_scales, start, end, scale, softcap, sizes
            )
            store_partial(partial, first_head, 1 + split, g, valid, answer, top, total, value_parts)


@triton.jit(do_not_specialize_on_alignment=["slots", "token_positions"])
def _combine(output, partial, slots, token_positions, sizes: tl.constexpr):
    """One kv head of one decoding token: its splits become one answer."""
    group: tl.constexpr = sizes.group
    value_parts: tl.constexpr = sizes.values
    token, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    parts, first_head = tl.num_programs(2), (token * tl.num_programs(1) + head) * group
    if tl.load(slots + token) < 0:
        store_nothing(output, first_head, part, parts, group, value_parts)
        return
    coded = tl.maximum(tl.load(token_positions + token).to(tl.int32) + 1 - N, 0)
    _, splits = split_of(coded, sizes)
    for h in range(part, group, parts):
        store_combined(output, partial, first_head + h, 1 + splits, value_parts)


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
    """See ``contract.KernelModule.decode_by_channel``; nothing waits for the device."""
    if not takes(rows):
        return False
    (batch, heads, dim), (_, kv_heads, value_dim) = query.shape, value.shape
    if not batch:
        return True
    sizes, launch = launch_of(heads // kv_heads, dim, value_dim, *rows.formats, CHANNEL_SPLITS)
    splits, partial, parts = CHANNEL_SPLITS.most(rows.largest), None, 1
    if splits > 1:
        partial = partial_results(batch, heads, kv_heads, splits, value_dim, query.device)
        parts = programs(batch * kv_heads, splits, query.device)
    grid = (batch, kv_heads, parts)
    _decode[grid](
        output, partial, packed(query), packed(key), packed(value), channel_memory(rows), rows.first, rows.first_group,
        slots, positions, sinks, scale, softcap, sizes, **launch,
    )  # fmt: skip
    if partial is not None:
        _combine[grid](output, partial, slots, positions, sizes, num_warps=4)
    return True


def compiled_for(dim: int, value_dim: int, shared: int) -> list[Variant]:  # noqa: ARG001
    """The launches of bfloat16 models with keys and values of these sizes."""
    variants = []
    plain = {"num_warps": 4, "num_stages": 3}
    for group, softcap, sinks, split, formats in [
        (4, None, False, True, ("int4", "int4")),
        (4, None, False, False, ("int8", "int4")),
        (8, 50.0, True, True, ("int8", "fp8")),
        (1, None, False, True, ("int4", MODEL)),
    ]:
        sizes, launch = launch_of(group, dim, value_dim, *formats, CHANNEL_SPLITS)
        types, constants = argument_types(formats[1]), {"sizes": sizes}
        decoding = {"softcap": softcap} | ({} if sinks else {"sinks": None}) | ({} if split else {"partial": None})
        variants.append(variant(_decode, types, constants | decoding, launch))
        kernels = [append_groups, append_exact, read_groups, *([_combine] if split else [])]
        variants += [variant(kernel, types, constants, plain) for kernel in kernels]
    return variants
