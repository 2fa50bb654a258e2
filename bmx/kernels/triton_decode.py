"""The Triton kernel of a decoding step: a token takes a row of its slot, attends to it, and what it saw is added up.

Each program has one kv head of one token to itself, so that nothing is added up in an order that chance decides, and no
number depends on its company. What changes from step to step is read from the device: a step can be a CUDA graph.

Shapes: B decoding rows, H query heads, K kv heads, G = H / K, C rows of a head in one slot, D key dim, E value dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.registry import interpreted
from bmx.kernels.slot_views import Rows

INTERPRETED = interpreted()
LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
TYPES = {  # of the kernels' arguments, but for vectors; what follows a colon divides the number
    **dict.fromkeys(("positions", "lists", "counts"), "*i32"),
    **dict.fromkeys(("first", "capacity", "table"), "*i64"),
    **dict.fromkeys(("slots", "now", "limits"), "*i64:8"),
    **dict.fromkeys(("mass", "sums", "scratch"), "*fp32"),
    **dict.fromkeys(("query_row", "query_head", "key_row", "key_head", "value_row", "value_head", "width"), "i32:16"),
    **dict.fromkeys(("packed", "chunks", "longest"), "i32"),
    **dict.fromkeys(("scale", "old"), "fp32"),
}


@triton.jit
def rank(position, received, now, by: tl.constexpr, sink: tl.constexpr, recent: tl.constexpr, window: tl.constexpr):
    """Scores of pairs: see ``CompressionPolicy.protected``; what is no number goes first."""
    score = received
    if by == "age":
        score = position.to(tl.float32)
    if by == "average":
        age = tl.maximum(now - position, 1)  # that of what is older than a window does not matter
        score = tl.div_rn(received, age.to(tl.float32))
    score = tl.where((position < sink) | (position >= now - recent), INFINITY, score)
    gone = (position < 0) | (score != score)  # noqa: PLR0124 - NaN
    if window > 0:
        gone = gone | (position <= now - window)
    return tl.where(gone, -INFINITY, score)


@triton.jit
def _victim(
    positions, mass, limit, now,
    by: tl.constexpr, sink: tl.constexpr, recent: tl.constexpr, window: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The lowest-ranked of a full slot's rows, the first of equals."""
    least = tl.full([block], INFINITY, tl.float32)
    where = tl.arange(0, block)
    for start in range(0, limit, block):
        c = start + tl.arange(0, block)
        position = tl.load(positions + c, mask=c < limit, other=0)
        received = tl.zeros([block], tl.float32)
        if by != "age" and mass is not None:
            received = tl.load(mass + c, mask=c < limit, other=0.0)
        score = rank(position, received, now, by, sink, recent, window)
        lower = (score < least) & (c < limit)
        least = tl.where(lower, score, least)
        where = tl.where(lower, c, where)
    return tl.min(tl.where(least == tl.min(least, 0), where, limit), 0)


@triton.jit
def _logits(products, scale, softcap: tl.constexpr):
    """Scaled and capped scores, in powers of two."""
    if softcap is None:
        logits = products * (scale * LOG2_E)
    else:
        x = products * (scale / softcap)
        t = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
        tanh = (1 - t) / (1 + t)
        logits = tl.where(x < 0, -tanh, tanh) * (softcap * LOG2_E)
    return logits


