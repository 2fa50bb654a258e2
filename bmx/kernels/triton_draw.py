"""Draws tokens on a GPU, for all rows at once and without sorting the vocabulary.

Tokens are in the order of ``contract.KernelModule.draw``: likeliest first, of equals the first. Each cut of them, and
the token drawn, is the place in that order where a sum passes a number. A program finds it for one row by halving: bit
by bit, it finds the greatest logit such that the tokens from it on hold more than that number, with a pass over the
row for each bit. Sums have a fixed order, so that a row's token depends on that row alone.

Shapes: N rows of logits, M of them that are drawn from, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels.drawing import COLDEST
from bmx.kernels.triton_operands import Variant, variant

MOST_BLOCK = 4096  # tokens that a program looks at together
FREE_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # last bits in which float32 of a type differ not


@triton.jit
def _logits(row, start, vocab, free: tl.constexpr, block: tl.constexpr):
    """A block's logits in float32, and whole numbers [block] int32 in their order; behind the last, the least."""
    tokens = start + tl.arange(0, block)
    logits = tl.load(row + tokens, tokens < vocab, float("-inf")).to(tl.float32)
    logits = tl.where(logits == 0, 0.0, logits)  # -0 is 0
    bits = logits.to(tl.int32, bitcast=True)
    return logits, (bits ^ ((bits >> 31) & 0x7FFFFFFF)) & (-1 << free)


@triton.jit
def _logit(order, free: tl.constexpr):
    """The logit of a number of ``_logits``."""
    bits = tl.where(order < 0, (order | ((1 << free) - 1)) ^ 0x7FFFFFFF, order)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _sum(row, vocab, least, best, heat, counts: tl.constexpr, free: tl.constexpr, block: tl.constexpr):
    """The weights of the tokens from a number on, or how many they are."""
    sums = tl.zeros([block], tl.float32)
    for start in range(0, vocab, block):
        logits, order = _logits(row, start, vocab, free, block)
        inside = tl.where(start + tl.arange(0, block) < vocab, 1.0, 0.0)
        weights = inside if counts else tl.exp((logits - best) / heat)
        sums += tl.where(order >= least, weights, 0.0)
    return tl.sum(sums.to(tl.float64), 0)


@triton.jit
def _search(row, vocab, most, best, heat, counts: tl.constexpr, free: tl.constexpr, block: tl.constexpr):
    """The greatest number such that the tokens from it on sum up to more than ``most``, and the sum of those above."""
    found = tl.full((), -2147483648, tl.int32)
    above = most * 0
    for i in range(32 - free):
        trial = found ^ (tl.full((), 1, tl.int32) << (31 - i))
        total = _sum(row, vocab, trial, best, heat, counts, free, block)
        above = tl.where(total > most, above, total)
        found = tl.where(total > most, trial, found)
    return found, above


@triton.jit
def _whole_row(row, vocab, best, heat, min_p, free: tl.constexpr, block: tl.constexpr):
    """The sum of the weights that are at least ``min_p`` and not 0, and the least number of such a token."""
    sums = tl.zeros([block], tl.float32)
    least = tl.full([block], 2147483647, tl.int32)
    for start in range(0, vocab, block):
        logits, order = _logits(row, start, vocab, free, block)
        weights = tl.exp((logits - best) / heat)
        stays = (weights >= min_p) & (weights > 0)
        sums += tl.where(stays, weights, 0.0)
        least = tl.minimum(least, tl.where(stays, order, 2147483647))
    return tl.sum(sums.to(tl.float64), 0), tl.min(least, 0)


@triton.jit
def _take(row, vocab, wanted, place, free: tl.constexpr, block: tl.constexpr):
    """Of the tokens with a number, the one at a place; the last one if there are fewer."""
    chosen = tl.full((), 0, tl.int32)
    before = tl.full((), 0, tl.int32)
    for start in range(0, vocab, block):
        tokens = start + tl.arange(0, block)
        _, order = _logits(row, start, vocab, free, block)
        same = ((order == wanted) & (tokens < vocab)).to(tl.int32)
        places = before + tl.cumsum(same, 0) - 1
        chosen = tl.maximum(chosen, tl.max(tl.where((same > 0) & (places <= place), tokens, 0), 0))
        before += tl.sum(same, 0)
    return chosen


