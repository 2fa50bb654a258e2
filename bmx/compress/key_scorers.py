"""Scorers that look at keys and values: they need no attention weights, so any fused kernel can compute attention.

Shapes as in ``Seen``: K kv heads, R rows, D key dim, E value dim, G query heads of a kv head, T queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from bmx.compress.scorer_api import RANK_EVERY, Needs, ScorerDefaults, Seen

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class KeyDiff(ScorerDefaults):
    """Keys that differ from the average key rank higher (KeyDiff, arXiv 2504.15364, section 3)."""

    needs: ClassVar[Needs] = Needs.KEYS
    every: ClassVar[int] = RANK_EVERY

    def __call__(self, seen: Seen) -> Tensor:
        """Minus the cosine between each key and the mean of the normalised keys."""
        from torch.nn.functional import cosine_similarity, normalize

        unit = normalize(seen.keys, dim=-1) * seen.valid.unsqueeze(-1)
        return -cosine_similarity(seen.keys, unit.mean(-2, keepdim=True), dim=-1)


@dataclass(frozen=True, slots=True)
class KeyNorm(ScorerDefaults):
    """Keys of a small L2 norm rank higher (Devoto et al., arXiv 2406.11430, section 3)."""

    needs: ClassVar[Needs] = Needs.KEYS
    every: ClassVar[int] = RANK_EVERY

    def __call__(self, seen: Seen) -> Tensor:
        """Minus the key's L2 norm."""
        return -seen.keys.norm(dim=-1)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class LagKV(ScorerDefaults):
    """Pairs that stand out against the tokens after them rank higher (LagKV, arXiv 2504.04704, section 2).

    Rows are sorted by position and cut into partitions of ``lag`` rows, counted from the newest. Each channel of a
    partition is scaled by that channel's range in the next partition. A row's score is the standard deviation of its
    scaled channels, as a softmax over its partition, averaged over key and value. The newest partition has no next
    one and is kept.

    Attributes:
        lag: rows of a partition.
    """

    needs: ClassVar[Needs] = Needs.KEYS | Needs.VALUES
    every: ClassVar[int] = RANK_EVERY
    lag: int = 128

    def __call__(self, seen: Seen) -> Tensor:
        """The mean of the softmax shares of key and value; +inf for the newest partition."""
        order = seen.positions.argsort(dim=-1)
        rows = seen.positions.shape[-1]
        lag = min(self.lag, max(1, rows // 4))  # small budgets get smaller partitions, so that there are several
        remainder = rows % lag  # the oldest rows, too few for a partition, are scaled by the first partition
        shares = [_spread(_in_order(t, order), lag, remainder) for t in (seen.keys, seen.values)]
        scores = (shares[0] + shares[1]) / 2
        return scores.new_empty(scores.shape).scatter_(-1, order, scores)


def _in_order(tensor: Tensor, order: Tensor) -> Tensor:
    """[..., R, D], rows sorted."""
    return tensor.gather(-2, order.unsqueeze(-1).expand(tensor.shape))


def _spread(sorted_rows: Tensor, lag: int, remainder: int) -> Tensor:
    """[..., R]: standard deviation over a row's channels, as a softmax over its partition; +inf for the last one."""
    import torch

    def shares(part: Tensor, after: Tensor) -> Tensor:
        low, high = after.amin(-2, keepdim=True), after.amax(-2, keepdim=True)
        return ((part - low) / (high - low).clamp(min=1e-6)).std(-1).softmax(-1)

    starts = range(remainder, sorted_rows.shape[-2], lag)
    partitions = [sorted_rows[..., start : start + lag, :] for start in starts]
    compared = [shares(part, after) for part, after in pairwise(partitions)]
    oldest = [shares(sorted_rows[..., :remainder, :], partitions[0])] if remainder else []
    newest = torch.full_like(partitions[-1][..., 0], float("inf"))
    return torch.cat([*oldest, *compared, newest], dim=-1)


@dataclass(frozen=True, slots=True)
class ExpectedAttention(ScorerDefaults):
    """The attention expected from future queries, if they are like the last ones (arXiv 2510.00636, section 3).

    Queries are modelled as normally distributed, with the mean and covariance of the chunk that was just read. Their
    rotary embeddings are those of the chunk's positions, where the paper averages over future positions. Pairs are
    ranked while a prompt is read; in decoding the last ranking stands.

    Attributes:
        epsilon: added to the expected attention, so that the value's norm counts for all pairs.
    """

    needs: ClassVar[Needs] = Needs.KEYS | Needs.VALUES | Needs.QUERIES
    every: ClassVar[int] = 0
    epsilon: float = 0.02

    def __call__(self, seen: Seen) -> Tensor:
        """(softmax of the expected logit, averaged over a kv head's query heads, + epsilon) * L2 norm of the value."""
        queries, keys = seen.queries.permute(1, 2, 0, 3), seen.keys.unsqueeze(-3)
        mean = queries.mean(-2, keepdim=True)  # [K, G, 1, D]
        centred = queries - mean
        covariance = centred.transpose(-1, -2) @ centred / queries.shape[-2]  # [K, G, D, D]
        linear = (mean @ keys.transpose(-1, -2)).squeeze(-2) * seen.scale  # [K, G, R]
        spread = ((keys @ covariance) * keys).sum(-1) * (seen.scale**2 / 2)
        expected = (linear + spread).softmax(-1).mean(-2)
        return (expected + self.epsilon) * seen.values.norm(dim=-1)  # type: ignore[no-any-return]


def mean_similarity(seen: Seen) -> Tensor:
    """[..., R]: each key's mean cosine similarity with all keys of its head, without a similarity matrix."""
    from torch.nn.functional import normalize

    unit = normalize(seen.keys, dim=-1) * seen.valid.unsqueeze(-1)
    mean = unit.sum(-2, keepdim=True) / seen.valid.sum(-1).clamp(min=1)[..., None, None]
    return (unit * mean).sum(-1)
