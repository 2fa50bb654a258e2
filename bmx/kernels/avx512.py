"""Kernels compiled for CPUs with AVX512-BF16: attention and linear layers in bfloat16, and products of bytes.

Knows tensors, and what the C++ beside it can take; what it cannot (other types, odd sizes, capped scores, squares)
goes to the tiles of ``cpu``. Same signatures and results as ``reference``.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from bmx.kernels import build, cpu, reference
from bmx.kernels.linear import Linear
from bmx.kernels.ranking import RANKS, EvictionOrder
from bmx.kernels.slot_views import Chunks, Rows

WORD = 32  # bfloat16 numbers, or columns, that are taken together
COLUMNS = 16
SUPPORTED_DTYPES = (torch.bfloat16,)
gate = reference.gate


class _Rows(ctypes.Structure):
    """Vectors by row and head, as the C++ sees them."""

    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_long), ("head", ctypes.c_long))


class _Layer(ctypes.Structure):
    """A linear layer, as the C++ sees it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "sums", "bias")),
        *((name, ctypes.c_long) for name in ("columns", "offset")),
    )


class _Ranking(ctypes.Structure):
    """How pairs are ranked, as the C++ sees it."""

    _fields_ = (("rank", ctypes.c_int), ("sink", ctypes.c_int), ("recent", ctypes.c_int), ("window", ctypes.c_int))


