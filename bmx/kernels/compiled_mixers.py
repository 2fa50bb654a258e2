"""The functions of mixers, compiled for this processor. Numbers do not depend on how a sequence is cut into steps.

Implements ``mixer_contract.MixerFunctions`` for inputs and states in bfloat16 or float32, norms in bfloat16. Other
types go to ``reference``; so do sizes that fill no register (vectors of norms, channels of a convolution, D and E of
the delta rule, and N of a state space that are no multiples of 16), convolutions of more than 4 taps, and rates [H, N]
of heads with several channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bmx.kernels import reference
from bmx.kernels.compiled_library import Library, address, sequences_of, vectors_of
from bmx.kernels.segments import Segments

COLUMNS = 16  # numbers that are computed together, at most
TYPES = (torch.bfloat16, torch.float32)
TAPS = range(2, 5)  # of a convolution


class CompiledMixers:
    """What mixers call of the kernels compiled for one instruction set.

    Args:
        library: the compiled functions.
    """

    def __init__(self, library: Library) -> None:
        self._library = library

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, segments: Segments, *, silu: bool
    ) -> Tensor:
        """See ``contract.KernelModule.convolve``."""
        channels, taps = weight.shape
        alike = {one.dtype for one in (x, weight, windows, bias) if one is not None}
        fits = len(alike) == 1 and x.dtype in TYPES and windows.is_contiguous()
        if not fits or channels % COLUMNS or taps not in TAPS:
            return reference.convolve(x, weight, bias, windows, segments, silu=silu)
        x, weight, bias = _in_rows(x), weight.contiguous(), None if bias is None else bias.contiguous()
        output = x.new_empty(x.shape)
        operands = (x.data_ptr(), x.stride(0), _is_wide(x), *map(address, (weight, bias, windows)))
        for sequences in _all_sequences(segments):
            self._library.call("bmx_convolve", *operands, sequences, silu, channels, taps, output.data_ptr())
        return output

    def delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        states: Tensor,
        segments: Segments,
        *,
        normalise: bool,
    ) -> Tensor:
        """See ``contract.KernelModule.delta_rule``."""
        (_, keys, dim), (_, heads, value_dim) = key.shape, value.shape
        fits = query.dtype == key.dtype == value.dtype and value.dtype in TYPES and _are_states(states)
        if not fits or dim % COLUMNS or value_dim % COLUMNS:
            return reference.delta_rule(query, key, value, decay, beta, states, segments, normalise=normalise)
        by_channel = decay.dim() == 3
        output = value.new_empty(value.shape)
        each = (decay.float() if by_channel else decay.float().unsqueeze(-1)), beta.float().unsqueeze(-1)
        operands = tuple(map(_in_rows, (query, key, value, *each)))
        sizes = (heads, heads // keys, dim, value_dim, by_channel, normalise)
        given = (vectors_of(*operands), _is_wide(value), states.data_ptr(), _is_wide(states))
        for sequences in _all_sequences(segments):
            self._library.call("bmx_delta_rule", *given, sequences, *sizes, output.data_ptr())
        return output

    def state_space(
        self,
        x: Tensor,
        step: Tensor,
        rate: Tensor,
        inputs: Tensor,
        outputs: Tensor,
        skip: Tensor | None,
        states: Tensor,
        segments: Segments,
    ) -> Tensor:
        """See ``contract.KernelModule.state_space``."""
        (_, heads, dim), (_, groups, numbers), by_number = x.shape, inputs.shape, rate.dim() == 2
        if not _are_states(states) or numbers % COLUMNS or (by_number and dim > 1):
            return reference.state_space(x, step, rate, inputs, outputs, skip, states, segments)
        operands = [None if one is None else one.float().contiguous() for one in (x, step, rate, inputs, outputs, skip)]
        output = torch.empty(x.shape, dtype=torch.float32)
        sizes = (heads, groups, dim, numbers, by_number)
        given = (*map(address, operands), states.data_ptr(), _is_wide(states))
        for sequences in _all_sequences(segments):
            self._library.call("bmx_state_space", *given, sequences, *sizes, output.data_ptr())
        return output

    def gated_norm(self, x: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """See ``contract.KernelModule.gated_norm``."""
        inner = len(weight)
        if not (x.dtype == gate.dtype == weight.dtype == torch.bfloat16 and inner % COLUMNS == 0):
            return reference.gated_norm(x, gate, weight, epsilon)
        x, gate = x.contiguous(), gate.contiguous()
        y, sizes = torch.empty_like(x), (x.numel() // inner, inner)
        self._library.functions.bmx_gated_norm(*map(address, (x, gate, weight, y)), epsilon, *sizes)
        return y

    def norm_of_gated(self, x: Tensor, gate: Tensor, weight: Tensor, epsilon: float, group: int) -> Tensor:
        """See ``contract.KernelModule.norm_of_gated``; x is float32, as state spaces return it."""
        fits = x.dtype == torch.float32 and gate.dtype == weight.dtype == torch.bfloat16
        if not fits or group % COLUMNS:
            return reference.norm_of_gated(x, gate, weight, epsilon, group)
        x, gate = x.contiguous(), gate.contiguous()
        y, sizes = torch.empty_like(x), (x.numel() // group, len(weight) // group, group)
        self._library.functions.bmx_norm_of_gated(*map(address, (x, gate, weight, y)), epsilon, *sizes)
        return y

    def offset_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """See ``contract.KernelModule.offset_norm``."""
        inner = len(weight)
        if not (x.dtype == weight.dtype == torch.bfloat16 and inner % COLUMNS == 0):
            return reference.offset_norm(x, weight, epsilon)
        x = x.contiguous()
        y, sizes = torch.empty_like(x), (x.numel() // inner, inner)
        self._library.functions.bmx_offset_norm(*map(address, (x, weight, y)), epsilon, *sizes)
        return y


def _all_sequences(segments: Segments) -> Iterator[Any]:
    """The sequences of a step, those of equal length together, in the order in which states are read and stored."""
    if segments.decode_slots is not None:
        yield sequences_of(segments.decode_slots, None, 1, kept=True)
    for batch in segments.batches:
        yield sequences_of(batch.slots, batch.begins, batch.length, kept=batch.kept)


def _in_rows(x: Tensor) -> Tensor:
    """Vectors by row, and by head if there are such, each contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _is_wide(x: Tensor) -> bool:
    """Whether its numbers are float32, and not bfloat16."""
    return x.dtype == torch.float32


def _are_states(states: Tensor) -> bool:
    """Whether the C++ takes these states."""
    return states.dtype in TYPES and states.is_contiguous()
