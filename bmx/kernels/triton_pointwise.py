"""A model's pointwise parts on a GPU, each in one pass over its numbers: RMSNorm, the rotary embedding, the gate.

Knows tensors only. Everything is computed in float32 and rounded once.

Shapes: T tokens, H heads, I inner size, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels.triton_operands import Variant, variant

GATE_BLOCK = 1024


@triton.jit
def _rms_norm_kernel(output, x, weight, epsilon, inner: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < inner
    numbers = tl.load(x + row * inner + columns, inside, 0.0)
    wide = numbers.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / inner
    normal = (wide * tl.rsqrt(mean + epsilon)).to(numbers.dtype)
    scale = tl.load(weight + columns, inside, 0.0)
    tl.store(output + row * inner + columns, scale.to(tl.float32) * normal.to(tl.float32), inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``contract.KernelModule.rms_norm``."""
    x, inner = x.contiguous(), x.shape[-1]
    output, rows = torch.empty_like(x), x.numel() // inner
    if rows:
        block = triton.next_power_of_2(inner)
        _rms_norm_kernel[rows,](output, x, weight, epsilon, inner, block, num_warps=4 if block <= 4096 else 8)
    return output


@triton.jit
def _rotate_kernel(output, x, cos, sin, by_token, by_head, heads, dim: tl.constexpr, half_block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half: tl.constexpr = dim // 2
    columns = tl.arange(0, half_block)
    inside = columns < half
    source = x + token * by_token + head * by_head
    first = tl.load(source + columns, inside, 0.0).to(tl.float32)
    second = tl.load(source + half + columns, inside, 0.0).to(tl.float32)
    angles = token * dim + columns
    low = first * tl.load(cos + angles, inside, 0.0) - second * tl.load(sin + angles, inside, 0.0)
    high = second * tl.load(cos + angles + half, inside, 0.0) + first * tl.load(sin + angles + half, inside, 0.0)
    target = output + (token * heads + head) * dim
    tl.store(target + columns, low, inside)
    tl.store(target + half + columns, high, inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``contract.KernelModule.rotate``; in memory, the result's tokens come before its heads."""
    _, heads, tokens, dim = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    output = x.new_empty(1, tokens, heads, dim)
    if output.numel():
        half = triton.next_power_of_2(max(1, dim // 2))
        strides = (x.stride(2), x.stride(1))
        tables = (cos.contiguous(), sin.contiguous())
        _rotate_kernel[tokens, heads](output, x, *tables, *strides, heads, dim, half, num_warps=1)
    return output.transpose(1, 2)


@triton.jit
def _gate_kernel(output, gate, up, by_gate, by_up, inner: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < inner
    numbers = tl.load(gate + row * by_gate + columns, inside, 0.0)
    wide = numbers.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(numbers.dtype)
    factor = tl.load(up + row * by_up + columns, inside, 0.0)
    tl.store(output + row * inner + columns, silu.to(tl.float32) * factor.to(tl.float32), inside)


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """See ``contract.KernelModule.gate``; rows of the operands may be strided."""
    inner = up.shape[-1]
    first, second = gate.reshape(-1, inner), up.reshape(-1, inner)
    output = up.new_empty(up.shape)
    if output.numel():
        grid = (len(first), triton.cdiv(inner, GATE_BLOCK))
        _gate_kernel[grid](output, first, second, first.stride(0), second.stride(0), inner, GATE_BLOCK, num_warps=4)
    return output


def compiled_for(dim: int, value_dim: int, shared: int) -> list[Variant]:  # noqa: ARG001
    """The launches of bfloat16 models with keys of this size, and 32 times that size."""
    inner, half = 32 * dim, triton.next_power_of_2(dim // 2)
    types = dict.fromkeys(("output", "x", "weight", "cos", "sin", "gate", "up"), "*bf16")
    types |= dict.fromkeys(("by_token", "by_head", "heads", "by_gate", "by_up"), "i32") | {"epsilon": "fp32"}
    block = triton.next_power_of_2(inner)
    norm, rotary = {"inner": inner, "block": block}, {"dim": dim, "half_block": half}
    gated = {"inner": 4 * inner, "block": GATE_BLOCK}
    return [
        variant(_rms_norm_kernel, types, norm, {"num_warps": 4 if block <= 4096 else 8, "num_stages": 1}),
        variant(_rotate_kernel, types, rotary, {"num_warps": 1, "num_stages": 1}),
        variant(_gate_kernel, types, gated, {"num_warps": 4, "num_stages": 1}),
    ]
