"""The specification of what mixers compute: layers that keep a state of their own for each sequence, in plain torch.

Each function cuts the packed tokens into sequences, reads the state that a sequence has in its slot, and leaves there
the state after its tokens. Tokens are computed in chunks, with a few matrix products for each.

Shapes: T packed tokens, N segments or decoding tokens that are computed together, L tokens of each, S slots, H heads,
K key heads, G groups, D key dim, E value dim, P channels of a head, W taps; R numbers of a state for each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bmx.kernels.segments import Segments

CHUNK = 64  # tokens computed together
CHANNEL_CHUNK = 16  # the same where each channel decays by itself: D numbers for each pair of tokens
CHANNEL_SEGMENTS = 8  # segments computed together there
NORM_EPSILON = 1e-6

_Compute = Callable[..., tuple[Tensor, Tensor]]  # (states [N, ...], inputs [N, L, ...]) -> (outputs, states)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, segments: Segments, *, silu: bool
) -> Tensor:
    """See ``contract.KernelModule.convolve``."""

    def compute(window: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        seen, length = torch.cat([window, own], dim=1), own.shape[1]
        y = torch.zeros_like(own, dtype=torch.float32) if bias is None else bias.float().expand(own.shape)
        for tap, factors in enumerate(taps):
            y = y + seen[:, tap : tap + length].float() * factors
        return torch.nn.functional.silu(y) if silu else y, seen[:, length:]

    taps = weight.float().t()  # [W, C]
    return _by_sequence(compute, (x,), windows, segments, torch.empty_like(x))


def delta_rule(
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
    by_channel = decay.dim() == 3

    def compute(state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        if by_channel and inputs[0].shape[1] > 1 and len(state) > CHANNEL_SEGMENTS:
            pieces = (torch.split(one, CHANNEL_SEGMENTS) for one in (state, *inputs))
            outputs, after = zip(*(compute(*piece) for piece in zip(*pieces, strict=True)), strict=True)
            return torch.cat(outputs), torch.cat(after)
        chunks, state = [], state.float()
        for *both, v, g, b in _chunks(inputs, CHANNEL_CHUNK if by_channel else CHUNK):
            q, k = map(_normalised, both) if normalise else both
            y, state = _delta_chunk(q, k, v, g, b, state)
            chunks.append(y.transpose(1, 2))
        return torch.cat(chunks, 1), state

    decay, beta = decay if by_channel else decay.unsqueeze(-1), beta.unsqueeze(-1)
    output = torch.empty_like(value, memory_format=torch.contiguous_format)
    return _by_sequence(compute, (query, key, value, decay, beta), states, segments, output)


def state_space(
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
    by_number = rate.dim() == 2
    rate = rate.float()

    def compute(state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        chunks, state = [], state.float()
        for own, dt, *of_groups in _chunks(inputs, 1 if by_number else CHUNK):
            b, c = (one.repeat_interleave(own.shape[1] // one.shape[1], 1) for one in of_groups)  # [N, H, L, R]
            if by_number:
                state = torch.exp(dt * rate.unsqueeze(1)) * state + (dt * own).transpose(-1, -2) * b
                y = c @ state.transpose(-1, -2)
            else:
                y, state = _state_space_chunk(dt * own, dt * rate.view(-1, 1, 1), b, c, state)
            y = y if skip is None else y + skip.float().view(-1, 1, 1) * own
            chunks.append(y.transpose(1, 2))
        return torch.cat(chunks, 1), state

    output = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    return _by_sequence(compute, (x, step.unsqueeze(-1), inputs, outputs), states, segments, output)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``contract.KernelModule.gated_norm``."""
    normed = weight * _normed(x, epsilon).to(x.dtype)
    return (normed * torch.nn.functional.silu(gate.float())).to(x.dtype)


def norm_of_gated(x: Tensor, gate: Tensor, weight: Tensor, epsilon: float, group: int) -> Tensor:
    """See ``contract.KernelModule.norm_of_gated``."""
    gated = x.float() * torch.nn.functional.silu(gate.float())
    return weight * _normed(gated.view(*x.shape[:-1], -1, group), epsilon).view(x.shape).to(x.dtype)


def offset_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``contract.KernelModule.offset_norm``."""
    return (_normed(x, epsilon) * (1.0 + weight.float())).to(x.dtype)


def _normed(x: Tensor, epsilon: float) -> Tensor:
    """Vectors over the root of their mean square, in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)


