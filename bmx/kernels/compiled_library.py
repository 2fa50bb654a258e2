"""The C++ kernels' functions as Python sees them, and tensors as those functions see them: addresses and strides.

Knows the structures and arguments of ``cpp/kernels.cpp``; decides nothing.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from bmx.kernels.formats import MODEL, Stored
from bmx.kernels.linear import Linear
from bmx.kernels.ranking import RANKS, EvictionOrder
from bmx.kernels.slot_views import ChannelRows

FORMATS = (MODEL, "int8", "int4")  # that the C++ reads and writes


class _Vectors(ctypes.Structure):
    """Vectors by row and head, as the C++ sees them: address, and strides in numbers."""

    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_long), ("head", ctypes.c_long))


class _Stored(ctypes.Structure):
    """Stored vectors, as the C++ sees them: one after another, `head` rows for each kv head."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scales")),
        *((name, ctypes.c_long) for name in ("format", "dim", "head")),
    )


class _ChannelKeys(ctypes.Structure):
    """Keys that are scaled by channel, as the C++ sees them: groups one after another."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scales")),
        *((name, ctypes.c_long) for name in ("format", "dim")),
    )


class _ChannelRows(ctypes.Structure):
    """``ChannelRows``, as the C++ sees them: of consecutive heads."""

    _fields_ = (
        ("keys", _ChannelKeys),
        ("values", _Stored),
        *((name, ctypes.c_void_p) for name in ("exact_keys", "exact_values", "exact_rows")),
        *((name, ctypes.c_void_p) for name in ("first", "first_group", "capacity")),
    )


class _Layer(ctypes.Structure):
    """A linear layer, as the C++ sees it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "sums", "bias")),
        *((name, ctypes.c_long) for name in ("columns", "offset")),
    )


class _Sequences(ctypes.Structure):
    """Sequences of equal length among packed rows, as the C++ sees them."""

    _fields_ = (
        ("slots", ctypes.c_void_p),
        ("begins", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_long) for name in ("count", "length")),
        ("kept", ctypes.c_int),
    )


