"""The Triton kernel of short convolutions: all segments of a step in one launch, windows in place.

A program computes some tokens of a segment in a block of channels; the one of a segment's first tokens reads the
window, and writes the next one.

Shapes: T packed tokens, S slots, C channels, W inputs of an output.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bmx.kernels.segments import Segments
from bmx.kernels.triton_operands import Variant, variant
from bmx.kernels.triton_segments import launches, segment_of

BLOCK = 128  # channels of a program that reads prompts
DECODE_BLOCK = 512
TOKENS = 32  # of a program that reads prompts


@triton.jit
def _inputs(x, windows, by_token, begin, slot, places, valid, columns, inside, channels, width: tl.constexpr):
    """Inputs of a segment, by place in it; those before its first token are in the slot's window."""
    row = slot * (width - 1) + (places + width - 1)
    new = (valid & (places >= 0))[:, None] & inside[None, :]
    old = (valid & (places < 0))[:, None] & inside[None, :]
    numbers = tl.load(x + (begin + places)[:, None] * by_token + columns[None, :], new, 0.0)
    if width > 1:
        numbers += tl.load(windows + row[:, None] * channels + columns[None, :], old, 0.0)
    return numbers


@triton.jit(do_not_specialize=["kept"], do_not_specialize_on_alignment=["slots", "table"])
def _convolve(
    output, x, weight, bias, windows, slots, table, kept, by_token, channels,
    width: tl.constexpr, silu: tl.constexpr, tokens: tl.constexpr, block: tl.constexpr, window: tl.constexpr,
):  # fmt: skip
    number, part = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * block + tl.arange(0, block)
    inside = columns < channels
    begin, length, slot = segment_of(slots, table, kept, number, tl.num_programs(0))
    if part * tokens >= length:
        return
    at = part * tokens + tl.arange(0, tokens)
    valid = at < length
    target = output + (begin + at)[:, None] * channels + columns[None, :]
    if slot < 0:
        tl.store(target, tl.zeros([tokens, block], output.dtype.element_ty), valid[:, None] & inside[None, :])
        return
    total = tl.zeros([tokens, block], tl.float32)
    for i in tl.static_range(width):
        places = at + (i + 1 - width)
        numbers = _inputs(x, windows, by_token, begin, slot, places, valid, columns, inside, channels, width)
        factor = tl.load(weight + columns * width + i, inside, 0.0).to(tl.float32)
        total += numbers.to(tl.float32) * factor[None, :]
    if bias is not None:
        total += tl.load(bias + columns, inside, 0.0).to(tl.float32)[None, :]
    if silu:
        total *= tl.sigmoid(total)
    tl.store(target, total.to(output.dtype.element_ty), valid[:, None] & inside[None, :])
    if width > 1:  # noqa: SIM102 - a constant
        if (part == 0) & (kept == 1):
            row = tl.arange(0, window)
            last = row < width - 1
            newest = _inputs(
                x, windows, by_token, begin, slot, length - (width - 1) + row, last, columns, inside, channels, width
            )
            tl.debug_barrier()  # all threads have read the window
            kept_at = windows + (slot * (width - 1) + row)[:, None] * channels + columns[None, :]
            tl.store(kept_at, newest, last[:, None] & inside[None, :])


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, segments: Segments, *, silu: bool
) -> Tensor:
    """See ``contract.KernelModule.convolve``."""
    x = x if x.stride(1) == 1 else x.contiguous()
    output, (channels, width) = x.new_empty(x.shape), weight.shape
    for launch in launches(segments):
        sizes, options = _launch(width, launch.table is None)
        grid = (launch.number, triton.cdiv(launch.longest, sizes["tokens"]), triton.cdiv(channels, sizes["block"]))
        _convolve[grid](
            output, x, weight.contiguous(), bias, windows, launch.slots, launch.table, launch.kept, x.stride(0),
            channels, silu=silu, **sizes, **options,
        )  # fmt: skip
    return output


def _launch(width: int, decoding: bool) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes of a program, and its warps and stages."""
    tile = {"tokens": 1, "block": DECODE_BLOCK} if decoding else {"tokens": TOKENS, "block": BLOCK}
    sizes = {"width": width, "window": max(1, triton.next_power_of_2(width - 1)), **tile}
    return sizes, {"num_warps": 4, "num_stages": 1}


def compiled_for(dim: int, value_dim: int, shared: int) -> list[Variant]:  # noqa: ARG001
    """The launches of bfloat16 models with windows of two or three inputs, whatever the size of heads."""
    types = dict.fromkeys(("output", "x", "weight", "bias", "windows"), "*bf16") | {
        "slots": "*i64:8",
        "table": "*i64:8",
    }
    types |= {"kept": "i32", "by_token": "i32:16", "channels": "i32:16"}
    variants = []
    for width, silu, bias in ((4, True, False), (4, True, True), (3, False, False)):
        for other in ("table", "slots"):
            sizes, options = _launch(width, other == "table")
            constants = {**sizes, "silu": silu, other: None} | ({} if bias else {"bias": None})
            variants.append(variant(_convolve, types, constants, options))
    return variants
