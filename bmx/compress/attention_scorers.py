"""How important each KV pair is. A scorer ranks; protecting, choosing and writing are not its business.

A new method is one frozen dataclass: say what it ``needs`` to see, and return a score per KV pair. One from another
package is found by its entry point in the group ``bmx.scorers``: a name, and a scorer or a class of them.

Shapes as in ``Seen``: K kv heads, R rows, for any leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, ClassVar

from bmx.compress.key_scorers import ExpectedAttention, KeyDiff, KeyNorm, LagKV, mean_similarity
from bmx.compress.scorer_api import RANK_EVERY, Needs, QueryWeights, Scorer, ScorerDefaults, Seen
from bmx.errors import UsageError
from bmx.units import SCORER_GROUP

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class AverageAttention(ScorerDefaults):
    """Attention received per query that could have seen the key (Batch-Max, arXiv 2412.05693).

    Dividing by the lifetime takes away the old tokens' advantage: under even attention over 4,096 tokens the plain
    sum (H2O) prefers the oldest to the newest by four orders of magnitude, the average by one.
    """

    needs: ClassVar[Needs] = Needs.ATTENTION_MASS

    def __call__(self, seen: Seen) -> Tensor:
        """mass / lifetime."""
        return seen.attention_mass / seen.lifetime


@dataclass(frozen=True, slots=True)
class AttentionMass(ScorerDefaults):
    """The attention that a key received, summed over queries with ``query_weights``.

    All queries weighted alike: H2O (arXiv 2306.14048, section 4). Weights that decay with age: A2SF (arXiv 2407.20485,
    section 3). The newest query alone: TOVA (arXiv 2401.06104, section 3), here for each kv head by itself.
    """

    needs: ClassVar[Needs] = Needs.ATTENTION_MASS

    def __call__(self, seen: Seen) -> Tensor:
        """The mass itself."""
        return seen.attention_mass


@dataclass(frozen=True, slots=True)
class RoCo(ScorerDefaults):
    """The lowest average attention goes, but not where attention varies most (EasyKV, arXiv 2402.06262, section 4).

    As many tokens as must go are safe for the spread of what they received; of the rest, the average decides.
    """

    needs: ClassVar[Needs] = Needs.ATTENTION_MASS | Needs.SQUARES

    def __call__(self, seen: Seen) -> Tensor:
        """mass / lifetime, and the greatest of all on top for the ``surplus`` rows that vary most."""
        mean = seen.attention_mass / seen.lifetime
        variance = seen.squares / seen.lifetime - mean.square()
        safe = variance.topk(min(seen.surplus, variance.shape[-1]), dim=-1).indices
        return mean.scatter_add(-1, safe, mean.amax(-1, keepdim=True).expand(safe.shape))


@dataclass(frozen=True, slots=True)
class Window(ScorerDefaults):
    """What the newest queries attend to, smoothed over neighbours: SnapKV (arXiv 2404.14469, section 4) at each chunk.

    In decoding each new query replaces its share of the window's votes. A window of one query is TOVA's.

    Attributes:
        pool: neighbours, in the order of the tokens that are left, whose votes are averaged.
    """

    needs: ClassVar[Needs] = Needs.ATTENTION_MASS
    every: ClassVar[int] = RANK_EVERY  # rows must be sorted to know neighbours
    query_weights: QueryWeights = QueryWeights(window=32)
    pool: int = 5

    def __call__(self, seen: Seen) -> Tensor:
        """The mean of the votes of ``pool`` neighbours, those beyond the ends counted as none."""
        from torch.nn.functional import avg_pool1d

        order = seen.positions.argsort(dim=-1)
        votes = seen.attention_mass.gather(-1, order)
        pooled = avg_pool1d(votes.flatten(0, -2).unsqueeze(1), self.pool, stride=1, padding=self.pool // 2)
        return votes.scatter(-1, order, pooled.view_as(votes))


@dataclass(frozen=True, slots=True)
class RKV(ScorerDefaults):
    """Attention of the newest queries less redundancy, for long answers: R-KV (arXiv 2505.24133, section 3).

    A key's redundancy is its mean cosine similarity with all keys of its head, which needs no similarity matrix. Both
    terms are brought to a sum of one per head. The paper's rule that the newest of near-duplicates counts as none is
    left to the recent tokens, which always stay.

    Attributes:
        importance: weight of attention; the rest is redundancy's.
    """

    needs: ClassVar[Needs] = Needs.ATTENTION_MASS | Needs.KEYS
    every: ClassVar[int] = RANK_EVERY
    query_weights: QueryWeights = QueryWeights(window=8)
    importance: float = 0.1

    def __call__(self, seen: Seen) -> Tensor:
        """importance * attention + (1 - importance) * novelty, the greatest redundancy less the key's own."""
        attention = seen.attention_mass / seen.attention_mass.sum(-1, keepdim=True).clamp(min=1e-20)
        redundancy = mean_similarity(seen).masked_fill(~seen.valid, float("-inf")).softmax(-1)
        novelty = redundancy.amax(-1, keepdim=True) - redundancy
        return self.importance * attention + (1 - self.importance) * novelty


