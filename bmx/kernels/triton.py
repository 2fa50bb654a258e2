"""Kernels for NVIDIA GPUs, written in Triton: all decoding tokens of a layer in one launch, all prompt chunks in a few.

Implements ``contract.KernelModule``; knows tensors only. Single slots and large products are left to torch. No kernel
uses atomics, so that repeated runs are equal to the last bit, and none makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bmx.kernels import fp8_products, reference
from bmx.kernels.linear import Linear, as_one
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.slot_views import Chunks, Rows
from bmx.kernels.triton_channel_decode import decode_by_channel
from bmx.kernels.triton_channels import append_by_channel, read_by_channel
from bmx.kernels.triton_convolve import convolve
from bmx.kernels.triton_decode import decode_step
from bmx.kernels.triton_delta_rule import delta_rule
from bmx.kernels.triton_draw import draw
from bmx.kernels.triton_evict import evict, fits
from bmx.kernels.triton_fp8 import round_rows
from bmx.kernels.triton_operands import reads
from bmx.kernels.triton_pointwise import gate, gated_norm, offset_norm, rms_norm, rotate
from bmx.kernels.triton_prefill import add_up, attend, attend_chunk
from bmx.kernels.triton_state_space import state_space

__all__ = [
    "append_by_channel",
    "attend_chunk",
    "attend_slots",
    "convolve",
    "decode_by_channel",
    "decode_step",
    "delta_rule",
    "draw",
    "gate",
    "gated_norm",
    "norm_of_gated",
    "offset_norm",
    "prefill_step",
    "product",
    "read_by_channel",
    "rms_norm",
    "rotate",
    "state_space",
]

attend_slots = reference.attend_slots
norm_of_gated = reference.norm_of_gated


def prefill_step(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    chunks: Chunks,
    *,
    scale: float,
    order: EvictionOrder,
    ranking: Callable[[Tensor | None], Tensor] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> bool:
    """See ``contract.KernelModule.prefill_step``.

    It declines a negative scale, shared rows, and too many rows to choose from.
    """
    if scale <= 0 or chunks.shared or not reads(rows) or not fits(rows, chunks):
        return False
    scored = rows.mass is not None and any(chunks.may_evict(rows))
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": order.window}
    logsums = query.new_empty(query.shape[:2], dtype=torch.float32) if scored else None
    attend(output, query, key, value, rows, chunks, sinks=sinks, logsums=logsums, **options)
    options |= {"distance": order.distance, "power": order.power}
    sums = None if logsums is None else add_up(query, key, rows, chunks, logsums, **options)
    ranks = None if ranking is None else ranking(sums)
    return evict(key, value, rows, chunks, sums, ranks, order=order)


def product(layers: tuple[Linear, ...], gated: bool = False) -> Callable[[Tensor], list[Tensor]]:
    """See ``contract.KernelModule.product``: torch multiplies; rounding and the gate are kernels.

    Layers whose weights lie one after another are one product, whose outputs are views of each layer's columns.
    """
    together = as_one(layers) if len(layers) > 1 else None
    factors = layers if together is None else (together,)
    in_float8 = layers[0].weight.dtype == torch.float8_e4m3fn
    multiply = fp8_products.product(factors, round_rows) if in_float8 else reference.product(factors)
    columns = [len(layer.weight) for layer in layers]

    def compute(x: Tensor) -> list[Tensor]:
        outputs = multiply(x)
        if together is not None:
            outputs = list(torch.split(outputs[0], columns, dim=-1))
        return [gate(*outputs)] if gated else outputs

    return compute
