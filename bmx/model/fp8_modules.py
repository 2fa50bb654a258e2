"""Linear layers with float8 weights, whose inputs are rounded to 8-bit floats as well (W8A8). Knows torch's modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bmx.kernels import fp8
from bmx.kernels.fp8_products import product, round_rows
from bmx.kernels.linear import Linear
from bmx.model.forwards import linear_layers


class Fp8Linear(nn.Module):
    """A linear layer with weights in float8_e4m3fn, a scale for each output, and one for each token's inputs.

    The number type is that of "FP8 Formats for Deep Learning" (arXiv 2209.05433, section 3).
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scales = round_rows(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    @property
    def layer(self) -> Linear:
        """The layer as kernels see it."""
        return Linear(weight=self.codes, bias=self.bias, scales=self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return product((self.layer,))(x)[0]


def quantise(model: Any) -> int:
    """Replace a model's linear layers, but for the output head, by float8 ones; returns how many there were."""
    count = 0
    for parent, name, child in linear_layers(model):
        if fp8.takes(child.out_features, child.in_features):
            setattr(parent, name, Fp8Linear(child))
            count += 1
    return count
