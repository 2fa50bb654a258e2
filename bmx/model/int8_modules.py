"""Linear layers with int8 weights, whose inputs are rounded to 8 bits as well (W8A8). Knows torch's modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bmx.kernels import Kernels, int8, reference
from bmx.kernels.fbgemm import PackedLinear
from bmx.kernels.linear import Linear
from bmx.model.forwards import linear_layers


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one code after another, as compiled kernels read them.

    A scale per output for weights, a scale and a zero per token for inputs: the vector-wise quantisation of LLM.int8
    (arXiv 2208.07339, section 2.1), without its outliers.
    """

    codes: Tensor
    scales: Tensor
    sums: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1).clamp(min=1e-30) / 127
        self.register_buffer("codes", (weight / scales.unsqueeze(1)).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("sums", self.codes.sum(1, dtype=torch.int32))
        self.bias = linear.bias

    @property
    def layer(self) -> Linear:
        """The layer as kernels see it."""
        return Linear(weight=self.codes, bias=self.bias, scales=self.scales, sums=self.sums)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return reference.product((self.layer,))(x)[0]


class LibraryInt8Linear(nn.Module):
    """A linear layer with the same int8 weights, as torch's library FBGEMM reads them.

    Attributes:
        packed_bytes: bytes of the weights, which are no tensor of torch's.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._packed = PackedLinear(Int8Linear(linear).layer)
        self.bias = linear.bias
        self.packed_bytes = self._packed.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return self._packed(x)


def quantise(model: Any, kernels: Kernels) -> int:
    """Replace a model's linear layers, but for the output head, by int8 ones; returns how many there were.

    A layer that neither the kernels nor FBGEMM multiply faster than torch does in the model's own type stays as it is.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    by_library = not int8.why_no_library(dtype)
    count = 0
    for parent, name, child in linear_layers(model):
        if int8.takes(kernels.capabilities, dtype, child.out_features, child.in_features):
            setattr(parent, name, Int8Linear(child))
        elif by_library and child.weight.numel() >= int8.LEAST_WEIGHTS:
            setattr(parent, name, LibraryInt8Linear(child))
        else:
            continue
        count += 1
    return count
