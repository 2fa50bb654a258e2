"""Kernels compiled for this processor: attention and linear layers in bfloat16, and products of int8 weights.

Implements ``contract.KernelModule``, what mixers call in ``compiled_mixers``; knows tensors, and which of them the C++
beside it takes. Linear layers, norms and rotations of other types and of sizes that fill no register go to
``reference``. Attention of other types, of sizes that are no multiple of 32, with capped scores, squares or a negative
scale goes to ``cpu``; fused steps decline it, and KV pairs in formats other than int8 and int4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bmx import hardware
from bmx.kernels import build, cpu, reference
from bmx.kernels.compiled_library import (
    FORMATS,
    Library,
    address,
    channel_rows_of,
    layers_of,
    order_of,
    stored_of,
    vectors_of,
)
from bmx.kernels.compiled_mixers import CompiledMixers
from bmx.kernels.formats import MODEL, Stored
from bmx.kernels.linear import Linear
from bmx.kernels.ranking import FORMULAS, EvictionOrder
from bmx.kernels.scores import out_of_window
from bmx.kernels.slot_views import ChannelRows, Chunks, Rows, SharedRows, query_heads

WORD = 32  # bfloat16 numbers, or columns, that are computed together
COLUMNS = 16
MOST_CODES = 512  # of a vector: sums of products with 16-bit numbers stay within 32 bits


class CompiledKernels(CompiledMixers):
    """The kernels compiled for one instruction set: implements ``contract.KernelModule``.

    Args:
        name: of the set, one of ``SETS``.

    Raises:
        RuntimeError: this machine cannot have them; ``bmx.kernels.choose`` never chooses them there.
    """

    def __init__(self, name: str) -> None:
        library = build.library(name)
        if isinstance(library, str):
            raise RuntimeError(f"there are no kernels compiled for {name}: {library}")
        super().__init__(Library(library))

    def product(self, layers: tuple[Linear, ...], gated: bool = False) -> _Product:
        """See ``contract.KernelModule.product``."""
        return _Product(self._library, layers, gated)

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """See ``contract.KernelModule.gate``."""
        return reference.gate(gate, up)

    def draw(self, logits: Tensor, rows: Tensor, sampling: Tensor) -> Tensor:
        """See ``contract.KernelModule.draw``."""
        return reference.draw(logits, rows, sampling)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """See ``contract.KernelModule.rms_norm``."""
        inner = len(weight)
        if not (x.dtype == weight.dtype == torch.bfloat16 and inner % COLUMNS == 0):
            return reference.rms_norm(x, weight, epsilon)
        x = x.contiguous()
        y = torch.empty_like(x)
        self._library.functions.bmx_rms_norm(
            x.data_ptr(), weight.data_ptr(), y.data_ptr(), epsilon, x.numel() // inner, inner
        )
        return y

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See ``contract.KernelModule.rotate``."""
        dim = x.shape[-1]
        alike = x.dtype == cos.dtype == sin.dtype == torch.bfloat16 and cos.shape[-1] == dim
        if not (alike and dim % (2 * COLUMNS) == 0 and x.shape[0] == cos.shape[0] == 1 and x.stride(-1) == 1):
            return reference.rotate(x, cos, sin)
        cos, sin = cos.contiguous(), sin.contiguous()
        _, heads, tokens, _ = x.shape
        y = x.new_empty(1, tokens, heads, dim)
        tables = (cos.data_ptr(), sin.data_ptr(), y.data_ptr())
        self._library.functions.bmx_rotate(x.data_ptr(), x.stride(2), x.stride(1), *tables, tokens, heads, dim)
        return y.transpose(1, 2)

    def attend_chunk(
        self,
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
        """See ``contract.KernelModule.attend_chunk``."""
        operands = (query, key, value, past_key, past_value)
        if softcap is not None or squares or scale <= 0 or not all(map(_takes, operands)):
            details: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "hidden": hidden, "squares": squares}
            details |= {"query_weights": query_weights, "past_places": past_places, "power": power}
            details |= {"scale": scale, "distance": distance}
            output, sums = cpu.attend_chunk(*map(_wide, operands), **details)
            return output.to(query.dtype), sums
        slot = Stored(_in_rows(past_key), None, MODEL), Stored(_in_rows(past_value), None, MODEL)
        options: dict[str, Any] = {
            "sinks": sinks,
            "hidden": hidden,
            "query_weights": query_weights,
            "past_places": past_places,
        }
        return self._attend_chunk((query, key, value), slot, past_key.shape[1], scale, distance, power, **options)

    def _attend_chunk(
        self,
        chunk: tuple[Tensor, Tensor, Tensor],
        slot: tuple[Stored, Stored],
        past: int,
        scale: float,
        distance: int,
        power: int,
        other: tuple[tuple[Stored, Stored], int] | None = None,
        **options: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """``attend_chunk`` to the first ``past`` stored rows of a slot's kv heads.

        Args:
            chunk: query, key and value.
            slot: keys and values.
            past: P.
            scale: as in ``attend_chunk``.
            distance: as in ``attend_chunk``.
            power: as in ``attend_chunk``.
            other: keys and values of another slot, and how many of the ``past`` rows are its: they come first.
            options: sinks, hidden, query_weights and past_places, as in ``attend_chunk``.
        """
        query, key, value = chunk
        (tokens, heads, _), kv_heads = query.shape, key.shape[1]
        output = query.new_empty(tokens, heads, value.shape[-1])
        query_weights, sinks = options["query_weights"], options["sinks"]
        ways = 0 if query_weights is None else len(query_weights)
        sums = torch.zeros(ways, kv_heads, past + tokens)
        rows = (options["hidden"], None if sinks is None else sinks.float(), query_weights, options["past_places"])
        tables = [None if table is None else table.contiguous() for table in rows]
        before, shared = other or (None, 0)
        sizes = (tokens, heads, kv_heads, past, shared, ways, scale, distance, power)
        addresses = map(address, (*tables, output, sums))
        stored = stored_of(*slot, key, value, other=before)
        self._library.call("bmx_attend_chunk", vectors_of(*chunk), stored, *sizes, *addresses)
        return output, sums if ways else None

    def attend_slots(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor | None = None,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        hidden: Tensor | None = None,
        want_mass: bool = False,
        squares: bool = False,
        power: int = 1,
        shared: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``contract.KernelModule.attend_slots``."""
        contiguous = keys.is_contiguous() and values.is_contiguous() and shared is None
        if softcap is not None or squares or scale <= 0 or not (contiguous and all(map(_takes, (query, keys, values)))):
            details: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "hidden": hidden, "squares": squares}
            details |= {"want_mass": want_mass, "power": power}
            details |= {"scale": scale, "slots": slots, "shared": shared and tuple(map(_wide, shared))}
            output, sums = cpu.attend_slots(*map(_wide, (query, keys, values)), **details)
            return output.to(query.dtype), sums
        batch, heads, _ = query.shape
        _, kv_heads, capacity, value_dim = values.shape
        query, sinks = query.contiguous(), None if sinks is None else sinks.float()
        output = query.new_empty(batch, heads, value_dim)
        mass = torch.empty(1, batch, kv_heads, capacity) if want_mass else None
        strides = (0, 0)
        if hidden is not None:
            hidden = hidden.expand(batch, kv_heads, capacity)
            hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
            strides = (hidden.stride(0), hidden.stride(1))
        stored = stored_of(Stored(keys, None, MODEL), Stored(values, None, MODEL), keys, values)
        operands = (address(query), stored, address(slots))
        sizes = (batch, heads, kv_heads, capacity)
        options = (scale, power, address(hidden), *strides, address(sinks))
        self._library.call("bmx_attend_slots", *operands, *sizes, *options, address(output), address(mass))
        return output, mass

    def decode_step(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Rows,
        slots: Tensor,
        positions: Tensor,
        row_limits: Tensor,
        *,
        scale: float,
        order: EvictionOrder,
        decay: float,
        accumulate: bool,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        shared: SharedRows | None = None,
    ) -> bool:
        """See ``contract.KernelModule.decode_step``; no slot may be -1, and it declines orders by rank."""
        if softcap is not None or scale <= 0 or order.by not in FORMULAS or not _takes_rows(query, key, value, rows):
            return False
        batch, heads, _ = query.shape
        sinks = None if sinks is None else sinks.float()
        state = map(address, (rows.positions, rows.mass, rows.first, rows.capacity))
        others = (None, None) if shared is None else shared
        tokens = map(address, (slots, positions, row_limits, *others))
        sizes = (batch, heads, rows.kv_heads, rows.largest, 0 if shared is None else int(shared.rows.max()))
        options = (scale, decay, accumulate, order_of(order), address(sinks))
        keys = Stored(rows.keys, rows.key_scales, rows.key_format)
        values = Stored(rows.values, rows.value_scales, rows.value_format)
        operands = (vectors_of(query, key, value), stored_of(keys, values, key, value))
        self._library.call("bmx_decode_step", *operands, *state, *tokens, *sizes, *options, address(output))
        return True

    def prefill_step(
        self,
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
        """See ``contract.KernelModule.prefill_step``; one chunk after another, and none where pairs are ranked."""
        if softcap is not None or scale <= 0 or ranking is not None or not _takes_rows(query, key, value, rows):
            return False
        decay = [1.0] * len(chunks.offsets) if chunks.decay is None else chunks.decay.tolist()
        for n, (heads, (keys, values, positions, mass, _)) in chunks.views(rows):
            own = slice(chunks.offsets[n], chunks.offsets[n] + chunks.lengths[n])
            asking = query_heads(heads, query.shape[1] // rows.kv_heads)
            start, tokens, (kv_heads, capacity) = chunks.starts[n], chunks.lengths[n], positions.shape
            slot, before = chunks.shared_by(n)
            limit = min(chunks.row_limits[n], capacity)
            used = min(start - before, limit)
            seen, other = positions[:, :used], None
            if before:
                view = rows.view(slot, heads.start)
                seen, other = torch.cat([view.positions[:, :before], seen], 1), ((view.keys, view.values), before)
            chunk = query[own, asking], key[own, heads], value[own, heads]
            output[own, asking], sums = self._attend_chunk(
                chunk, (keys, values), before + used, scale, order.distance, order.power, other,
                sinks=None if sinks is None else sinks[asking],
                hidden=out_of_window(seen, start, tokens, order.window),
                query_weights=_weights(chunks, own) if mass is not None and chunks.evicts(n, capacity) else None,
                past_places=seen - start if order.distance else None,
            )  # fmt: skip
            operands = (vectors_of(*chunk[1:]), stored_of(keys, values, key, value))
            state = map(address, (positions, mass, None if sums is None else sums[0]))
            sizes = (tokens, kv_heads, capacity, limit, used, start)
            self._library.call("bmx_evict", *operands, *state, *sizes, decay[n], order_of(order))
        return True

    def decode_by_channel(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: ChannelRows,
        slots: Tensor,
        positions: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> bool:
        """See ``contract.KernelModule.decode_by_channel``; declines a position that its slot has no row for."""
        if softcap is not None or scale <= 0 or not _takes_channels(rows, query, key, value):
            return False
        (batch, heads, _), sinks = query.shape, None if sinks is None else sinks.float()
        operands = (vectors_of(query, key, value), channel_rows_of(rows), address(slots), address(positions))
        sizes = (batch, heads, key.shape[1])
        return self._library.call("bmx_decode_by_channel", *operands, *sizes, scale, address(sinks), address(output))

    def append_by_channel(self, key: Tensor, value: Tensor, rows: ChannelRows, slot: int, start: int) -> bool:
        """See ``contract.KernelModule.append_by_channel``."""
        if not _takes_channels(rows, key, value):
            return False
        operands, (tokens, kv_heads, _) = (vectors_of(key, value), channel_rows_of(rows, slot)), key.shape
        self._library.functions.bmx_append_by_channel(*operands, tokens, kv_heads, start)
        return True

    def read_by_channel(self, rows: ChannelRows, slot: int, count: int) -> tuple[Tensor, Tensor] | None:
        """See ``contract.KernelModule.read_by_channel``."""
        exact = rows.exact_keys, rows.exact_values
        if not _takes_channels(rows, *exact):
            return None
        kv_heads = rows.exact_keys.shape[1]
        keys, values = (vectors.new_empty(kv_heads, count, vectors.shape[-1]) for vectors in exact)
        addresses = keys.data_ptr(), values.data_ptr()
        self._library.functions.bmx_read_by_channel(channel_rows_of(rows, slot), kv_heads, count, *addresses)
        return keys, values


@cache
def kernels_for(name: str) -> CompiledKernels:
    """The kernels compiled for an instruction set, loaded once.

    Args:
        name: of the set, one of ``SETS``.

    Raises:
        RuntimeError: this machine cannot have them.
    """
    return CompiledKernels(name)


class _Product:
    """Layers that read the same input, as the C++ sees them: see ``contract.KernelModule.product``."""

    def __init__(self, library: Library, layers: tuple[Linear, ...], gated: bool) -> None:
        self._library, self._layers, self._gated = library, layers, gated
        self._columns = [layer.weight.shape[0] for layer in layers]
        self._inner = layers[0].weight.shape[1]
        offsets = [sum(self._columns[:i]) for i in range(len(layers))]
        self._total = self._columns[0] if gated else sum(self._columns)
        self._views = layers_of(layers, offsets)
        alike = len({(layer.weight.dtype, layer.weight.shape[1]) for layer in layers}) == 1
        paired = not gated or (len(layers) == 2 and self._columns[0] == self._columns[1])
        self._fits = alike and paired and self._inner % WORD == 0 and all(map(_fits, layers))

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., I] -> [..., O] of each layer, or of the gated two."""
        if not self._fits or x.dtype != torch.bfloat16:
            return reference.product(self._layers, self._gated)(x)
        x, outer = x.contiguous(), x.shape[:-1]
        rows = x.numel() // self._inner
        y = x.new_empty(rows * self._total)
        if rows:
            sizes = (len(self._layers), self._gated, y.data_ptr(), rows, self._inner)
            self._library.call("bmx_linear", x.data_ptr(), self._views, *sizes)
        if self._gated:
            return [y.view(*outer, self._total)]
        parts = torch.split(y, [rows * columns for columns in self._columns])
        return [part.view(*outer, columns) for part, columns in zip(parts, self._columns, strict=True)]


def _weights(chunks: Chunks, own: slice) -> Tensor:
    """The weights of one chunk's queries [1, T]."""
    if chunks.query_weights is None:
        return torch.ones(1, own.stop - own.start)
    return chunks.query_weights[own].unsqueeze(0)


def _fits(layer: Linear) -> bool:
    """Whether the C++ takes this layer's weights."""
    kind = torch.bfloat16 if layer.scales is None else torch.int8
    whole = layer.weight.shape[0] % COLUMNS == 0 and layer.weight.is_contiguous() and layer.weight.dtype == kind
    return whole and (layer.bias is None or layer.bias.dtype == torch.bfloat16)


def _wide(operand: Tensor) -> Tensor:
    """What torch attends to: in float32 where the processor has no bfloat16 in hardware, since that takes far less."""
    return operand.float() if operand.dtype == torch.bfloat16 and not hardware.multiplies("bfloat16") else operand


def _in_rows(past: Tensor) -> Tensor:
    """Vectors [K, P, D], such that those of a head lie one after another."""
    heads, rows, dim = past.stride()[0], past.stride()[1], past.shape[2]
    return past if rows == dim and heads % dim == 0 else past.contiguous()


def _takes_rows(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> bool:
    """Whether the C++ takes these vectors, and reads and writes these rows."""
    if not all(map(_takes, (query, key, value))) or not set(FORMATS).issuperset(rows.formats):
        return False
    plain = all(t.dtype in (torch.bfloat16, torch.uint8) for t in (rows.keys, rows.values))
    return plain and (rows.formats == (MODEL, MODEL) or max(key.shape[-1], value.shape[-1]) <= MOST_CODES)


def _takes_channels(rows: ChannelRows, *vectors: Tensor) -> bool:
    """Whether the C++ takes these vectors, and reads and writes these rows."""
    if not all(map(_takes, vectors)) or not set(FORMATS).issuperset(rows.formats):
        return False
    return rows.exact_keys.dtype == torch.bfloat16 and max(one.shape[-1] for one in vectors) <= MOST_CODES


def _takes(tensor: Tensor) -> bool:
    """Whether the C++ takes these vectors."""
    return tensor.dtype == torch.bfloat16 and tensor.shape[-1] % WORD == 0 and tensor.stride(-1) == 1
