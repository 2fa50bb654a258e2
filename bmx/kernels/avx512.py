"""Kernels compiled for CPUs with AVX512-BF16: attention and linear layers in bfloat16, and products of int8 weights.

Implements ``contract.KernelModule``; knows tensors, and which of them the C++ beside it takes. Linear layers, norms and
rotations of other types and of sizes that fill no register go to ``reference``. Attention of other types, of sizes that
are no multiple of 32, with capped scores, squares or a negative scale goes to ``cpu``; fused steps decline it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bmx.kernels import build, cpu, reference
from bmx.kernels.linear import Linear
from bmx.kernels.ranking import RANKS, EvictionOrder
from bmx.kernels.slot_views import Chunks, Rows

WORD = 32  # bfloat16 numbers, or columns, that are computed together
COLUMNS = 16
gate = reference.gate


class _Vectors(ctypes.Structure):
    """Vectors by row and head, as the C++ sees them: address, and strides in numbers."""

    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_long), ("head", ctypes.c_long))


class _Layer(ctypes.Structure):
    """A linear layer, as the C++ sees it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "sums", "bias")),
        *((name, ctypes.c_long) for name in ("columns", "offset")),
    )


class _Order(ctypes.Structure):
    """An ``EvictionOrder``, as the C++ sees it."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("by", "sink", "recent", "window", "distance", "power"))


class _Library:
    """The compiled functions, and the memory that they work in.

    Calls follow one another (the GIL is held), so one piece of memory serves all; it grows to the largest need.
    """

    def __init__(self, library: ctypes.PyDLL) -> None:
        pointer, number, flag, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
        working: dict[str, list[Any]] = {
            "bmx_linear": [pointer] * 2 + [flag] * 2 + [pointer] + [number] * 2,
            "bmx_attend_chunk": [pointer] + [number] * 7 + [real, flag, flag] + [pointer] * 6,
            "bmx_attend_slots": [pointer] * 4 + [number] * 6 + [real, flag, pointer, number, number] + [pointer] * 3,
            "bmx_decode_step": [pointer] * 10 + [number] * 6 + [real] * 2 + [flag, _Order] + [pointer] * 2,
            "bmx_evict": [pointer] * 6 + [number] * 8 + [real, _Order],
        }
        for name, arguments in working.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [*arguments, pointer, number], number
        library.bmx_rms_norm.argtypes, library.bmx_rms_norm.restype = [*[pointer] * 3, real, number, number], None
        library.bmx_rotate.argtypes = [pointer, number, number, *[pointer] * 3, *[number] * 3]
        library.bmx_rotate.restype = None
        self.functions: Any = library
        self._work = torch.empty(0, dtype=torch.uint8)

    def call(self, function: Any, *arguments: Any) -> None:
        """Call a function; if it says that the memory to work in is too small, again with as much as it needs."""
        needed = function(*arguments, self._work.data_ptr(), self._work.numel())
        if needed:
            self._work.resize_(needed)
            function(*arguments, self._work.data_ptr(), needed)


@cache
def _library() -> _Library:
    """The compiled functions.

    Raises:
        RuntimeError: this machine has no compiled kernels; ``bmx.kernels.choose`` never chooses this module there.
    """
    library = build.library()
    if isinstance(library, str):
        raise RuntimeError(f"there are no compiled kernels: {library}")
    return _Library(library)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Product:
    """Layers that read the same input, as the C++ sees them: see ``contract.KernelModule.product``."""

    def __init__(self, layers: tuple[Linear, ...], gated: bool) -> None:
        self._layers, self._gated = layers, gated
        self._columns = [layer.weight.shape[0] for layer in layers]
        self._inner = layers[0].weight.shape[1]
        offsets = [sum(self._columns[:i]) for i in range(len(layers))]
        self._total = self._columns[0] if gated else sum(self._columns)
        self._views = (_Layer * len(layers))(
            *(
                _Layer(*map(_address, (layer.weight, layer.scales, layer.sums, layer.bias)), len(layer.weight), offset)
                for layer, offset in zip(layers, offsets, strict=True)
            )
        )
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
            library, sizes = _library(), (len(self._layers), self._gated, y.data_ptr(), rows, self._inner)
            library.call(library.functions.bmx_linear, x.data_ptr(), self._views, *sizes)
        if self._gated:
            return [y.view(*outer, self._total)]
        parts = torch.split(y, [rows * columns for columns in self._columns])
        return [part.view(*outer, columns) for part, columns in zip(parts, self._columns, strict=True)]


def product(layers: tuple[Linear, ...], gated: bool = False) -> _Product:
    """See ``contract.KernelModule.product``."""
    return _Product(layers, gated)


def _fits(layer: Linear) -> bool:
    """Whether the C++ takes this layer's weights."""
    kind = torch.bfloat16 if layer.scales is None else torch.int8
    whole = layer.weight.shape[0] % COLUMNS == 0 and layer.weight.is_contiguous() and layer.weight.dtype == kind
    return whole and (layer.bias is None or layer.bias.dtype == torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``contract.KernelModule.rms_norm``."""
    inner = len(weight)
    if not (x.dtype == weight.dtype == torch.bfloat16 and inner % COLUMNS == 0):
        return reference.rms_norm(x, weight, epsilon)
    x = x.contiguous()
    y = torch.empty_like(x)
    _library().functions.bmx_rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), epsilon, x.numel() // inner, inner)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``contract.KernelModule.rotate``."""
    dim = x.shape[-1]
    alike = x.dtype == cos.dtype == sin.dtype == torch.bfloat16 and cos.shape[-1] == dim
    if not (alike and dim % (2 * COLUMNS) == 0 and x.shape[0] == cos.shape[0] == 1 and x.stride(-1) == 1):
        return reference.rotate(x, cos, sin)
    cos, sin = cos.contiguous(), sin.contiguous()
    _, heads, tokens, _ = x.shape
    y = x.new_empty(1, tokens, heads, dim)
    tables = (cos.data_ptr(), sin.data_ptr(), y.data_ptr())
    _library().functions.bmx_rotate(x.data_ptr(), x.stride(2), x.stride(1), *tables, tokens, heads, dim)
    return y.transpose(1, 2)


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
    """See ``contract.KernelModule.attend_chunk``."""
    operands = (query, key, value, past_key, past_value)
    if softcap is not None or squares or scale <= 0 or not all(map(_takes, operands)):
        details: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "hidden": hidden, "squares": squares}
        details |= {"query_weights": query_weights, "past_places": past_places, "distance": distance, "power": power}
        return cpu.attend_chunk(*operands, scale=scale, **details)
    tokens, heads, dim = query.shape
    kv_heads, past, value_dim = past_value.shape
    output = query.new_empty(tokens, heads, value_dim)
    ways = 0 if query_weights is None else len(query_weights)
    sums = torch.zeros(ways, kv_heads, past + tokens)
    views = (_Vectors * 5)(*(_Vectors(t.data_ptr(), t.stride(0), t.stride(1)) for t in operands[:3]),
                        *(_Vectors(t.data_ptr(), t.stride(1), t.stride(0)) for t in operands[3:]))  # fmt: skip
    sinks = None if sinks is None else sinks.float()
    hidden = None if hidden is None else hidden.contiguous()
    query_weights = None if query_weights is None else query_weights.contiguous()
    past_places = None if past_places is None else past_places.contiguous()
    sizes = (tokens, heads, kv_heads, past, dim, value_dim, ways)
    options = (scale, distance, power, *map(_address, (hidden, sinks, query_weights, past_places)))
    library = _library()
    library.call(library.functions.bmx_attend_chunk, views, *sizes, *options, _address(output), _address(sums))
    return output, sums if ways else None


