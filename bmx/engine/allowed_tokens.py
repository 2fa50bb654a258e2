"""The tokens that formats of answers allow next, found beside the model's step and applied to its logits.

Knows matchers and logits; knows nothing of formats or steps.

Shapes: N rows of logits, M of them of answers with a format, V vocabulary, W = V / 32 words of 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bmx.engine.grammar import Matcher
from bmx.kernels.transfer import upload
from bmx.kernels.workspace import SAMPLER_ROWS


class AllowedTokens:
    """The tokens that formats allow next, found on another thread while the model computes the step.

    Args:
        rows: for each row of logits its matcher, or token ids that may not follow; None where all may.
    """

    def __init__(self, rows: Sequence[Matcher | tuple[int, ...] | None]) -> None:
        self._forbidden = [(place, list(row)) for place, row in enumerate(rows) if isinstance(row, tuple)]
        matchers = {place: row for place, row in enumerate(rows) if isinstance(row, Matcher)}
        self._places = list(matchers)
        self._filled: Future[Tensor] | None = None
        if matchers:
            self._filled = _thread().submit(_masks, list(matchers.values()))

    def keep_in(self, logits: Tensor) -> None:
        """Set the logits [N, V] of all other tokens to minus infinity."""
        for place, ids in self._forbidden:
            logits[place, ids] = -torch.inf
        if self._filled is None:
            return
        masks = self._filled.result()
        for start in range(0, len(masks), SAMPLER_ROWS):
            rows = upload(self._places[start : start + SAMPLER_ROWS], logits.device)
            allowed = _unpacked(masks[start : start + SAMPLER_ROWS].to(logits.device, non_blocking=True))
            logits[rows] = logits[rows].masked_fill(~allowed[:, : logits.shape[1]], -torch.inf)


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "bmx-formats")


@cache
def _executor() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


def _masks(matchers: list[Matcher]) -> Tensor:
    """The tokens that each matcher allows, as bits [M, W] int32 on the host."""
    words = -(-matchers[0].vocab // 32)
    masks = torch.zeros(len(matchers), words, dtype=torch.int32, pin_memory=torch.cuda.is_available())
    numbered = [(matcher.state, place) for place, matcher in enumerate(matchers)]
    _executor().unsafe_compute_mask_ptr(numbered, masks.data_ptr(), 4 * words, len(matchers))
    return masks


def _unpacked(masks: Tensor) -> Tensor:
    """[M, W] int32 -> [M, 32 W] bool."""
    powers = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=masks.device)
    return (masks.view(torch.uint8).unsqueeze(-1) & powers).bool().flatten(1)