@triton.jit
def _attend(
    q, own_key, own_value, keys, values, positions, sinks, scratch, heads, real, row, used, at, width, scale,
    softcap: tl.constexpr, window: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    dim_full: tl.constexpr, value_dim_full: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A token's query heads q [G, D] attend to its own pair, then to the rows in use but the one that it takes.

    The softmax begins with the own pair, so that its maximum is a number from the start.

    Returns:
        The answer [G, E], not divided yet; and [G]: the score of the own pair, the highest one, and the divisor.
    """
    d, e = tl.arange(0, dim_full), tl.arange(0, value_dim_full)
    g = tl.arange(0, q.shape[0])
    own = _logits(tl.sum(q.to(tl.float32) * own_key.to(tl.float32)[None, :], 1), scale, softcap)
    top = own
    if sinks is not None:
        extra = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * LOG2_E
        top = tl.maximum(own, extra)
    total = tl.exp2(own - top)
    answer = total[:, None] * own_value.to(tl.float32)[None, :]
    if sinks is not None:
        total += tl.exp2(extra - top)
    for start in range(0, used, block):
        c = start + tl.arange(0, block)
        read = (c < used) & (c != row)  # the row it takes may be written by now
        k = tl.load(keys + c[:, None] * dim + d[None, :], mask=read[:, None] & (d < dim)[None, :], other=0.0)
        scores = _logits(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap)  # [G, block]
        shown = read
        if window > 0:
            shown = read & (tl.load(positions + c, mask=read, other=0) > at - window)
        scores = tl.where(shown[None, :], scores, -INFINITY)
        if scratch is not None:
            tl.store(scratch + g[:, None] * width + c[None, :], scores, mask=real[:, None] & read[None, :])
        higher = tl.maximum(top, tl.max(scores, 1))
        fade = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(
            values + c[:, None] * value_dim + e[None, :], mask=read[:, None] & (e < value_dim)[None, :], other=0.0
        )
        answer = tl.dot(weights.to(v.dtype), v, answer * fade[:, None], input_precision="ieee")
        top = higher
    return answer, own, top, total


@triton.jit
def _count(
    mass, scratch, real, row, used, width, own, top, total, old,
    group: tl.constexpr, group_full: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Add to the mass of all rows in use what the token's query heads saw of them, on average."""
    g, over = tl.arange(0, group_full), 1.0 / total
    tl.debug_barrier()  # other threads wrote what is read here
    for start in range(0, used, block):
        c = start + tl.arange(0, block)
        read = (c < used) & (c != row)
        scores = tl.load(scratch + g[:, None] * width + c[None, :], mask=real[:, None] & read[None, :], other=-INFINITY)
        seen = tl.sum(tl.exp2(scores - top[:, None]) * over[:, None], 0) / group
        before = tl.load(mass + c, mask=read, other=0.0)
        tl.store(mass + c, before * old + seen, mask=read)
    tl.store(mass + row, tl.sum(tl.where(real, tl.exp2(own - top) * over, 0.0), 0) / group)


@triton.jit(do_not_specialize_on_alignment=["slots", "now", "limits"])
def _decode(
    output, query, key, value, keys, values, positions, mass, first, capacity, slots, now, limits, sinks, scratch,
    query_row, query_head, key_row, key_head, value_row, value_head, width, scale, old,
    softcap: tl.constexpr, by: tl.constexpr, sink: tl.constexpr, recent: tl.constexpr, window: tl.constexpr,
    group: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr, group_full: tl.constexpr, dim_full: tl.constexpr,
    value_dim_full: tl.constexpr, block: tl.constexpr, block_search: tl.constexpr, block_count: tl.constexpr,
):  # fmt: skip
    """One kv head of one decoding row: its token takes a row, attends to the slot, and what it saw is added up."""
    one, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    slot = tl.load(slots + one)
    g, d, e = tl.arange(0, group_full), tl.arange(0, dim_full), tl.arange(0, value_dim_full)
    mine = (one * kv_heads + head) * group  # this program's first query head of all
    out = output + mine * value_dim + g[:, None] * value_dim + e[None, :]
    asked = (g < group)[:, None] & (e < value_dim)[None, :]
    if slot < 0:
        tl.store(out, tl.zeros([group_full, value_dim_full], output.dtype.element_ty), mask=asked)
        return
    rows = tl.load(capacity + slot)
    place = tl.load(first + slot) + head * rows
    limit = tl.minimum(tl.load(limits + one), rows).to(tl.int32)
    at = tl.load(now + one).to(tl.int32)
    keys += place * dim
    values += place * value_dim
    positions += place
    if mass is not None:
        mass += place
    row = at
    if at >= limit:
        row = _victim(positions, mass, limit, at, by, sink, recent, window, block_search)
    used = tl.minimum(at, limit)  # rows of earlier tokens, the victim's among them

    heads = head * group + g
    q = tl.load(
        query + one * query_row + heads[:, None] * query_head + d[None, :],
        mask=(g < group)[:, None] & (d < dim)[None, :],
        other=0.0,
    )
    own_key = tl.load(key + one * key_row + head * key_head + d, mask=d < dim, other=0.0)
    own_value = tl.load(value + one * value_row + head * value_head + e, mask=e < value_dim, other=0.0)
    tl.debug_barrier()  # the search has read all that it reads
    tl.store(keys + row * dim + d, own_key, mask=d < dim)
    tl.store(values + row * value_dim + e, own_value, mask=e < value_dim)
    tl.store(positions + row, at)

    if scratch is not None:
        scratch += mine * width
    answer, own, top, total = _attend(
        q, own_key, own_value, keys, values, positions, sinks, scratch, heads, g < group, row, used, at, width, scale,
        softcap, window, dim, value_dim, dim_full, value_dim_full, block,
    )  # fmt: skip
    tl.store(out, (answer / total[:, None]).to(output.dtype.element_ty), mask=asked)
    if scratch is not None:
        _count(mass, scratch, g < group, row, used, width, own, top, total, old, group, group_full, block_count)
    elif mass is not None:
        tl.store(mass + row, 0.0)


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
    """See ``contract.KernelModule.decode_step``; declines nothing, and nothing waits for the device."""
    batch, heads, dim = query.shape
    if not batch:
        return True
    group, width = heads // rows.kv_heads, _round_up(rows.largest, 16)
    scored = accumulate and rows.mass is not None
    scratch = torch.empty(batch, heads, width, dtype=torch.float32, device=query.device) if scored else None
    constants, launch = _decode_launch(group, dim, value.shape[-1], key.element_size())
    _decode[(batch, rows.kv_heads)](
        output, query, key, value, rows.keys, rows.values, rows.positions, rows.mass, rows.first, rows.capacity,
        slots, positions, row_limits, sinks, scratch,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], width, scale, decay,
        softcap=softcap, **order_constants(order), **constants, **launch,
    )  # fmt: skip
    return True


