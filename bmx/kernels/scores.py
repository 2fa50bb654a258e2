"""Attention scores in plain torch: products, caps, the softmax, and which keys a query does not see or count for.

Shapes: T chunk tokens, H query heads, K kv heads, C rows of a slot, P rows in use, D key dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled dot products [N, M, C]; the scale is applied before anything is rounded or overflows.

    Args:
        query: [N, M, D].
        key: [N, C, D].
        scale: factor of the dot products.
    """
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


def out_of_window(positions: Tensor, start: int, tokens: int, window: int | None) -> Tensor | None:
    """[K, T, P + T] bool: keys that a sliding window hides from a chunk's queries; None if it hides none.

    Args:
        positions: [K, P], of the slot's rows in use.
        start: position of the chunk's first token.
        tokens: of the chunk.
        window: newest keys that a query sees, or None.
    """
    if window is None or start + tokens <= window:
        return None
    own = torch.arange(start, start + tokens, device=positions.device)
    keys = torch.cat([positions, own.expand(len(positions), -1)], dim=1)  # [K, P+T]
    return keys.unsqueeze(1) <= own.view(1, -1, 1) - window


def near_keys(past_places: Tensor | None, kv_heads: int, tokens: int, distance: int, device: torch.device) -> Tensor:
    """[K, T, P + T] bool: keys that a chunk's query does not count for: it lies less than ``distance`` after.

    Args:
        past_places: [K, P], as in ``contract.KernelModule.attend_chunk``; None for no rows.
        kv_heads: K.
        tokens: of the chunk.
        distance: in tokens.
        device: where the result is.
    """
    own = torch.arange(tokens, device=device)
    places = own.expand(kv_heads, -1)
    if past_places is not None:
        places = torch.cat([past_places, places], dim=1)
    return own.view(1, -1, 1) - places.unsqueeze(1) < distance
