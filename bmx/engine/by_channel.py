"""What kernels do at once in a layer whose keys are scaled by channel, where they can. Knows slots and vectors.

Shapes: T tokens of a chunk, B decoding tokens, H query heads, K kv heads, P rows in use,
D key dim, E value dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bmx.engine.packed import DecodeGroup
from bmx.kernels.contract import KernelModule
from bmx.kv.pool import LayerSlots


def append_chunk(kernels: KernelModule, part: LayerSlots, slot: int, start: int, key: Tensor, value: Tensor) -> bool:
    """Store a prompt chunk; False, with nothing done, if kernels cannot.

    Args:
        kernels: of the device.
        part: the layer's slots; written.
        slot: of them.
        start: position of the first token.
        key: [T, K, D].
        value: [T, K, E].
    """
    rows = part.channel_rows
    if rows is None or not kernels.append_by_channel(key, value, rows, slot, start):
        return False
    if part.index is not None:
        part.index.append(slot, start, key.transpose(0, 1))
    return True


def read_slot(kernels: KernelModule, part: LayerSlots, slot: int, rows: int) -> tuple[Tensor, Tensor]:
    """The rows of a slot that are in use: keys [K, P, D] and values [K, P, E].

    Args:
        kernels: of the device; the pool reads what they do not.
        part: the layer's slots.
        slot: of them.
        rows: how many are in use (P).
    """
    read = None if part.channel_rows is None else kernels.read_by_channel(part.channel_rows, slot, rows)
    return part.read(slot, rows) if read is None else read


def decode_group(
    kernels: KernelModule, part: LayerSlots, group: DecodeGroup, tokens: tuple[Tensor, Tensor, Tensor], **options: Any
) -> Tensor | None:
    """Store one token per slot, and let each attend to its slot; None, with nothing done, if kernels cannot.

    Args:
        kernels: of the device.
        part: the layer's slots; written.
        group: the decoding tokens.
        tokens: their queries [B, H, D], keys [B, K, D] and values [B, K, E].
        options: scale, softcap and sinks.

    Returns:
        [B, H, E].
    """
    rows, layout, (query, key, value) = part.channel_rows, part.layout, tokens
    if rows is None or layout.owner != layout.last_reader or layout.recall is not None:
        return None
    output = query.new_empty(*query.shape[:2], value.shape[-1])
    numbers = group.slots, group.positions
    return output if kernels.decode_by_channel(output, query, key, value, rows, *numbers, **options) else None
