"""Decoding in splits: programs attend to consecutive rows of a slot side by side, and a second kernel combines them.

Flash-decoding (Dao et al. 2023, pytorch.org/blog/flash-decoding), for slots so long and so few that a program for each
kv head leaves multiprocessors idle. How rows are split depends on how many the slot has in use and on nothing else, and
splits are combined in their order, however many programs shared them: a token's answer does not depend on its company.

What it gives and costs, by arithmetic, for 8 slots x 8 kv heads x 8,192 rows of bfloat16 heads of 128 numbers (268 MB)
on 132 multiprocessors with 4.3 TB/s and a latency of 1 us, so that 4.3 MB must be on the way at any time: a program
waits for two tiles of 32 KB while it computes the third. One program a head: 64 x 64 KB = 4.2 MB, from half of the
multiprocessors. Splits of 512 rows are 1,024, shared by 7 programs a head: 448 x 64 KB = 29 MB, from all of them. A
split's result is 4 x 130 float32 (2 KB), written and read, for 256 KB of pairs: 1.6 %, and one more launch.

Shapes: B decoding tokens, H query heads, K kv heads, G = H / K, S splits of a slot at most, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from bmx.kernels.registry import interpreted
from bmx.kernels.triton_vectors import load, store
from bmx.kernels.workspace import SPLIT, UNSPLIT

INTERPRETED = interpreted()
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below every score: the maximum of none
TOGETHER = tl.constexpr(16)  # splits that are combined at once
PROGRAMS = 3  # that a multiprocessor runs at once


@dataclass(frozen=True)
class Splits:
    """How the rows of a slot that are in use are split.

    Attributes:
        whole: as many rows are one split.
        rows: of a split, where more are in use.
    """

    whole: int
    rows: int

    def most(self, rows: int) -> int:
        """Splits of a slot with so many rows (S)."""
        return 1 if rows <= self.whole else -(-rows // self.rows)


SPLITS = Splits(64, 16) if INTERPRETED else Splits(UNSPLIT, SPLIT)


class Partial(NamedTuple):
    """What the softmax over each part gave, in powers of two: of the own pair and the sinks, then of each split.

    Attributes:
        answer: [B, H, 1 + S, E] float32, values weighted with probabilities that are not divided yet.
        top: [B, H, 1 + S] float32, the highest score.
        total: [B, H, 1 + S] float32, the divisor.
        own: [B, H] float32, the score of the token's own pair.
        row: [B, K] int32, the row that the token takes.
        stride: 1 + S.
    """

    answer: Any
    top: Any
    total: Any
    own: Any
    row: Any
    stride: Any


PARTIAL = Partial("*fp32", "*fp32", "*fp32", "*fp32", "*i32", "i32")


def partial_results(
    batch: int, heads: int, kv_heads: int, splits: int, value_dim: int, device: torch.device
) -> Partial:
    """Room for the results of so many splits (S)."""
    shape, numbers = (batch, heads, 1 + splits), dict[str, Any](dtype=torch.float32, device=device)
    return Partial(
        torch.empty(*shape, value_dim, **numbers),
        torch.empty(shape, **numbers),
        torch.empty(shape, **numbers),
        torch.empty(batch, heads, **numbers),
        torch.empty(batch, kv_heads, dtype=torch.int32, device=device),
        1 + splits,
    )


def programs(heads: int, splits: int, device: torch.device) -> int:
    """Programs that share the splits of one kv head, where so many heads of all tokens decode together."""
    return min(splits, -(-PROGRAMS * multiprocessors(device) // heads))


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; in the interpreter, of one that is small."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


@triton.jit
def split_of(used, sizes: tl.constexpr):
    """The rows of a split, and the number of splits, where so many rows are in use."""
    rows = tl.where(used <= sizes.splits.whole, sizes.splits.whole, sizes.splits.rows)
    return rows, tl.cdiv(used, rows)


@triton.jit
def logits(products, scale, softcap: tl.constexpr):
    """Scaled and capped scores, in powers of two."""
    if softcap is None:
        scores = products * (scale * LOG2_E)
    else:
        x = products * (scale / softcap)
        t = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
        tanh = (1 - t) / (1 + t)
        scores = tl.where(x < 0, -tanh, tanh) * (softcap * LOG2_E)
    return scores


@triton.jit
def nothing(answer, top):
    """The softmax of no row: an answer of two parts, the highest score, and the divisor."""
    zeros = tl.zeros_like(top)
    return (tl.zeros_like(answer[0]), tl.zeros_like(answer[1])), zeros + LOWEST, zeros


@triton.jit
def store_partial(partial, first_head, part, g, valid, answer, top, total, parts: tl.constexpr):
    """Write a part's result: of the query heads ``first_head`` + g of all tokens."""
    at = first_head * partial.stride + part
    offsets = g * partial.stride
    store(partial.answer + at * parts.whole, offsets * parts.whole, valid, answer[0], answer[1], parts)
    tl.store(partial.top + at + offsets, top, mask=valid)
    tl.store(partial.total + at + offsets, total, mask=valid)


