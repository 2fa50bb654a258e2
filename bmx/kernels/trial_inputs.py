"""What trials of attention compute with: the sizes of a layer, and numbers that are always the same.

Shapes: S slots, K kv heads, C rows of a head in a slot, T tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bmx.kernels.formats import MODEL, Stored
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.slot_views import Chunks, Rows

SLOTS, ROWS, TOKENS = 2, 40, 16  # slots of a trial, rows of each of their heads, tokens of a chunk
OLDER = 24  # tokens of the first slot that were evicted: it is full, and the second one has room for a chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """What the kernels of an attention layer are compiled for.

    Attributes:
        heads: query heads.
        kv_heads: K.
        key_dim: numbers of a key.
        value_dim: numbers of a value.
        formats: how keys and values are stored.
        order: which pair is evicted first.
        mass: whether rows hold the attention that they received.
        decays: whether queries weigh differently, and earlier attention decays.
        softcap: of the scores, or None.
        sinks: whether there are extra logits without a value.
        fused: whether kernels do whole steps; if not, chunks attend and a policy does the rest.
        channel_formats: how keys and values are stored, where keys are scaled by channel; else None.
        float8: whether the model's linear layers have float8 weights.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    order: EvictionOrder
    formats: tuple[str, str] = (MODEL, MODEL)
    mass: bool = False
    decays: bool = False
    softcap: float | None = None
    sinks: bool = False
    fused: bool = True
    channel_formats: tuple[str, str] | None = None
    float8: bool = False


class Inputs:
    """Numbers for trials, the same whenever they are asked for.

    Args:
        layer: sizes.
        dtype: of the model.
        device: where they are.
        per_head: rows of each head of a slot.

    Attributes:
        starts: tokens that each slot has seen.
    """

    def __init__(self, layer: Attention, dtype: torch.dtype, device: torch.device, per_head: int = ROWS) -> None:
        self.layer, self.dtype, self.device = layer, dtype, device
        self.per_head, self.starts = per_head, (per_head + OLDER, TOKENS)

    def normal(self, *shape: int, seed: int) -> Tensor:
        """Numbers of the model's type that are distributed normally."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)

    def tensor(self, numbers: Any, dtype: torch.dtype = torch.long) -> Tensor:
        """Given numbers."""
        return torch.tensor(numbers, dtype=dtype, device=self.device)

    def vectors(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of packed tokens."""
        layer = self.layer
        query = self.normal(tokens, layer.heads, layer.key_dim, seed=1)
        key = self.normal(tokens, layer.kv_heads, layer.key_dim, seed=2)
        return query, key, self.normal(tokens, layer.kv_heads, layer.value_dim, seed=3)

    @property
    def options(self) -> dict[str, Any]:
        """What all functions of attention are told."""
        layer = self.layer
        sinks = self.normal(layer.heads, seed=4) if layer.sinks else None
        return {"scale": layer.key_dim**-0.5, "softcap": layer.softcap, "sinks": sinks}

    def rows(self) -> Rows:
        """Two slots: the first is full, and holds any tokens; the second holds its first tokens."""
        layer, heads = self.layer, SLOTS * self.layer.kv_heads
        order = torch.Generator().manual_seed(5)
        full = [torch.randperm(self.starts[0], generator=order)[: self.per_head] for _ in range(layer.kv_heads)]
        begun = torch.arange(self.per_head).masked_fill(torch.arange(self.per_head) >= self.starts[1], -1)
        keys = Stored.zeros(layer.formats[0], (heads * self.per_head,), layer.key_dim, self.dtype, self.device)
        values = Stored.zeros(layer.formats[1], (heads * self.per_head,), layer.value_dim, self.dtype, self.device)
        keys.write(slice(None), self.normal(heads * self.per_head, layer.key_dim, seed=6))
        values.write(slice(None), self.normal(heads * self.per_head, layer.value_dim, seed=7))
        return Rows(
            keys=keys.numbers,
            values=values.numbers,
            positions=torch.cat([*full, *[begun] * layer.kv_heads]).int().to(self.device),
            mass=self.normal(heads * self.per_head, seed=8).float().abs() / self.per_head if layer.mass else None,
            first=(torch.arange(heads) * self.per_head).view(SLOTS, -1).to(self.device),
            capacity=torch.full((SLOTS, layer.kv_heads), self.per_head).to(self.device),
            kv_heads=layer.kv_heads,
            capacities=((self.per_head,) * layer.kv_heads,) * SLOTS,
            largest=self.per_head,
            key_scales=keys.scales,
            value_scales=values.scales,
            key_format=layer.formats[0],
            value_format=layer.formats[1],
            ranks=self.normal(heads * self.per_head, seed=22).float() if layer.order.by == "rank" else None,
        )

    def chunks(self) -> Chunks:
        """A chunk for each slot; both sequences evict sooner or later."""
        columns = {
            "offsets": tuple(TOKENS * slot for slot in range(SLOTS)),
            "lengths": (TOKENS,) * SLOTS,
            "slots": tuple(range(SLOTS)),
            "starts": self.starts,
            "row_limits": (self.per_head,) * SLOTS,
            "totals": (self.starts[0] + 2 * self.per_head,) * SLOTS,
        }
        weights = decay = None
        if self.layer.decays:
            weights = self.normal(TOKENS * SLOTS, seed=9).float().abs()
            decay = self.tensor((0.5,) * SLOTS, torch.float32)
        table = self.tensor(list(columns.values()))
        return Chunks(**columns, table=table, shared=(), query_weights=weights, decay=decay)
