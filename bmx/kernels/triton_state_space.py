"""Triton kernels of state spaces: Mamba-2 (arXiv 2405.21060) and Mamba-1 (arXiv 2312.00752).

A decoding token reads and writes its state once, row by row of all heads' channels; so do, token after token, prompts
of Mamba-1, whose numbers decay each by itself. Prompts of Mamba-2 are computed in chunks (arXiv 2405.21060, section 6):
a program for each head and block of its channels goes through the chunks of a segment with the state in registers.

Shapes: T packed tokens, S slots, H heads, P channels of a head, G groups, N numbers of a channel's state, L tokens of a
chunk, R rows of states: channels of all heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels.segments import Segments
from bmx.kernels.triton_operands import BF16_TOKENS, Variant, packed, variant
from bmx.kernels.triton_segments import launches, segment_of

TILE = 2048  # numbers of states that a program holds token after token
CHUNK = 32  # tokens computed together
BLOCK = 64  # channels of a head that a program computes in chunks
LONG = 128  # numbers of a channel's state: of longer ones a program computes fewer channels
LEAST = 16  # numbers that tensor cores multiply at once


@triton.jit(do_not_specialize=["kept"], do_not_specialize_on_alignment=["slots", "table"])
def _scan(
    output, x, step, rate, inputs, outputs, skip, states, slots, table, kept,
    heads: tl.constexpr, channels: tl.constexpr, group: tl.constexpr, size: tl.constexpr, columns: tl.constexpr,
    block: tl.constexpr, by_number: tl.constexpr,
):  # fmt: skip
    """Some rows of states of one segment, token after token."""
    row, n = tl.program_id(1) * block + tl.arange(0, block), tl.arange(0, columns)
    begin, length, slot = segment_of(slots, table, kept, tl.program_id(0), tl.num_programs(0))
    exists, head = row < heads * channels, row // channels
    if slot < 0:
        tl.store(output + begin * (heads * channels) + row, tl.zeros([block], tl.float32), exists)
        return
    if length == 0:
        return
    inside = exists[:, None] & (n < size)[None, :]
    place = states + (slot * (heads * channels) + row)[:, None] * size + n[None, :]
    state = tl.load(place, inside, 0.0).to(tl.float32)
    if by_number:
        rates = tl.load(rate + head[:, None] * size + n[None, :], inside, 0.0).to(tl.float32)
    else:
        rates = tl.load(rate + head, exists, 0.0).to(tl.float32)[:, None]
    if skip is not None:
        skips = tl.load(skip + head, exists, 0.0).to(tl.float32)
    of_group = (head // group)[:, None]
    for token in range(length):
        at = begin + token
        number = tl.load(x.data + at * x.token + head * x.head + row % channels, exists, 0.0).to(tl.float32)
        time = tl.load(step + at * heads + head, exists, 0.0)
        source = inputs.data + at * inputs.token + of_group * inputs.head + n[None, :]
        enters = tl.load(source, inside, 0.0).to(tl.float32)
        source = outputs.data + at * outputs.token + of_group * outputs.head + n[None, :]
        leaves = tl.load(source, inside, 0.0).to(tl.float32)
        state = state * tl.exp(time[:, None] * rates) + (time * number)[:, None] * enters
        answer = tl.sum(state * leaves, 1)
        if skip is not None:
            answer += skips * number
        tl.store(output + at * (heads * channels) + row, answer, exists)
    if kept == 1:
        tl.store(place, state.to(states.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["kept"], do_not_specialize_on_alignment=["table"])
def _chunks(
    output, x, step, rate, inputs, outputs, skip, states, table, kept,
    channels: tl.constexpr, group: tl.constexpr, size: tl.constexpr, columns: tl.constexpr, block: tl.constexpr,
    chunk: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Some channels of one head of one segment, chunk after chunk; products of float32 numbers where ``wide``."""
    dtype: tl.constexpr = tl.float32 if wide else x.data.dtype.element_ty
    head, heads = tl.program_id(1), tl.num_programs(1)
    begin, length, slot = segment_of(None, table, kept, tl.program_id(0), tl.num_programs(0))
    if length == 0:
        return
    i, n, p = tl.arange(0, chunk), tl.arange(0, columns), tl.program_id(2) * block + tl.arange(0, block)
    inside = (p < channels)[:, None] & (n < size)[None, :]
    place = states + ((slot * heads + head) * channels + p)[:, None] * size + n[None, :]
    state = tl.load(place, inside, 0.0).to(tl.float32)
    pace = tl.load(rate + head).to(tl.float32)
    for start in range(0, length, chunk):
        at, valid = begin + start + i, start + i < length
        of_x, of_group = valid[:, None] & (p < channels)[None, :], valid[:, None] & (n < size)[None, :]
        numbers = tl.load(x.data + at[:, None] * x.token + head * x.head + p[None, :], of_x, 0.0)
        source = inputs.data + at[:, None] * inputs.token + (head // group) * inputs.head + n[None, :]
        enters = tl.load(source, of_group, 0.0).to(dtype)
        source = outputs.data + at[:, None] * outputs.token + (head // group) * outputs.head + n[None, :]
        leaves = tl.load(source, of_group, 0.0).to(dtype)
        time = tl.load(step + at * heads + head, valid, 0.0)
        total, whole = tl.cumsum(time * pace, 0), tl.sum(time * pace, 0)
        left = tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0)) * time[None, :]
        among = tl.dot(leaves, tl.trans(enters), input_precision="ieee") * left
        among = tl.where(i[:, None] >= i[None, :], among, 0.0).to(dtype)
        answer = tl.dot(leaves, tl.trans(state.to(dtype)), input_precision="ieee") * tl.exp(total)[:, None]
        answer = tl.dot(among, numbers.to(dtype), answer, input_precision="ieee")
        if skip is not None:
            answer += tl.load(skip + head).to(tl.float32) * numbers.to(tl.float32)
        tl.store(output + (at * heads + head)[:, None] * channels + p[None, :], answer, of_x)
        entered = (numbers.to(tl.float32) * (time * tl.exp(whole - total))[:, None]).to(dtype)
        state = tl.dot(tl.trans(entered), enters, state * tl.exp(whole), input_precision="ieee")
    if kept == 1:
        tl.store(place, state.to(states.dtype.element_ty), inside)