def attend_slots(
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
) -> tuple[Tensor, Tensor | None]:
    """See ``contract.KernelModule.attend_slots``."""
    contiguous = keys.is_contiguous() and values.is_contiguous()
    if softcap is not None or squares or scale <= 0 or not (contiguous and all(map(_takes, (query, keys, values)))):
        details: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "hidden": hidden, "squares": squares}
        details |= {"want_mass": want_mass, "power": power}
        return cpu.attend_slots(query, keys, values, slots, scale=scale, **details)
    batch, heads, dim = query.shape
    _, kv_heads, capacity, value_dim = values.shape
    query, sinks = query.contiguous(), None if sinks is None else sinks.float()
    output = query.new_empty(batch, heads, value_dim)
    mass = torch.empty(1, batch, kv_heads, capacity) if want_mass else None
    strides = (0, 0)
    if hidden is not None:
        hidden = hidden.expand(batch, kv_heads, capacity)
        hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
        strides = (hidden.stride(0), hidden.stride(1))
    operands = (_address(query), _address(keys), _address(values), _address(slots))
    sizes = (batch, heads, kv_heads, capacity, dim, value_dim)
    options = (scale, power, _address(hidden), *strides, _address(sinks))
    library = _library()
    library.call(library.functions.bmx_attend_slots, *operands, *sizes, *options, _address(output), _address(mass))
    return output, mass


