"""Triton kernels that store and read slots whose keys are scaled by channel: archives, and the full cache in few bits.

Keys are decoded group by group in registers: a
group of ``KEY_GROUP`` rows has one scale and one offset per channel, which are loaded once for all of them.

Shapes: H query heads, K kv heads, G = H / K, N = ``KEY_GROUP`` rows of a group, D key dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels.formats import KEY_GROUP, MODEL
from bmx.kernels.slot_views import ChannelRows
from bmx.kernels.triton_operands import BF16_TOKENS, packed
from bmx.kernels.triton_splits import (
    INTERPRETED,
    PARTIAL,
    SPLITS,
    Splits,
)
from bmx.kernels.triton_vectors import (
    FORMATS,
    Parts,
    _load,
    _rounded,
    _scale,
    in_one_part,
    load,
    load_decoded,
    scales_of_head,
    store,
    store_encoded,
)

INFINITY = tl.constexpr(float("inf"))
N = tl.constexpr(KEY_GROUP)
MOST = tl.constexpr(65504.0)
CHANNEL_SPLITS = Splits(64, 32) if INTERPRETED else SPLITS  # whole groups of keys


@dataclass(frozen=True)
class ChannelSizes:
    """Sizes that the kernels are compiled for.

    Attributes:
        group: G.
        group_full: a power of two that holds it.
        keys: how keys are stored, by channel.
        values: how values are stored.
        splits: how the coded rows of a slot are split.
    """

    group: int
    group_full: int
    keys: Parts
    values: Parts
    splits: Splits


class ChannelMemory(NamedTuple):
    """``ChannelRows`` as kernels take them. Triton's tuples have ``values`` already."""

    codes: Any
    scales: Any
    value: Any
    value_scales: Any
    exact_key: Any
    exact_value: Any
    exact_row: Any


def channel_memory(rows: ChannelRows) -> ChannelMemory:
    """All that kernels take of a layer's slots."""
    exact = rows.exact_keys, rows.exact_values, rows.exact_rows
    return ChannelMemory(rows.codes, rows.scales, rows.values.numbers, rows.values.scales, *exact)


def takes(rows: ChannelRows) -> bool:
    """Whether the kernels know the formats of these rows."""
    return rows.key_format in ("int8", "int4") and rows.values.format in FORMATS


@triton.jit
def _of_channels(scales, begin: tl.constexpr, size: tl.constexpr, stop: tl.constexpr):
    """Scale and offset [size] of the channels from ``begin`` on; zeros behind ``stop``."""
    columns = begin + tl.arange(0, size)
    scale = tl.load(scales + columns * 2, mask=columns < stop, other=0.0).to(tl.float32)
    return scale, tl.load(scales + columns * 2 + 1, mask=columns < stop, other=0.0).to(tl.float32)


@triton.jit
def decoded_keys(codes, scales, valid, parts: tl.constexpr, dtype: tl.constexpr):
    """Keys [N, D] of a group, in two parts; zeros where not valid."""
    n = tl.arange(0, N)
    scale, offset = _of_channels(scales, 0, parts.low, parts.split)
    if parts.format == "int4":
        levels = _load(codes, n * parts.width, valid, 0, parts.low, parts.split, True)
        low = ((levels & 15).to(tl.float32) * scale[None, :] + offset[None, :]).to(dtype)
        scale, offset = _of_channels(scales, parts.split, parts.high, parts.whole)
        high = ((levels >> 4).to(tl.float32) * scale[None, :] + offset[None, :]).to(dtype)
    else:
        levels = _load(codes, n * parts.width, valid, 0, parts.low, parts.split, True)
        low = (levels.to(tl.float32) * scale[None, :] + offset[None, :]).to(dtype)
        high = low
    return low, high


@triton.jit
def _encoded_part(x, scales, begin: tl.constexpr, size: tl.constexpr, stop: tl.constexpr, highest: tl.constexpr):
    """The levels of a part of a group's keys [N, size]; writes their channels' scales and offsets."""
    columns = begin + tl.arange(0, size)
    x = x.to(tl.float32)
    least = tl.min(x, 0)
    scale = _scale(tl.max(x, 0) - least, highest)
    offset = tl.minimum(tl.maximum(least, -MOST), MOST).to(tl.float16)
    tl.store(scales + columns * 2, scale, mask=columns < stop)
    tl.store(scales + columns * 2 + 1, offset, mask=columns < stop)
    level = tl.div_rn(x - offset.to(tl.float32)[None, :], scale.to(tl.float32)[None, :])
    return _rounded(tl.minimum(tl.maximum(level, 0.0), highest)).to(tl.int32)


