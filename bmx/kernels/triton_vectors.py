"""Vectors as Triton kernels load and store them: in one part or two, in the model's type or in codes with scales.

Two parts are powers of two that need less padding than one (96 = 64 + 32), or the halves of a vector in int4, which lie
in the low and the high bits of its bytes. What codes mean is said in ``formats``, whose numbers are stored here bit for
bit.

Shapes: N vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from bmx.kernels.formats import LARGEST_HALF, MODEL, SMALLEST_SCALE

FORMATS = (MODEL, "fp8", "int8", "int4")  # that kernels read and store
LEAST = 16  # numbers of a part: what tensor cores multiply at once
TIES = tl.constexpr(
    1.5 * 2**23
)  # added to a smaller float32 and taken off again, it leaves a whole number, ties to even
LEAST_SCALE = tl.constexpr(SMALLEST_SCALE)
MOST = tl.constexpr(LARGEST_HALF)
INFINITY = tl.constexpr(float("inf"))
OF_HALF = tl.constexpr(
    256.0
)  # a number in float8 over the float16 that has its bits: their exponents begin at 7 and 15
LARGEST_FP8 = tl.constexpr(448.0)
NORMAL_FP8 = tl.constexpr(2.0**-6)  # smaller numbers are multiples of 2^-9


@dataclass(frozen=True)
class Parts:
    """How a vector is loaded and stored.

    Attributes:
        whole: its numbers.
        split: those of the first part.
        low: a power of two that holds the first part.
        high: a power of two that holds the second part; 0 if there is none.
        format: in which slots store it.
    """

    whole: int
    split: int
    low: int
    high: int
    format: str = MODEL

    @property
    def width(self) -> int:
        """Stored numbers, or bytes of codes, of a vector."""
        return self.split if self.format == "int4" else self.whole


def in_one_part(dim: int, form: str = MODEL) -> Parts:
    """A vector of ``dim`` numbers in one part; in int4 in two."""
    if form == "int4":
        half = -(-dim // 2)
        return Parts(dim, half, _power(half), _power(half), form)
    return Parts(dim, dim, _power(dim), 0, form)


def in_parts(dim: int, form: str = MODEL) -> Parts:
    """A vector of ``dim`` numbers in two parts where that needs less padding than one."""
    one = in_one_part(dim, form)
    low = one.low // 2
    high = _power(dim - low)
    return Parts(dim, low, low, high, form) if not one.high and low >= LEAST and low + high < one.low else one


def _power(count: int) -> int:
    return max(LEAST, int(triton.next_power_of_2(count)))


@triton.jit
def _load(base, offsets, valid, begin: tl.constexpr, size: tl.constexpr, stop: tl.constexpr, masked: tl.constexpr):
    """Numbers ``begin`` .. ``stop`` of the vectors at these offsets, in ``size`` columns; zeros outside."""
    columns = begin + tl.arange(0, size)
    at = base + offsets[:, None] + columns[None, :]
    if masked or begin + size > stop:
        part = tl.load(at, mask=valid[:, None] & (columns < stop)[None, :], other=0)
    else:
        part = tl.load(at)
    return part


@triton.jit
def load(base, offsets, valid, parts: tl.constexpr, masked: tl.constexpr):
    """The vectors at these offsets, in two parts (the first one twice if there is one); zeros where not valid."""
    low = _load(base, offsets, valid, 0, parts.low, parts.split, masked)
    high = low
    if parts.high > 0:
        high = _load(base, offsets, valid, parts.split, parts.high, parts.whole, masked)
    return low, high


@triton.jit
def _code_value(codes, parts: tl.constexpr, dtype: tl.constexpr):
    """What bytes of codes stand for; in float8 (e4m3fn), ``OF_HALF`` times less."""
    codes = codes.to(tl.int8, bitcast=True)
    if parts.format == "fp8":  # the sign comes first, then the last seven bits
        codes = ((codes.to(tl.int16) << 7) & -0x4001).to(tl.float16, bitcast=True)
    return codes.to(dtype)


@triton.jit
def load_stored(base, rows, stride, valid, parts: tl.constexpr, masked: tl.constexpr, dtype: tl.constexpr):
    """What slots store of the vectors in these rows, in two parts: numbers of ``dtype``, or codes converted to it."""
    if parts.format == "int4":
        codes = _load(base, rows * stride, valid, 0, parts.low, parts.split, masked)
        low = (codes & 15).to(tl.int8, bitcast=True).to(dtype)
        high = (codes >> 4).to(tl.int8, bitcast=True).to(dtype)
    else:
        low, high = load(base, rows * stride, valid, parts, masked)
        if parts.format != "model":
            low, high = _code_value(low, parts, dtype), _code_value(high, parts, dtype)
    return low, high


@triton.jit
def scales_of_head(scales, begin, parts: tl.constexpr):
    """The address of the scales of a head's vectors, of which the first is in this row; unused without scales."""
    at = begin  # Triton 3.6 cannot return None
    if scales is not None:
        at = scales + begin * (2 if parts.format == "int4" else 1)
    return at


@triton.jit
def load_scales(scales, rows, valid, parts: tl.constexpr):
    """Factor and offset [N] of what ``load_stored`` gives of these rows; 0 where not valid, or where there is none."""
    if parts.format == "int4":
        scale = tl.load(scales + rows * 2, mask=valid, other=0.0).to(tl.float32)
        offset = tl.load(scales + rows * 2 + 1, mask=valid, other=0.0).to(tl.float32)
    else:
        scale = tl.load(scales + rows, mask=valid, other=0.0).to(tl.float32)
        if parts.format == "fp8":
            scale *= OF_HALF
        offset = tl.zeros_like(scale)
    return scale, offset


