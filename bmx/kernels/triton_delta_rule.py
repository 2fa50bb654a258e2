"""Triton kernels of the gated delta rule (arXiv 2412.06464), and of Kimi's, where each channel decays by itself.

A decoding token reads and writes its state once. Prompts are computed in chunks (arXiv 2412.06464, section 3.3): what a
chunk's tokens change follows from what those before them have changed, a triangular system that is inverted for all
chunks at once; then a program for each head and block of value columns goes through the chunks of a segment with the
state in registers. Differences of decays are never above zero, so that nothing overflows.

Shapes: T packed tokens, S slots, H heads, K key heads, D key dim, E value dim, L tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels.segments import Segments
from bmx.kernels.triton_operands import BF16_TOKENS, LEAST_SHARED, Variant, packed, shared_memory, variant
from bmx.kernels.triton_segments import launches, segment_of

CHUNK = 64  # tokens computed together
SMALL_CHUNK = 32  # the same of numbers that take four bytes, and on GPUs that run short of registers
SHORT_CHUNK = 16  # the same where each channel decays by itself, or keys are long
LONG = 128  # numbers of a key
HALF = 2  # bytes
BLOCK = 32  # value columns of a program
LEAST = 16  # numbers that tensor cores multiply at once
EPSILON = tl.constexpr(1e-6)  # added to the square of a vector's length


@triton.jit
def _vectors(operand, at, head, valid, dim: tl.constexpr, columns: tl.constexpr, normalise: tl.constexpr):
    """One head of some packed tokens [L, D], zeros where not valid, and the factor [L] of each that normalises it."""
    d = tl.arange(0, columns)
    source = operand.data + at[:, None] * operand.token + head * operand.head + d[None, :]
    numbers = tl.load(source, valid[:, None] & (d < dim)[None, :], 0.0)
    wide = numbers.to(tl.float32)
    factor = tl.sum(wide * wide, 1)
    factor = tl.rsqrt(factor + EPSILON) if normalise else factor * 0 + 1
    return numbers, factor


@triton.jit
def _vector(operand, token, head, dim: tl.constexpr, columns: tl.constexpr, normalise: tl.constexpr):
    """One head of one packed token [D], in float32, normalised."""
    one = token + tl.arange(0, 1)
    numbers, factor = _vectors(operand, one, head, one >= 0, dim, columns, normalise)
    return tl.sum(numbers.to(tl.float32) * factor[:, None], 0)


@triton.jit
def _state(states, slot, head, heads, part, dim: tl.constexpr, columns: tl.constexpr, value_dim: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Addresses of a block of value columns of a head's state [D, E], and which of them exist."""
    d, e = tl.arange(0, columns), part * block + tl.arange(0, block)
    at = states + ((slot * heads + head) * dim + d)[:, None] * value_dim + e[None, :]
    return at, (d < dim)[:, None] & (e < value_dim)[None, :]


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _decode(
    output, query, key, value, decay, beta, states, slots,
    group: tl.constexpr, dim: tl.constexpr, columns: tl.constexpr, value_dim: tl.constexpr, block: tl.constexpr,
    normalise: tl.constexpr, by_channel: tl.constexpr,
):  # fmt: skip
    """A block of value columns of one head of one decoding token."""
    token, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    slot, row = tl.load(slots + token), token * heads + head
    e = part * block + tl.arange(0, block)
    if slot < 0:
        tl.store(output + row * value_dim + e, tl.zeros([block], output.dtype.element_ty), e < value_dim)
        return
    d = tl.arange(0, columns)
    q = _vector(query, token, head // group, dim, columns, normalise) * (dim**-0.5)
    k = _vector(key, token, head // group, dim, columns, normalise)
    v = tl.load(value.data + token * value.token + head * value.head + e, e < value_dim, 0.0).to(tl.float32)
    if by_channel:  # noqa: SIM108
        left = tl.exp(tl.load(decay + row * dim + d, d < dim, 0.0))[:, None]
    else:
        left = tl.exp(tl.load(decay + row))
    at, inside = _state(states, slot, head, heads, part, dim, columns, value_dim, block)
    state = tl.load(at, inside, 0.0).to(tl.float32) * left
    change = (v - tl.sum(state * k[:, None], 0)) * tl.load(beta + row).to(tl.float32)
    state += k[:, None] * change[None, :]
    tl.store(at, state.to(states.dtype.element_ty), inside)
    answer = tl.sum(state * q[:, None], 0)
    tl.store(output + row * value_dim + e, answer.to(output.dtype.element_ty), e < value_dim)


@triton.jit
def _pairs_by_channel(q, k, key, decay, at, first, count, head, heads, key_head, valid,
    dim: tl.constexpr, columns: tl.constexpr, chunk: tl.constexpr, normalise: tl.constexpr,
):  # fmt: skip
    """Products [L, L] of the chunk's keys and queries with its keys, decayed by channel; wrong for later keys."""
    i, d = tl.arange(0, chunk), tl.arange(0, columns)
    source = decay + (at * heads + head)[:, None] * dim + d[None, :]
    total = tl.cumsum(tl.load(source, valid[:, None] & (d < dim)[None, :], 0.0), 0)
    of_keys, of_queries = tl.zeros([chunk, chunk], tl.float32), tl.zeros([chunk, chunk], tl.float32)
    for j in range(count):
        other = _vector(key, first + j, key_head, dim, columns, normalise)
        until = tl.sum(tl.where((i == j)[:, None], total, 0.0), 0)
        other = other[None, :] * tl.exp(tl.minimum(total - until[None, :], 0.0))
        of_keys += tl.where((i == j)[None, :], tl.sum(k * other, 1)[:, None], 0.0)
        of_queries += tl.where((i == j)[None, :], tl.sum(q * other, 1)[:, None], 0.0)
    return of_keys, of_queries


@triton.jit
def _inverse(lower, count, chunk: tl.constexpr):
    """The inverse of 1 + a matrix [L, L] that is zero but below the diagonal, row by row (forward substitution)."""
    i = tl.arange(0, chunk)
    inverse = -lower
    for row in range(1, count):
        own = tl.sum(tl.where((i == row)[:, None], inverse, 0.0), 0)
        own += tl.sum(own[:, None] * inverse, 0)
        inverse = tl.where((i == row)[:, None], own[None, :], inverse)
    return inverse + tl.where(i[:, None] == i[None, :], 1.0, 0.0)


@triton.jit(do_not_specialize=["kept"], do_not_specialize_on_alignment=["table"])
def _within(
    solved, attended, query, key, decay, beta, table, kept,
    group: tl.constexpr, dim: tl.constexpr, columns: tl.constexpr, chunk: tl.constexpr,
    normalise: tl.constexpr, by_channel: tl.constexpr,
):  # fmt: skip
    """What tokens of one chunk of one head have to do with each other, whatever the state: two matrices [L, L].

    ``solved`` makes changes of what tokens would change alone; ``attended`` is the products of queries and keys.
    """
    head, heads = tl.program_id(2), tl.num_programs(2)
    begin, length, _ = segment_of(None, table, kept, tl.program_id(0), tl.num_programs(0))
    count = tl.minimum(length - tl.program_id(1) * chunk, chunk)
    if count <= 0:
        return
    i, first = tl.arange(0, chunk), begin + tl.program_id(1) * chunk
    at, valid = first + i, i < count
    q, q_factor = _vectors(query, at, head // group, valid, dim, columns, normalise)
    k, k_factor = _vectors(key, at, head // group, valid, dim, columns, normalise)
    q_factor *= dim**-0.5
    factor = tl.load(beta + at * heads + head, valid, 0.0).to(tl.float32)
    if by_channel:
        of_keys, of_queries = _pairs_by_channel(
            q.to(tl.float32) * q_factor[:, None], k.to(tl.float32) * k_factor[:, None], key, decay, at, first, count,
            head, heads, head // group, valid, dim, columns, chunk, normalise,
        )  # fmt: skip
    else:
        total = tl.cumsum(tl.load(decay + at * heads + head, valid, 0.0), 0)
        left = tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0)) * k_factor[None, :]
        of_keys = tl.dot(k, tl.trans(k), input_precision="ieee") * left * k_factor[:, None]
        of_queries = tl.dot(q, tl.trans(k), input_precision="ieee") * left * q_factor[:, None]
    later = i[:, None] - i[None, :]
    inverse = _inverse(tl.where(later > 0, of_keys * factor[:, None], 0.0), count, chunk)
    of_queries = tl.where(later >= 0, of_queries, 0.0)
    target = (at * heads + head)[:, None] * chunk + i[None, :]
    tl.store(solved + target, (inverse * factor[None, :]).to(solved.dtype.element_ty), valid[:, None])
    tl.store(attended + target, of_queries.to(solved.dtype.element_ty), valid[:, None])


@triton.jit(do_not_specialize=["kept"], do_not_specialize_on_alignment=["table"])
def _across(
    output, solved, attended, query, key, value, decay, states, table, kept,
    group: tl.constexpr, dim: tl.constexpr, columns: tl.constexpr, value_dim: tl.constexpr, block: tl.constexpr,
    chunk: tl.constexpr, normalise: tl.constexpr, by_channel: tl.constexpr,
):  # fmt: skip
    """A block of value columns of one head of one segment, chunk after chunk."""
    head, part, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    begin, length, slot = segment_of(None, table, kept, tl.program_id(0), tl.num_programs(0))
    if length == 0:
        return
    i, d, e = tl.arange(0, chunk), tl.arange(0, columns), part * block + tl.arange(0, block)
    place, inside = _state(states, slot, head, heads, part, dim, columns, value_dim, block)
    state = tl.load(place, inside, 0.0).to(tl.float32)
    for start in range(0, length, chunk):
        at, valid = begin + start + i, start + i < length
        of_value = valid[:, None] & (e < value_dim)[None, :]
        matrix = (at * heads + head)[:, None] * chunk + i[None, :]
        source_of_value = value.data + at[:, None] * value.token + head * value.head + e[None, :]
        k, k_left = _vectors(key, at, head // group, valid, dim, columns, normalise)
        at_end, k_end = k, k_left
        if by_channel:
            source = decay + (at * heads + head)[:, None] * dim + d[None, :]
            decays = tl.load(source, valid[:, None] & (d < dim)[None, :], 0.0)
            total, whole = tl.cumsum(decays, 0), tl.sum(decays, 0)
            at_end = (k.to(tl.float32) * tl.exp(whole[None, :] - total)).to(k.dtype)
            k = (k.to(tl.float32) * tl.exp(total)).to(k.dtype)
            faded = tl.exp(whole)[:, None]
        else:
            decays = tl.load(decay + at * heads + head, valid, 0.0)
            total, whole = tl.cumsum(decays, 0), tl.sum(decays, 0)
            k_end *= tl.exp(whole - total)
            k_left *= tl.exp(total)
            faded = tl.exp(whole)
        before, v = state.to(k.dtype), tl.load(source_of_value, of_value, 0.0)
        alone = v.to(tl.float32) - tl.dot(k, before, input_precision="ieee") * k_left[:, None]
        q, q_left = _vectors(query, at, head // group, valid, dim, columns, normalise)
        if by_channel:
            q = (q.to(tl.float32) * tl.exp(total)).to(k.dtype)
        else:
            q_left *= tl.exp(total)
        system = tl.load(solved + matrix, valid[:, None], 0.0)
        change = tl.dot(system, alone.to(k.dtype), input_precision="ieee")
        answer = tl.dot(q, before, input_precision="ieee") * (q_left * dim**-0.5)[:, None]
        pairs = tl.load(attended + matrix, valid[:, None], 0.0)
        answer = tl.dot(pairs, change.to(k.dtype), answer, input_precision="ieee")
        target = output + (at * heads + head)[:, None] * value_dim + e[None, :]
        tl.store(target, answer.to(output.dtype.element_ty), of_value)
        change = (change * k_end[:, None]).to(k.dtype)
        state = tl.dot(tl.trans(at_end), change, state * faded, input_precision="ieee")
    if kept == 1:
        tl.store(place, state.to(states.dtype.element_ty), inside)


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    states: Tensor,
    segments: Segments,
    *,
    normalise: bool,
) -> Tensor:
    """See ``contract.KernelModule.delta_rule``."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    decay, beta, (tokens, heads, value_dim) = decay.contiguous(), beta.contiguous(), value.shape
    output, pairs = value.new_empty(value.shape), None
    sizes = _sizes(heads // query.shape[1], query.shape[2], decay.dim() == 3, normalise)
    operands = packed(query), packed(key), packed(value), decay
    for launch in launches(segments):
        of_value, options = _launch(sizes, value_dim, value.dtype, launch.table is None, shared_memory())
        blocks, rows = triton.cdiv(value_dim, of_value["block"]), (launch.table, launch.kept)
        if launch.table is None:
            _decode[launch.number, heads, blocks](
                output, *operands, beta, states, launch.slots, **sizes, **of_value, **options
            )
            continue
        chunk = of_value["chunk"]
        pairs = value.new_empty(2, tokens, heads, chunk) if pairs is None else pairs
        _within[launch.number, triton.cdiv(launch.longest, chunk), heads](
            *pairs, *operands[:2], decay, beta, *rows, **sizes, chunk=chunk, **options
        )
        _across[launch.number, heads, blocks](output, *pairs, *operands, states, *rows, **sizes, **of_value, **options)
    return output


def _sizes(group: int, dim: int, by_channel: bool, normalise: bool) -> dict[str, Any]:
    """What all kernels are compiled for; ``group`` heads have a key."""
    columns = max(LEAST, triton.next_power_of_2(dim))
    return {"group": group, "dim": dim, "columns": columns, "normalise": normalise, "by_channel": by_channel}


def _launch(
    sizes: Mapping[str, Any], value_dim: int, dtype: torch.dtype, decoding: bool, shared: int
) -> tuple[dict[str, int], dict[str, int]]:
    """A program's value columns and tokens, and its warps and stages."""
    long = sizes["columns"] > LONG
    block = min(BLOCK // 2 if long else BLOCK, max(LEAST, triton.next_power_of_2(value_dim)))
    of_value = {"value_dim": value_dim, "block": block}
    if decoding:
        return of_value, {"num_warps": 4, "num_stages": 1}
    chunk = CHUNK if dtype.itemsize == HALF and shared > LEAST_SHARED else SMALL_CHUNK
    chunk = SHORT_CHUNK if long or sizes["by_channel"] else chunk
    return of_value | {"chunk": chunk}, {"num_warps": 8, "num_stages": 1}


# heads of a key, numbers of a key and of a value, whether channels decay by themselves: of Qwen 3.5 and Qwen 3 Next,
# OLMo Hybrid, Kimi Linear
MODELS = ((2, 128, 128, False), (1, 96, 192, False), (1, 128, 128, True))


def compiled_for(dim: int, value_dim: int, shared: int) -> list[Variant]:  # noqa: ARG001
    """The launches of some bfloat16 models, whatever the size of heads."""
    types: dict[str, Any] = dict.fromkeys(("query", "key", "value"), BF16_TOKENS)
    types |= dict.fromkeys(("output", "beta", "solved", "attended"), "*bf16") | {"decay": "*fp32", "kept": "i32"}
    types |= {"slots": "*i64:8", "table": "*i64:8"}
    variants = []
    for (group, key, value, by_channel), state in zip(MODELS, ("*fp32", "*bf16", "*fp32"), strict=True):
        sizes = _sizes(group, key, by_channel, True)
        for kernel in (_decode, _within, _across):
            of_value, options = _launch(sizes, value, torch.bfloat16, kernel is _decode, shared)
            constants = {name: size for name, size in (sizes | of_value).items() if name in kernel.arg_names}
            variants.append(variant(kernel, types | {"states": state}, constants, options))
    return variants
