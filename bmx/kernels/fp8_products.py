"""Linear layers in 8-bit floats: rows of weights and of inputs are rounded to float8_e4m3fn, with a scale for each row.

``torch._scaled_mm`` multiplies with scales of rows on GPUs of compute capability 9.0 by cuBLAS, on others by CUTLASS.
Where that is refused, or not to be trusted, it multiplies without scales, and they follow. Knows tensors only.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bmx.kernels.linear import Linear

MOST = 448.0  # the greatest number of the type
LEAST = 1e-30  # of a row's greatest number, so that rows of zeros have a scale
WRONG = 0.1  # far off, in sums of 32 products of numbers up to 1: no rounding
ADA = (8, 9)
REFUSED = (
    "not_supported",
    "not currently supported",
    "cutlass cannot",
)  # what torch's errors say of sizes, libraries or GPUs
Round = Callable[[Tensor], tuple[Tensor, Tensor]]

_by_tensor: set[tuple[int, int, int]] = set()  # sizes that are multiplied without scales of rows


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, I] in float8, and the scales [N] float32 by which they are multiplied."""
    wide = x.float()
    scales = wide.abs().amax(1).clamp(min=LEAST) / MOST
    return (wide / scales.unsqueeze(1)).to(torch.float8_e4m3fn), scales


def product(layers: tuple[Linear, ...], rounded: Round = round_rows) -> Callable[[Tensor], list[Tensor]]:
    """The function that computes layers with float8 weights: x [..., I] -> [..., O] of each.

    Args:
        layers: their weights.
        rounded: rounds the rows of x, as ``round_rows`` does.
    """

    def compute(x: Tensor) -> list[Tensor]:
        codes, scales = rounded(x.reshape(-1, x.shape[-1]))
        return [multiply(codes, scales, layer, x.dtype).view(*x.shape[:-1], -1) for layer in layers]

    return compute


def multiply(codes: Tensor, scales: Tensor, layer: Linear, dtype: torch.dtype) -> Tensor:
    """Rounded rows times a layer: [N, O].

    Args:
        codes: [N, I] float8.
        scales: [N] float32, of the rows.
        layer: the layer.
        dtype: of the result.
    """
    if layer.scales is None:
        raise ValueError("the layer has no float8 weights")
    weight, by_row, by_output = layer.weight.t(), scales.unsqueeze(1), layer.scales.unsqueeze(0)
    sizes = (len(codes), *layer.weight.shape)
    if sizes not in _by_tensor and not _ignores_streams(codes.device):
        try:
            return torch._scaled_mm(
                codes, weight, by_row, by_output, bias=layer.bias, out_dtype=dtype, use_fast_accum=codes.is_cuda
            )
        except RuntimeError as error:
            if not any(text in str(error).lower() for text in REFUSED):
                raise
            _by_tensor.add(sizes)
    return _scaled_after(codes, weight, by_row, by_output, layer.bias, dtype)


def failure(device: torch.device) -> str:
    """Why products of float8 numbers fail on a device; empty if they do not.

    Args:
        device: where they are to be computed.
    """
    x = torch.linspace(-1, 1, 16 * 32, device=device).view(16, 32)
    codes, scales = round_rows(x)
    rounded = codes.float() * scales.unsqueeze(1)
    layer = Linear(weight=codes, bias=None, scales=scales)
    try:
        off = multiply(codes, scales, layer, torch.bfloat16).float() - rounded @ rounded.t()
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    return "" if bool(off.abs().max() < WRONG) else "its products of 8-bit floats are wrong"


def _scaled_after(
    codes: Tensor, weight: Tensor, by_row: Tensor, by_output: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same with scales that follow the product; its numbers are within the range of bfloat16."""
    one = torch.ones((), device=codes.device)
    y = torch._scaled_mm(codes, weight, one, one, out_dtype=dtype, use_fast_accum=codes.is_cuda)
    y.mul_(by_row).mul_(by_output)
    return y if bias is None else y.add_(bias)


def _ignores_streams(device: torch.device) -> bool:
    """Whether products with scales of rows run on the default stream, whatever the current one is.

    So they do on Ada before torch 2.12: their inputs may not be there yet, and they cannot be captured.
    """
    if device.type != "cuda":
        return False
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return torch.cuda.get_device_capability(device) == ADA and version < (2, 12)
