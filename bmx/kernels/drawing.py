"""Tokens drawn from logits in plain torch: the specification of ``contract.KernelModule.draw``. Knows tensors only.

Shapes: N rows of logits, M of them that are drawn from, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmx.kernels.workspace import SAMPLER_ROWS

COLDEST = 1e-6  # lower temperatures are raised to it: they pick the same token, and could overflow


def draw(logits: Tensor, rows: Tensor, sampling: Tensor) -> Tensor:
    """See ``contract.KernelModule.draw``; a few rows at a time, since all their numbers are sorted in float64."""
    blocks = zip(rows.split(SAMPLER_ROWS), sampling.split(SAMPLER_ROWS, dim=1), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([_draw(logits[some].float(), each.unsqueeze(2)) for some, each in blocks])


def _draw(logits: Tensor, sampling: Tensor) -> Tensor:
    """One token for each row of float32 logits [M, V], by its row of sampling [5, M, 1]."""
    temperature, top_k, top_p, min_p, uniform = sampling
    vocab = logits.shape[-1]
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probs = (ordered - ordered[:, :1]) / temperature.clamp(min=COLDEST)
    del ordered
    rank = torch.arange(vocab, device=logits.device)
    probs.masked_fill_((rank >= top_k) & (top_k > 0), float("-inf"))
    probs = torch.softmax(probs, dim=-1)
    likelier = probs.cumsum(-1).sub_(probs)  # the probability of all likelier tokens
    probs.masked_fill_(likelier >= top_p, 0.0)
    del likelier
    probs.masked_fill_(probs < min_p * probs[:, :1], 0.0)
    allowed = (probs > 0).sum(-1, keepdim=True).clamp(min=1)  # tokens are sorted, so the allowed ones come first
    cumulative = probs.cumsum(-1)
    chosen = torch.minimum((cumulative <= uniform * cumulative[:, -1:]).sum(-1, keepdim=True), allowed - 1)
    return ids.gather(1, chosen).squeeze(1)
