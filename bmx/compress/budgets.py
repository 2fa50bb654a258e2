"""How many KV pairs a sequence keeps: a number, a share of its prompt, or what some bytes hold; by layer and head.

Knows lengths and counts; touches no tensor and loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any

from bmx.errors import UsageError
from bmx.kv.layout import KVLayout
from bmx.units import LayerFactors, byte_share, heads_of

PYRAMID_BASE = 20  # the last layer has 1 / PYRAMID_BASE of an even share


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """KV pairs that a layer and head may keep.

    Attributes:
        pairs: KV pairs of every sequence, on average over the layers; None if ``share`` is set.
        share: the share of the prompt's tokens to keep; above 1 where bytes suffice for pairs of the answer too.
        fixed: pairs that every layer has alike: sink and recent tokens.
        asked: a share as the user gave it, such as ``25%`` (of the pairs) or ``25%bytes``; empty for a number of pairs.
        layers: ``uniform``, ``pyramid``, or factors on the pairs that are not fixed, 1 on average: of each layer, or of
            each of its kv heads.
    """

    pairs: int | None
    share: float | None
    fixed: int
    asked: str = ""
    layers: str | LayerFactors = "uniform"

    @classmethod
    def of(cls, wanted: float | str, fixed: int, layers: str | LayerFactors) -> Budget:
        """From settings.

        Args:
            wanted: a number of pairs, a share of the prompt below 1, or a share of the full cache's bytes.
            fixed: sink and recent tokens together.
            layers: as the attribute of that name.
        """
        of_bytes = byte_share(wanted)
        share = float(wanted) if of_bytes is None else of_bytes
        if share >= 1:
            return cls(pairs=int(share), share=None, fixed=fixed, layers=layers)
        asked = f"{100 * share:g}%" + ("" if of_bytes is None else "bytes")
        return cls(pairs=None, share=share, fixed=fixed, asked=asked, layers=layers)

    def in_pairs(self, pair: KVLayout) -> Budget:
        """A budget in bytes as a share of the prompt's pairs; any other as it is.

        The full cache counts with keys and values in the model's own type; what is kept, with all that is stored: codes
        and their scales, positions, and the scores by which pairs are ranked.

        Args:
            pair: a slot of one row.
        """
        of_bytes = self.of_bytes
        return replace(self, share=of_bytes * pair.full_cache_bytes / pair.cache_bytes) if of_bytes else self

    @property
    def of_bytes(self) -> float | None:
        """The share of the full cache's bytes that the user asked for; None for a budget in pairs."""
        return byte_share(self.asked)

    def record(self) -> dict[str, Any]:
        """What the user asked for and what became of it, for JSON."""
        return {"asked": self.asked or self.pairs, "pairs": self.pairs, "share_of_pairs": self.share}

    def rows(self, prompt_tokens: int, max_tokens: int) -> int:
        """Rows of a slot that a sequence needs in the layer and head that keeps most."""
        return self._rows(prompt_tokens, max_tokens, max(self._extremes))

    def least(self, prompt_tokens: int, max_tokens: int) -> int:
        """Rows of a slot that a sequence needs in the layer and head that keeps least."""
        return self._rows(prompt_tokens, max_tokens, min(self._extremes))

    def _rows(self, prompt_tokens: int, max_tokens: int, factor: float) -> int:
        total = prompt_tokens + max_tokens
        if self.share is not None:
            pairs = self.share * prompt_tokens
            return min(total, max(2 * self.fixed, floor(pairs) if self.of_bytes else ceil(pairs)))
        return min(total, self._pairs(factor))

    @property
    def _extremes(self) -> Sequence[float]:
        """Factors that include the greatest and the least of all layers and heads."""
        if self.layers == "uniform":
            return (1.0,)
        if isinstance(self.layers, str):
            return pyramid(2)
        return [factor for layer in self.layers for factor in heads_of(layer)]

    def heads(self, index: int, layers: int, kv_heads: int, alike: bool = False) -> tuple[int, ...]:
        """Pairs of each kv head of a layer, where the budget is a number of pairs.

        Args:
            index: of the layer.
            layers: of the model.
            kv_heads: of the layer.
            alike: whether all heads keep as many: what the layer's mean factor gives.

        Raises:
            UsageError: the number of factors is not the number of layers, or of a layer's kv heads.
        """
        factors: Sequence[float | tuple[float, ...]] = (1.0,) * layers
        if self.layers != "uniform":
            factors = pyramid(layers) if isinstance(self.layers, str) else self.layers
        if len(factors) != layers:
            raise UsageError(f"kv_layer_budgets has {len(factors)} factors, the model has {layers} layers")
        own = heads_of(factors[index])
        if len(own) not in (1, kv_heads):
            raise UsageError(
                f"kv_layer_budgets has {len(own)} factors of layer {index + 1}, which has {kv_heads} kv heads",
                hint="give one factor for each layer, or one for each of its kv heads",
            )
        own = (sum(own) / len(own),) if alike else own
        return tuple(self._pairs(factor) for factor in own) * (kv_heads // len(own))

    def _pairs(self, factor: float) -> int:
        """Pairs of a head: the fixed ones, and ``factor`` times the average of the others, at least one."""
        return self.fixed + max(1, round(((self.pairs or 0) - self.fixed) * factor))


def pyramid(layers: int, base: float = PYRAMID_BASE) -> list[float]:
    """Factors that fall linearly; the last layer has 1 / base (PyramidKV, arXiv 2406.02069, section 3)."""
    last = 1 / base
    return [2 - last - i * (2 - 2 * last) / max(1, layers - 1) for i in range(layers)]
