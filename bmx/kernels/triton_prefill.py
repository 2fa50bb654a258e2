"""Attention of prompt chunks on a GPU, all chunks of a step at once, and its column sums: how kernels are launched.

Knows tensors only, and reads none on the host. The kernels are in ``triton_attention``.

Shapes: T packed tokens, N chunks, H query heads, K kv heads, R rows of all slots and heads, P rows in use of a slot,
D key dim, E value dim, M sums of attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from bmx.kernels import reference
from bmx.kernels.formats import MODEL
from bmx.kernels.registry import interpreted
from bmx.kernels.slot_views import Chunks, Rows
from bmx.kernels.transfer import upload
from bmx.kernels.triton_attention import Sizes, attend_kernel, sums_kernel
from bmx.kernels.triton_operands import (
    BF16_TOKENS,
    MOST_SHARED,
    SlotRows,
    Variant,
    packed,
    shared_memory,
    slot_rows,
    stored_rows,
    variant,
)
from bmx.kernels.triton_vectors import in_parts

INTERPRETED = interpreted()


@dataclass(frozen=True, slots=True)
class Launch:
    """Rows of a tile of queries, keys of a tile, and the warps and pipeline stages of a program."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """As Triton takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def _launch_attention(dim: int, value_dim: int, itemsize: int, shared: int, decodes: bool = False) -> Launch:
    """How attention is launched.

    Args:
        dim: D.
        value_dim: E.
        itemsize: bytes of a number of the model's type.
        shared: bytes of shared memory that a block may have.
        decodes: whether slots store codes. Tiles that are decoded in registers cannot be loaded ahead, so several small
            programs share a multiprocessor and wait by turns.
    """
    if INTERPRETED:
        return Launch(32, 16, 4, 1)
    if itemsize == 4:  # no tensor cores
        return Launch(32, 32, 8, 1)
    wide, ample = max(dim, value_dim) > 128, shared >= MOST_SHARED
    if decodes:
        return Launch(64, 32, 8, 1) if wide else Launch(64, 64 if ample else 32, 4, 1)
    if not wide:
        return Launch(128, 64, 8, 3)
    return Launch(128, 64 if dim + value_dim <= 320 else 32, 8, 2) if ample else Launch(64, 32, 8, 2)


def _launch_sums(dim: int, itemsize: int, shared: int) -> Launch:
    """How column sums are launched: of keys of D numbers, with this much shared memory of a block."""
    if INTERPRETED:
        return Launch(16, 32, 4, 1)
    if itemsize == 4:
        return Launch(32, 32, 8, 1)
    if dim <= 192:
        return Launch(64, 128, 8, 3 if dim <= 128 else 2)
    return Launch(64, 128, 8, 2) if shared >= MOST_SHARED else Launch(32, 64, 4, 2)


def attend(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    chunks: Chunks,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    logsums: Tensor | None = None,
) -> None:
    """Prompt chunks attend to their slots' rows in use, and causally to themselves.

    Args:
        output: [T, H, E], contiguous; only the chunks' tokens are written.
        query: [T, H, D], of all packed tokens, each vector contiguous.
        key: [T, K, D], of all packed tokens, each vector contiguous.
        value: [T, K, E], of all packed tokens, each vector contiguous.
        rows: the layer's slots.
        chunks: the prompt chunks.
        scale: factor of the dot products, positive.
        softcap: as in ``contract.KernelModule.attend_chunk``.
        sinks: [H], as in ``contract.KernelModule.attend_chunk``.
        window: newest keys that a query sees, or None.
        logsums: [T, H] float32; written: logarithms to base 2 of the sums of exponentials, sinks included.
    """
    if not chunks.lengths:
        return
    kv_heads, width = value.shape[1:]
    decodes = rows.formats != (MODEL, MODEL)
    launch = _launch_attention(query.shape[2], width, query.element_size(), shared_memory(), decodes)
    sizes = _sizes(query.shape[1], kv_heads, query.shape[2], width, softcap, window, launch, *rows.formats)
    tiles = triton.cdiv(max(chunks.lengths) * sizes.group, launch.block_m)
    attend_kernel[tiles, kv_heads, len(chunks.lengths)](
        *(output, logsums, packed(query), packed(key), packed(value)),
        *(_slot_rows(rows, window, mass=None), *_row_strides(rows), sinks),
        *(rows.first, rows.capacity, chunks.table, chunks.table.stride(0), *_factors(scale, softcap), sizes),
        **launch.options,
    )


