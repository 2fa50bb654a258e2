"""A model's pointwise parts on a GPU, each in one pass over its numbers: RMSNorm, the rotary embedding, the gate.

Knows tensors only. Everything is computed in float32 and rounded once.

Shapes: T tokens, H heads, I inner size, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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


def compiled_for(head_dim: int) -> list[tuple[Any, dict[str, str], dict[str, int], int, int]]:
    """The launches of a bfloat16 model with heads of this size: kernel, types, constants, warps and stages of each."""
    inner, pointer = 32 * head_dim, "*bf16"
    norm = {"output": pointer, "x": pointer, "weight": pointer, "epsilon": "fp32"}
    rotary = dict.fromkeys(("output", "x", "cos", "sin"), pointer) | dict.fromkeys(
        ("by_token", "by_head", "heads"), "i32"
    )
    block, half = triton.next_power_of_2(inner), triton.next_power_of_2(head_dim // 2)
    return [
        (_rms_norm_kernel, norm, {"inner": inner, "block": block}, 4 if block <= 4096 else 8, 1),
        (_rotate_kernel, rotary, {"dim": head_dim, "half_block": half}, 1, 1),
        (
            _gate_kernel,
            dict.fromkeys(("output", "gate", "up"), pointer) | {"by_gate": "i32", "by_up": "i32"},
            {"inner": 4 * inner, "block": GATE_BLOCK},
            4,
            1,
        ),
    ]