@triton.jit
def load_decoded(base, scales, rows, stride, valid, parts: tl.constexpr, masked: tl.constexpr, dtype: tl.constexpr):
    """The vectors that slots store in these rows, of ``dtype`` and in two parts."""
    if parts.format == "model":
        low, high = load(base, rows * stride, valid, parts, masked)
    else:
        low, high = load_stored(base, rows, stride, valid, parts, masked, tl.float32)
        scale, offset = load_scales(scales, rows, valid, parts)
        low = (low * scale[:, None] + offset[:, None]).to(dtype)
        high = (high * scale[:, None] + offset[:, None]).to(dtype)
    return low, high


@triton.jit
def store(base, offsets, valid, low, high, parts: tl.constexpr):
    """Write vectors in two parts, as numbers of the memory's own type."""
    columns = tl.arange(0, parts.low)
    at = base + offsets[:, None] + columns[None, :]
    tl.store(at, low.to(base.dtype.element_ty), mask=valid[:, None] & (columns < parts.split)[None, :])
    if parts.high > 0:
        columns = parts.split + tl.arange(0, parts.high)
        at = base + offsets[:, None] + columns[None, :]
        tl.store(at, high.to(base.dtype.element_ty), mask=valid[:, None] & (columns < parts.whole)[None, :])


@triton.jit
def _rounded(x):
    """Whole numbers next to x, of two as near the even one."""
    return (x + TIES) - TIES


@triton.jit
def _scale(extent, levels: tl.constexpr):
    """[N] float16: the step between two levels."""
    return tl.minimum(tl.maximum(tl.div_rn(extent, levels), LEAST_SCALE), MOST).to(tl.float16)


@triton.jit
def _levels(x, offset, scale):
    """The levels 0 .. 15 next to numbers [N, D]."""
    level = _rounded(tl.div_rn(x - offset.to(tl.float32)[:, None], scale.to(tl.float32)[:, None]))
    return tl.minimum(tl.maximum(level, 0.0), 15.0)


@triton.jit
def to_fp8(x):
    """Codes in float8 (e4m3fn) of float32 numbers up to its largest, rounded to the nearest, of two to the even one."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1) >> 20) - (127 - 7 << 3)  # three bits of 23 stay
    small = _rounded(tl.abs(x) * 512).to(tl.int32)
    return (tl.where(tl.abs(x) < NORMAL_FP8, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def store_encoded(base, scales, rows, valid, low, high, parts: tl.constexpr):
    """Store vectors in rows of slots, in one part (in int4 in two); returns what will be read there, in float32.

    Columns of the parts that the vectors do not fill are zero.
    """
    offsets = rows * parts.width
    low, high = low.to(tl.float32), high.to(tl.float32)
    if parts.format == "model":
        store(base, offsets, valid, low, high, parts)
    if parts.format == "fp8":
        scale = _scale(tl.max(tl.abs(low), 1), LARGEST_FP8)
        wide = scale.to(tl.float32)[:, None]
        codes = to_fp8(tl.minimum(tl.maximum(tl.div_rn(low, wide), -LARGEST_FP8), LARGEST_FP8))
        store(base, offsets, valid, codes, codes, parts)
        tl.store(scales + rows, scale, mask=valid)
        low = _code_value(codes, parts, tl.float32) * (wide * OF_HALF)
        high = low
    if parts.format == "int8":
        scale = _scale(tl.max(tl.abs(low), 1), 127.0)
        wide = scale.to(tl.float32)[:, None]
        low = _rounded(tl.minimum(tl.maximum(tl.div_rn(low, wide), -127.0), 127.0))
        store(base, offsets, valid, low.to(tl.int8).to(tl.uint8, bitcast=True), low, parts)
        tl.store(scales + rows, scale, mask=valid)
        low = low * wide
        high = low
    if parts.format == "int4":
        inside, within = tl.arange(0, parts.low) < parts.split, tl.arange(0, parts.high) < parts.whole - parts.split
        inside, within = inside[None, :], within[None, :]
        least = tl.minimum(tl.min(tl.where(inside, low, INFINITY), 1), tl.min(tl.where(within, high, INFINITY), 1))
        most = tl.maximum(tl.max(tl.where(inside, low, -INFINITY), 1), tl.max(tl.where(within, high, -INFINITY), 1))
        scale, offset = _scale(most - least, 15.0), tl.minimum(tl.maximum(least, -MOST), MOST).to(tl.float16)
        low, high = _levels(low, offset, scale), tl.where(within, _levels(high, offset, scale), 0.0)
        codes = low.to(tl.int32) | (high.to(tl.int32) << 4)
        at = base + offsets[:, None] + tl.arange(0, parts.low)[None, :]
        tl.store(at, codes.to(tl.uint8), mask=valid[:, None] & inside)
        tl.store(scales + rows * 2, scale, mask=valid)
        tl.store(scales + rows * 2 + 1, offset, mask=valid)
        low = low * scale.to(tl.float32)[:, None] + offset.to(tl.float32)[:, None]
        high = high * scale.to(tl.float32)[:, None] + offset.to(tl.float32)[:, None]
    return low, high
