"""Rounds the inputs of linear layers with float8 weights on a GPU, in one pass over their numbers.

Shapes: N rows, I inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels.fp8_products import LEAST, MOST
from bmx.kernels.triton_operands import Variant, variant


@triton.jit
def _round_kernel(
    codes, scales, x, by_row, inner: tl.constexpr, least: tl.constexpr, most: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < inner
    wide = tl.load(x + row * by_row + columns, inside, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 0), least) / most
    tl.store(scales + row, scale)
    tl.store(codes + row * inner + columns, (wide / scale).to(tl.float8e4nv), inside)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``fp8_products.round_rows``; rows may be strided."""
    rows, inner = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(rows, inner, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(inner)
        _round_kernel[rows,](codes, scales, x, x.stride(0), inner, LEAST, MOST, block, num_warps=_warps(block))
    return codes, scales


def _warps(block: int) -> int:
    """Warps of a program: a thread holds at most 64 numbers, up to 65,536 of a row."""
    return min(32, max(4, block // 2048))


def compiled_for(dim: int, value_dim: int, shared: int) -> list[Variant]:  # noqa: ARG001
    """The launches of a bfloat16 model with 32 heads of this size: rows of the hidden state, and of the inner one."""
    types = {"codes": "*fp8e4nv", "scales": "*fp32", "x": "*bf16", "by_row": "i32:16"}
    launches = []
    for inner in (32 * dim, 112 * dim):
        block = triton.next_power_of_2(inner)
        constants = {"inner": inner, "least": LEAST, "most": MOST, "block": block}
        launches.append(variant(_round_kernel, types, constants, {"num_warps": _warps(block), "num_stages": 1}))
    return launches
