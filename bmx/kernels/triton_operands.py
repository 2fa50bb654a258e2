"""Operands of Triton kernels that belong together, as one argument each; and their types, for compiling ahead of time.

Triton specialises what is inside of a tuple by value and alignment: an argument that must not be specialised is one of
its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmx.kernels.formats import MODEL
from bmx.kernels.slot_views import Rows
from bmx.kernels.triton_vectors import FORMATS

LEAST_SHARED = 99 * 1024  # bytes of shared memory that a block may have on GPUs of compute capability 8.6, 8.9 and 12
MOST_SHARED = 227 * 1024  # on those of 9.0 and 10.0; on 8.0 it is 163 KB


@cache
def shared_memory() -> int:
    """Bytes of shared memory that a block may have on the current GPU; without one, the most that any GPU has."""
    if not torch.cuda.is_available():
        return MOST_SHARED
    return getattr(torch.cuda.get_device_properties(), "shared_memory_per_block_optin", LEAST_SHARED)


class Packed(NamedTuple):
    """Vectors of packed tokens [T, heads, dim], and their strides in numbers."""

    data: Any
    token: Any
    head: Any


class SlotRows(NamedTuple):
    """``Rows`` as kernels take it; None where a kernel does not need it. Triton's tuples have ``values`` already."""

    key: Any
    value: Any
    positions: Any = None
    mass: Any = None
    key_scales: Any = None
    value_scales: Any = None
    ranks: Any = None


def packed(tensor: Tensor) -> Packed:
    """Vectors of packed tokens, each of them contiguous."""
    return Packed(tensor, tensor.stride(0), tensor.stride(1))


def slot_rows(rows: Rows) -> SlotRows:
    """All that kernels take of a layer's slots."""
    return SlotRows(rows.keys, rows.values, rows.positions, rows.mass, rows.key_scales, rows.value_scales, rows.ranks)


def reads(rows: Rows) -> bool:
    """Whether kernels know the formats of these rows."""
    return set(FORMATS).issuperset(rows.formats)


def stored_rows(
    key_format: str, value_format: str, positions: bool = True, mass: bool = True, ranks: bool = False
) -> SlotRows:
    """Types of the rows of a bfloat16 model."""
    (key, key_scales), (value, value_scales) = (
        ("*bf16", None) if form == MODEL else ("*u8", "*fp16") for form in (key_format, value_format)
    )
    types = SlotRows(key, value, "*i32" if positions else None, "*fp32" if mass else None)
    return types._replace(key_scales=key_scales, value_scales=value_scales, ranks="*fp32" if ranks else None)


BF16_TOKENS = Packed("*bf16", "i32:16", "i32:16")


class Variant(NamedTuple):
    """One launch of a kernel, to be compiled ahead of time.

    Attributes:
        kernel: the Triton function.
        types: of its arguments, by name: ``constexpr``, or Triton's name for the type, with the number that addresses
            and numbers are divisible by after a colon; addresses without one are divisible by 16, numbers by 1. A tuple
            of those for a tuple; in it, None is None.
        constants: values of the ``constexpr`` arguments.
        warps: of a program.
        stages: of a pipeline.
    """

    kernel: Any
    types: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int
    stages: int


def variant(kernel: Any, types: Mapping[str, Iterable[str]], constants: Mapping[str, Any], launch: Any) -> Variant:
    """A launch whose constants are given, and whose other arguments have these types."""
    chosen = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    return Variant(kernel, chosen, constants, launch["num_warps"], launch["num_stages"])
