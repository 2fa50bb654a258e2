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

WORD = 32  # bfloat16 numbers, or columns, that are taken together
COLUMNS = 16
RANKS = ("age", "mass", "average")  # as the C++ counts them


class _Rows(ctypes.Structure):
    """Vectors by row and head, as the C++ sees them."""

    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_long), ("head", ctypes.c_long))


def _bind() -> Any:
    library = build.library()
    if isinstance(library, str):
        raise RuntimeError(f"there are no compiled kernels: {library}")
    pointer, number, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
    signatures: dict[str, list[Any]] = {
        "bmx_linear": [pointer] * 5 + [number] * 3,
        "bmx_linear_int8": [pointer] * 7 + [number] * 3,
        "bmx_attend_chunk": [pointer, *[number] * 6, real, pointer, pointer, pointer, number, pointer, pointer],
        "bmx_attend_slots": [pointer] * 4 + [number] * 6 + [real, pointer, number, number] + [pointer] * 3,
        "bmx_decode": [pointer] * 8 + [number] * 6 + [real] * 2 + [ctypes.c_int] * 5 + [pointer] * 2,
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
        _work.resize_(0).resize_(needed)
        function(*arguments, _work.data_ptr(), needed)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None = None) -> Tensor:
    """See ``reference.linear``."""
    columns, inner = weight.shape
    if weight.dtype != torch.bfloat16 or not _fits(x, weight, bias):
        return reference.linear(x, weight, bias, gate)
    x, gate = x.contiguous(), None if gate is None else gate.contiguous()
    y = x.new_empty(*x.shape[:-1], columns)
    rows = x.numel() // inner
    if rows:
        operands = (_address(x), _address(weight), _address(bias), _address(gate), _address(y))
        _call(_library.bmx_linear, *operands, rows, columns, inner)
    return y


def linear_int8(
    x: Tensor, codes: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None, gate: Tensor | None = None
) -> Tensor:
    """See ``reference.linear_int8``."""
    columns, inner = codes.shape
    if not _fits(x, codes, bias):
        return reference.linear_int8(x, codes, scales, sums, bias, gate)
    x, gate = x.contiguous(), None if gate is None else gate.contiguous()
    y = x.new_empty(*x.shape[:-1], columns)
    rows = x.numel() // inner
    if rows:
        weights = (_address(codes), _address(scales), _address(sums), _address(bias))
        _call(_library.bmx_linear_int8, _address(x), *weights, _address(gate), _address(y), rows, columns, inner)
    return y


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    columns, inner = weight.shape
    whole = columns % COLUMNS == 0 and inner % WORD == 0 and weight.is_contiguous()
    return x.dtype == torch.bfloat16 and whole and (bias is None or bias.dtype == torch.bfloat16)


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


def decode_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    mass: Tensor | None,
    slots: Tensor,
    now: Tensor,
    limits: Tensor | None,
    *,
    scale: float,
    rank: str,
    sink: int,
    recent: int,
    window: int | None,
    old: float,
    count: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | None:
    """A whole decoding step of a layer, where ranking is as simple as this: in place of what policy and pool do.

    Each token takes the next empty row of its slot, or that of the lowest-ranked pair that is neither among the first
    ``sink`` nor the newest ``recent`` tokens; then it attends to the slot, and what it attended to is added up.

    Args:
        query: [B, H, D]; key [B, K, D]; value [B, K, E]: of the tokens.
        keys: [S, K, C, D]; values [S, K, C, E]; positions [S, K, C] int32; mass [S, K, C] float32: of the slots.
        slots: [B]; now [B], the tokens' positions; limits [B], rows that each may use, or None for all.
        rank: ``age``, ``mass``, or ``average`` (mass by lifetime): what is lowest goes.
        window: newest keys that a query sees, or None.
        old: what is left of earlier mass; count: whether to add to it.

    Returns:
        [B, H, E]; None, and nothing is done, where the C++ cannot take it.
    """
    vectors = (query, key, value, keys, values)
    if softcap is not None or scale <= 0 or not all(map(_vectors, vectors)):
        return None
    batch, heads, dim = query.shape
    _, kv_heads, capacity, breadth = values.shape
    output = query.new_empty(batch, heads, breadth)
    sinks = None if sinks is None else sinks.float()
    views = (_Rows * 3)(*(_Rows(t.data_ptr(), t.stride(0), t.stride(1)) for t in vectors[:3]))
    state = (_address(keys), _address(values), _address(positions), _address(mass))
    told = (_address(slots), _address(now), _address(limits))
    sizes = (batch, heads, kv_heads, capacity, dim, breadth)
    manner = (scale, old, count, RANKS.index(rank), sink, recent, window or 0)
    _call(_library.bmx_decode, views, *state, *told, *sizes, *manner, _address(sinks), _address(output))
    return output


def _vectors(tensor: Tensor) -> bool:
    """Whether these are vectors that the C++ can read."""
    return tensor.dtype == torch.bfloat16 and tensor.shape[-1] % WORD == 0 and tensor.stride(-1) == 1
