"""A model's pointwise parts on a GPU, each in one pass over its numbers: RMSNorm, the rotary embedding, the gate.

Knows tensors only. Everything is computed in float32 and rounded once.

Shapes: T tokens, H heads, I inner size, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels.triton_operands import Variant, variant

TILE = 4096  # numbers that a program of 128 threads holds
GATE_BLOCK = 1024


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    output, x, gate, weight, rows, by_token, by_head, heads, epsilon, offset: tl.constexpr,
    inner: tl.constexpr, block: tl.constexpr, many: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * many + tl.arange(0, many)
    columns = tl.arange(0, block)
    inside = (row < rows)[:, None] & (columns < inner)[None, :]
    token, head, row = (row // heads).to(tl.int64), row % heads, row.to(tl.int64)
    source = x + (token * by_token + head * by_head)[:, None] + columns[None, :]
    numbers = tl.load(source, inside, 0.0)
    scale = tl.load(weight + columns, columns < inner, 0.0).to(tl.float32)
    wide = numbers.to(tl.float32)
    mean = tl.sum(wide * wide, 1) / inner
    normal = wide * tl.rsqrt(mean + epsilon)[:, None]
    if offset:
        normal *= (1.0 + scale)[None, :]
    else:
        normal = scale[None, :] * normal.to(numbers.dtype).to(tl.float32)
    target = row[:, None] * inner + columns[None, :]
    if gate is not None:
        opened = tl.load(gate + target, inside, 0.0).to(tl.float32)
        normal = normal.to(numbers.dtype).to(tl.float32) * (opened * tl.sigmoid(opened))
    tl.store(output + target, normal, inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``contract.KernelModule.rms_norm``; a program takes several vectors if they are short.

    Vectors of heads are read as they lie: those of queries and keys are columns of a larger product.
    """
    return _norm(x, None, weight, epsilon)


def offset_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``contract.KernelModule.offset_norm``; vectors are read as in ``rms_norm``."""
    return _norm(x, None, weight, epsilon, offset=True)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``contract.KernelModule.gated_norm``."""
    return _norm(x, gate.contiguous(), weight, epsilon)


def _norm(x: Tensor, gate: Tensor | None, weight: Tensor, epsilon: float, *, offset: bool = False) -> Tensor:
    """The norm of vectors; ``offset`` says whether weights are added to 1."""
    inner, by_heads = x.shape[-1], x.dim() == 4 and len(x) == 1 and x.stride(3) == 1
    output, rows = x.new_empty(x.shape), x.numel() // inner
    if rows:
        x = x if by_heads else x.contiguous()
        strides = (x.stride(1), x.stride(2), x.shape[2]) if by_heads else (inner, inner, 1)
        sizes, launch = _norm_launch(inner)
        grid = (triton.cdiv(rows, sizes["many"]),)
        _rms_norm_kernel[grid](output, x, gate, weight, rows, *strides, epsilon, offset, **sizes, **launch)
    return output


def _norm_launch(inner: int) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes of a program, and its warps and stages."""
    block = triton.next_power_of_2(inner)
    sizes = {"inner": inner, "block": block, "many": max(1, TILE // block)}
    return sizes, {"num_warps": 4 if block <= TILE else 8, "num_stages": 1}


@triton.jit(do_not_specialize=["tokens"])
def _rotate_kernel(
    output, x, cos, sin, tokens, by_token, by_head, heads,
    dim: tl.constexpr, half_block: tl.constexpr, many: tl.constexpr,
):  # fmt: skip
    """Some heads of some tokens, in the order of the output; each reads its angles, mostly from the cache."""
    half: tl.constexpr = dim // 2
    row = tl.program_id(0) * many + tl.arange(0, many)
    columns = tl.arange(0, half_block)
    inside = (row < tokens * heads)[:, None] & (columns < half)[None, :]
    token, head, row = (row // heads).to(tl.int64), row % heads, row.to(tl.int64)
    source = x + (token * by_token + head * by_head)[:, None] + columns[None, :]
    first = tl.load(source, inside, 0.0).to(tl.float32)
    second = tl.load(source + half, inside, 0.0).to(tl.float32)
    angles = (token * dim)[:, None] + columns[None, :]
    low = first * tl.load(cos + angles, inside, 0.0) - second * tl.load(sin + angles, inside, 0.0)
    high = second * tl.load(cos + angles + half, inside, 0.0) + first * tl.load(sin + angles + half, inside, 0.0)
    target = output + (row * dim)[:, None] + columns[None, :]
    tl.store(target, low, inside)
    tl.store(target + half, high, inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``contract.KernelModule.rotate``; in memory, the result's tokens come before its heads."""
    _, heads, tokens, dim = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    output = x.new_empty(1, tokens, heads, dim)
    if output.numel():
        sizes, launch = _rotation_launch(dim)
        operands = (output, x, cos.contiguous(), sin.contiguous(), tokens, x.stride(2), x.stride(1), heads)
        _rotate_kernel[triton.cdiv(tokens * heads, sizes["many"]),](*operands, **sizes, **launch)
    return output.transpose(1, 2)


def _rotation_launch(dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes of a program, and its warps and stages."""
    half = triton.next_power_of_2(max(1, dim // 2))
    return {"dim": dim, "half_block": half, "many": max(1, TILE // 2 // half)}, {"num_warps": 4, "num_stages": 1}


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
    """The launches of bfloat16 models with keys of this size, normed or not, and 32 times that size."""
    types = dict.fromkeys(("output", "x", "weight", "cos", "sin", "gate", "up"), "*bf16")
    types |= dict.fromkeys(("by_token", "by_head", "by_gate", "by_up"), "i32:16") | {"epsilon": "fp32"}
    types |= dict.fromkeys(("rows", "tokens", "heads"), "i32")
    gated = {"inner": 128 * dim, "block": GATE_BLOCK}
    return [
        *(
            variant(_rms_norm_kernel, types, kind | _norm_launch(inner)[0], _norm_launch(inner)[1])
            for inner in (32 * dim, dim)
            for kind in ({"gate": None, "offset": False}, {"gate": None, "offset": True}, {"offset": False})
        ),
        variant(_rotate_kernel, types, *_rotation_launch(dim)),
        variant(_gate_kernel, types, gated, {"num_warps": 4, "num_stages": 1}),
    ]