class _Order(ctypes.Structure):
    """An ``EvictionOrder``, as the C++ sees it."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("by", "sink", "recent", "window", "distance", "power"))


class Library:
    """The compiled functions, and the memory that they work in.

    Calls follow one another (the GIL is held), so one piece of memory serves all; it grows to the largest need.
    """

    def __init__(self, library: ctypes.PyDLL) -> None:
        pointer, number, flag, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
        working: dict[str, list[Any]] = {
            "bmx_linear": [pointer] * 2 + [flag] * 2 + [pointer] + [number] * 2,
            "bmx_attend_chunk": [pointer] * 2 + [number] * 6 + [real, flag, flag] + [pointer] * 6,
            "bmx_attend_slots": [pointer] * 3 + [number] * 4 + [real, flag, pointer, number, number] + [pointer] * 3,
            "bmx_decode_step": [pointer] * 11 + [number] * 5 + [real] * 2 + [flag, _Order] + [pointer] * 2,
            "bmx_evict": [pointer] * 5 + [number] * 6 + [real, _Order],
            "bmx_convolve": [pointer, number, flag] + [pointer] * 4 + [flag, number, number, pointer],
            "bmx_delta_rule": [pointer, flag, pointer, flag, pointer] + [number] * 4 + [flag, flag, pointer],
            "bmx_state_space": [pointer] * 7 + [flag, pointer] + [number] * 4 + [flag, pointer],
            "bmx_decode_by_channel": [pointer] * 4 + [number] * 3 + [real, pointer, pointer],
        }
        for name, arguments in working.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [*arguments, pointer, number], number
        library.bmx_rms_norm.argtypes, library.bmx_rms_norm.restype = [*[pointer] * 3, real, number, number], None
        library.bmx_offset_norm.argtypes, library.bmx_offset_norm.restype = library.bmx_rms_norm.argtypes, None
        library.bmx_gated_norm.argtypes = [*[pointer] * 4, real, number, number]
        library.bmx_gated_norm.restype = None
        library.bmx_norm_of_gated.argtypes = [*[pointer] * 4, real, number, number, number]
        library.bmx_norm_of_gated.restype = None
        library.bmx_rotate.argtypes = [pointer, number, number, *[pointer] * 3, *[number] * 3]
        library.bmx_rotate.restype = None
        library.bmx_append_by_channel.argtypes = [pointer] * 2 + [number] * 3
        library.bmx_append_by_channel.restype = None
        library.bmx_read_by_channel.argtypes = [pointer, number, number, pointer, pointer]
        library.bmx_read_by_channel.restype = None
        self.functions: Any = library
        self._work = torch.empty(0, dtype=torch.uint8)

    def call(self, name: str, *arguments: Any) -> bool:
        """Call a function; if it says that the memory to work in is too small, again with as much as it needs.

        Returns:
            Whether it was done: not, if the function declined.
        """
        function = getattr(self.functions, name)
        needed = function(*arguments, self._work.data_ptr(), self._work.numel())
        if needed > 0:
            self._work.resize_(needed)
            function(*arguments, self._work.data_ptr(), needed)
        return bool(needed >= 0)


def address(tensor: Tensor | None) -> int | None:
    """Where its numbers are."""
    return None if tensor is None else tensor.data_ptr()


def layers_of(layers: tuple[Linear, ...], offsets: list[int]) -> Any:
    """Linear layers of one input; ``offsets`` say where the outputs of each begin."""
    return (_Layer * len(layers))(
        *(
            _Layer(*map(address, (layer.weight, layer.scales, layer.sums, layer.bias)), len(layer.weight), offset)
            for layer, offset in zip(layers, offsets, strict=True)
        )
    )


def order_of(order: EvictionOrder) -> _Order:
    """Which pair is evicted first."""
    by, window = RANKS.index(order.by), order.window or 0
    return _Order(by, order.sink, order.recent, window, order.distance, order.power)


def vectors_of(*tensors: Tensor) -> Any:
    """Tensors [N, H or K, D or E], as the C++ sees them."""
    return (_Vectors * len(tensors))(*(_Vectors(t.data_ptr(), t.stride(0), t.stride(1)) for t in tensors))


def sequences_of(slots: Tensor, begins: tuple[int, ...] | None, length: int, *, kept: bool) -> Any:
    """Sequences of equal length, by the slot and the first row of each; None if those are the rows 0, 1, ..."""
    first = None if begins is None else (ctypes.c_int64 * len(begins))(*begins)
    return ctypes.byref(_Sequences(slots.data_ptr(), first, len(slots), length, kept))


def stored_of(keys: Stored, values: Stored, *vectors: Tensor, other: tuple[Stored, Stored] | None = None) -> Any:
    """Stored keys and values [..., rows, D or E], as the C++ sees them, and those of another slot behind them.

    Args:
        keys: of a slot, or of all.
        values: of the same.
        vectors: a key and a value of the same sizes.
        other: keys and values of the other slot; the same again if left out.
    """
    views = []
    dims = [one.shape[-1] for one in vectors]
    for stored, dim in zip((keys, values, *(other or (keys, values))), dims * 2, strict=True):
        numbers = stored.numbers
        head = numbers.stride(-3) // numbers.stride(-2) if numbers.ndim > 2 else 0
        views.append(_Stored(address(numbers), address(stored.scales), FORMATS.index(stored.format), dim, head))
    return (_Stored * 4)(*views)


def channel_rows_of(rows: ChannelRows, slot: int = 0) -> Any:
    """Slots whose keys are scaled by channel, from this one on."""

    def begin(tensor: Tensor) -> int:
        return tensor.data_ptr() + slot * tensor.stride(0) * tensor.itemsize

    dims, values = (rows.exact_keys.shape[-1], rows.exact_values.shape[-1]), rows.values
    keys = _ChannelKeys(address(rows.codes), address(rows.scales), FORMATS.index(rows.key_format), dims[0])
    of_values = _Stored(address(values.numbers), address(values.scales), FORMATS.index(values.format), dims[1], 0)
    of_slots = (rows.exact_keys, rows.exact_values, rows.exact_rows, rows.first, rows.first_group, rows.capacity)
    return ctypes.byref(_ChannelRows(keys, of_values, *map(begin, of_slots)))
