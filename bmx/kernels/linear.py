"""A linear layer as kernels see it: weights in the model's type, in int8 or in float8. Knows tensors only."""

from __future__ import annotations

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