@dataclass(frozen=True, slots=True)
class Recency(ScorerDefaults):
    """The newer the better: with the sinks, StreamingLLM (arXiv 2309.17453, section 3).

    With a capacity of a layer's own sliding window, this loses nothing.
    """

    def __call__(self, seen: Seen) -> Tensor:
        """The position itself."""
        return seen.positions.float()


@dataclass(frozen=True, slots=True)
class Random(ScorerDefaults):
    """A fair draw per token and head that never changes: what any method must beat."""

    def __call__(self, seen: Seen) -> Tensor:
        """Numbers in [0, 1) mixed from position and head; the same in every run and batch."""
        import torch

        heads = torch.arange(seen.positions.shape[-2], device=seen.positions.device).unsqueeze(-1)
        mixed = (seen.positions.long() * 2654435761 + heads * 2246822519 + 374761393) % 2**32
        for factor in (0x7FEB352D, 0x846CA68B):  # two rounds of an integer hash
            mixed = ((mixed ^ (mixed >> 16)) * factor) % 2**32
        return (mixed ^ (mixed >> 16)).float() / 2**32


SCORERS: dict[str, Scorer] = {
    "average-attention": AverageAttention(),
    "h2o": AttentionMass(),
    "decay": AttentionMass(query_weights=QueryWeights(decay=0.98)),
    "roco": RoCo(),
    "window": Window(),
    "tova": AttentionMass(query_weights=QueryWeights(window=1)),
    "r-kv": RKV(),
    "keydiff": KeyDiff(),
    "knorm": KeyNorm(),
    "lagkv": LagKV(),
    "expected-attention": ExpectedAttention(),
    "streaming": Recency(),
    "random": Random(),
}


def scorer_named(name: str) -> Scorer | None:
    """The scorer of that name, built in or from an entry point; None for ``none``, which evicts nothing.

    Raises:
        UsageError: there is none, or it is none.
    """
    if name == "none" or name in SCORERS:
        return SCORERS.get(name)
    found = next(iter(entry_points(group=SCORER_GROUP, name=name)), None)
    if found is None:
        raise UsageError(f"kv_policy cannot be {name!r}", hint=f"it takes {', '.join(SCORERS)} or none")
    try:
        loaded = found.load()
        scorer = loaded() if isinstance(loaded, type) else loaded
    except Exception as error:  # another's code may raise anything
        raise UsageError(f"the policy {name!r} ({found.value}) cannot be loaded: {error}") from error
    if not (callable(scorer) and all(hasattr(scorer, part) for part in ("needs", "query_weights", "every"))):
        raise UsageError(f"the policy {name!r} ({found.value}) is no scorer", hint="see bmx.compress.scorer_api.Scorer")
    return scorer  # type: ignore[no-any-return]