def state_space(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    skip: Tensor | None,
    states: Tensor,
    segments: Segments,
) -> Tensor:
    """See ``contract.KernelModule.state_space``."""
    x, inputs, outputs = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, inputs, outputs))
    _, heads, channels = x.shape
    output = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    operands = packed(x), step.contiguous(), rate.contiguous(), packed(inputs), packed(outputs), skip, states
    wide = max(t.element_size() for t in (x, inputs, outputs)) > 2
    for launch in launches(segments):
        by_token = launch.table is None or rate.dim() == 2
        sizes, options = _launch(channels, heads // inputs.shape[1], inputs.shape[2], by_token)
        if by_token:
            _scan[launch.number, triton.cdiv(heads * channels, sizes["block"])](
                output, *operands, launch.slots, launch.table, launch.kept,
                heads=heads, by_number=rate.dim() == 2, **sizes, **options,
            )  # fmt: skip
        else:
            _chunks[launch.number, heads, triton.cdiv(channels, sizes["block"])](
                output, *operands, launch.table, launch.kept, chunk=CHUNK, wide=wide, **sizes, **options
            )
    return output


def _launch(channels: int, group: int, size: int, by_token: bool) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes of a program, and its warps and stages; ``group`` heads have the same inputs and outputs."""
    sizes = {"channels": channels, "group": group, "size": size}
    if by_token:
        columns = triton.next_power_of_2(size)
        return sizes | {"columns": columns, "block": max(1, TILE // columns)}, {"num_warps": 4, "num_stages": 1}
    block, columns = (max(LEAST, triton.next_power_of_2(count)) for count in (channels, size))
    most = BLOCK // 4 if columns > LONG else BLOCK
    return sizes | {"columns": columns, "block": min(most, block)}, {"num_warps": 8, "num_stages": 1}


# heads, channels of a head, groups, numbers of a channel's state: of Granite 4 H (tiny and small), Falcon H1, Jamba
MODELS = ((48, 64, 1, 128), (128, 64, 1, 128), (24, 128, 1, 256), (8192, 1, 1, 16))


def compiled_for(dim: int, value_dim: int, shared: int) -> list[Variant]:  # noqa: ARG001
    """The launches of some bfloat16 models, whatever the size of heads."""
    types: dict[str, Any] = {"output": "*fp32", "step": "*fp32", "rate": "*fp32", "skip": "*bf16", "states": "*fp32"}
    types |= dict.fromkeys(("x", "inputs", "outputs"), BF16_TOKENS)
    types |= {"slots": "*i64:8", "table": "*i64:8", "kept": "i32"}
    variants = []
    for heads, channels, groups, size in MODELS:
        sizes, options = _launch(channels, heads // groups, size, by_token=True)
        scanned = {"heads": heads, "by_number": channels == 1, **sizes}
        variants.append(variant(_scan, types, scanned | {"table": None}, options))
        if channels == 1:
            variants.append(variant(_scan, types, scanned | {"slots": None}, options))
        else:
            sizes, options = _launch(channels, heads // groups, size, by_token=False)
            variants.append(variant(_chunks, types, {**sizes, "chunk": CHUNK, "wide": False}, options))
    return variants
