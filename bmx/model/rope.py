"""Rotary embeddings that depend on the length of a sequence: each sequence keeps the frequencies of its final length.

LongRoPE (Phi-3 and later) and dynamic NTK choose their frequencies by the greatest position of a whole forward. In a
packed step that position may belong to another sequence, and chunks of one prompt would get keys of different
frequencies. Knows rotary modules; knows nothing of steps or slots.

Shapes: T packed tokens, D rotated dimensions of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from bmx.errors import ModelError
from bmx.kernels.transfer import upload

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of packed tokens whose sequences have the same final length.

    Attributes:
        tokens: number of tokens in the run.
        length: final length of their sequences, in tokens.
    """

    tokens: int
    length: int


class SequenceRope(nn.Module):
    """Takes the place of the model's rotary module, and rotates each segment with its own frequencies.

    Args:
        original: the model's rotary module.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original = original
        self._segments: Sequence[Segment] = ()
        self._is_long: Tensor | None = None
        self._frequencies: dict[int, tuple[Tensor, float]] = {}
        self._compute: Callable[..., tuple[Tensor, Tensor]] = inspect.unwrap(type(original).forward)

    @contextmanager
    def sequences(self, segments: Sequence[Segment] = (), is_long: Tensor | None = None) -> Iterator[None]:
        """Say whose tokens are packed, for the forward in the body.

        Args:
            segments: the runs of packed tokens, in order; none where all have the frequencies of short sequences.
            is_long: [T] bool, instead of segments: which tokens are of sequences that take the second of two sets.
        """
        self._segments, self._is_long = segments, is_long
        try:
            yield
        finally:
            self._segments, self._is_long = (), None

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, T, D] of ``position_ids`` [1, T], by the sequences that ``sequences`` was given.

        Args:
            x: a tensor of the type and device that cos and sin get.
            position_ids: [1, T] positions of the packed tokens.
        """
        import torch

        if self._is_long is not None:
            return self._rotate_by_length(x, position_ids, self._is_long)
        if not self._segments:
            return self._rotate(x, position_ids, 0)
        if self.two_sets:
            long = [self.is_long(segment.length) for segment in self._segments for _ in range(segment.tokens)]
            return self._rotate_by_length(x, position_ids, upload(long, x.device, torch.bool))
        parts, start = [], 0
        for segment in self._segments:
            parts.append(self._rotate(x, position_ids[:, start : start + segment.tokens], segment.length))
            start += segment.tokens
        cos, sin = zip(*parts, strict=True)
        return torch.cat(cos, dim=1), torch.cat(sin, dim=1)

    def _rotate_by_length(self, x: Tensor, position_ids: Tensor, is_long: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin by the frequencies of long sequences where ``is_long`` [T], by those of short ones elsewhere."""
        import torch

        limit, is_long = _trained_length(self.original.config), is_long.view(1, -1, 1)
        short, long = (self._rotate(x, position_ids, length) for length in (limit, limit + 1))
        return torch.where(is_long, long[0], short[0]), torch.where(is_long, long[1], short[1])

    @property
    def two_sets(self) -> bool:
        """Whether there are two sets of frequencies, for short and for long sequences, and no others."""
        return "dynamic" not in self.original.rope_type

    def is_long(self, length: int) -> bool:
        """Whether a sequence of this final length takes the second of two sets."""
        return length > _trained_length(self.original.config)

    def _rotate(self, x: Tensor, position_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        self.original.inv_freq, self.original.attention_scaling = self._frequencies_of(length, x.device)
        return self._compute(self.original, x, position_ids)

    def _frequencies_of(self, length: int, device: Any) -> tuple[Tensor, float]:
        """Frequencies and scaling for sequences of this final length."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = self.original.config
        limit = _trained_length(config)
        key = max(length, limit) if "dynamic" in self.original.rope_type else limit + (length > limit)
        if key not in self._frequencies:
            self._frequencies[key] = ROPE_INIT_FUNCTIONS[self.original.rope_type](config, device, seq_len=key)
        return self._frequencies[key]


def pin_rope(model: Any) -> SequenceRope | None:
    """Replace the rotary module of a LongRoPE or dynamic-NTK model; None for any other model.

    Raises:
        ModelError: the model has several such modules, or one with several types.
    """
    modules = [(name, m) for name, m in model.named_modules() if _depends_on_length(getattr(m, "rope_type", ""))]
    if not modules:
        return None
    name, module = modules[0]
    if len(modules) > 1 or not isinstance(module.rope_type, str):
        raise ModelError(f"bmx cannot run {type(model).__name__}: it scales its rotary embedding by layer and length")
    rope = SequenceRope(module)
    model.set_submodule(name, rope)
    return rope


def _depends_on_length(rope_type: Any) -> bool:
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)


def _trained_length(config: Any) -> int:
    parameters = config.rope_parameters
    if parameters["rope_type"] == "longrope":
        return int(parameters["original_max_position_embeddings"])
    return int(config.max_position_embeddings)
