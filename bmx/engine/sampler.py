"""From logits to the next token of each row, in the order of operations that transformers uses.

Knows logits and sampling parameters. A row's randomness is one number that the caller draws, so that a row's token
does not depend on the other rows.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmx.kernels.transfer import upload
from bmx.plan.memory import SAMPLER_ROWS
from bmx.request import SamplingParams

NO_TOKEN = -1
COLDEST = 1e-6  # lower temperatures are raised to it: they pick the same token, and could overflow


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How the token of one row of logits is sampled.

    Attributes:
        params: its sampling parameters.
        draw: a uniform random number in [0, 1).
        seen: ids of its prompt and answer, where a repetition penalty needs them.
    """

    params: SamplingParams
    draw: float = 0.0
    seen: Sequence[int] = ()

    @classmethod
    def likeliest(cls) -> SamplingRow:
        """A row that takes the likeliest token."""
        return cls(SamplingParams())

    @property
    def changes(self) -> bool:
        """Whether its token may differ from the likeliest one."""
        return self.params.temperature > 0 or self.params.repetition_penalty != 1


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The next token of each row [N]; ``NO_TOKEN`` where its logits are not numbers.

    Greedy rows use the model's own logits; only the others are copied to float32, a few at a time.

    Args:
        logits: [N, V].
        rows: one per row of logits.
    """
    ids = likeliest(logits)
    changed = [i for i, row in enumerate(rows) if row.changes]
    for start in range(0, len(changed), SAMPLER_ROWS):
        block = changed[start : start + SAMPLER_ROWS]
        index = upload(block, logits.device)
        chosen = _choose(logits[index].float(), [rows[i] for i in block])
        ids[index] = torch.where(ids[index] == NO_TOKEN, NO_TOKEN, chosen)
    return ids


def likeliest(logits: Tensor) -> Tensor:
    """The token of the greatest logit of each row [N, V] -> [N]; ``NO_TOKEN`` where that is not finite."""
    best, ids = logits.max(dim=-1)
    return torch.where(torch.isfinite(best), ids, NO_TOKEN)


def _penalise(logits: Tensor, row: SamplingRow) -> None:
    """Divide positive and multiply negative logits [V] of seen tokens by the penalty (CTRL, arXiv 1909.05858, 4.1)."""
    seen = upload(sorted(set(row.seen)), logits.device)
    unpenalised, penalty = logits[seen], row.params.repetition_penalty
    logits[seen] = torch.where(unpenalised > 0, unpenalised / penalty, unpenalised * penalty)


def _choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """One token per row of float32 logits [N, V], which are changed in place: [N] ids."""
    for values, row in zip(logits, rows, strict=True):
        if row.params.repetition_penalty != 1:
            _penalise(values, row)
    ids = logits.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        index = upload(drawn, logits.device)
        ids[index] = _draw(logits[index], [rows[i] for i in drawn])
    return ids


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """One token per row of float32 logits [N, V], by inverting its cumulative distribution: [N] ids."""

    def column(values: list[float]) -> Tensor:
        return upload(values, logits.device, torch.float64).unsqueeze(1)

    vocab = logits.shape[-1]
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probs = (ordered - ordered[:, :1]) / column([max(row.params.temperature, COLDEST) for row in rows])
    del ordered
    rank = torch.arange(vocab, device=logits.device)
    probs.masked_fill_(rank >= column([row.params.top_k or vocab for row in rows]), float("-inf"))
    probs = torch.softmax(probs, dim=-1)
    likelier = probs.cumsum(-1).sub_(probs)  # the probability of all likelier tokens
    probs.masked_fill_(likelier >= column([row.params.top_p for row in rows]), 0.0)
    del likelier
    probs.masked_fill_(probs < column([row.params.min_p for row in rows]) * probs[:, :1], 0.0)
    allowed = (probs > 0).sum(-1, keepdim=True).clamp(min=1)  # tokens are sorted, so the allowed ones come first
    cumulative = probs.cumsum(-1)
    target = column([row.draw for row in rows]) * cumulative[:, -1:]
    chosen = torch.minimum((cumulative <= target).sum(-1, keepdim=True), allowed - 1)
    return ids.gather(1, chosen).squeeze(1)
