"""What kernels do at once in a layer whose keys are scaled by channel, where they can. Knows slots and vectors.

Shapes: N packed tokens of a step, T tokens of a chunk, H query heads, K kv heads, P rows in use,
D key dim, E value dim.
"""

from __future__ import annotations

from torch import Tensor

from bmx.engine.layer_inputs import LayerInputs
from bmx.engine.packed import DecodeBatch
from bmx.kernels.contract import Capabilities, KernelModule
from bmx.kernels.slot_views import ChannelRows
from bmx.kv.pool import KVPool, LayerSlots


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


def decode_tokens(
    kernels: KernelModule, rows: ChannelRows, batch: DecodeBatch, output: Tensor, inputs: LayerInputs
) -> bool:
    """Store one token per slot, and let each attend to its slot; False, with nothing done, if kernels cannot.

    Args:
        kernels: of the device.
        rows: the layer's slots, of all groups; written.
        batch: the decoding tokens, the first of the packed ones.
        output: [N, H, E]; written.
        inputs: of all packed tokens.
    """
    own = slice(len(batch.slots))
    tokens = output[own], inputs.query[own], inputs.key[own], inputs.value[own]
    return kernels.decode_by_channel(*tokens, rows, batch.slots, batch.positions, **inputs.options)


def layers_by_channel(pool: KVPool, capabilities: Capabilities) -> list[ChannelRows | None]:
    """By layer, its slots, where kernels may do the decoding tokens' whole part; else None."""
    found: list[ChannelRows | None] = []
    for layer, rows in enumerate(pool.channel_rows):
        layout = pool.layer(0, layer)[0].layout
        plain = layout.owner == layer == layout.last_reader and layout.recall is None
        found.append(rows if plain and capabilities.decodes_by_channel(*layout.formats) else None)
    return found