def _bind() -> Any:
    library = build.library()
    if isinstance(library, str):
        raise RuntimeError(f"there are no compiled kernels: {library}")
    pointer, number, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
    signatures: dict[str, list[Any]] = {
        "bmx_linear": [pointer] * 2 + [ctypes.c_int] * 2 + [pointer] + [number] * 2,
        "bmx_attend_chunk": [pointer, *[number] * 6, real, pointer, pointer, pointer, number, pointer, pointer],
        "bmx_attend_slots": [pointer] * 4 + [number] * 6 + [real, pointer, number, number] + [pointer] * 3,
        "bmx_decode": [pointer] * 10 + [number] * 6 + [real] * 2 + [ctypes.c_int, _Ranking] + [pointer] * 2,
        "bmx_compress": [pointer] * 6 + [number] * 8 + [real, _Ranking],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [*arguments, pointer, number], number
    library.bmx_rms_norm.argtypes, library.bmx_rms_norm.restype = [*[pointer] * 3, real, number, number], None
    library.bmx_rotate.argtypes = [pointer, number, number, *[pointer] * 3, *[number] * 3]
    library.bmx_rotate.restype = None
    return library


_library = _bind()
_work = torch.empty(0, dtype=torch.uint8)  # what kernels work in: they run one after another, under the GIL


def _call(function: Any, *arguments: Any) -> None:
    """Call a kernel; if it says that the memory to work in is too little, with more."""
    needed = function(*arguments, _work.data_ptr(), _work.numel())
    if needed:
        _work.resize_(needed)
        function(*arguments, _work.data_ptr(), needed)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Product:
    """Layers that read the same input, as the C++ sees them: see ``reference.product``."""

    def __init__(self, layers: tuple[Linear, ...], gated: bool) -> None:
        self._layers, self._gated = layers, gated
        self._columns = [layer.weight.shape[0] for layer in layers]
        self._inner = layers[0].weight.shape[1]
        offsets = [sum(self._columns[:i]) for i in range(len(layers))]
        self._total = self._columns[0] if gated else sum(self._columns)
        self._told = (_Layer * len(layers))(
            *(
                _Layer(*map(_address, (one.weight, one.scales, one.sums, one.bias)), one.weight.shape[0], offset)
                for one, offset in zip(layers, offsets, strict=True)
            )
        )
        alike = not gated or (len(layers) == 2 and self._columns[0] == self._columns[1])
        self._fits = alike and self._inner % WORD == 0 and all(map(_fits, layers))
        self._fits = self._fits and len({(one.weight.dtype, one.weight.shape[1]) for one in layers}) == 1

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., I] -> [..., O] of each layer, or of the gated two."""
        if not self._fits or x.dtype != torch.bfloat16:
            return reference.product(self._layers, self._gated)(x)
        x, ahead = x.contiguous(), x.shape[:-1]
        rows = x.numel() // self._inner
        y = x.new_empty(rows * self._total)
        if rows:
            sizes = (len(self._layers), self._gated, y.data_ptr(), rows, self._inner)
            _call(_library.bmx_linear, x.data_ptr(), self._told, *sizes)
        if self._gated:
            return [y.view(*ahead, self._total)]
        parts = torch.split(y, [rows * columns for columns in self._columns])
        return [part.view(*ahead, columns) for part, columns in zip(parts, self._columns, strict=True)]


def product(layers: tuple[Linear, ...], gated: bool = False) -> _Product:
    """See ``reference.product``."""
    return _Product(layers, gated)


def _fits(layer: Linear) -> bool:
    kind = torch.bfloat16 if layer.scales is None else torch.int8
    whole = layer.weight.shape[0] % COLUMNS == 0 and layer.weight.is_contiguous() and layer.weight.dtype == kind
    return whole and (layer.bias is None or layer.bias.dtype == torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``reference.rms_norm``."""
    inner = len(weight)
    if not (x.dtype == weight.dtype == torch.bfloat16 and inner % COLUMNS == 0):
        return reference.rms_norm(x, weight, epsilon)
    x = x.contiguous()
    y = torch.empty_like(x)
    _library.bmx_rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), epsilon, x.numel() // inner, inner)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``reference.rotate``."""
    dim = x.shape[-1]
    alike = x.dtype == cos.dtype == sin.dtype == torch.bfloat16 and cos.shape[-1] == dim
    if not (alike and dim % (2 * COLUMNS) == 0 and x.shape[0] == cos.shape[0] == 1 and x.stride(-1) == 1):
        return reference.rotate(x, cos, sin)
    cos, sin = cos.contiguous(), sin.contiguous()
    _, heads, tokens, _ = x.shape
    y = x.new_empty(1, tokens, heads, dim)
    tables = (cos.data_ptr(), sin.data_ptr(), y.data_ptr())
    _library.bmx_rotate(x.data_ptr(), x.stride(2), x.stride(1), *tables, tokens, heads, dim)
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
    votes: Tensor | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See ``reference.attend_chunk``."""
    operands = (query, key, value, past_key, past_value)
    if softcap is not None or squares or scale <= 0 or not all(map(_vectors, operands)):
        details: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "hidden": hidden, "squares": squares}
        return cpu.attend_chunk(*operands, scale=scale, votes=votes, **details)
    tokens, heads, dim = query.shape
    kv_heads, past, breadth = past_value.shape
    output = query.new_empty(tokens, heads, breadth)
    ways = 0 if votes is None else len(votes)
    sums = torch.zeros(ways, kv_heads, past + tokens)
    views = (_Rows * 5)(*(_Rows(t.data_ptr(), t.stride(0), t.stride(1)) for t in operands[:3]),
                        *(_Rows(t.data_ptr(), t.stride(1), t.stride(0)) for t in operands[3:]))  # fmt: skip
    sinks = None if sinks is None else sinks.float()
    hidden = None if hidden is None else hidden.contiguous()
    votes = None if votes is None else votes.contiguous()
    sizes = (tokens, heads, kv_heads, past, dim, breadth)
    asked = (scale, _address(hidden), _address(sinks), _address(votes), ways)
    _call(_library.bmx_attend_chunk, views, *sizes, *asked, _address(output), _address(sums))
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
) -> tuple[Tensor, Tensor | None]:
    """See ``reference.attend_slots``."""
    whole = keys.is_contiguous() and values.is_contiguous()
    if softcap is not None or squares or scale <= 0 or not (whole and all(map(_vectors, (query, keys, values)))):
        details: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "hidden": hidden, "squares": squares}
        return cpu.attend_slots(query, keys, values, slots, scale=scale, want_mass=want_mass, **details)
    batch, heads, dim = query.shape
    _, kv_heads, capacity, breadth = values.shape
    query, sinks = query.contiguous(), None if sinks is None else sinks.float()
    output = query.new_empty(batch, heads, breadth)
    mass = torch.empty(1, batch, kv_heads, capacity) if want_mass else None
    steps = (0, 0)
    if hidden is not None:
        hidden = hidden.expand(batch, kv_heads, capacity)
        hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
        steps = (hidden.stride(0), hidden.stride(1))
    operands = (_address(query), _address(keys), _address(values), _address(slots))
    sizes = (batch, heads, kv_heads, capacity, dim, breadth)
    asked = (scale, _address(hidden), *steps, _address(sinks))
    _call(_library.bmx_attend_slots, *operands, *sizes, *asked, _address(output), _address(mass))
    return output, mass


def decode(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    slots: Tensor,
    now: Tensor,
    limits: Tensor,
    *,
    scale: float,
    ranking: EvictionOrder,
    old: float,
    count: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> bool:
    """A whole decoding step of a layer, where ranking is as simple as this: in place of what policy and pool do.

    Each token takes the next empty row of its slot, or that of the lowest-ranked pair; then it attends to the slot,
    and what it attended to is added up.

    Args:
        output: [B, H, E], to be filled.
        query: [B, H, D]; key [B, K, D]; value [B, K, E]: of the tokens.
        rows: of all slots.
        slots: [B]; now [B], the tokens' positions; limits [B], rows that each may use.
        ranking: who goes first; old: what is left of earlier mass; count: whether to add to it.

    Returns:
        Whether it was done; if not, nothing was: the C++ cannot take it.
    """
    vectors = (query, key, value, rows.keys, rows.values)
    if softcap is not None or scale <= 0 or not all(map(_vectors, vectors)):
        return False
    batch, heads, dim = query.shape
    sinks = None if sinks is None else sinks.float()
    views = (_Rows * 3)(*(_Rows(t.data_ptr(), t.stride(0), t.stride(1)) for t in vectors[:3]))
    state = map(_address, (rows.keys, rows.values, rows.positions, rows.mass, rows.first, rows.capacity))
    told = map(_address, (slots, now, limits))
    sizes = (batch, heads, rows.kv_heads, rows.largest, dim, value.shape[-1])
    manner = (scale, old, count, _told(ranking))
    _call(_library.bmx_decode, views, *state, *told, *sizes, *manner, _address(sinks), _address(output))
    return True


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
    """The prompt chunks' part of a layer, where ranking is as simple as this: in place of what policy and pool do.

    Each chunk attends to its slot and to itself; what its queries saw is added up, and the best pairs stay.

    Args:
        output: [T, H, E], of which the chunks' tokens are filled.
        query: [T, H, D]; key [T, K, D]; value [T, K, E]: of all packed tokens.
        rows: of all slots.

    Returns:
        Whether it was done; if not, nothing was: the C++ cannot take it.
    """
    vectors = (query, key, value, rows.keys, rows.values)
    if softcap is not None or scale <= 0 or not all(map(_vectors, vectors)):
        return False
    old = [1.0] * len(chunks.at) if chunks.old is None else chunks.old.tolist()
    for n, (at, length) in enumerate(zip(chunks.at, chunks.lengths, strict=True)):
        part = slice(at, at + length)
        first, capacity = int(rows.first[chunks.slots[n]]), int(rows.capacity[chunks.slots[n]])
        start, limit = chunks.starts[n], min(chunks.limits[n], capacity)
        here, used = slice(first, first + rows.kv_heads * capacity), min(start, limit)
        keys, values = (of[here].view(rows.kv_heads, capacity, -1) for of in (rows.keys, rows.values))
        positions = rows.positions[here].view(rows.kv_heads, capacity)
        counts = rows.mass is not None and chunks.totals[n] > limit
        votes = _votes(chunks.votes, part, counts)
        hidden = reference.out_of_window(positions[:, :used], start, length, ranking.window)
        output[part], sums = attend_chunk(
            query[part], key[part], value[part], keys[:, :used], values[:, :used],
            scale=scale, sinks=sinks, hidden=hidden, votes=votes,
        )  # fmt: skip
        views = (_Rows * 2)(*(_Rows(t.data_ptr(), t.stride(0), t.stride(1)) for t in (key[part], value[part])))
        state = (
            keys,
            values,
            positions,
            None if rows.mass is None else rows.mass[here],
            None if sums is None else sums[0],
        )
        sizes = (length, rows.kv_heads, capacity, limit, used, start, key.shape[-1], value.shape[-1])
        _call(_library.bmx_compress, views, *map(_address, state), *sizes, old[n], _told(ranking))
    return True


def _votes(votes: Tensor | None, part: slice, counts: bool) -> Tensor | None:
    """The votes of one chunk [1, T]; None where they do not count."""
    if not counts:
        return None
    return torch.ones(1, part.stop - part.start) if votes is None else votes[part].unsqueeze(0)


def _told(ranking: EvictionOrder) -> _Ranking:
    return _Ranking(RANKS.index(ranking.by), ranking.sink, ranking.recent, ranking.window or 0)


def _vectors(tensor: Tensor) -> bool:
    """Whether these are vectors that the C++ can read."""
    return tensor.dtype == torch.bfloat16 and tensor.shape[-1] % WORD == 0 and tensor.stride(-1) == 1
