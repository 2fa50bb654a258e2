"""What is left when a decoding token's programs have read its slot: one answer of all splits, and the attention mass.

Shapes: G query heads of a kv head.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from bmx.kernels.triton_splits import LOWEST, Splits, combined_softmax, split_of, store_combined, store_nothing
from bmx.kernels.triton_vectors import Parts

INFINITY = tl.constexpr(float("inf"))


@dataclass(frozen=True)
class DecodeSizes:
    """Sizes that the decoding kernel is compiled for.

    Attributes:
        group: G.
        group_full: a power of two that holds it.
        keys: how keys are stored.
        values: how values are stored.
        block: rows that are attended to at once.
        search: rows that are compared at once.
        count: rows whose attention is added up at once.
        splits: how the rows of a slot are split.
    """

    group: int
    group_full: int
    keys: Parts
    values: Parts
    block: int
    search: int
    count: int
    splits: Splits


@triton.jit
def accumulate_rows(
    mass, scratch, valid, row, begin, end, width, top, total, decay, order: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    """Add the mean of the query heads' probabilities, raised to the power, to the mass of rows but the token's own."""
    group: tl.constexpr = sizes.group
    block: tl.constexpr = sizes.count
    g, shared = tl.arange(0, valid.shape[0]), tl.log2(total)
    for start in range(begin, end, block):
        c = start + tl.arange(0, block)
        read = (c < end) & (c != row)
        at = scratch + g[:, None] * width + c[None, :]
        scores = tl.load(at, mask=valid[:, None] & read[None, :], other=-INFINITY)
        seen = tl.sum(tl.exp2((scores - top[:, None] - shared[:, None]) * order.power), 0) / group
        before = tl.load(mass + c, mask=read, other=0.0)
        tl.store(mass + c, before * decay + seen, mask=read)


@triton.jit
def own_mass(valid, own, top, total, order: tl.constexpr, sizes: tl.constexpr):
    """The mass of the token's own pair: the mean of its query heads' probabilities, raised to the power."""
    seen = tl.exp2((own - top - tl.log2(total)) * order.power)
    return tl.sum(tl.where(valid, seen, 0.0), 0) / sizes.group


@triton.jit
def add_attention(
    mass, scratch, valid, row, used, width, own, top, total, decay, order: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    """Add a token's attention to the mass of all rows in use, where there is a mass, and scores are kept."""
    if scratch is not None:
        tl.debug_barrier()  # other threads wrote what is read here
        accumulate_rows(mass, scratch, valid, row, 0, used, width, top, total, decay, order, sizes)
        tl.store(mass + row, own_mass(valid, own, top, total, order, sizes))
    elif mass is not None:
        tl.store(mass + row, 0.0)


@triton.jit
def rows_of_head(first, capacity, token_positions, row_limits, token, slot, head):
    """The first row of a kv head of a slot, how many rows of it the token's sequence may use, and its position."""
    at = slot * tl.num_programs(1) + head
    limit = tl.minimum(tl.load(row_limits + token), tl.load(capacity + at)).to(tl.int32)
    return tl.load(first + at), limit, tl.load(token_positions + token).to(tl.int32)


@triton.jit(do_not_specialize_on_alignment=["slots", "token_positions", "row_limits"])
def combine(
    output, partial, rows, first, capacity, slots, token_positions, row_limits, scratch, width, decay,
    order: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    """One kv head of one decoding token: its splits become one answer, and its attention is added up."""
    group: tl.constexpr = sizes.group
    value_parts: tl.constexpr = sizes.values
    token, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kv_heads, parts = tl.num_programs(1), tl.num_programs(2)
    slot = tl.load(slots + token)
    first_head = (token * kv_heads + head) * group
    if slot < 0:
        store_nothing(output, first_head, part, parts, group, value_parts)
        return
    begin, limit, position = rows_of_head(first, capacity, token_positions, row_limits, token, slot, head)
    used = tl.minimum(position, limit)
    length, splits = split_of(used, sizes)
    row = tl.load(partial.row + token * kv_heads + head)
    if part == 0:
        tl.store(rows.positions + begin + row, position)
        if rows.ranks is not None:
            tl.store(rows.ranks + begin + row, float("inf"))
    if scratch is not None:
        g = tl.arange(0, sizes.group_full)
        valid = g < group
        top, total = combined_softmax(partial, first_head, 1 + splits, g, valid)
        total = tl.where(valid, total, 1.0)
        mass = rows.mass + begin
        for split in range(part, splits, parts):
            start = split * length
            accumulate_rows(
                mass, scratch + first_head * width, valid, row, start, tl.minimum(start + length, used), width, top,
                total, decay, order, sizes,
            )  # fmt: skip
        if part == 0:
            own = tl.load(partial.own + first_head + g, mask=valid, other=LOWEST)
            tl.store(mass + row, own_mass(valid, own, top, total, order, sizes))
    elif rows.mass is not None and part == 0:
        tl.store(rows.mass + begin + row, 0.0)
    for h in range(part, group, parts):
        store_combined(output, partial, first_head + h, 1 + splits, value_parts)