@triton.jit
def store_group(codes, scales, low, high, parts: tl.constexpr):
    """Encode and write a group of keys [N, D] in two parts."""
    n, columns = tl.arange(0, N), tl.arange(0, parts.low)
    if parts.format == "int4":
        levels = _encoded_part(low, scales, 0, parts.low, parts.split, 15.0)
        levels |= _encoded_part(high, scales, parts.split, parts.high, parts.whole, 15.0) << 4
    else:
        levels = _encoded_part(low, scales, 0, parts.low, parts.split, 255.0)
    at = codes + n[:, None] * parts.width + columns[None, :]
    tl.store(at, levels.to(tl.uint8), mask=(n[:, None] >= 0) & (columns < parts.split)[None, :])


@triton.jit(do_not_specialize=["slot", "start", "stop"], do_not_specialize_on_alignment=["first", "first_group"])
def append_groups(key, value, rows, first, first_group, slot, start, stop, sizes: tl.constexpr):
    """One kv head of a chunk, and one group of the slot's rows: values are stored, and keys if the group is whole."""
    key_parts: tl.constexpr = sizes.keys
    value_parts: tl.constexpr = sizes.values
    head, n = tl.program_id(0), tl.arange(0, N)
    of_head = slot.to(tl.int64) * tl.num_programs(0) + head
    group = start // N + tl.program_id(1)
    row = group * N + n
    new, token = (row >= start) & (row < stop), (row - start).to(tl.int64)
    begin, begin_group = tl.load(first + of_head), tl.load(first_group + of_head) + group
    values, value_scales = rows.value + begin * value_parts.width, scales_of_head(rows.value_scales, begin, value_parts)
    low, high = load(value.data + head * value.head, token * value.token, new, value_parts, True)
    store_encoded(values, value_scales, row, new, low, high, value_parts)
    if group * N + N <= stop:
        own_low, own_high = load(key.data + head * key.head, token * key.token, new, key_parts, True)
        held = rows.exact_key + of_head * N * key_parts.whole
        held_low, held_high = load(held, n * key_parts.whole, row < start, key_parts, True)
        key_low, key_high = tl.where(new[:, None], own_low, held_low), tl.where(new[:, None], own_high, held_high)
        codes, scales = rows.codes + begin_group * N * key_parts.width, rows.scales + begin_group * 2 * key_parts.whole
        store_group(codes, scales, key_low, key_high, key_parts)


@triton.jit(do_not_specialize=["slot", "start", "stop"])
def append_exact(key, value, rows, slot, start, stop, sizes: tl.constexpr):
    """One kv head of a chunk: its newest pairs are held exactly."""
    key_parts: tl.constexpr = sizes.keys
    value_parts: tl.constexpr = sizes.values
    head, row = tl.program_id(0), stop - N + tl.arange(0, N)
    exact = (slot.to(tl.int64) * tl.num_programs(0) + head) * N
    new, token, entry = row >= start, (row - start).to(tl.int64), (row + N) % N
    low, high = load(key.data + head * key.head, token * key.token, new, key_parts, True)
    store(rows.exact_key + exact * key_parts.whole, entry * key_parts.whole, new, low, high, key_parts)
    low, high = load(value.data + head * value.head, token * value.token, new, value_parts, True)
    store(rows.exact_value + exact * value_parts.whole, entry * value_parts.whole, new, low, high, value_parts)
    tl.store(rows.exact_row + exact + entry, row, mask=new)


def append_by_channel(key: Tensor, value: Tensor, rows: ChannelRows, slot: int, start: int) -> bool:
    """See ``contract.KernelModule.append_by_channel``."""
    if not takes(rows):
        return False
    (tokens, kv_heads, dim), stop = key.shape, start + len(key)
    sizes, _ = launch_of(1, dim, value.shape[-1], *rows.formats, CHANNEL_SPLITS)
    memory, tokens_of = channel_memory(rows), (packed(key), packed(value))
    groups = (stop - 1) // KEY_GROUP + 1 - start // KEY_GROUP
    append_groups[kv_heads, groups](*tokens_of, memory, rows.first, rows.first_group, slot, start, stop, sizes)
    append_exact[kv_heads,](*tokens_of, memory, slot, start, stop, sizes)
    return bool(tokens)


