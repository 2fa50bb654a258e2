"""The policy: a scorer, a budget and the tokens that are never evicted, as one value; and who survives a chunk.

Knows ranks and rows; knows nothing of models' sizes beyond the spec, of memory or of steps.

Shapes: K kv heads, C rows of a slot, P rows in use, T chunk tokens, B decoding slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bmx.compress.scorers import AverageAttention, Needs, Newest, Scorer, Seen
from bmx.config import EngineConfig
from bmx.kv.layout import KVLayout, LayerLayout
from bmx.model.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from bmx.kv.pool import LayerSlots

SCORERS: dict[str, Scorer | None] = {"average-attention": AverageAttention(), "none": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionPolicy:
    """Which KV pairs a sequence keeps.

    Attributes:
        scorer: ranks the pairs; None keeps them all.
        budget: pairs that each layer and head may keep (unused without a scorer).
        sink: first tokens that are never evicted.
        recent: newest tokens that are never evicted.
    """

    scorer: Scorer | None
    budget: int
    sink: int
    recent: int

    @classmethod
    def from_config(cls, config: EngineConfig) -> CompressionPolicy:
        """The policy that the configuration names."""
        scorer = SCORERS[config.kv_policy]
        return cls(scorer=scorer, budget=config.kv_budget, sink=config.kv_sink, recent=config.kv_recent)

    def rows_needed(self, total_tokens: int) -> int:
        """Rows of a slot that a sequence of so many tokens, prompt and answer, needs."""
        return total_tokens if self.scorer is None else min(total_tokens, self.budget)

    def layout(self, spec: ModelSpec, capacity: int) -> KVLayout:
        """A slot of ``capacity`` rows; sliding-window layers hold no more than their window."""
        return KVLayout(tuple(self._layer(spec, layer, capacity) for layer in spec.layers))

    def _layer(self, spec: ModelSpec, layer: LayerSpec, capacity: int) -> LayerLayout:
        by_age = layer.window is not None and layer.window <= capacity
        return LayerLayout(
            capacity=min(capacity, layer.window or capacity),
            kv_heads=layer.kv_heads,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            itemsize=spec.itemsize,
            window=layer.window,
            owner=layer.owner,
            last_reader=spec.last_reader(layer.owner),
            by_age=by_age,
        )

    def scorer_of(self, layout: LayerLayout) -> Scorer:
        """What ranks this layer's rows."""
        return Newest() if layout.by_age or self.scorer is None else self.scorer

    def needs_mass(self, layout: LayerLayout) -> bool:
        """Whether this layer's attention must be added up."""
        return self.scorer_of(layout).needs is Needs.ATTENTION_MASS

    def priorities(self, layout: LayerLayout, mass: Tensor, positions: Tensor, now: Tensor | int) -> Tensor:
        """How much each row deserves to stay.

        Args:
            mass: [..., R] float32; positions [..., R] int, -1 for an empty row.
            now: tokens of the sequence seen so far, a number or [..., 1].

        Returns:
            [..., R] float32: the score; +inf for sink and recent tokens; -inf for empty rows and for tokens that no
            later query can see through the layer's window.
        """
        scores = self.scorer_of(layout)(Seen(mass, positions, now, layout.window))
        protected = (positions < self.sink) | (positions >= now - self.recent)
        scores = scores.masked_fill(protected, float("inf"))
        gone = positions < 0
        if layout.window is not None:
            gone = gone | (positions <= now - layout.window)
        return scores.masked_fill(gone, float("-inf"))

    def victims(self, part: LayerSlots, slots: Tensor, now: Tensor) -> Tensor:
        """The row that each decoding slot and head gives up for its next token: the lowest-ranked unprotected one.

        Args:
            slots: [B]; now [B], tokens seen by each.

        Returns:
            [B, K] rows.
        """
        priorities = self.priorities(part.layout, part.mass[slots], part.positions[slots], now.view(-1, 1, 1))
        return priorities.argmin(-1)

    def compress(
        self, part: LayerSlots, slot: int, start: int, key: Tensor, value: Tensor, mass: Tensor | None
    ) -> None:
        """After a chunk has attended: add what it saw to the slot's scores, keep the best, drop the rest.

        Args:
            slot: the sequence's row of the batch.
            start: tokens of the sequence before the chunk.
            key: [T, K, D]; value [T, K, E]: the chunk's own.
            mass: [K, P + T] attention received from the chunk's queries, slot rows first, or None if unscored.
        """
        import torch  # here, since plans are made with policies and without torch

        capacity, tokens = part.layout.capacity, key.shape[0]
        used, now = min(start, capacity), start + tokens
        positions = torch.arange(start, now, device=key.device)
        if mass is not None:
            part.mass[slot, :, :used] += mass[:, :used]
        own = None if mass is None else mass[:, used:]
        if used + tokens <= capacity:
            part.append(slot, used, key, value, positions, own)
            return
        own = torch.zeros(key.shape[1], tokens, device=key.device) if own is None else own
        rivals = torch.cat([part.positions[slot], positions.expand(key.shape[1], -1)], dim=1)  # [K, C+T]
        priorities = self.priorities(part.layout, torch.cat([part.mass[slot], own], dim=1), rivals, now)
        best = priorities.topk(capacity, dim=-1).indices
        keep = torch.zeros_like(priorities, dtype=torch.bool).scatter_(1, best, True)
        part.replace(slot, keep, key, value, positions, own)