def add_up(
    query: Tensor,
    key: Tensor,
    rows: Rows,
    chunks: Chunks,
    logsums: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    distance: int = 0,
    power: int = 1,
) -> Tensor:
    """Add the attention that slot rows in use receive from their chunk to their mass, which decays first.

    Chunks whose sequences never evict are left out: 0 for their own keys.

    Args:
        query: [T, H, D], of all packed tokens.
        key: [T, K, D], of all packed tokens.
        rows: the layer's slots, with mass; the mass is written.
        chunks: the prompt chunks.
        logsums: [T, H], from ``attend``.
        scale: factor of the dot products, positive.
        softcap: as in ``attend``.
        window: as in ``attend``.
        distance: as in ``ranking.EvictionOrder``.
        power: as in ``ranking.EvictionOrder``.

    Returns:
        [K, T] float32, the attention that the chunks' own keys receive; undefined for other tokens.
    """
    own = torch.empty(key.shape[1], key.shape[0], dtype=torch.float32, device=key.device)
    if chunks.lengths:
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window, "distance": distance}
        _add_up(own, rows.mass, query, key, rows, chunks, logsums, chunks.query_weights, power=power, **options)
    return own


def _add_up(
    own: Tensor,
    mass: Tensor | None,
    query: Tensor,
    key: Tensor,
    rows: Rows,
    chunks: Chunks,
    logsums: Tensor,
    query_weights: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    distance: int = 0,
    power: int = 1,
) -> None:
    """Add up attention with one set of query weights; without mass, ``own`` [K, P + T] takes sums of slot rows too."""
    heads, dim = query.shape[1:]
    launch = _launch_sums(dim, query.element_size(), shared_memory())
    sizes = _sizes(heads, key.shape[1], dim, dim, softcap, window, launch, rows.key_format)
    past = max(min(start, limit, rows.largest) for start, limit in zip(chunks.starts, chunks.row_limits, strict=True))
    past_tiles, own_tiles = (triton.cdiv(keys, launch.block_n) for keys in (past, max(chunks.lengths)))
    sums_kernel[past_tiles + own_tiles, key.shape[1], len(chunks.lengths)](
        *(own, packed(query), packed(key)),
        *(_slot_rows(rows, window or distance, mass)._replace(value=None, value_scales=None), _row_strides(rows)[0]),
        *(logsums, query_weights, chunks.decay, rows.first, rows.capacity, chunks.table, chunks.table.stride(0)),
        *(past_tiles, own.stride(0), *_factors(scale, softcap), distance, power, sizes),
        **launch.options,
    )


def attend_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    hidden: Tensor | None = None,
    query_weights: Tensor | None = None,
    squares: bool = False,
    past_places: Tensor | None = None,
    distance: int = 0,
    power: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """See ``contract.KernelModule.attend_chunk``; the specification computes it where a mask hides keys."""
    options: dict[str, Any] = {"scale": scale, "softcap": softcap}
    if hidden is not None:
        options |= {"sinks": sinks, "hidden": hidden, "query_weights": query_weights, "squares": squares}
        far: dict[str, Any] = {"past_places": past_places, "distance": distance, "power": power}
        return reference.attend_chunk(query, key, value, past_key, past_value, **options, **far)
    tokens, heads, _ = query.shape
    rows, chunks = _one_slot(past_key, past_value, past_places if distance else None, tokens)
    output = value.new_empty(tokens, heads, value.shape[-1])
    if query_weights is None:
        attend(output, query, key, value, rows, chunks, sinks=sinks, **options)
        return output, None
    logsums = torch.empty(tokens, heads, dtype=torch.float32, device=query.device)
    attend(output, query, key, value, rows, chunks, sinks=sinks, logsums=logsums, **options)
    ways = [(weights, power) for weights in query_weights.contiguous()]
    ways += [(query_weights[0].contiguous(), 2)] if squares else []
    shape = len(ways), key.shape[1], past_key.shape[1] + tokens
    sums = torch.empty(shape, dtype=torch.float32, device=query.device)
    for own, (weights, raised) in zip(sums, ways, strict=True):
        _add_up(own, None, query, key, rows, chunks, logsums, weights, distance=distance, power=raised, **options)
    return output, sums


def _slot_rows(rows: Rows, positions: int | None, mass: Tensor | None) -> SlotRows:
    """A layer's slots with this mass; with positions if they are needed."""
    return slot_rows(rows)._replace(positions=rows.positions if positions else None, mass=mass)


def _row_strides(rows: Rows) -> tuple[int, int]:
    """Numbers from one row of keys, and of values, to the next."""
    return rows.keys.stride(0), rows.values.stride(0)


