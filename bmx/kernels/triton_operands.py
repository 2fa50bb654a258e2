"""Operands of Triton kernels that belong together, as one argument each; and their types, for compiling ahead of time.

Triton specialises what is inside of a tuple by value and alignment: an argument that must not be specialised is one of
its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from bmx.kernels.slot_views import Rows


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


def packed(tensor: Tensor) -> Packed:
    """Vectors of packed tokens, each of them contiguous."""
    return Packed(tensor, tensor.stride(0), tensor.stride(1))


def slot_rows(rows: Rows) -> SlotRows:
    """All that kernels take of a layer's slots."""
    return SlotRows(rows.keys, rows.values, rows.positions, rows.mass)


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
