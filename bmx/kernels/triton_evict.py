"""Triton kernels for what follows a prompt chunk's attention: who stays, and where.

Each program chooses for one kv head of one chunk; others then move what stays. What changes from step to step, but for
sizes, is read from the device.

Shapes: N chunks, T packed tokens of a step, K kv heads, C rows of a head in one slot, D key dim, E value dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.slot_views import Chunks, Rows
from bmx.kernels.triton_decode import TYPES, order_constants, rank

MOST = 8192  # rows of a head, and tokens of a chunk, that one program can choose from
LEAST_BLOCK = 64  # tokens: shorter chunks are no kernel of their own
NOTHING = tl.constexpr(-(2**31))  # less than what ``_sortable`` makes of any score


@triton.jit
def _sortable(scores):
    """Numbers int32 in the same order as scores float32, zeros of both signs alike."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _as_many(old, new, least):
    """How many of two vectors' numbers are not less than this."""
    return tl.sum((old >= least).to(tl.int32), 0) + tl.sum((new >= least).to(tl.int32), 0)


@triton.jit
def _threshold(old, new, wanted):
    """The greatest number that at least so many of two vectors' numbers are not less than, bit by bit."""
    least = tl.where(_as_many(old, new, 0) >= wanted, 0, NOTHING)
    for bit in range(31):
        higher = least | (1 << (30 - bit))
        least = tl.where(_as_many(old, new, higher) >= wanted, higher, least)
    return least


@triton.jit(do_not_specialize=["packed", "chunks", "longest"])
def _choose(
    lists, counts, positions, mass, sums, first, capacity, table, packed, chunks, longest,
    by: tl.constexpr, sink: tl.constexpr, recent: tl.constexpr, window: tl.constexpr,
    block_rows: tl.constexpr, block_tokens: tl.constexpr,
):  # fmt: skip
    """One kv head of one chunk: which of its tokens stay, and the rows that they take, both in ascending order.

    lists [2, N, K, longest] int32: rows, then tokens; counts [N, K] int32, how many they are.
    """
    head, n = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(0)
    begin = tl.load(table + n)
    tokens = tl.load(table + chunks + n).to(tl.int32)
    slot = tl.load(table + 2 * chunks + n)
    start = tl.load(table + 3 * chunks + n).to(tl.int32)
    rows = tl.load(capacity + slot)
    limit = tl.minimum(tl.load(table + 4 * chunks + n), rows).to(tl.int32)
    place = tl.load(first + slot) + head * rows
    used = tl.minimum(start, limit)
    mine = n.to(tl.int64) * kv_heads + head
    taken = lists + mine * longest
    staying = taken + chunks.to(tl.int64) * kv_heads * longest
    c, i = tl.arange(0, block_rows), tl.arange(0, block_tokens)
    if used + tokens <= limit:
        tl.store(taken + i, used + i, mask=i < tokens)
        tl.store(staying + i, i, mask=i < tokens)
        tl.store(counts + mine, tokens)
        return

    position = tl.load(positions + place + c, mask=c < used, other=-1)
    received = tl.zeros([block_rows], tl.float32)
    if by != "age" and mass is not None:
        received = tl.load(mass + place + c, mask=c < used, other=0.0)
    old = _sortable(rank(position, received, start + tokens, by, sink, recent, window))
    old = tl.where(c < used, old, NOTHING)
    received = tl.zeros([block_tokens], tl.float32)
    if by != "age" and sums is not None:
        received = tl.load(sums + head.to(tl.int64) * packed + begin + i, mask=i < tokens, other=0.0)
    new = _sortable(rank(start + i, received, start + tokens, by, sink, recent, window))
    new = tl.where(i < tokens, new, NOTHING)

    least = _threshold(old, new, limit)
    alike = limit - _as_many(old, new, least + 1)  # so many of those at the threshold stay: the first
    same = (old == least).to(tl.int32)
    stays = (old > least) | ((old == least) & (tl.cumsum(same, 0) <= alike))
    free = (c < limit) & (stays == 0)
    tl.store(taken + tl.cumsum(free.to(tl.int32), 0) - 1, c, mask=free)
    alike -= tl.sum(same, 0)
    same = (new == least).to(tl.int32)
    stays = (new > least) | ((new == least) & (tl.cumsum(same, 0) <= alike))
    tl.store(staying + tl.cumsum(stays.to(tl.int32), 0) - 1, i, mask=stays)
    tl.store(counts + mine, tl.sum(stays.to(tl.int32), 0))


