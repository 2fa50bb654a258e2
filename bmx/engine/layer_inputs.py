"""What a layer's attention is given in one forward: vectors, a chunk's state, and the step that is computed.

Knows the step and tensors; computes nothing.

Shapes: N packed tokens of the step, T tokens of one chunk, M sums of attention, H query heads, K kv heads, P rows in
use, D key dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmx.engine.packed import PackedStep
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.slot_views import Rows
from bmx.kv.pool import LayerSlots, Parts


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a layer attends with.

    Attributes:
        query: [N, H, D].
        key: [N, K, D], rotary embedding applied.
        value: [N, K, E].
        scale: factor of the dot products.
        softcap: cap of the scores (Gemma 2), or None.
        sinks: [H] logits of the attention sinks (gpt-oss), or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        """All but the vectors, as keyword arguments of a kernel."""
        return {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}

    def head(self, head: int) -> LayerInputs:
        """One kv head's."""
        group = self.query.shape[1] // self.key.shape[1]
        own, asking = slice(head, head + 1), slice(head * group, (head + 1) * group)
        sinks = None if self.sinks is None else self.sinks[asking]
        vectors = self.query[:, asking], self.key[:, own], self.value[:, own]
        return LayerInputs(*vectors, self.scale, self.softcap, sinks)

    def output(self) -> Tensor:
        """An uninitialised output [N, H, E]."""
        tokens, heads, _ = self.query.shape
        return self.query.new_empty(tokens, heads, self.value.shape[-1])


@dataclass(slots=True)
class ChunkState:
    """A chunk's keys and values, and the attention that they have received in the layers that read them.

    Attributes:
        key: [T, K, D], with the probe's behind them.
        value: [T, K, E], with the probe's behind them.
        sums: [M, K, P + T], or None where it is not needed.
    """

    key: Tensor
    value: Tensor
    sums: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        """Add the attention [M, K, P + T] of one more layer."""
        self.sums = sums if self.sums is None else self.sums + sums


class Pairs(NamedTuple):
    """Pairs of one slot.

    Attributes:
        keys: [K, P, D].
        values: [K, P, E].
        positions: [K, P].
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    def before(self, others: Pairs) -> Pairs:
        """These, and others behind them."""
        return Pairs(*(torch.cat(both, dim=1) for both in zip(self, others, strict=True)))


class FusedLayer(NamedTuple):
    """A layer whose whole part of a step kernels do.

    Attributes:
        rows: its slots.
        order: which pair is evicted first.
        key_dim: D.
    """

    rows: Rows
    order: EvictionOrder
    key_dim: int


@dataclass(slots=True)
class Forward:
    """One forward of the model over a packed step.

    Attributes:
        step: the packed step.
        layer: the layer that is called next; transformers calls them in order, and some families pass no keywords on.
        shared: by owner and first packed row, the state of chunks that later layers read too.
        ranked: see ``Ranking.rank_chunks``.
    """

    step: PackedStep
    layer: int = 0
    shared: dict[tuple[int, int], ChunkState] = field(default_factory=dict)
    ranked: dict[int, Any] = field(default_factory=dict)


def by_part(parts: Parts, output: Tensor, inputs: LayerInputs) -> Iterator[tuple[LayerSlots, Tensor, LayerInputs]]:
    """A layer's parts, each with its heads of the output [N, H, E] and of the inputs."""
    if len(parts) == 1:
        yield parts[0], output, inputs
        return
    group = output.shape[1] // len(parts)
    for head, part in enumerate(parts):
        yield part, output[:, head * group : (head + 1) * group], inputs.head(head)