def _by_sequence(
    compute: _Compute, inputs: tuple[Tensor, ...], states: Tensor, segments: Segments, output: Tensor
) -> Tensor:
    """The outputs of all packed tokens [T, ...]; the states [S + 1, ...] of kept sequences are written."""
    if segments.decode_slots is not None:
        slots = segments.decode_slots.remainder(len(states))  # -1 is the last one
        y, after = compute(states[slots], *(one[: len(slots)].unsqueeze(1) for one in inputs))
        output[: len(slots)] = y.squeeze(1)
        states.index_copy_(0, slots, after.to(states.dtype))
    for batch in segments.batches:
        y, after = compute(states[batch.slots], *map(batch.take, inputs))
        batch.put(output, y)
        if batch.kept:
            states.index_copy_(0, batch.slots, after.to(states.dtype))
    return output


def _chunks(inputs: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of the inputs [N, L, H, ...], each of at most ``size`` tokens: float32 [N, H, size, ...]."""
    for chunk in zip(*(torch.split(one, size, 1) for one in inputs), strict=True):
        yield tuple(one.float().transpose(1, 2) for one in chunk)


def _normalised(x: Tensor) -> Tensor:
    """Vectors of length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPSILON)


def _decays(total: Tensor) -> Tensor:
    """What is left at token i of what was stored at token j: exp of the difference of the decays up to both.

    Args:
        total: [..., L, D] float64 logarithms, decreasing.

    Returns:
        [..., L, L, D] float32, 0 where j is later than i.
    """
    length = total.shape[-2]
    later = torch.ones(length, length, dtype=torch.bool, device=total.device).triu(1).unsqueeze(-1)
    differences = (total.unsqueeze(-2) - total.unsqueeze(-3)).float()
    return differences.masked_fill_(later, float("-inf")).exp_()


def _decays_at_end(total: Tensor) -> Tensor:
    """What is left at the last token of what was stored at each: [..., L, D] float32."""
    return (total[..., -1:, :] - total).float().exp_()


def _delta_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of the delta rule (arXiv 2406.06484, section 3.2, with decay: arXiv 2412.06464, section 3.3).

    What each token changes follows from what the tokens before it have changed: one triangular system for all of them.

    Args:
        q: [N, K, L, D].
        k: [N, K, L, D].
        v: [N, H, L, E].
        g: [N, H, L, 1 or D], logarithms of the decay.
        b: [N, H, L, 1].
        state: [N, H, D, E].

    Returns:
        [N, H, L, E], and the state after the chunk.
    """
    q, k = (one.repeat_interleave(v.shape[1] // one.shape[1], 1) for one in (q * q.shape[-1] ** -0.5, k))
    total = g.cumsum(-2, dtype=torch.float64)  # rounded sums of strong decays would hide weak ones
    left, decays, at_end = total.exp().float(), _decays(total), _decays_at_end(total)
    if g.shape[-1] == 1:
        of_keys, of_queries = (one @ k.transpose(-1, -2) * decays.squeeze(-1) for one in (k, q))
    else:
        of_keys, of_queries = (torch.einsum("nhid,nhjd,nhijd->nhij", one, k, decays) for one in (k, q))
    change = b * (v - (k * left) @ state)
    if k.shape[2] > 1:  # the diagonal of the system is 1, whatever stands there
        change = torch.linalg.solve_triangular(b * of_keys, change, upper=False, unitriangular=True)
    y = (q * left) @ state + of_queries @ change
    return y, left[..., -1, :].unsqueeze(-1) * state + (k * at_end).transpose(-1, -2) @ change


def _state_space_chunk(x: Tensor, g: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of Mamba-2's state space (arXiv 2405.21060, section 6).

    Args:
        x: [N, H, L, P], times the step.
        g: [N, H, L, 1], logarithms of the decay.
        b: [N, H, L, R].
        c: [N, H, L, R].
        state: [N, H, P, R].

    Returns:
        [N, H, L, P], and the state after the chunk.
    """
    total = g.cumsum(-2, dtype=torch.float64)
    left = total.exp().float()
    y = (c @ b.transpose(-1, -2) * _decays(total).squeeze(-1)) @ x + left * (c @ state.transpose(-1, -2))
    return y, left[..., -1:, :] * state + (x * _decays_at_end(total)).transpose(-1, -2) @ b
