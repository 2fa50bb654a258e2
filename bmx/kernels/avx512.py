"""Kernels compiled for CPUs with AVX512-BF16: attention and linear layers in bfloat16, and products of int8 weights.

Implements ``contract.KernelModule``; knows tensors, and which of them the C++ beside it takes. Linear layers, norms and
rotations of other types and of sizes that fill no register go to ``reference``. Attention of other types, of sizes that
are no multiple of 32, with capped scores, squares or a negative scale goes to ``cpu``; fused steps decline it, and KV
pairs in formats other than int8 and int4.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bmx.kernels import build, cpu, reference
from bmx.kernels.formats import MODEL, Stored
from bmx.kernels.linear import Linear
from bmx.kernels.ranking import RANKS, EvictionOrder
from bmx.kernels.slot_views import Chunks, Rows, query_heads

WORD = 32  # bfloat16 numbers, or columns, that are computed together
COLUMNS = 16
FORMATS = (MODEL, "int8", "int4")  # that the C++ reads and writes
MOST_CODES = 512  # of a vector: sums of products with 16-bit numbers stay within 32 bits
gate = reference.gate


class _Vectors(ctypes.Structure):
    """Vectors by row and head, as the C++ sees them: address, and strides in numbers."""

    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_long), ("head", ctypes.c_long))


class _Stored(ctypes.Structure):
    """Stored vectors, as the C++ sees them: one after another, `head` rows for each kv head."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scales")),
        *((name, ctypes.c_long) for name in ("format", "dim", "head")),
    )


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
            "bmx_attend_chunk": [pointer] * 2 + [number] * 5 + [real, flag, flag] + [pointer] * 6,
            "bmx_attend_slots": [pointer] * 3 + [number] * 4 + [real, flag, pointer, number, number] + [pointer] * 3,
            "bmx_decode_step": [pointer] * 9 + [number] * 4 + [real] * 2 + [flag, _Order] + [pointer] * 2,
            "bmx_evict": [pointer] * 5 + [number] * 6 + [real, _Order],
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
    library.bmx_start()  # asks the system for AMX, where the processor has it
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
    slot = Stored(_in_rows(past_key), None, MODEL), Stored(_in_rows(past_value), None, MODEL)
    options = {"sinks": sinks, "hidden": hidden, "query_weights": query_weights, "past_places": past_places}
    return _attend_chunk((query, key, value), slot, past_key.shape[1], scale, distance, power, **options)


def _attend_chunk(
    chunk: tuple[Tensor, Tensor, Tensor],
    slot: tuple[Stored, Stored],
    past: int,
    scale: float,
    distance: int,
    power: int,
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
    sizes = (tokens, heads, kv_heads, past, ways, scale, distance, power)
    addresses = map(_address, (*tables, output, sums))
    library = _library()
    library.call(library.functions.bmx_attend_chunk, _vectors(*chunk), _stored(*slot, key, value), *sizes, *addresses)
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
    stored = _stored(Stored(keys, None, MODEL), Stored(values, None, MODEL), keys, values)
    operands = (_address(query), stored, _address(slots))
    sizes = (batch, heads, kv_heads, capacity)
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
    if softcap is not None or scale <= 0 or not _takes_rows(query, key, value, rows):
        return False
    batch, heads, _ = query.shape
    sinks = None if sinks is None else sinks.float()
    state = map(_address, (rows.positions, rows.mass, rows.first, rows.capacity))
    tokens = map(_address, (slots, positions, row_limits))
    sizes = (batch, heads, rows.kv_heads, rows.largest)
    options = (scale, decay, accumulate, _order(order), _address(sinks))
    keys = Stored(rows.keys, rows.key_scales, rows.key_format)
    values = Stored(rows.values, rows.value_scales, rows.value_format)
    operands = (_vectors(query, key, value), _stored(keys, values, key, value))
    library = _library()
    library.call(library.functions.bmx_decode_step, *operands, *state, *tokens, *sizes, *options, _address(output))
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
    if softcap is not None or scale <= 0 or not _takes_rows(query, key, value, rows):
        return False
    decay = [1.0] * len(chunks.offsets) if chunks.decay is None else chunks.decay.tolist()
    for n, (heads, (keys, values, positions, mass)) in chunks.views(rows):
        own = slice(chunks.offsets[n], chunks.offsets[n] + chunks.lengths[n])
        asking = query_heads(heads, query.shape[1] // rows.kv_heads)
        start, tokens, (kv_heads, capacity) = chunks.starts[n], chunks.lengths[n], positions.shape
        limit = min(chunks.row_limits[n], capacity)
        used = min(start, limit)
        chunk = query[own, asking], key[own, heads], value[own, heads]
        output[own, asking], sums = _attend_chunk(
            chunk, (keys, values), used, scale, order.distance, order.power,
            sinks=None if sinks is None else sinks[asking],
            hidden=reference.out_of_window(positions[:, :used], start, tokens, order.window),
            query_weights=_weights(chunks, own) if mass is not None and chunks.evicts(n, capacity) else None,
            past_places=positions[:, :used] - start if order.distance else None,
        )  # fmt: skip
        operands = (_vectors(*chunk[1:]), _stored(keys, values, key, value))
        state = map(_address, (positions, mass, None if sums is None else sums[0]))
        sizes = (tokens, kv_heads, capacity, limit, used, start)
        library = _library()
        library.call(library.functions.bmx_evict, *operands, *state, *sizes, decay[n], _order(order))
    return True


def _weights(chunks: Chunks, own: slice) -> Tensor:
    """The weights of one chunk's queries [1, T]."""
    if chunks.query_weights is None:
        return torch.ones(1, own.stop - own.start)
    return chunks.query_weights[own].unsqueeze(0)


def _order(order: EvictionOrder) -> _Order:
    by, window = RANKS.index(order.by), order.window or 0
    return _Order(by, order.sink, order.recent, window, order.distance, order.power)


def _vectors(*tensors: Tensor) -> Any:
    """Tensors [N, H or K, D or E], as the C++ sees them."""
    return (_Vectors * len(tensors))(*(_Vectors(t.data_ptr(), t.stride(0), t.stride(1)) for t in tensors))


def _stored(keys: Stored, values: Stored, *vectors: Tensor) -> Any:
    """Stored keys and values [..., rows, D or E], as the C++ sees them; ``vectors`` are of the same sizes."""
    views = []
    for stored, dim in zip((keys, values), (one.shape[-1] for one in vectors), strict=True):
        numbers = stored.numbers
        head = numbers.stride(-3) // numbers.stride(-2) if numbers.ndim > 2 else 0
        views.append(_Stored(_address(numbers), _address(stored.scales), FORMATS.index(stored.format), dim, head))
    return (_Stored * 2)(*views)


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


def _takes(tensor: Tensor) -> bool:
    """Whether the C++ takes these vectors."""
    return tensor.dtype == torch.bfloat16 and tensor.shape[-1] % WORD == 0 and tensor.stride(-1) == 1
