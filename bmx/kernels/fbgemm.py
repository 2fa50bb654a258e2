"""Linear layers with int8 weights in FBGEMM, the library of torch's quantised layers. Knows tensors only.

FBGEMM knows one scale for all inputs together. So each row is divided by a scale of its own here, and FBGEMM is given
the quotients with a scale of 1: sums are exact integers, and no number depends on the rows beside it.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bmx.kernels.int8 import packed_bytes
from bmx.kernels.linear import Linear

ENGINE = "fbgemm"
MOST = 255  # the greatest code of an input
MOST_HALVED = 127  # the greatest without VNNI: there two products are added in 16 bits, which saturate


class PackedLinear:
    """A linear layer in the form that FBGEMM reads; of the codes that it is made from, it keeps none.

    Attributes:
        nbytes: bytes that it takes beside the bias.
    """

    def __init__(self, layer: Linear) -> None:
        if layer.scales is None or layer.sums is None:
            raise ValueError("the layer has no int8 weights")
        self._packed = _pack(layer.weight, layer.scales)
        self._shift = layer.scales * layer.sums  # [O]
        self._bias = layer.bias
        self.nbytes = packed_bytes(*layer.weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O], in the type of x; each row of x is rounded to 8 bits, without VNNI to 7."""
        rows = x.reshape(-1, x.shape[-1]).float()
        steps, zeros = row_scales(rows, most_code())
        y = _multiply(rows.div(steps).add_(zeros), self._packed)
        y.addcmul_(zeros, self._shift, value=-1).mul_(steps)
        if self._bias is not None:
            y.add_(self._bias)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def row_scales(rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Steps and zeros [N, 1] of rows [N, I] float32: a row is about ``step * (code - zero)``, codes 0 .. ``most``.

    Zero is one of the codes' numbers, and itself a code.
    """
    least, greatest = rows.amin(1, keepdim=True).clamp_(max=0), rows.amax(1, keepdim=True).clamp_(min=0)
    steps = greatest.sub_(least).clamp_(min=1e-30).div_(most)
    return steps, least.div_(steps).neg_().round_()


@cache
def most_code() -> int:
    """The greatest code of an input whose sums FBGEMM gets right on this processor."""
    weight = torch.full((32, 64), MOST_HALVED, dtype=torch.int8)
    sums = _multiply(torch.full((1, 64), float(MOST)), _pack(weight, torch.ones(32)))
    return MOST if bool((sums == 64 * MOST * MOST_HALVED).all()) else MOST_HALVED


def _multiply(levels: Tensor, packed: Any) -> Tensor:
    """Levels [N, I] float32, rounded to codes, times weights: [N, O] float32."""
    y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(levels, 1.0, 0, packed)
    return y


def _pack(codes: Tensor, scales: Tensor) -> Any:
    """Weights [O, I] int8 and their scales [O] as FBGEMM reads them."""
    engines: Any = torch.backends.quantized
    before, zeros = engines.engine, torch.zeros(len(codes), dtype=torch.long)
    with warnings.catch_warnings(action="ignore"):  # torch 2.13 says that a later one will have no quantised tensors
        weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
    try:
        engines.engine = ENGINE
        return torch.ops.quantized.linear_prepack(weight, None)
    finally:
        engines.engine = before