@triton.jit
def _best(row, vocab, free: tl.constexpr, block: tl.constexpr):
    """The greatest logit."""
    greatest = tl.full([block], float("-inf"), tl.float32)
    for start in range(0, vocab, block):
        logits, _ = _logits(row, start, vocab, free, block)
        greatest = tl.maximum(greatest, logits)
    return tl.max(greatest, 0)


@triton.jit(do_not_specialize=["by_setting"])
def _draw_kernel(
    ids, logits, rows, sampling, by_row, by_setting, vocab, coldest: tl.constexpr, free: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = logits + tl.load(rows + program).to(tl.int64) * by_row
    sampling += program
    temperature = tl.load(sampling)
    chosen = tl.full((), 0, tl.int32)
    if temperature > 0:
        heat = tl.maximum(temperature, coldest).to(tl.float32)
        top_k = tl.load(sampling + by_setting)
        top_p = tl.load(sampling + 2 * by_setting)
        min_p = tl.load(sampling + 3 * by_setting).to(tl.float32)
        best = _best(row, vocab, free, block)
        # The allowed tokens: their weights, the number of the last ones, and how many have that number.
        total, last = _whole_row(row, vocab, best, heat, min_p * 0, free, block)
        ties = top_k * 0 + vocab
        if (top_k > 0) & (top_k < vocab):
            at, above = _search(row, vocab, top_k - 1, best, heat, True, free, block)
            if at >= last:
                higher = _sum(row, vocab, at + (1 << free), best, heat, False, free, block)
                last, ties = at, top_k - above
                total = higher + ties * tl.exp((_logit(at, free) - best) / heat)
        if top_p < 1:
            at, above = _search(row, vocab, top_p * total, best, heat, False, free, block)
            weight = tl.exp((_logit(at, free) - best) / heat).to(tl.float64)
            needed = tl.maximum(tl.ceil((top_p * total - above) / weight), 1.0)
            if (at > last) | ((at == last) & (needed < ties)):
                last, ties = at, needed
                total = above + needed * weight
        if min_p > 0:
            likely, least = _whole_row(row, vocab, best, heat, min_p, free, block)
            if least > last:
                last, ties, total = least, top_k * 0 + vocab, likely
        most = tl.load(sampling + 4 * by_setting) * total
        at, above = _search(row, vocab, most, best, heat, False, free, block)
        weight = tl.exp((_logit(at, free) - best) / heat).to(tl.float64)
        place = tl.minimum(tl.maximum((most - above) / weight, 0.0), vocab)
        place = tl.where(at > last, place, tl.where(at == last, tl.minimum(place, ties - 1), ties - 1))
        chosen = _take(row, vocab, tl.maximum(at, last), place.to(tl.int32), free, block)
    tl.store(ids + program, chosen.to(tl.int64))


def draw(logits: Tensor, rows: Tensor, sampling: Tensor) -> Tensor:
    """See ``contract.KernelModule.draw``."""
    ids = torch.empty_like(rows)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if len(rows):
        vocab, free = logits.shape[1], FREE_BITS[logits.dtype]
        block = _block(vocab)
        _draw_kernel[len(rows),](
            ids, logits, rows, sampling, logits.stride(0), sampling.stride(0), vocab, COLDEST, free, block,
            **_launch(block),
        )  # fmt: skip
    return ids


def _block(vocab: int) -> int:
    return min(MOST_BLOCK, int(triton.next_power_of_2(vocab)))


def _launch(block: int) -> dict[str, int]:
    return {"num_warps": max(1, min(8, block // 512)), "num_stages": 1}


def compiled_for(dim: int, value_dim: int, shared: int) -> list[Variant]:  # noqa: ARG001
    """The launches for logits of each type, whatever the size of heads."""
    types = {"ids": "*i64", "rows": "*i64", "sampling": "*fp64"}
    types |= dict.fromkeys(("by_row", "by_setting", "vocab"), "i32")
    launches = []
    for name, dtype in (("*bf16", torch.bfloat16), ("*fp32", torch.float32)):
        constants = {"coldest": COLDEST, "free": FREE_BITS[dtype], "block": MOST_BLOCK}
        launches.append(variant(_draw_kernel, types | {"logits": name}, constants, _launch(MOST_BLOCK)))
    return launches
