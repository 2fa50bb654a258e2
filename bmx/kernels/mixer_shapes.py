"""What the functions of mixers return, in shape and type alone: for models on the meta device, whose tensors are empty.

Shapes: T packed tokens, C channels, H heads, E value dim, P channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def convolve(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """[T, C], as ``mixer_contract.MixerFunctions.convolve`` returns it."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def delta_rule(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: ARG001
    """[T, H, E], as ``mixer_contract.MixerFunctions.delta_rule`` returns it."""
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def state_space(x: Tensor, *_: Any) -> Tensor:
    """[T, H, P] float32, as ``mixer_contract.MixerFunctions.state_space`` returns it."""
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