@triton.jit
def store_own(partial, heads, valid, own, kv_head, row):
    """Write the scores of a token's own pair, and the row that it takes in a kv head of all tokens."""
    tl.store(partial.own + heads, own, mask=valid)
    tl.store(partial.row + kv_head, row)


@triton.jit
def _parts(partial, at, count, begin, valid):
    """Highest scores and divisors [N, TOGETHER] of the parts from ``begin`` on; at [N] is a head's first one."""
    s = begin + tl.arange(0, TOGETHER)
    read = valid[:, None] & (s < count)[None, :]
    tops = tl.load(partial.top + at[:, None] + s[None, :], mask=read, other=LOWEST)
    return tops, tl.load(partial.total + at[:, None] + s[None, :], mask=read, other=0.0)


@triton.jit
def combined_softmax(partial, first_head, count, g, valid):
    """The highest score and the divisor [N] of all parts, of the query heads ``first_head`` + g of all tokens."""
    at = first_head * partial.stride + g * partial.stride
    top, total = tl.full(g.shape, LOWEST, tl.float32), tl.zeros(g.shape, tl.float32)
    for begin in range(0, count, TOGETHER):
        tops, totals = _parts(partial, at, count, begin, valid)
        higher = tl.maximum(top, tl.max(tops, 1))
        total = total * tl.exp2(top - higher) + tl.sum(totals * tl.exp2(tops - higher[:, None]), 1)
        top = higher
    return top, total


@triton.jit
def store_combined(output, partial, head, count, vector: tl.constexpr):
    """Write the answer of one query head of all tokens: that of all parts."""
    one, s = tl.arange(0, 1), tl.arange(0, TOGETHER)
    top, total = combined_softmax(partial, head, count, one, one == 0)  # [1]
    low_size: tl.constexpr = vector.low
    high_size: tl.constexpr = vector.high if vector.high > 0 else 1
    low, high = tl.zeros([1, low_size], tl.float32), tl.zeros([1, high_size], tl.float32)
    at = head * partial.stride
    for begin in range(0, count, TOGETHER):
        read = begin + s < count
        tops = tl.load(partial.top + at + begin + s, mask=read, other=LOWEST)
        weights = tl.exp2(tops - top)[:, None]
        answers = partial.answer + (at + begin) * vector.whole
        value_low, value_high = load(answers, s * vector.whole, read, vector, True)
        low += tl.sum(value_low * weights, 0)[None, :]
        if vector.high > 0:
            high += tl.sum(value_high * weights, 0)[None, :]
    store(output + head * vector.whole, one, one == 0, low / total[:, None], high / total[:, None], vector)


@triton.jit
def store_nothing(output, first_head, begin, step, group: tl.constexpr, vector: tl.constexpr):
    """Write zeros: the answer of every so many-th of these query heads, where a packed row is idle."""
    one, nothing = tl.arange(0, 1), tl.zeros([1, 1], tl.float32)
    for h in range(begin, group, step):
        store(output + (first_head + h) * vector.whole, one, one == 0, nothing, nothing, vector)
