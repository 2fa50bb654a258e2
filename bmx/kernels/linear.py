"""A linear layer as kernels see it: its weights, in one of several types. Knows tensors; computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linear:
    """Weights of a linear layer.

    Attributes:
        weight: [O, I], in the model's type, in int8 or in float8_e4m3fn.
        bias: [O], or None.
        scales: [O] float32, by which a row of int8 or float8 weights is multiplied; None for the model's type.
        sums: [O] int32, sum of each row of int8 weights: corrects for inputs whose zero is not code 0.
    """

    weight: Tensor
    bias: Tensor | None
    scales: Tensor | None = None
    sums: Tensor | None = None


def as_one(layers: Sequence[Linear]) -> Linear | None:
    """Layers of one input as one layer, a view; None if their weights do not lie one after another in memory."""
    columns = [[getattr(layer, name) for layer in layers] for name in ("weight", "bias", "scales")]
    weight, bias, scales = wholes = [_as_one(column) for column in columns]
    apart = any(one is None and any(t is not None for t in column) for one, column in zip(wholes, columns, strict=True))
    return None if weight is None or apart else Linear(weight=weight, bias=bias, scales=scales)


def _as_one(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors with rows as one tensor, a view; None if one is missing, or they do not lie one after another."""
    tensors = [part for part in parts if part is not None and part.is_contiguous()]
    if len(tensors) < len(parts):
        return None
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or tensor.dtype != first.dtype or tensor.storage_offset() != end:
            return None
        end += tensor.numel()
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
