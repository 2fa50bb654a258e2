"""A linear layer as kernels see it: its weights, as they are or in bytes. Knows tensors; computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linear:
    """Weights of a linear layer.

    Attributes:
        weight: [O, I], in the model's type or in int8; bias [O] or None.
        scales: [O] float32, of weights in int8; None for others.
        sums: [O] int32, of each row of weights in int8: what the zero of an input that is no code of 0 adds up to.
    """

    weight: Tensor
    bias: Tensor | None
    scales: Tensor | None = None
    sums: Tensor | None = None
