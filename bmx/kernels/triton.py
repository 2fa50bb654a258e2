"""Kernels for NVIDIA GPUs, written in Triton: all decoding tokens of a layer in one launch, all prompt chunks in a few.

Knows tensors only; same signatures and results as ``reference``, whose functions serve where there is none here. No
kernel uses atomics, so that repeated runs are equal to the last bit, and none makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bmx.kernels import interpreted, reference
from bmx.kernels.linear import Linear
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.slot_views import Chunks, Rows
from bmx.kernels.triton_decode import decode
from bmx.kernels.triton_evict import fits, keep
from bmx.kernels.triton_pointwise import gate, rms_norm, rotate
from bmx.kernels.triton_prefill import add_up, attend, attend_chunk

__all__ = ["attend_chunk", "attend_slots", "decode", "gate", "product", "read", "rms_norm", "rotate"]

SUPPORTED_DTYPES = (
    () if interpreted() else (torch.bfloat16, torch.float16, torch.float32)
)  # a program for each token takes long
attend_slots = reference.attend_slots


def read(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    chunks: Chunks,
    *,
    scale: float,
    ranking: EvictionOrder,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> bool:
    """The prompt chunks' part of a layer, where ranking is as simple as this: see ``avx512.read``."""
    if scale <= 0 or not fits(rows, chunks):
        return False
    each = zip(chunks.totals, chunks.limits, chunks.slots, strict=True)
    scored = rows.mass is not None and any(total > min(limit, rows.sizes[slot]) for total, limit, slot in each)
    told: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": ranking.window}
    logsums = query.new_empty(query.shape[:2], dtype=torch.float32) if scored else None
    attend(output, query, key, value, rows, chunks, sinks=sinks, logsums=logsums, **told)
    sums = None if logsums is None else add_up(query, key, rows, chunks, logsums, **told)
    return keep(key, value, rows, chunks, sums, ranking=ranking)


def product(layers: tuple[Linear, ...], gated: bool = False) -> Callable[[Tensor], list[Tensor]]:
    """See ``reference.product``: large products are the vendor's business, what follows them is not."""
    plain = reference.product(layers)
    return (lambda x: [gate(*plain(x))]) if gated else plain
