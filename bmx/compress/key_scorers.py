"""Scorers that look at keys and values: they need no attention weights, so that any fused kernel may compute attention.

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
    """Keys that differ from the average stay (KeyDiff, arXiv 2504.15364, section 3)."""

    needs: ClassVar[Needs] = Needs.KEYS
    every: ClassVar[int] = RANK_EVERY

    def __call__(self, seen: Seen) -> Tensor:
        """Minus the cosine between each key and the mean of the unit keys."""
        from torch.nn.functional import cosine_similarity, normalize

        unit = normalize(seen.keys, dim=-1) * seen.valid.unsqueeze(-1)
        return -cosine_similarity(seen.keys, unit.mean(-2, keepdim=True), dim=-1)


@dataclass(frozen=True, slots=True)
class KeyNorm(ScorerDefaults):
    """Small keys stay (Devoto et al., arXiv 2406.11430, section 3)."""

    needs: ClassVar[Needs] = Needs.KEYS
    every: ClassVar[int] = RANK_EVERY

    def __call__(self, seen: Seen) -> Tensor:
        """Minus the key's length."""
        return -seen.keys.norm(dim=-1)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class LagKV(ScorerDefaults):
    """Pairs that stand out from those that follow them stay (LagKV, arXiv 2504.04704, section 2).

    Rows are taken in the order of their tokens, in partitions of ``lag``, counted from the newest. Each channel of a
    partition is scaled by its range in the next one; a pair's score is how much its scaled channels spread, made a
    share of its partition, for key and value, averaged. The newest partition has nothing after it and stays.
    """

    needs: ClassVar[Needs] = Needs.KEYS | Needs.VALUES
    every: ClassVar[int] = RANK_EVERY
    lag: int = 128

    def __call__(self, seen: Seen) -> Tensor:
        """Mean of the shares of key and value; infinite for the newest partition."""
        order = seen.positions.argsort(dim=-1)
        rows = seen.positions.shape[-1]
        lag = min(self.lag, max(1, rows // 4))  # small budgets are cut finer, so that there is something to compare
        spare = rows % lag  # the oldest rows, too few for a partition: they are measured against the first one
        shares = [_spread(_in_order(t, order), lag, spare) for t in (seen.keys, seen.values)]
        scores = (shares[0] + shares[1]) / 2
        return scores.new_empty(scores.shape).scatter_(-1, order, scores)


def _in_order(tensor: Tensor, order: Tensor) -> Tensor:
    """[..., R, D], rows sorted."""
    return tensor.gather(-2, order.unsqueeze(-1).expand(tensor.shape))


def _spread(sorted_rows: Tensor, lag: int, spare: int) -> Tensor:
    """[..., R]: each row's spread over its channels as a softmax over its partition; infinite for the last one."""
    import torch

    def shares(part: Tensor, after: Tensor) -> Tensor:
        low, high = after.amin(-2, keepdim=True), after.amax(-2, keepdim=True)
        return ((part - low) / (high - low).clamp(min=1e-6)).std(-1).softmax(-1)

    starts = range(spare, sorted_rows.shape[-2], lag)
    parts = [sorted_rows[..., start : start + lag, :] for start in starts]
    found = [shares(part, after) for part, after in pairwise(parts)]
    oldest = [shares(sorted_rows[..., :spare, :], parts[0])] if spare else []
    newest = torch.full_like(parts[-1][..., 0], float("inf"))
    return torch.cat([*oldest, *found, newest], dim=-1)


@dataclass(frozen=True, slots=True)
class ExpectedAttention(ScorerDefaults):
    """The attention that queries to come will pay, were they like the last ones (arXiv 2510.00636, section 3).

    Queries are taken as normally distributed, with the mean and covariance of the chunk that was just read: their
    rotations are the real ones of its positions, where the paper averages those of positions to come. Pairs are
    ranked while a prompt is read; in decoding its last ranking stands.
    """

    needs: ClassVar[Needs] = Needs.KEYS | Needs.VALUES | Needs.QUERIES
    every: ClassVar[int] = 0
    epsilon: float = 0.02

    def __call__(self, seen: Seen) -> Tensor:
        """(softmax of the expected logit, averaged over the group, + epsilon) * length of the value."""
        queries, keys = seen.queries.permute(1, 2, 0, 3), seen.keys.unsqueeze(-3)
        mean = queries.mean(-2, keepdim=True)  # [K, G, 1, D]
        around = queries - mean
        covariance = around.transpose(-1, -2) @ around / queries.shape[-2]  # [K, G, D, D]
        linear = (mean @ keys.transpose(-1, -2)).squeeze(-2) * seen.scale  # [K, G, R]
        spread = ((keys @ covariance) * keys).sum(-1) * (seen.scale**2 / 2)
        expected = (linear + spread).softmax(-1).mean(-2)
        return (expected + self.epsilon) * seen.values.norm(dim=-1)  # type: ignore[no-any-return]


def mean_similarity(seen: Seen) -> Tensor:
    """[..., R]: each key's cosine with all keys of its head, on average; no matrix of similarities is needed."""
    from torch.nn.functional import normalize

    unit = normalize(seen.keys, dim=-1) * seen.valid.unsqueeze(-1)
    mean = unit.sum(-2, keepdim=True) / seen.valid.sum(-1).clamp(min=1)[..., None, None]
    return (unit * mean).sum(-1)
