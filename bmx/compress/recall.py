"""Recall: which rows a decoding token reads, where it does not read all of them.

Knows scores and rows; knows nothing of how an index estimates, of slots or of steps. Plans use it without torch.

Shapes: B decoding tokens, K kv heads, G query heads of each, C rows of a slot, R rows that are looked at, O rows that
are chosen beside the first and the newest, N rows that a token reads, D key dim, P pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bmx.config import EngineConfig
from bmx.kv.layout import RecallLayout

if TYPE_CHECKING:
    from torch import Tensor

NOTHING = -1  # an entry of chosen rows that stands for none
NEIGHBOURS = 7  # rows over which the attention of a token that reads all is spread, before it chooses


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """How the rows that a token reads are chosen: the first and the newest always, then those of the best scores.

    A row's score is the mean over a kv head's query heads of the attention probability that an index estimates for it,
    or that a token gave it which read all rows. Probabilities, and not dot products, since those of one query head say
    nothing beside those of another; their mean is what evicting policies add up too. A choice stands for ``every``
    tokens. Rows that are newest now, and will not be before the next choice, take part in it.

    Attributes:
        by: ``pages``, ``clusters`` or ``bits``: what estimates; ``attention``: some tokens read all rows.
        pairs: rows that a token reads, in all.
        every: tokens of an answer from one choice to the next, at most ``recent``.
        sink: number of first tokens that are always read.
        recent: number of newest tokens that are always read, the token itself among them.
    """

    by: str
    pairs: int
    every: int
    sink: int
    recent: int

    @classmethod
    def from_config(cls, config: EngineConfig) -> Recall | None:
        """The recall that the configuration names; None where all rows are read."""
        if config.kv_recall == "all":
            return None
        return cls(
            by=config.kv_recall,
            pairs=config.kv_recall_pairs,
            every=config.kv_recall_every,
            sink=config.kv_sink,
            recent=config.kv_recent,
        )

    def due(self, position: int, prompt_tokens: int) -> bool:
        """Whether the token at a position chooses anew: by its number in the answer alone, so the first one does."""
        return (position - prompt_tokens) % self.every == 0

    def others(self, capacity: int) -> int:
        """Rows that are chosen beside the first and the newest (O), in a slot of ``capacity`` rows."""
        return max(0, min(self.pairs, capacity) - self.sink - self.recent)

    def layout(self, capacity: int, shared: bool = False) -> RecallLayout:
        """What is kept beside a layer.

        Args:
            capacity: rows of its slots.
            shared: whether other layers read its rows too: those that its own queries choose.
        """
        remembers = self.every > 1 or (shared and self.by != "attention")
        return RecallLayout(by=self.by, sink=self.sink, kept=self.others(capacity) if remembers else 0)

    def choose(self, scores: Tensor, positions: Tensor, capacity: int) -> Tensor:
        """The rows of the best scores among those that will not be newest until the next choice.

        Args:
            scores: [B, K, R], none below 0.
            positions: [B], of the tokens that choose: rows up to there are in use.
            capacity: rows of the slot (C).

        Returns:
            [B, K, O] int32, ascending; of equal scores the newer row; ``NOTHING`` where there are too few.
        """
        import torch
        from torch.nn.functional import pad

        count, row = self.others(capacity), torch.arange(scores.shape[-1], device=scores.device)
        last = positions.view(-1, 1, 1) + self.every - 1 - self.recent
        order = scores.float().abs().contiguous().view(torch.int32).long() << 32 | row  # by score, then by row: no ties
        order = order.masked_fill((row < self.sink) | (row > last), NOTHING)
        best = order.topk(min(count, len(row)), dim=-1, sorted=False).values
        rows = torch.where(best < 0, NOTHING, best & 0x7FFFFFFF).to(torch.int32).sort(-1).values
        return pad(rows, (count - rows.shape[-1], 0), value=NOTHING)

    def reading(self, chosen: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that tokens read: the first, the chosen and the newest, none of them twice.

        Args:
            chosen: [B, K, O], by these tokens or by earlier ones.
            positions: [B], of the tokens.

        Returns:
            rows: [B, K, N] int64.
            hidden: [B, K, N] bool, entries that stand for no row of their own.
        """
        import torch

        now, shape = positions.view(-1, 1, 1), chosen.shape[:2]
        first = torch.arange(self.sink, device=chosen.device)
        newest = now + torch.arange(1 - self.recent, 1, device=chosen.device)
        parts = (
            (first, first > now),
            (chosen, (chosen < 0) | (chosen > now - self.recent)),
            (newest, newest < self.sink),
        )
        rows = torch.cat([part.expand(*shape, -1).long() for part, _ in parts], dim=-1)
        return rows.clamp(min=0), torch.cat([hidden.expand(*shape, -1) for _, hidden in parts], dim=-1)