@triton.jit(do_not_specialize=["slot", "count"], do_not_specialize_on_alignment=["first", "first_group"])
def read_groups(keys, values, rows, first, first_group, slot, count, sizes: tl.constexpr):
    """One kv head of a slot, and one group of its first ``count`` rows, those that are in use: decoded, or exact."""
    key_parts: tl.constexpr = sizes.keys
    value_parts: tl.constexpr = sizes.values
    head, group, n = tl.program_id(0), tl.program_id(1), tl.arange(0, N)
    of_head = slot.to(tl.int64) * tl.num_programs(0) + head
    row = group * N + n
    coded, exact = row < count - N, (row >= count - N) & (row < count)
    begin, begin_group = tl.load(first + of_head), tl.load(first_group + of_head) + group
    codes, scales = rows.codes + begin_group * N * key_parts.width, rows.scales + begin_group * 2 * key_parts.whole
    dtype: tl.constexpr = keys.dtype.element_ty
    at = head.to(tl.int64) * count + row
    low, high = decoded_keys(codes, scales, coded, key_parts, dtype)
    held = rows.exact_key + of_head * N * key_parts.whole
    held_low, held_high = load(held, n * key_parts.whole, exact, key_parts, True)
    low, high = tl.where(coded[:, None], low, held_low), tl.where(coded[:, None], high, held_high)
    store(keys, at * key_parts.whole, row < count, low, high, key_parts)
    stored, value_scales = rows.value + begin * value_parts.width, scales_of_head(rows.value_scales, begin, value_parts)
    low, high = load_decoded(stored, value_scales, row, value_parts.width, coded, value_parts, True, dtype)
    held = rows.exact_value + of_head * N * value_parts.whole
    held_low, held_high = load(held, n * value_parts.whole, exact, value_parts, True)
    low, high = tl.where(coded[:, None], low, held_low), tl.where(coded[:, None], high, held_high)
    store(values, at * value_parts.whole, row < count, low, high, value_parts)


def read_by_channel(rows: ChannelRows, slot: int, count: int) -> tuple[Tensor, Tensor] | None:
    """See ``contract.KernelModule.read_by_channel``."""
    if not takes(rows):
        return None
    exact, kv_heads = (rows.exact_keys, rows.exact_values), rows.exact_keys.shape[1]
    keys, values = (vectors.new_empty(kv_heads, count, vectors.shape[-1]) for vectors in exact)
    sizes, _ = launch_of(1, keys.shape[-1], values.shape[-1], *rows.formats, CHANNEL_SPLITS)
    if count:
        grid = (kv_heads, triton.cdiv(count, KEY_GROUP))
        read_groups[grid](keys, values, channel_memory(rows), rows.first, rows.first_group, slot, count, sizes)
    return keys, values


@cache
def launch_of(
    group: int, dim: int, value_dim: int, key_format: str, value_format: str, splits: Splits
) -> tuple[ChannelSizes, dict[str, int]]:
    """Sizes that the kernels are compiled for, and warps and stages of decoding."""
    group_full = max(16, triton.next_power_of_2(group))
    keys, values = in_one_part(dim, key_format), in_one_part(value_dim, value_format)
    launch = {"num_warps": 8 if group_full >= 64 else 4, "num_stages": 3}
    return ChannelSizes(group, group_full, keys, values, splits), launch


def argument_types(value_format: str) -> dict[str, Any]:
    """Types of the arguments of bfloat16 models."""
    value = ("*bf16", None) if value_format == MODEL else ("*u8", "*fp16")
    return {
        **dict.fromkeys(("query", "key", "value"), BF16_TOKENS),
        **dict.fromkeys(("output", "sinks", "keys", "values"), "*bf16"),
        **dict.fromkeys(("first", "first_group"), "*i64"),
        **dict.fromkeys(("slots", "token_positions"), "*i64:8"),
        **dict.fromkeys(("slot", "start", "stop", "count"), "i32"),
        "rows": ChannelMemory("*u8", "*fp16", value[0], value[1], "*bf16", "*bf16", "*i32"),
        "partial": PARTIAL,
        "scale": "fp32",
    }
