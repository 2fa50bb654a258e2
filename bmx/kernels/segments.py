"""Which packed tokens of a step belong to which sequence: what functions that keep a state by sequence need to know.

Knows tensors and slot numbers only. The packed row holds one token of each decoding slot, then prompt segments.

Shapes: T packed tokens of a step, B decoding tokens, N segments, L tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bmx.kernels.transfer import upload


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentBatch:
    """Prompt segments of equal length, which are computed together; no two of the same slot.

    Attributes:
        begins: the first packed row of each (N).
        length: tokens of each (L).
        slots: [N] int64, the slot of each, counted over all groups.
        kept: whether the state after a segment is stored in its slot; that of a probe is not.
    """

    begins: tuple[int, ...]
    length: int
    slots: Tensor
    kept: bool

    def take(self, x: Tensor) -> Tensor:
        """The segments' rows of x [T, ...] as [N, L, ...]: a view where segments lie one after another."""
        if self._adjacent():
            return self._view(x)
        return torch.stack([x[begin : begin + self.length] for begin in self.begins])

    def put(self, output: Tensor, y: Tensor) -> None:
        """Write y [N, L, ...] to the segments' rows of output [T, ...]."""
        if self._adjacent():
            self._view(output).copy_(y)
            return
        for begin, rows in zip(self.begins, y, strict=True):
            output[begin : begin + self.length] = rows

    def _adjacent(self) -> bool:
        first, length = self.begins[0], self.length
        return self.begins == tuple(range(first, first + len(self.begins) * length, length))

    def _view(self, x: Tensor) -> Tensor:
        first, count = self.begins[0], len(self.begins)
        rows = x[first : first + count * self.length]
        return rows.view(count, self.length, *x.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segments:
    """The packed tokens of a step by sequence. No slot has both a decoding token and a segment.

    Attributes:
        decode_slots: [B] int64, packed rows 0 .. B - 1 are one token of each of these slots; -1 for a row that belongs
            to nobody: its output says nothing, and it writes the spare last state or none; None where no token is
            decoding.
        batches: prompt segments behind them: those whose state is kept before the probes that follow them.
        table: [4, N] int64, on the device, all of them in this order: first packed row, tokens, slot, and 1 where the
            state is kept; None where there are none.
    """

    decode_slots: Tensor | None
    batches: tuple[SegmentBatch, ...] = ()
    table: Tensor | None = None

    @classmethod
    def of(
        cls, decode_slots: Tensor | None, segments: Iterable[tuple[int, int, int, bool]], device: torch.device
    ) -> Segments:
        """Segments by length, those that are kept first.

        Args:
            decode_slots: see ``Segments``.
            segments: the first packed row, the length, the slot, and whether the state is kept, of each segment, in the
                order of packed rows; no two of the same slot are kept, and no two are not.
            device: where states are.
        """
        alike: dict[tuple[bool, int], list[tuple[int, int]]] = {}
        for begin, length, slot, kept in segments:
            alike.setdefault((not kept, length), []).append((begin, slot))
        if not alike:
            return cls(decode_slots=decode_slots)
        groups = sorted(alike.items())
        rows = [
            (begin, length, slot, int(not probes)) for (probes, length), members in groups for begin, slot in members
        ]
        table = upload([*zip(*rows, strict=True)], device)
        of_groups = torch.split(table[2], [len(members) for _, members in groups])
        batches = (
            SegmentBatch(begins=tuple(begin for begin, _ in members), length=length, slots=own, kept=not probes)
            for ((probes, length), members), own in zip(groups, of_groups, strict=True)
        )
        return cls(decode_slots=decode_slots, batches=tuple(batches), table=table)


NO_SEGMENTS = Segments(decode_slots=None)