def estimated_attention(
    products: Tensor, positions: Tensor, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """The attention that rows would receive if dot products were what an index estimates.

    Args:
        products: [B, K, G, R].
        positions: [B], of the tokens: rows up to there are in use.
        scale: factor of the dot products.
        softcap: cap of the scores, or None.
        sinks: [H] logits of the attention sinks, or None.

    Returns:
        [B, K, R] float32, the mean over a kv head's query heads; 0 for rows that are not in use.
    """
    import torch

    from bmx.kernels.scores import cap, softmax_with_sinks

    beyond = torch.arange(products.shape[-1], device=products.device) > positions.view(-1, 1, 1, 1)
    scores = cap(products * scale, softcap).masked_fill(beyond, float("-inf"))
    return softmax_with_sinks(scores, None if sinks is None else sinks.view(*products.shape[1:3], 1)).mean(2)


def with_neighbours(attention: Tensor) -> Tensor:
    """The most attention [B, K, R] that a row or one of its neighbours received (RefreshKV, arXiv 2411.05787)."""
    from torch.nn.functional import max_pool1d

    return max_pool1d(attention, NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2)


def hidden_by_pages(
    recall: Recall, query: Tensor, keys: Tensor, positions: Tensor, used: Sequence[int], scale: float
) -> Tensor:
    """Which rows of evicting slots tokens do not read: RocketKV's second stage (arXiv 2502.14051).

    Rows of such a slot lie in any order; pages are of consecutive tokens among those that are left. How large pages
    are, and how many channels are looked at, follows from the sequence's rows and ``recall.pairs``.

    Args:
        recall: how many rows are read.
        query: [B, H, D].
        keys: [B, K, C, D], of the tokens' slots.
        positions: [B, K, C], of the rows.
        used: rows in use, of each slot.
        scale: factor of the dot products.

    Returns:
        [B, K, C] bool.
    """
    import torch

    hidden = torch.ones_like(positions, dtype=torch.bool)
    for token, rows in enumerate(used):
        order = positions[token, :, :rows].argsort(-1)  # [K, R]
        in_order = keys[token].gather(1, order.unsqueeze(-1).expand(-1, -1, keys.shape[-1])).float()
        asking = query[token].float().view(len(order), -1, query.shape[-1])
        scores = page_scores(asking, in_order, recall.pairs, scale)
        newest = order.new_tensor([rows - 1])
        read, none = recall.reading(recall.choose(scores.unsqueeze(0), newest, rows), newest)
        own = order.gather(1, read[0].clamp(max=rows - 1))
        times = hidden.new_zeros(hidden.shape[1:], dtype=torch.int32).scatter_add_(1, own, (~none[0]).int())
        hidden[token] = times == 0
    return hidden


def page_scores(query: Tensor, keys: Tensor, pairs: int, scale: float) -> Tensor:
    """RocketKV's estimate of attention, for keys in the order of their tokens.

    With c = R / pairs, pages have ceil(sqrt(c)) keys, and as many channels are looked at as keep the reading for it at
    about R / c keys: those in which the queries of a group are greatest.

    Args:
        query: [K, G, D] float32.
        keys: [K, R, D] float32.
        pairs: rows that a token reads.
        scale: factor of the dot products.

    Returns:
        [K, R], the estimate for each row's page.
    """
    import torch
    from torch.nn.functional import pad

    rows, dim = keys.shape[1:]
    ratio = max(1.0, rows / pairs)
    size = math.ceil(math.sqrt(ratio))
    channels = query.abs().mean(1).topk(max(1, min(dim, int(dim * size / ratio)))).indices.unsqueeze(1)  # [K, 1, r]
    asking = query.gather(2, channels.expand(-1, query.shape[1], -1))  # [K, G, r]
    own = keys.gather(2, channels.expand(-1, rows, -1))
    low, high = (
        closest(pad(own, (0, 0, 0, -rows % size), value=nothing).view(len(own), -1, size, own.shape[-1]), 2)
        for nothing, closest in ((float("inf"), torch.amin), (-float("inf"), torch.amax))
    )
    bounds = torch.where(asking.sum(1, keepdim=True) >= 0, high, low)
    share = asking.abs().sum(-1, keepdim=True) / query.abs().sum(-1, keepdim=True).clamp(min=1e-20)
    logits = asking @ bounds.transpose(-1, -2) * scale / share.sqrt().clamp(min=1e-20)
    return logits.softmax(-1).mean(1).repeat_interleave(size, 1)[:, :rows]