def _decode_launch(group: int, dim: int, value_dim: int, itemsize: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of the decoding kernel, and how it is launched."""
    full = {
        "group_full": max(16, triton.next_power_of_2(group)),
        "dim_full": max(16, triton.next_power_of_2(dim)),
        "value_dim_full": max(16, triton.next_power_of_2(value_dim)),
    }
    vector = max(full["dim_full"], full["value_dim_full"]) * itemsize
    many = full["group_full"] >= 64
    blocks = {
        "block": 16 if INTERPRETED else min(max(16384 // vector, 16), 32 if many else 64),
        "block_search": 32 if INTERPRETED else 1024,
        "block_count": 32 if INTERPRETED else 4096 // full["group_full"],
    }
    manner = {"num_warps": 8 if many else 4, "num_stages": 2 if many else 3}
    return {"group": group, "dim": dim, "value_dim": value_dim, **full, **blocks}, manner


def order_constants(order: EvictionOrder) -> dict[str, Any]:
    """An eviction order as constants of a kernel."""
    return {"by": order.by, "sink": order.sink, "recent": order.recent, "window": order.window or 0}


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def compiled_for(head_dim: int) -> list[tuple[Any, dict[str, str], dict[str, Any], int, int]]:
    """What runs for bfloat16 heads of so many numbers: kernel, types, constants, warps and stages of each variant."""
    average = EvictionOrder(by="average", sink=4, recent=64, window=None)
    manners: list[tuple[int, EvictionOrder, float | None, bool, bool]] = [  # G, ranking, softcap, sinks, mass
        (4, average, None, False, True),
        (1, EvictionOrder(by="age", sink=0, recent=0, window=None), None, False, False),
        (8, EvictionOrder(by="mass", sink=4, recent=64, window=4096), 50.0, True, True),
        (71, average, None, False, True),
    ]
    variants = []
    for group, ranking, softcap, sinks, counted in manners:
        fixed, launch = _decode_launch(group, head_dim, head_dim, 2)
        constants = {"softcap": softcap, **order_constants(ranking), **fixed}
        constants |= {} if sinks else {"sinks": None}
        constants |= {} if counted else {"mass": None, "scratch": None}
        types = {name: "constexpr" if name in constants else TYPES.get(name, "*bf16") for name in _decode.arg_names}
        variants.append((_decode, types, constants, launch["num_warps"], launch["num_stages"]))
    return variants
