"""The trial of kernels for keys that are scaled by channel: a chunk is stored, a token decoded, and the slot read.

Shapes: T tokens, K kv heads, H query heads, D key dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bmx.kernels import reference
from bmx.kernels.contract import KernelModule
from bmx.kernels.formats import FORMATS, KEY_GROUP, MODEL, Stored
from bmx.kernels.slot_views import ChannelRows

SLOTS = 2


def results_by_channel(
    module: KernelModule, formats: tuple[str, str], vectors: tuple[Tensor, Tensor, Tensor], options: Mapping[str, Any]
) -> dict[str, Tensor] | None:
    """The last token's output, and the slot's keys and values; None where the kernels leave all of it to the pool.

    Args:
        module: of the kernels; plain torch gives what is expected.
        formats: how keys and values are stored.
        vectors: queries [T, H, D], keys [T, K, D] and values [T, K, E] of a sequence.
        options: scale, softcap and sinks.
    """
    query, key, value = vectors
    if module is reference:
        return _expected(formats, query, key, value, options)
    rows, count = _rows(formats, key, value), len(key)
    if not module.append_by_channel(key[:-1], value[:-1], rows, SLOTS - 1, 0):
        return None
    output = value.new_zeros(SLOTS, *query.shape[1:2], value.shape[-1])
    last = torch.tensor([count - 1, 0], device=key.device)  # the token, and an idle row
    slots = torch.tensor([SLOTS - 1, -1], device=key.device)
    module.decode_by_channel(output, query[last], key[last], value[last], rows, slots, last, **options)
    read = module.read_by_channel(rows, SLOTS - 1, count)
    return None if read is None else {"output": output, "keys": read[0], "values": read[1]}


def _rows(formats: tuple[str, str], key: Tensor, value: Tensor) -> ChannelRows:
    """Empty slots with as many rows as there are tokens."""
    (count, heads, dim), value_dim, device = key.shape, value.shape[-1], key.device
    groups, form = -(-count // KEY_GROUP), FORMATS[formats[0]]
    first = torch.arange(SLOTS * heads, device=device).view(SLOTS, heads)
    exact = SLOTS, heads, KEY_GROUP
    total = SLOTS * heads * groups
    return ChannelRows(
        codes=torch.zeros(total, KEY_GROUP, form.code_bytes(dim), dtype=torch.uint8, device=device),
        scales=torch.zeros(total, dim, 2, dtype=torch.float16, device=device),
        key_format=formats[0],
        values=Stored.zeros(formats[1], (SLOTS * heads * count,), value_dim, value.dtype, device),
        exact_keys=key.new_zeros(*exact, dim),
        exact_values=value.new_zeros(*exact, value_dim),
        exact_rows=torch.full(exact, -1, dtype=torch.int32, device=device),
        first=first * count,
        first_group=first * groups,
        capacity=torch.full_like(first, count),
        largest=count,
    )


def _expected(
    formats: tuple[str, str], query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What formats say: the newest pairs are read exactly, the others as they are decoded."""
    keys, values = key.transpose(0, 1).clone(), value.transpose(0, 1).clone()
    (heads, count, dim), form = keys.shape, FORMATS[formats[0]]
    coded, whole = count - KEY_GROUP, count // KEY_GROUP * KEY_GROUP
    groups = form.encode_groups(keys[:, :whole].reshape(heads, -1, KEY_GROUP, dim))
    keys[:, :coded] = form.decode_groups(*groups, keys.dtype).flatten(1, 2)[:, :coded]
    if formats[1] != MODEL:
        encoded = FORMATS[formats[1]].encode(values[:, :coded])
        values[:, :coded] = FORMATS[formats[1]].decode(*encoded, values.dtype)[..., : values.shape[-1]]
    output, _ = reference.attend_slots(query[-1:], keys.unsqueeze(0), values.unsqueeze(0), **options)
    return {"output": torch.cat([output, torch.zeros_like(output)]), "keys": keys, "values": values}