def _one_slot(past_key: Tensor, past_value: Tensor, past_places: Tensor | None, tokens: int) -> tuple[Rows, Chunks]:
    """A slot as ``Rows`` and a chunk for it as ``Chunks``, from a view of the slot's rows in use."""
    kv_heads, past, _ = past_key.shape
    capacity = _rows_of_head(past_key)
    if capacity is None or capacity != _rows_of_head(past_value):
        past_key, past_value, capacity = past_key.contiguous(), past_value.contiguous(), past
    first, capacities = [head * capacity for head in range(kv_heads)], [capacity] * kv_heads
    table = upload([0, tokens, 0, past, past, past + tokens, *first, *capacities], past_key.device)
    positions = table  # unread: no window, and near queries count
    if past_places is not None:  # the kernel subtracts the chunk's start, here ``past``
        positions = torch.nn.functional.pad(past_places + past, (0, capacity - past))
    rows = Rows(
        keys=past_key[0],
        values=past_value[0],
        positions=positions,
        mass=None,
        first=table[6 : 6 + kv_heads].view(1, -1),
        capacity=table[6 + kv_heads :].view(1, -1),
        kv_heads=kv_heads,
        capacities=(tuple(capacities),),
        largest=capacity,
    )
    chunks = Chunks(
        offsets=(0,),
        lengths=(tokens,),
        slots=(0,),
        starts=(past,),
        row_limits=(past,),
        totals=(past + tokens,),
        table=table[:6].view(6, 1),
    )
    return rows, chunks


def _rows_of_head(past: Tensor) -> int | None:
    """Rows from one head of a slot to the next; None if the view cannot be the first rows of a slot's heads."""
    kv_heads, rows, _ = past.shape
    if past.stride(2) != 1:
        return None
    if kv_heads == 1 or rows == 0:
        return rows
    apart, over = divmod(past.stride(0), past.stride(1))
    return apart if not over and apart >= rows else None


@cache
def _sizes(
    heads: int,
    kv_heads: int,
    dim: int,
    width: int,
    softcap: float | None,
    window: int | None,
    launch: Launch,
    key_format: str = MODEL,
    value_format: str = MODEL,
) -> Sizes:
    """Sizes that the kernels are compiled for."""
    return Sizes(
        heads=heads,
        group=heads // kv_heads,
        window=window or 0,
        capped=softcap is not None,
        keys=in_parts(dim, key_format),
        outputs=in_parts(width, value_format),
        block_m=launch.block_m,
        block_n=launch.block_n,
    )


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """The factor of dot products, or of their tanh under a cap; and the factor of dot products before that tanh."""
    to_two = math.log2(math.e)
    return (scale * to_two, 0.0) if softcap is None else (softcap * to_two, 2 * scale / softcap * to_two)


TYPES: dict[str, Any] = {
    **dict.fromkeys(("query", "key", "value"), BF16_TOKENS),
    "output": "*bf16",
    "logsums": "*fp32",
    "decay": "*fp32",
    **dict.fromkeys(("own", "query_weights"), "*fp32:4"),
    **dict.fromkeys(("first", "capacity", "table"), "*i64:8"),
    **dict.fromkeys(("chunks", "past_tiles", "own_head"), "i32"),
    **dict.fromkeys(("keys_row", "values_row"), "i32:16"),
    **dict.fromkeys(("factor", "inner"), "fp32"),
}


def compiled_for(dim: int, value_dim: int, shared: int) -> list[Variant]:
    """The launches of bfloat16 models with 32 heads and 8 kv heads, by the shared memory of a block."""
    plain, far = {"distance": 0, "power": 1}, {"distance": 32, "power": 2}
    coded = {64: ("fp8", "fp8"), 96: ("int4", "int8")}.get(dim, ("int8", "int4"))
    made = [_attention_variant(dim, value_dim, shared, (MODEL, MODEL), {"logsums": None})]
    for formats in ((MODEL, MODEL), coded):
        made += [_attention_variant(dim, value_dim, shared, formats, {}), _sums_variant(dim, shared, formats[0], far)]
    return [*made, _sums_variant(dim, shared, MODEL, plain)]


def _attention_variant(
    dim: int, value_dim: int, shared: int, formats: tuple[str, str], constants: dict[str, Any]
) -> Variant:
    launch = _launch_attention(dim, value_dim, 2, shared, formats != (MODEL, MODEL))
    rows = stored_rows(*formats, positions=False, mass=False)
    constants = {"sizes": _sizes(32, 8, dim, value_dim, None, None, launch, *formats), "sinks": None, **constants}
    return variant(attend_kernel, TYPES | {"slot_rows": rows}, constants, launch.options)


def _sums_variant(dim: int, shared: int, key_format: str, constants: dict[str, Any]) -> Variant:
    launch = _launch_sums(dim, 2, shared)
    rows = stored_rows(key_format, MODEL, positions=constants["distance"] > 0)._replace(value=None)
    constants = {"sizes": _sizes(32, 8, dim, dim, None, None, launch, key_format), **constants}
    return variant(sums_kernel, TYPES | {"slot_rows": rows}, constants, launch.options)