@triton.jit(do_not_specialize=["packed", "chunks", "longest"])
def _move(
    lists, counts, key, value, keys, values, positions, mass, sums, first, capacity, table, key_row, key_head,
    value_row, value_head, packed, chunks, longest,
    dim: tl.constexpr, value_dim: tl.constexpr, dim_full: tl.constexpr, value_dim_full: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """One kv head of some survivors of one chunk: they go where ``_choose`` said; without that, behind the others."""
    head, n = tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    j = tl.program_id(0) * block + tl.arange(0, block)
    begin = tl.load(table + n)
    slot = tl.load(table + 2 * chunks + n)
    start = tl.load(table + 3 * chunks + n)
    rows = tl.load(capacity + slot)
    place = tl.load(first + slot) + head * rows
    if lists is None:
        some = j < tl.load(table + chunks + n)
        row, token = start + j, j
    else:
        mine = n.to(tl.int64) * kv_heads + head
        some = j < tl.load(counts + mine)
        row = tl.load(lists + mine * longest + j, mask=some, other=0)
        token = tl.load(lists + (chunks.to(tl.int64) * kv_heads + mine) * longest + j, mask=some, other=0)
    source, to = begin + token, place + row  # int64
    d, e = tl.arange(0, dim_full), tl.arange(0, value_dim_full)
    there = some[:, None] & (d < dim)[None, :]
    k = tl.load(key + source[:, None] * key_row + head * key_head + d[None, :], mask=there)
    tl.store(keys + to[:, None] * dim + d[None, :], k, mask=there)
    there = some[:, None] & (e < value_dim)[None, :]
    v = tl.load(value + source[:, None] * value_row + head * value_head + e[None, :], mask=there)
    tl.store(values + to[:, None] * value_dim + e[None, :], v, mask=there)
    tl.store(positions + to, (start + token).to(tl.int32), mask=some)
    if mass is not None:
        received = tl.zeros([block], tl.float32)
        if sums is not None:
            received = tl.load(sums + head.to(tl.int64) * packed + source, mask=some, other=0.0)
        tl.store(mass + to, received, mask=some)


def evict(key: Tensor, value: Tensor, rows: Rows, chunks: Chunks, sums: Tensor | None, *, order: EvictionOrder) -> bool:
    """See ``reference.evict``; declines when there are too many rows or tokens to choose from."""
    if not chunks.lengths:
        return True
    if not fits(rows, chunks):
        return False
    longest, count, kv_heads, packed = max(chunks.lengths), len(chunks.lengths), rows.kv_heads, key.shape[0]
    sums = sums if rows.mass is not None else None
    lists = counts = None
    if _evicts(rows, chunks):
        lists = torch.empty(2, count, kv_heads, longest, dtype=torch.int32, device=key.device)
        counts = torch.empty(count, kv_heads, dtype=torch.int32, device=key.device)
        constants, launch = _choice_launch(rows.largest, longest)
        _choose[(kv_heads, count)](
            lists, counts, rows.positions, rows.mass, sums, rows.first, rows.capacity, chunks.table,
            packed, count, longest, **order_constants(order), **constants, **launch,
        )  # fmt: skip
    constants, launch = _move_launch(key.shape[-1], value.shape[-1])
    _move[(triton.cdiv(longest, constants["block"]), kv_heads, count)](
        lists, counts, key, value, rows.keys, rows.values, rows.positions, rows.mass, sums,
        rows.first, rows.capacity, chunks.table,
        *key.stride()[:2], *value.stride()[:2], packed, count, longest, **constants, **launch,
    )  # fmt: skip
    return True


def fits(rows: Rows, chunks: Chunks) -> bool:
    """Whether no chunk evicts in this step, or a program can hold what it chooses from."""
    return max(rows.largest, *chunks.lengths) <= MOST or not _evicts(rows, chunks)


def _evicts(rows: Rows, chunks: Chunks) -> bool:
    """Whether any chunk evicts in this step."""
    each = zip(chunks.starts, chunks.lengths, chunks.row_limits, chunks.slots, strict=True)
    return any(start + tokens > min(limit, rows.capacities[slot]) for start, tokens, limit, slot in each)


def _choice_launch(largest: int, longest: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of the choosing kernel, and how it is launched."""
    blocks = {
        "block_rows": triton.next_power_of_2(largest),
        "block_tokens": max(LEAST_BLOCK, triton.next_power_of_2(longest)),
    }
    return blocks, {"num_warps": min(max(max(blocks.values()) // 256, 4), 16), "num_stages": 1}


def _move_launch(dim: int, value_dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of the moving kernel, and how it is launched."""
    full = {"dim_full": triton.next_power_of_2(dim), "value_dim_full": triton.next_power_of_2(value_dim)}
    return {"dim": dim, "value_dim": value_dim, **full, "block": max(2048 // max(full.values()), 8)}, {
        "num_warps": 4,
        "num_stages": 1,
    }


def compiled_for(head_dim: int) -> list[tuple[Any, dict[str, str], dict[str, Any], int, int]]:
    """What runs for bfloat16 heads of so many numbers: kernel, types, constants, warps and stages of each variant."""
    average = order_constants(EvictionOrder(by="average", sink=4, recent=64, window=None))
    age = order_constants(EvictionOrder(by="age", sink=0, recent=0, window=512))
    variants: list[tuple[Any, dict[str, Any], dict[str, int]]] = []
    for largest, longest, ranking in ((512, 512, age), (2048, 1024, average), (8192, 4096, average)):
        fixed, launch = _choice_launch(largest, longest)
        missing = {"mass": None, "sums": None} if ranking is age else {}
        variants.append((_choose, {**ranking, **fixed, **missing}, launch))
    for missing in ({}, {"mass": None, "sums": None}, {"lists": None, "counts": None}):
        fixed, launch = _move_launch(head_dim, head_dim)
        variants.append((_move, {**fixed, **missing}, launch))
    return [
        (
            kernel,
            {name: "constexpr" if name in fixed else TYPES.get(name, "*bf16") for name in kernel.arg_names},
            fixed,
            launch["num_warps"],
            launch["num_stages"],
        )
        for kernel, fixed, launch in variants
    ]
