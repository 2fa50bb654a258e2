"""Scorers that rank KV pairs by the attention they received, and the two that need no input: recency and chance.

A scoring method is a frozen dataclass that says what it ``needs`` and returns a score per KV pair; protecting, choosing
and writing pairs is the policy's part. A new one gets its name in ``bmx.policies``; another package offers its own
under the entry points ``bmx.scorers``.

Shapes as in ``Seen``: K kv heads, R rows, for any leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bmx.compress.key_scorers import mean_similarity
from bmx.compress.scorer_api import RANK_EVERY, Needs, QueryWeights, ScorerDefaults, Seen

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class AverageAttention(ScorerDefaults):
    """Attention received per query that could have seen the key (Batch-Max, arXiv 2412.05693).

    Dividing by the lifetime removes the advantage of old tokens: under uniform attention over 4,096 tokens the plain
    sum (H2O) scores the oldest token four orders of magnitude above the newest, the average only one order.
    """

    needs: ClassVar[Needs] = Needs.ATTENTION_MASS

    def __call__(self, seen: Seen) -> Tensor:
        """Attention mass / lifetime."""
        return seen.attention_mass / seen.lifetime


@dataclass(frozen=True, slots=True)
class FarAttention(ScorerDefaults):
    """Attention received from far queries alone: the root of its mean square.

    A token attends mostly to its neighbours, whatever they say. This local attention is most of what a key receives in
    its life, and says least about the time after the prompt. So a prompt's queries count for a key only from
    ``kv_recent`` tokens after it on, when it is no longer protected; those of the answer always count.
    The root of the mean square stands between the mean and the maximum: a few queries that need a pair badly count.
    ``benchmarks/RESULTS.md`` compares it with other scores.
    """

    needs: ClassVar[Needs] = Needs.ATTENTION_MASS
    query_weights: QueryWeights = QueryWeights(far=True, power=2)

    def __call__(self, seen: Seen) -> Tensor:
        """The root of attention mass / number of far queries."""
        return (seen.attention_mass / seen.lifetime).pow(1 / self.query_weights.power)


@dataclass(frozen=True, slots=True)
class AttentionMass(ScorerDefaults):
    """The attention that a key received, summed over queries with ``query_weights``.

    All queries weighted alike: H2O (arXiv 2306.14048, section 4). Weights that decay with age: A2SF (arXiv 2407.20485,
    section 3). The newest query alone: TOVA (arXiv 2401.06104, section 3), here for each kv head by itself.
    """

    needs: ClassVar[Needs] = Needs.ATTENTION_MASS

    def __call__(self, seen: Seen) -> Tensor:
        """The attention mass itself."""
        return seen.attention_mass


A2SF = AttentionMass(query_weights=QueryWeights(decay=0.98))
TOVA = AttentionMass(query_weights=QueryWeights(window=1))


@dataclass(frozen=True, slots=True)
class RoCo(ScorerDefaults):
    """Average attention; pairs whose attention varies most are safe (EasyKV, arXiv 2402.06262, section 4).

    As many pairs as must be evicted are safe because of their variance; among the others the average decides.
    """

    needs: ClassVar[Needs] = Needs.ATTENTION_MASS | Needs.SQUARES

    def __call__(self, seen: Seen) -> Tensor:
        """Attention mass / lifetime, raised by its maximum for the ``surplus`` rows of the highest variance."""
        mean = seen.attention_mass / seen.lifetime
        variance = seen.squares / seen.lifetime - mean.square()
        safe = variance.topk(min(seen.surplus, variance.shape[-1]), dim=-1).indices
        return mean.scatter_add(-1, safe, mean.amax(-1, keepdim=True).expand(safe.shape))


@dataclass(frozen=True, slots=True)
class Window(ScorerDefaults):
    """Attention of the newest queries, smoothed over neighbours: SnapKV (arXiv 2404.14469, section 4) at each chunk.

    In decoding each new query replaces its share of the window's attention. A window of one query is TOVA's.

    Attributes:
        pool: number of neighbours, in the order of the tokens still held, over which attention is smoothed.
        greatest: whether a row counts as much as the greatest of its neighbours, instead of their mean.
    """

    needs: ClassVar[Needs] = Needs.ATTENTION_MASS
    every: ClassVar[int] = RANK_EVERY  # rows must be sorted to know neighbours
    query_weights: QueryWeights = QueryWeights(window=32)
    pool: int = 5
    greatest: bool = False

    def __call__(self, seen: Seen) -> Tensor:
        """The mean or greatest attention mass of ``pool`` neighbours; neighbours beyond the ends count as 0."""
        from torch.nn.functional import avg_pool1d, max_pool1d

        order = seen.positions.argsort(dim=-1)
        mass = seen.attention_mass.gather(-1, order)
        pooling = max_pool1d if self.greatest else avg_pool1d
        pooled = pooling(mass.flatten(0, -2).unsqueeze(1), self.pool, stride=1, padding=self.pool // 2)
        return mass.scatter(-1, order, pooled.view_as(mass))


ROCKETKV = Window(pool=63, greatest=True)  # the first stage of RocketKV (arXiv 2502.14051)


@dataclass(frozen=True, slots=True)
class RKV(ScorerDefaults):
    """Attention of the newest queries minus redundancy, for long answers: R-KV (arXiv 2505.24133, section 3).

    A key's redundancy is its mean cosine similarity with all keys of its head, computed without a similarity matrix.
    Both terms are normalised to a sum of 1 per head. The paper does not count the newest of near-duplicates as
    redundant; here the protected recent tokens stand in for that rule.

    Attributes:
        importance: weight of the attention term; the redundancy term has the rest.
    """

    needs: ClassVar[Needs] = Needs.ATTENTION_MASS | Needs.KEYS
    every: ClassVar[int] = RANK_EVERY
    query_weights: QueryWeights = QueryWeights(window=8)
    importance: float = 0.1

    def __call__(self, seen: Seen) -> Tensor:
        """importance * attention + (1 - importance) * (the head's greatest redundancy - the key's own)."""
        attention = seen.attention_mass / seen.attention_mass.sum(-1, keepdim=True).clamp(min=1e-20)
        redundancy = mean_similarity(seen).masked_fill(~seen.valid, float("-inf")).softmax(-1)
        novelty = redundancy.amax(-1, keepdim=True) - redundancy
        return self.importance * attention + (1 - self.importance) * novelty


@dataclass(frozen=True, slots=True)
class Recency(ScorerDefaults):
    """Newer pairs rank higher: with the sinks, StreamingLLM (arXiv 2309.17453, section 3).

    In a layer whose capacity is its own sliding window, nothing that can still be seen is evicted.
    """

    def __call__(self, seen: Seen) -> Tensor:
        """The position itself."""
        return seen.positions.float()


@dataclass(frozen=True, slots=True)
class Random(ScorerDefaults):
    """A fixed pseudo-random score per token and head: the baseline that any method must beat."""

    def __call__(self, seen: Seen) -> Tensor:
        """Numbers in [0, 1) hashed from position and head; the same in every run and batch."""
        import torch

        heads = torch.arange(seen.positions.shape[-2], device=seen.positions.device).unsqueeze(-1)
        mixed = (seen.positions.long() * 2654435761 + heads * 2246822519 + 374761393) % 2**32
        for factor in (0x7FEB352D, 0x846CA68B):  # two rounds of an integer hash
            mixed = ((mixed ^ (mixed >> 16)) * factor) % 2**32
        return (mixed ^ (mixed >> 16)).float() / 2**32
