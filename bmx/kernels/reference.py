"""The truth: attention over a slot and a chunk, in plain torch, one whole matrix at a time; and linear layers.

Knows tensors only, and is written to be read; every faster kernel has these signatures and is tested against it.

Shapes: T chunk tokens, B decoding slots, S slots, H query heads, K kv heads, G = H / K, C rows of a slot,
P rows in use, D key dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bmx.kernels.linear import Linear


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
    """A prompt chunk attends to its slot (all of it) and to itself (causally).

    Args:
        query: [T, H, D]; key [T, K, D]; value [T, K, E]: the chunk's own.
        past_key: [K, P, D]; past_value [K, P, E]: rows of the slot in use, in any order.
        scale: factor of the dot products.
        softcap: ``softcap * tanh(s / softcap)`` replaces each score s (Gemma 2).
        sinks: [H] extra logits that take part in the softmax and have no value (gpt-oss).
        hidden: [K, T, P + T] bool, True where a sliding window hides a key from a query.
        votes: [M, T] float32, M ways of adding up the attention that each key receives: the weight of each query.
        squares: whether to add up the squared probabilities too, by the first of these weights.

    Returns:
        output [T, H, E], and the sums [M, K, P + T] (M + 1 with squares) in float32 (or None without votes): over
        queries, weighted, of the mean over the group's heads of the attention probabilities, slot rows first.
    """
    tokens, heads, _ = query.shape
    kv_heads, past, _ = past_key.shape
    keys = torch.cat([past_key, key.transpose(0, 1)], dim=1)  # [K, P+T, D]
    values = torch.cat([past_value, value.transpose(0, 1)], dim=1)
    grouped = query.reshape(tokens, kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3)  # [K, G, T, D]
    scores = scaled_scores(grouped.flatten(1, 2), keys, scale).view(*grouped.shape[:3], -1)  # [K, G, T, P+T]
    scores = cap(scores.float(), softcap)
    future = torch.ones(tokens, past + tokens, dtype=torch.bool, device=query.device).triu(past + 1)
    scores.masked_fill_(future, float("-inf"))
    if hidden is not None:
        scores.masked_fill_(hidden.unsqueeze(1), float("-inf"))
    sink_logits = None if sinks is None else sinks.view(kv_heads, -1, 1, 1)
    weights = softmax_with_sinks(scores, sink_logits)
    output = torch.matmul(weights.to(value.dtype), values.unsqueeze(1))  # [K, G, T, E]
    output = output.permute(2, 0, 1, 3).reshape(tokens, heads, -1)
    if votes is None:
        return output, None
    sums = torch.einsum("mt,ktn->mkn", votes, weights.mean(1))
    if squares:
        sums = torch.cat([sums, torch.einsum("t,ktn->kn", votes[0], weights.square().mean(1)).unsqueeze(0)])
    return output, sums


def out_of_window(positions: Tensor, start: int, tokens: int, window: int | None) -> Tensor | None:
    """[K, T, P + T]: keys that a sliding window hides from a chunk's queries; None if it hides nothing.

    Args:
        positions: [K, P] of the slot's rows in use; the chunk's are ``start`` and so on.
    """
    if window is None or start + tokens <= window:
        return None
    own = torch.arange(start, start + tokens, device=positions.device)
    keys = torch.cat([positions, own.expand(len(positions), -1)], dim=1)  # [K, P+T]
    return keys.unsqueeze(1) <= own.view(1, -1, 1) - window


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
    """One decoding token per slot attends to its slot, in which its own key already is.

    Copying the keys of some slots costs more than attending to all: from half of them on, those that do not decode
    take part with a query of zeros.

    Args:
        query: [B, H, D]; keys [S, K, C, D]; values [S, K, C, E].
        slots: [B], the slot of each token; None if those are the first ones, in order (B = S).
        hidden: broadcastable to [B, K, C] bool, True for rows not in use or out of the window.
        scale, softcap, sinks: as in ``attend_chunk``.
        want_mass: whether to give the attention that each key receives; ``squares``: and the squared probabilities.

    Returns:
        output [B, H, E], and the sums [1 or 2, B, K, C] in float32 (or None).
    """
    look = partial(_look_up, scale=scale, softcap=softcap, sinks=sinks, want_mass=want_mass, squares=squares)
    if slots is None:
        return look(query, keys, values, hidden)
    if 2 * len(slots) < len(keys):
        return look(query, keys[slots], values[slots], hidden)
    everyone = query.new_zeros(len(keys), *query.shape[1:]).index_copy_(0, slots, query)
    if hidden is not None:
        shown = hidden.new_zeros(len(keys), *hidden.shape[1:])
        hidden = shown.index_copy_(0, slots, hidden.expand(len(slots), *hidden.shape[1:]))
    output, sums = look(everyone, keys, values, hidden)
    return output[slots], None if sums is None else sums[:, slots]


def _look_up(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    want_mass: bool,
    squares: bool,
) -> tuple[Tensor, Tensor | None]:
    """``attend_slots`` of one token for every slot, in order."""
    batch, kv_heads, capacity, dim = keys.shape
    grouped = query.reshape(batch * kv_heads, -1, dim)  # [B*K, G, D]
    scores = scaled_scores(grouped, keys.flatten(0, 1), scale).view(batch, kv_heads, -1, capacity)  # [B, K, G, C]
    scores = cap(scores.float(), softcap)
    if hidden is not None:
        scores.masked_fill_(hidden.unsqueeze(-2), float("-inf"))
    weights = softmax_with_sinks(scores, None if sinks is None else sinks.view(kv_heads, -1, 1))
    output = torch.matmul(weights.to(values.dtype), values)  # [B, K, G, E]
    output = output.reshape(batch, query.shape[1], -1)
    if not want_mass:
        return output, None
    return output, torch.stack([weights.mean(2)] + ([weights.square().mean(2)] if squares else []))


def product(layers: tuple[Linear, ...], gated: bool = False) -> Callable[[Tensor], list[Tensor]]:
    """What computes linear layers of the same input x [..., I]: [..., O] of each.

    Args:
        layers: all with weights in bytes, or none.
        gated: there are two, and the only output is SiLU(the first one's) times the second one's (SwiGLU, arXiv
            2002.05202).
    """

    def computed(x: Tensor) -> list[Tensor]:
        found = [_linear(x, layer) for layer in layers]
        return [gate(*found)] if gated else found

    return computed


def _linear(x: Tensor, layer: Linear) -> Tensor:
    """A linear layer [..., I] -> [..., O]; where its weights are bytes, inputs are too while they are multiplied.

    Each row of the input is rounded to 256 levels from its least to its greatest number, zero among them; sums are
    exact integers.
    """
    if layer.scales is None or layer.sums is None:
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    rows = x.reshape(-1, x.shape[-1]).float()
    least, greatest = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    steps = (greatest - least).clamp(min=1e-30) / 255
    zeros = (-least / steps).round()
    codes = ((rows / steps).round() + zeros).clamp(0, 255)
    sums = torch._int_mm((codes - 128).to(torch.int8), layer.weight.t())
    sums = sums + (128 - zeros.int()) * layer.sums
    y = sums.float() * steps * layer.scales
    y = y if layer.bias is None else y + layer.bias
    return y.to(x.dtype).view(*x.shape[:-1], len(layer.weight))


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) times up, both [..., I]."""
    return torch.nn.functional.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., I] over the root of its mean square, computed in float32 and rounded, times weight [I]."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding (arXiv 2104.09864, section 3.4.2; halves, not pairs): x [1, H, T, D]; cos, sin [1, T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


SUPPORTED_DTYPES: tuple[
    torch.dtype, ...
] = ()  # types of models whose parts are better computed here than by the model itself
decode = read = None  # policy and pool do it, operator by operator


def scaled_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Query [N, M, D] x key [N, C, D] -> scores [N, M, C], scaled before anything is rounded or overflows."""
    return torch.baddbmm(query.new_empty(()), query, key.transpose(-1, -2), beta=0, alpha=scale)


def cap(scores: Tensor, softcap: float | None) -> Tensor:
    """Soft-capped scores; unchanged without a cap."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension; ``sinks`` (broadcastable) joins the denominator only."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
