"""Decoding by replay: a round in which every slot decodes, captured as a CUDA graph for a few numbers of rows.

All that changes from round to round stays on the device: the next tokens, the positions, who is at an end. So rounds
follow each other without the host, which reads what they gave from a ring, later. Knows device tensors, and the model
as a function of a packed step; knows nothing of layers, slots' contents or why a sequence decodes.

Shapes: R rounds, N rows of a graph, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import Tensor

from bmx.engine.memory_meter import is_out_of_memory
from bmx.engine.packed import DecodeBatch, PackedStep
from bmx.engine.sampler import NO_TOKEN, SamplingRow, likeliest, sample
from bmx.kernels.transfer import Download, upload

ROUNDS = 8  # tokens that a sequence decodes between two looks of the host
SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)  # of the slots, for which there are graphs
ROW_ALIGNMENT = 16  # rows that a product takes together
ENDS = 8  # tokens that may end an answer, of which the device knows; the host sees to further ones
NOBODY = -1
Forward = Callable[[PackedStep, Tensor], Tensor]
FIELDS = 5  # of a row's state: slot, position, limit, tokens left, whether its frequencies are those of long sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRow:
    """One sequence that decodes.

    Attributes:
        slot: the number of its slot; position: of the token that is computed next; row_limit: rows it may use.
        tokens: that it shall decode, at most the rounds.
        ends: tokens that end it.
        long: whether it is longer than the positions that a model with two sets of frequencies was trained on first.
        draws: how each of its tokens is sampled; empty where all are the likeliest.
    """

    slot: int
    position: int
    row_limit: int
    tokens: int
    ends: tuple[int, ...] = ()
    long: bool = False
    draws: tuple[SamplingRow, ...] = ()


class DecodeGraphs:
    """The graphs of one run. They share one pool of memory and are captured when they are first needed.

    Args:
        forward: the logits [N, V] of a packed step of N decoding tokens; with the flags [N] of rows that are long.
        next_ids: [S + 1] the next token of each slot, the last entry nobody's.
        refused: is told why a round cannot be captured; it is then launched anew each time, with the same results.

    Attributes:
        captures: whether rounds are captured.
        row_counts: rows of the graphs.
    """

    def __init__(self, forward: Forward, next_ids: Tensor, refused: Callable[[str], None]) -> None:
        self._forward = forward
        self._next_ids = next_ids
        self._refused = refused
        self.captures = next_ids.device.type == "cuda"
        self._rounds: dict[tuple[int, bool], Round] = {}
        self._pool: Any = None
        slots = len(next_ids) - 1
        unit = min(slots, ROW_ALIGNMENT)
        self.row_counts = tuple(sorted({-(-ceil(slots * share) // unit) * unit for share in SHARES}))

    def decode(self, rows: Sequence[GraphRow]) -> Rounds:
        """Let sequences decode, one after another round; nothing waits for the device until its tokens are read."""
        count = next(count for count in self.row_counts if count >= len(rows))
        drawn = any(row.draws for row in rows)
        one = self._rounds.get((count, drawn)) or self._made(count, drawn)
        one.begin(rows)
        for number in range(max(row.tokens for row in rows)):
            one.run()
            if drawn:
                plain = [SamplingRow.likeliest()] * (count - len(rows))
                asked = [row.draws[number] if number < len(row.draws) else SamplingRow.likeliest() for row in rows]
                one.take(sample(one.logits, [*asked, *plain]))
        return Rounds(one.ring, [row.tokens for row in rows])

    def _made(self, count: int, drawn: bool) -> Round:
        largest = self.row_counts[-1]
        if self.captures and count < largest and (largest, drawn) not in self._rounds:
            self._made(largest, drawn)  # first, so that those of fewer rows find room where it has worked
        one = self._rounds[count, drawn] = Round(self._forward, self._next_ids, count, drawn)
        if self.captures:
            try:
                self._pool = one.capture(self._pool, _warming_stream())
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.captures = False
                self._refused(str(error).strip().partition("\n")[0])
        return one


@cache
def _warming_stream() -> Any:
    """Where rounds are run once before they are captured; one for all, since each has workspaces of its own."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class Rounds:
    """Tokens that rounds give, on their way to the host."""

    def __init__(self, ring: Tensor, counts: list[int]) -> None:
        self._counts = counts
        self._ring = Download(ring[: max(counts)])

    def read(self) -> list[int | None]:
        """Of each sequence, one after another; None where the logits were no numbers, or a sequence had ended."""
        ring = self._ring.read()
        found = [ring[number][row] for row, count in enumerate(self._counts) for number in range(count)]
        return [None if token == NO_TOKEN else token for token in found]


class Round:
    """A round of so many rows, and the state that it leaves for the next one.

    Attributes:
        ring: [R, N] what the rounds gave.
        logits: [N, V] of the last round, where tokens are drawn.
    """

    def __init__(self, forward: Forward, next_ids: Tensor, count: int, drawn: bool) -> None:
        device = next_ids.device
        self._forward, self._next_ids, self._drawn = forward, next_ids, drawn
        self._state = torch.zeros(FIELDS + ENDS, count, dtype=torch.long, device=device)
        self._tick = torch.zeros(1, dtype=torch.long, device=device)
        self.ring = torch.zeros(ROUNDS, count, dtype=torch.long, device=device)
        self.logits = torch.empty(0, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self, rows: Sequence[GraphRow]) -> None:
        """Take the rows on board; those behind them are idle."""
        idle = [0] * (self._state.shape[1] - len(rows))
        lists = [
            [row.slot for row in rows],
            [row.position for row in rows],
            [row.row_limit for row in rows],
            [row.tokens for row in rows],
            [int(row.long) for row in rows],
            *([row.ends[i] if i < len(row.ends) else NO_TOKEN for row in rows] for i in range(ENDS)),
        ]
        self._state.copy_(upload([[*numbers, *idle] for numbers in lists], self._state.device))
        self._tick.zero_()

    def run(self) -> None:
        """One round."""
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()

    def capture(self, pool: Any, stream: Any) -> Any:
        """Capture the round, with every row idle, after a first run on a stream; returns the pool that it lives in."""
        self._state.zero_()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compute()  # whatever is compiled or allocated once, now
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._compute()
        self._graph = graph
        return graph.pool()

    def _compute(self) -> None:
        slots, positions, limits, left, long = self._state[:FIELDS]
        mine = torch.where(left > 0, slots, NOBODY)
        step = PackedStep(
            input_ids=self._next_ids[mine].unsqueeze(0),
            positions=positions.unsqueeze(0),
            logits_at=0,
            decode_batch=DecodeBatch(slots=mine, positions=positions, row_limits=limits, evicting=True),
        )
        logits = self._forward(step, long)
        if self._drawn:
            self.logits = logits
        else:
            self.take(likeliest(logits))

    def take(self, ids: Tensor) -> None:
        """Note the next token of each row [N], and go on to the next position; those that have ended stay."""
        slots, positions, _, left, _ = self._state[:FIELDS]
        going = left > 0
        self.ring.index_copy_(0, self._tick, torch.where(going, ids, NO_TOKEN).unsqueeze(0))
        self._tick.add_(1)
        self._next_ids[torch.where(going, slots, NOBODY)] = ids.clamp(min=0)
        ended = (ids == self._state[FIELDS:]).any(0) | (ids == NO_TOKEN)
        positions.add_(going)
        left.copy_(torch.where(ended, 0, left - going.long()))
