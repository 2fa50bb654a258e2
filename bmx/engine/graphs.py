"""Decoding rounds as CUDA graphs: a round decodes one token in each row, and is captured for a few numbers of rows.

All that changes from round to round stays on the device: next tokens, positions, which rows have ended. So rounds
follow each other without the host, which later reads their tokens from a ring. Knows device tensors, and the model as a
function of a packed step; knows nothing of layers, of what slots hold, or of why a sequence decodes.

Shapes: R rounds, N rows of a graph, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor

from bmx.engine.memory_meter import is_out_of_memory
from bmx.engine.packed import DecodeBatch, PackedStep
from bmx.engine.sampler import NO_TOKEN, Draw, SamplingRow, likeliest, sampling_columns
from bmx.kernels.transfer import Download, upload

ROUNDS = 8  # tokens that a sequence decodes before the host reads them
SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)  # shares of the slots for which there are graphs
ROW_ALIGNMENT = 16  # rows that a matrix product computes together
ENDS = 8  # end tokens of an answer that the device checks; the host checks further ones
NO_SLOT = -1
Forward = Callable[[PackedStep, Tensor], Tensor]
CUTS = 4  # numbers that say which tokens are drawn from: temperature, top k, top p and min p
FIELDS = 5  # of a row's state: slot, position, row limit, tokens left, whether it has long-context frequencies


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRow:
    """One decoding sequence.

    Attributes:
        slot: the number of its slot over all groups.
        position: of the token that is computed next.
        row_limit: rows of its slot that it may use.
        tokens: how many it decodes, at most ``ROUNDS``.
        ends: token ids that end its answer.
        long: whether it has the long-context frequencies of a model with two sets of rotary frequencies.
        draws: how each of its tokens is sampled; empty if all are the likeliest.
    """

    slot: int
    position: int
    row_limit: int
    tokens: int
    ends: tuple[int, ...] = ()
    long: bool = False
    draws: tuple[SamplingRow, ...] = ()


class DecodeGraphs:
    """The graphs of one run. They share one memory pool and are captured when they are first needed.

    Args:
        forward: computes the logits [N, V] of a packed step of N decoding tokens; its second argument [N] says which
            rows have long-context frequencies.
        next_ids: [S + 1] the next token of each slot; the last entry is no slot's.
        draw: draws tokens, as ``contract.KernelModule.draw`` does.
        refused: is called with the reason if a round cannot be captured; rounds are then launched operator by operator,
            with the same results.
        before: is called before each round with the rows, and how many rounds came before; what it launches is no part
            of the graph.

    Attributes:
        captures: whether rounds are captured.
        row_counts: numbers of rows for which there are graphs.
    """

    def __init__(
        self,
        forward: Forward,
        next_ids: Tensor,
        draw: Draw,
        refused: Callable[[str], None],
        before: Callable[[Sequence[GraphRow], int], None],
    ) -> None:
        self._forward = forward
        self._next_ids = next_ids
        self._draw = draw
        self._refused = refused
        self._before = before
        self.captures = next_ids.device.type == "cuda"
        self._rounds: dict[tuple[int, bool], Round] = {}
        self._pool: Any = None
        slots = len(next_ids) - 1
        unit = min(slots, ROW_ALIGNMENT)
        self.row_counts = tuple(sorted({-(-ceil(slots * share) // unit) * unit for share in SHARES}))

    def decode(self, rows: Sequence[GraphRow]) -> Rounds:
        """Launch the rounds in which these rows decode; nothing waits for the device until the tokens are read."""
        count = next(count for count in self.row_counts if count >= len(rows))
        drawn = any(row.draws for row in rows)
        decoding = self._rounds.get((count, drawn)) or self._new_round(count, drawn)
        decoding.begin(rows)
        for number in range(max(row.tokens for row in rows)):
            self._before(rows, number)
            decoding.run()
        return Rounds(decoding.ring, [row.tokens for row in rows])

    def _new_round(self, count: int, drawn: bool) -> Round:
        """A round of ``count`` rows, captured if it can be."""
        largest = self.row_counts[-1]
        if self.captures and count < largest and (largest, drawn) not in self._rounds:
            self._new_round(largest, drawn)  # first, so that the smaller ones reuse its memory
        decoding = self._rounds[count, drawn] = Round(
            self._forward, self._next_ids, count, self._draw if drawn else None
        )
        if self.captures:
            try:
                self._pool = decoding.capture(self._pool, _warming_stream())
            except Exception as error:  # Triton's errors have no type in common with torch's
                if is_out_of_memory(error):
                    raise
                self.captures = False
                self._refused(_told_and_placed(error))
        return decoding


@cache
def _warming_stream() -> Any:
    """The stream on which rounds run once before capture; one for all, since each stream has workspaces of its own."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Within the body, torch raises a RuntimeError where the host would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype: what it misses, the capture finds
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _told_and_placed(error: Exception) -> str:
    """The first line of an error, and where it was raised."""
    told = str(error).strip().partition("\n")[0] or type(error).__name__
    frames = extract_tb(error.__traceback__)
    return f"{told} ({'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno})" if frames else told


