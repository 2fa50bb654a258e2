"""The segments of a step as Triton kernels see them: which packed rows follow each other, and in which slot.

Kernels of mixers are launched for the decoding rows, each a segment of one token, and for all prompt segments at once:
first for those whose state is kept, then for probes, which begin where kept ones ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl

from bmx.kernels.segments import Segments


class Launch(NamedTuple):
    """Segments that one launch computes.

    Attributes:
        number: how many.
        longest: tokens of the longest.
        slots: [number] the slot of each decoding row, -1 for an idle one; None for prompts.
        table: [4, number] int64, of prompts: first packed row, tokens, slot, and 1 where the state is kept; None for
            decoding rows.
        kept: 1 for segments whose state is kept, 0 for the others: those the launch leaves alone.
    """

    number: int
    longest: int
    slots: Any
    table: Any
    kept: int


def launches(segments: Segments) -> Iterator[Launch]:
    """What is to be launched for a step, in order."""
    if segments.decode_slots is not None and len(segments.decode_slots):
        yield Launch(len(segments.decode_slots), 1, segments.decode_slots, None, 1)
    if segments.table is None:
        return
    for kept in (True, False):
        longest = max((batch.length for batch in segments.batches if batch.kept == kept), default=0)
        if longest:
            yield Launch(segments.table.shape[1], longest, None, segments.table, int(kept))


@triton.jit
def segment_of(slots, table, kept, number, count):
    """A segment's first packed row, tokens (0 if the launch leaves it alone) and slot (-1 if its row is idle)."""
    if table is None:
        begin, length, slot = number.to(tl.int64), number * 0 + 1, tl.load(slots + number)
    else:
        begin, slot = tl.load(table + number), tl.load(table + 2 * count + number)
        own = tl.load(table + 3 * count + number) == kept
        length = tl.where(own, tl.load(table + count + number), 0).to(tl.int32)
    return begin, length, slot
