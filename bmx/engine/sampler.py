"""From logits to the next token of each row, in the order of operations that transformers uses.

Knows logits and sampling parameters; the kernels draw. A row's randomness is one number that the caller draws, so that
a row's token does not depend on the other rows.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmx.kernels.transfer import upload
from bmx.kernels.workspace import SAMPLER_ROWS
from bmx.request import SamplingParams

NO_TOKEN = -1
Draw = Callable[[Tensor, Tensor, Tensor], Tensor]  # ``contract.KernelModule.draw``


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
    def penalised(self) -> bool:
        """Whether the tokens so far change its logits."""
        return self.params.repetition_penalty != 1

    @property
    def drawn(self) -> bool:
        """Whether its token is drawn."""
        return self.params.temperature > 0


def sample(logits: Tensor, rows: Sequence[SamplingRow], draw: Draw) -> Tensor:
    """The next token of each row [N]; ``NO_TOKEN`` where its logits are not numbers.

    Only rows with a repetition penalty are copied to float32, a few at a time.

    Args:
        logits: [N, V].
        rows: one per row of logits.
        draw: draws tokens, as ``contract.KernelModule.draw`` does.
    """
    ids = likeliest(logits)
    drawn = [i for i, row in enumerate(rows) if row.drawn and not row.penalised]
    if drawn:
        _put(ids, drawn, _drawn(logits, drawn, rows, draw))
    penalised = [i for i, row in enumerate(rows) if row.penalised]
    for start in range(0, len(penalised), SAMPLER_ROWS):
        block = penalised[start : start + SAMPLER_ROWS]
        copies = logits[upload(block, logits.device)].float()
        _put(ids, block, _of_penalised(copies, [rows[i] for i in block], draw))
    return ids


def likeliest(logits: Tensor) -> Tensor:
    """The token of the greatest logit of each row [N, V] -> [N]; ``NO_TOKEN`` where that is not finite."""
    best, ids = logits.max(dim=-1)
    return torch.where(torch.isfinite(best), ids, NO_TOKEN)


def sampling_columns(rows: Sequence[SamplingRow]) -> list[list[float]]:
    """Lists of the rows' temperatures, top k, top p, min p and draws, as ``contract.KernelModule.draw`` takes them."""
    params = [row.params for row in rows]
    return [
        [each.temperature for each in params],
        [each.top_k or 0 for each in params],
        [each.top_p for each in params],
        [each.min_p for each in params],
        [row.draw for row in rows],
    ]


def _drawn(logits: Tensor, numbers: list[int], rows: Sequence[SamplingRow], draw: Draw) -> Tensor:
    """The tokens that are drawn for the rows with these numbers [M]."""
    sampling = upload(sampling_columns([rows[i] for i in numbers]), logits.device, torch.float64)
    return draw(logits, upload(numbers, logits.device), sampling)


def _put(ids: Tensor, numbers: list[int], chosen: Tensor) -> None:
    """Put the tokens of the rows with these numbers in their places, but for rows whose logits are not numbers."""
    index = upload(numbers, ids.device)
    ids[index] = torch.where(ids[index] == NO_TOKEN, NO_TOKEN, chosen)


def _of_penalised(logits: Tensor, rows: Sequence[SamplingRow], draw: Draw) -> Tensor:
    """One token per row of float32 logits [N, V], which are changed in place: [N] ids."""
    for values, row in zip(logits, rows, strict=True):
        _penalise(values, row)
    ids = logits.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if row.drawn]
    if drawn:
        ids[upload(drawn, logits.device)] = _drawn(logits, drawn, rows, draw)
    return ids


def _penalise(logits: Tensor, row: SamplingRow) -> None:
    """Divide positive and multiply negative logits [V] of seen tokens by the penalty (CTRL, arXiv 1909.05858, 4.1)."""
    seen = upload(sorted(set(row.seen)), logits.device)
    unpenalised, penalty = logits[seen], row.params.repetition_penalty
    logits[seen] = torch.where(unpenalised > 0, unpenalised / penalty, unpenalised * penalty)