class Rounds:
    """The tokens of rounds, while they are copied to the host.

    Args:
        ring: [ROUNDS, N] token ids.
        counts: tokens of each sequence, in the order of rows.
    """

    def __init__(self, ring: Tensor, counts: list[int]) -> None:
        self._counts = counts
        self._ring = Download(ring[: max(counts)])

    def read(self) -> list[int | None]:
        """The tokens of each sequence in turn; None where the logits were not numbers, or the sequence had ended."""
        ring = self._ring.read()
        tokens = [ring[number][row] for row, count in enumerate(self._counts) for number in range(count)]
        return [None if token == NO_TOKEN else token for token in tokens]


class Round:
    """A round of ``count`` rows, and the state that it leaves for the next one.

    Args:
        forward: see ``DecodeGraphs``.
        next_ids: see ``DecodeGraphs``.
        count: rows (N).
        draw: draws tokens; None if all are the likeliest.

    Attributes:
        ring: [R, N] token ids of the rounds.
    """

    def __init__(self, forward: Forward, next_ids: Tensor, count: int, draw: Draw | None) -> None:
        device = next_ids.device
        self._forward, self._next_ids, self._draw = forward, next_ids, draw
        self._rows = torch.arange(count, device=device)
        self._sampling = torch.zeros(CUTS + ROUNDS, count, dtype=torch.float64, device=device)
        self._state = torch.zeros(FIELDS + ENDS, count, dtype=torch.long, device=device)
        self._tick = torch.zeros(1, dtype=torch.long, device=device)
        self.ring = torch.zeros(ROUNDS, count, dtype=torch.long, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self, rows: Sequence[GraphRow]) -> None:
        """Set the state of the rows; the rows behind them are idle."""
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
        if self._draw is not None:
            self._sampling.copy_(upload(self._sampling_of(rows), self._sampling.device, torch.float64))
        self._tick.zero_()

    def _sampling_of(self, rows: Sequence[GraphRow]) -> list[list[float]]:
        """Temperature, top k, top p and min p of each row, and its draw in each round; 0 where none is drawn."""
        greedy, idle = SamplingRow.likeliest(), self._state.shape[1] - len(rows)
        first = [row.draws[0] if row.draws else greedy for row in rows] + [greedy] * idle
        draws = [
            [row.draws[i].draw if i < len(row.draws) else 0.0 for row in rows] + [0.0] * idle for i in range(ROUNDS)
        ]
        return [*sampling_columns(first)[:CUTS], *draws]

    def run(self) -> None:
        """One round."""
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()

    def capture(self, pool: Any, stream: Any) -> Any:
        """Capture the round as a graph, with every row idle, after two runs on another stream.

        The second one fails where the host would wait for the device, which no graph can hold: a capture that failed
        midway would leave torch's allocators as they are within one.

        Args:
            pool: the memory pool of earlier graphs, or None.
            stream: for the first runs.

        Returns:
            The memory pool that the graph uses.

        Raises:
            RuntimeError: the host would wait.
        """
        self._state.zero_()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._compute()  # compiles and allocates what is needed once
                with _no_waiting():
                    self._compute()
        finally:
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._compute()
        self._graph = graph
        return graph.pool()

    def _compute(self) -> None:
        slots, positions, limits, left, long = self._state[:FIELDS]
        active = torch.where(left > 0, slots, NO_SLOT)
        step = PackedStep(
            input_ids=self._next_ids[active].unsqueeze(0),
            positions=positions.unsqueeze(0),
            logits_at=0,
            decode_batch=DecodeBatch(slots=active, positions=positions, row_limits=limits, evicting=True),
        )
        logits = self._forward(step, long)
        ids = likeliest(logits)
        if self._draw is not None:
            sampling = torch.cat([self._sampling[:CUTS], self._sampling[CUTS:].index_select(0, self._tick)])
            drawn = (sampling[0] > 0) & (ids != NO_TOKEN)
            ids = torch.where(drawn, self._draw(logits, self._rows, sampling), ids)
        self._take(ids)

    def _take(self, ids: Tensor) -> None:
        """Store the next token of each row [N] and advance its position; rows that have ended stay as they are."""
        slots, positions, _, left, _ = self._state[:FIELDS]
        active = left > 0
        self.ring.index_copy_(0, self._tick, torch.where(active, ids, NO_TOKEN).unsqueeze(0))
        self._tick.add_(1)
        self._next_ids[torch.where(active, slots, NO_SLOT)] = ids.clamp(min=0)
        ended = (ids == self._state[FIELDS:]).any(0) | (ids == NO_TOKEN)
        positions.add_(active)
        left.copy_(torch.where(ended, 0, left - active.long()))
