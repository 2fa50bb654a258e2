"""Triton kernels of eviction after a prompt chunk's attention: which pairs stay, and in which rows.

A program of ``_choose`` chooses for one kv head of one chunk; programs of ``_move`` then write what stays. What changes
from step to step, but for sizes, is read from the device.

Shapes: N chunks, T packed tokens of a step, K kv heads, C rows of a head in one slot, D key dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels.formats import MODEL
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.slot_views import Chunks, Rows
from bmx.kernels.triton_decode import rank
from bmx.kernels.triton_operands import BF16_TOKENS, Variant, packed, reads, slot_rows, stored_rows, variant
from bmx.kernels.triton_vectors import Parts, in_one_part, load, store_encoded

MOST_ROWS, MOST_TOKENS = 16384, 8192  # of a head and of a chunk that one program can choose from, held in registers
BLOCKS = (64, 512, 2048, MOST_TOKENS)  # tokens of a chunk, at most, for which there is a kernel
NOTHING = tl.constexpr(-(2**31))  # below ``_sortable`` of any score


@dataclass(frozen=True)
class ChoiceSizes:
    """Powers of two that hold the rows of a head and the tokens of a chunk."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class MoveSizes:
    """How keys and values are stored, and how many survivors a program moves."""

    keys: Parts
    values: Parts
    block: int