def decode_step(
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
) -> bool:
    """See ``contract.KernelModule.decode_step``; no slot may be -1."""
    vectors = (query, key, value, rows.keys, rows.values)
    if softcap is not None or scale <= 0 or not all(map(_takes, vectors)):
        return False
    batch, heads, dim = query.shape
    sinks = None if sinks is None else sinks.float()
    views = (_Vectors * 3)(*(_Vectors(t.data_ptr(), t.stride(0), t.stride(1)) for t in vectors[:3]))
    state = map(_address, (rows.keys, rows.values, rows.positions, rows.mass, rows.first, rows.capacity))
    tokens = map(_address, (slots, positions, row_limits))
    sizes = (batch, heads, rows.kv_heads, rows.largest, dim, value.shape[-1])
    options = (scale, decay, accumulate, _order(order), _address(sinks))
    library = _library()
    library.call(library.functions.bmx_decode_step, views, *state, *tokens, *sizes, *options, _address(output))
    return True


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
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> bool:
    """See ``contract.KernelModule.prefill_step``; one chunk after another."""
    if softcap is not None or scale <= 0 or not all(map(_takes, (query, key, value, rows.keys, rows.values))):
        return False
    decay = [1.0] * len(chunks.offsets) if chunks.decay is None else chunks.decay.tolist()
    for n, evicts in enumerate(chunks.may_evict(rows)):
        own = slice(chunks.offsets[n], chunks.offsets[n] + chunks.lengths[n])
        start, tokens, limit = chunks.starts[n], chunks.lengths[n], chunks.row_limits[n]
        slot = rows.slot(chunks.slots[n])
        keys, values, positions, mass = slot.keys.numbers, slot.values.numbers, slot.positions, slot.mass
        limit = min(limit, len(positions[0]))
        used = min(start, limit)
        output[own], sums = attend_chunk(
            query[own], key[own], value[own], keys[:, :used], values[:, :used], scale=scale, sinks=sinks,
            hidden=reference.out_of_window(positions[:, :used], start, tokens, order.window),
            query_weights=_weights(chunks, own) if evicts and mass is not None else None,
            past_places=positions[:, :used] - start if order.distance else None,
            distance=order.distance, power=order.power,
        )  # fmt: skip
        views = (_Vectors * 2)(*(_Vectors(t.data_ptr(), t.stride(0), t.stride(1)) for t in (key[own], value[own])))
        state = map(_address, (keys, values, positions, mass, None if sums is None else sums[0]))
        sizes = (tokens, rows.kv_heads, len(positions[0]), limit, used, start, key.shape[-1], value.shape[-1])
        library = _library()
        library.call(library.functions.bmx_evict, views, *state, *sizes, decay[n], _order(order))
    return True


def _weights(chunks: Chunks, own: slice) -> Tensor:
    """The weights of one chunk's queries [1, T]."""
    if chunks.query_weights is None:
        return torch.ones(1, own.stop - own.start)
    return chunks.query_weights[own].unsqueeze(0)


def _order(order: EvictionOrder) -> _Order:
    by, window = RANKS.index(order.by), order.window or 0
    return _Order(by, order.sink, order.recent, window, order.distance, order.power)


def _takes(tensor: Tensor) -> bool:
    """Whether the C++ takes these vectors."""
    return tensor.dtype == torch.bfloat16 and tensor.shape[-1] % WORD == 0 and tensor.stride(-1) == 1