@triton.jit
def _sortable(scores):
    """int32 numbers in the order of float32 scores; zeros of both signs are equal."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _count_from(old, new, least):
    """How many numbers of two vectors are not less than ``least``."""
    return tl.sum((old >= least).to(tl.int32), 0) + tl.sum((new >= least).to(tl.int32), 0)


@triton.jit
def _threshold(old, new, wanted):
    """The ``wanted``-th largest number of two int32 vectors together, by binary search over bits."""
    least = tl.where(_count_from(old, new, 0) >= wanted, 0, NOTHING)
    for bit in range(31):
        higher = least | (1 << (30 - bit))
        least = tl.where(_count_from(old, new, higher) >= wanted, higher, least)
    return least


@triton.jit(do_not_specialize=["packed_tokens", "chunks", "longest"])
def _choose(
    lists, counts, positions, mass, sums, first, capacity, table, packed_tokens, chunks, longest,
    order: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    """One kv head of one chunk: which of its tokens stay, and the rows that they take, both in ascending order.

    lists [2, N, K, longest] int32: rows, then tokens; counts [N, K] int32: how many.
    """
    block_rows: tl.constexpr = sizes.rows
    block_tokens: tl.constexpr = sizes.tokens
    head, n = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(0)
    offset = tl.load(table + n)
    tokens = tl.load(table + chunks + n).to(tl.int32)
    slot = tl.load(table + 2 * chunks + n)
    start = tl.load(table + 3 * chunks + n).to(tl.int32)
    row_count = tl.load(capacity + slot * kv_heads + head)
    limit = tl.minimum(tl.load(table + 4 * chunks + n), row_count).to(tl.int32)
    begin = tl.load(first + slot * kv_heads + head)
    used = tl.minimum(start, limit)
    entry = n.to(tl.int64) * kv_heads + head
    taken = lists + entry * longest
    staying = taken + chunks.to(tl.int64) * kv_heads * longest
    c, i = tl.arange(0, block_rows), tl.arange(0, block_tokens)
    if used + tokens <= limit:
        tl.store(taken + i, used + i, mask=i < tokens)
        tl.store(staying + i, i, mask=i < tokens)
        tl.store(counts + entry, tokens)
        return

    position = tl.load(positions + begin + c, mask=c < used, other=-1)
    received = tl.zeros([block_rows], tl.float32)
    if order.by != "age" and mass is not None:
        received = tl.load(mass + begin + c, mask=c < used, other=0.0)
    old = _sortable(rank(position, received, start + tokens, order))
    old = tl.where(c < used, old, NOTHING)
    received = tl.zeros([block_tokens], tl.float32)
    if order.by != "age" and sums is not None:
        received = tl.load(sums + head.to(tl.int64) * packed_tokens + offset + i, mask=i < tokens, other=0.0)
    new = _sortable(rank(start + i, received, start + tokens, order))
    new = tl.where(i < tokens, new, NOTHING)

    least = _threshold(old, new, limit)
    ties = limit - _count_from(old, new, least + 1)  # pairs at the threshold that stay: the first ones
    same = (old == least).to(tl.int32)
    stays = (old > least) | ((old == least) & (tl.cumsum(same, 0) <= ties))
    free = (c < limit) & (stays == 0)
    tl.store(taken + tl.cumsum(free.to(tl.int32), 0) - 1, c, mask=free)
    ties -= tl.sum(same, 0)
    same = (new == least).to(tl.int32)
    stays = (new > least) | ((new == least) & (tl.cumsum(same, 0) <= ties))
    tl.store(staying + tl.cumsum(stays.to(tl.int32), 0) - 1, i, mask=stays)
    tl.store(counts + entry, tl.sum(stays.to(tl.int32), 0))


@triton.jit(do_not_specialize=["packed_tokens", "chunks", "longest"])
def _move(
    lists, counts, key, value, rows, sums, ranks, first, table, packed_tokens, chunks, longest, sizes: tl.constexpr,
):  # fmt: skip
    """One kv head of some survivors of one chunk: they go where ``_choose`` said; without lists, all are appended."""
    key_parts: tl.constexpr = sizes.keys
    value_parts: tl.constexpr = sizes.values
    block: tl.constexpr = sizes.block
    head, n = tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    j = tl.program_id(0) * block + tl.arange(0, block)
    offset = tl.load(table + n)
    slot = tl.load(table + 2 * chunks + n)
    start = tl.load(table + 3 * chunks + n)
    begin = tl.load(first + slot * kv_heads + head)
    if lists is None:
        valid = j < tl.load(table + chunks + n)
        row, token = start + j, j
    else:
        entry = n.to(tl.int64) * kv_heads + head
        valid = j < tl.load(counts + entry)
        row = tl.load(lists + entry * longest + j, mask=valid, other=0)
        token = tl.load(lists + (chunks.to(tl.int64) * kv_heads + entry) * longest + j, mask=valid, other=0)
    source, target = offset + token, begin + row  # int64
    low, high = load(key.data + head * key.head, source * key.token, valid, key_parts, True)
    store_encoded(rows.key, rows.key_scales, target, valid, low, high, key_parts)
    low, high = load(value.data + head * value.head, source * value.token, valid, value_parts, True)
    store_encoded(rows.value, rows.value_scales, target, valid, low, high, value_parts)
    tl.store(rows.positions + target, (start + token).to(tl.int32), mask=valid)
    if rows.mass is not None:
        received = tl.zeros([block], tl.float32)
        if sums is not None:
            received = tl.load(sums + head.to(tl.int64) * packed_tokens + source, mask=valid, other=0.0)
        tl.store(rows.mass + target, received, mask=valid)
    if rows.ranks is not None:
        rank_of = tl.full([block], float("inf"), tl.float32)
        if ranks is not None:
            rank_of = tl.load(ranks + head.to(tl.int64) * packed_tokens + source, mask=valid, other=0.0)
        tl.store(rows.ranks + target, rank_of, mask=valid)


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
    """See ``reference_eviction.evict``; declines when there are too many rows or tokens to choose from."""
    if not chunks.lengths:
        return True
    if not reads(rows) or not fits(rows, chunks):
        return False
    longest, count, kv_heads, tokens = max(chunks.lengths), len(chunks.lengths), rows.kv_heads, key.shape[0]
    sums = sums if rows.mass is not None else None
    lists = counts = None
    if _evicts(rows, chunks):
        lists = torch.empty(2, count, kv_heads, longest, dtype=torch.int32, device=key.device)
        counts = torch.empty(count, kv_heads, dtype=torch.int32, device=key.device)
        choice, launch = _choice_launch(rows.largest, longest)
        known = (rows.ranks, ranks) if order.by == "rank" else (rows.mass, sums)
        _choose[(kv_heads, count)](
            lists, counts, rows.positions, *known, rows.first, rows.capacity, chunks.table,
            tokens, count, longest, order, choice, **launch,
        )  # fmt: skip
    move, launch = _move_launch(key.shape[-1], value.shape[-1], *rows.formats)
    _move[(triton.cdiv(longest, move.block), kv_heads, count)](
        lists, counts, packed(key), packed(value), slot_rows(rows), sums, ranks, rows.first, chunks.table,
        tokens, count, longest, move, **launch,
    )  # fmt: skip
    return True


def fits(rows: Rows, chunks: Chunks) -> bool:
    """Whether no chunk evicts in this step, or a program can hold what it chooses from."""
    few = rows.largest <= MOST_ROWS and max(chunks.lengths, default=0) <= MOST_TOKENS
    return few or not _evicts(rows, chunks)


def _evicts(rows: Rows, chunks: Chunks) -> bool:
    """Whether any chunk evicts in this step."""
    each = zip(chunks.starts, chunks.lengths, chunks.row_limits, chunks.slots, strict=True)
    return any(start + tokens > min(limit, *rows.capacities[slot]) for start, tokens, limit, slot in each)


def _choice_launch(largest: int, longest: int) -> tuple[ChoiceSizes, dict[str, int]]:
    """Sizes that the choosing kernel is compiled for, and its warps and stages."""
    sizes = ChoiceSizes(triton.next_power_of_2(largest), next(block for block in BLOCKS if block >= longest))
    return sizes, {"num_warps": min(max(max(sizes.rows, sizes.tokens) // 256, 4), 16), "num_stages": 1}


@cache
def _move_launch(
    dim: int, value_dim: int, key_format: str = MODEL, value_format: str = MODEL
) -> tuple[MoveSizes, dict[str, int]]:
    """Sizes that the moving kernel is compiled for, and its warps and stages."""
    keys, values = in_one_part(dim, key_format), in_one_part(value_dim, value_format)
    largest = max(keys.low + keys.high, values.low + values.high)
    return MoveSizes(keys, values, max(2048 // largest, 8)), {"num_warps": 4, "num_stages": 1}


TYPES = {
    **dict.fromkeys(("key", "value"), BF16_TOKENS),
    **dict.fromkeys(("lists", "counts", "positions"), "*i32"),
    **dict.fromkeys(("first", "capacity", "table"), "*i64"),
    **dict.fromkeys(("mass", "sums", "ranks"), "*fp32"),
    **dict.fromkeys(("packed_tokens", "chunks", "longest"), "i32"),
}


def compiled_for(dim: int, value_dim: int, shared: int) -> list[Variant]:  # noqa: ARG001
    """The launches of bfloat16 models with keys and values of these sizes, by the shared memory of a block."""
    average = EvictionOrder(by="average", sink=4, recent=64, window=None)
    age = EvictionOrder(by="age", sink=0, recent=0, window=512)
    variants = []
    ranked = EvictionOrder(by="rank", sink=4, recent=64, window=None)
    sizes = ((512, 512, age), (2048, 1024, average), (2048, 1024, ranked), (8192, 4096, average))
    for largest, longest, order in sizes:
        choice, launch = _choice_launch(largest, longest)
        missing: dict[str, Any] = {"mass": None, "sums": None} if order is age else {}
        variants.append(variant(_choose, TYPES, {"order": order, "sizes": choice, **missing}, launch))
    plain, unevicted = (MODEL, MODEL), {"lists": None, "counts": None, "ranks": None}
    for formats, stats, missing in (
        *((plain, "mass", {"ranks": None}), (plain, "", {"sums": None, "ranks": None})),
        *((plain, "mass", unevicted), (("int8", "int4"), "mass, ranks", {})),
        (("int4", "int8"), "ranks", unevicted | {"sums": None}),
        (("fp8", "fp8"), "mass", {"ranks": None}),
    ):
        move, launch = _move_launch(dim, value_dim, *formats)
        types = TYPES | {"rows": stored_rows(*formats, mass="mass" in stats, ranks="ranks" in stats)}
        variants.append(variant(_move, types, {"sizes": move, **missing}, launch))
    return variants
