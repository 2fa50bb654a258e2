"""A step as the device sees it: token ids and positions in one row, and where each token's sequence lives.

Knows the scheduler's steps and the pool's slots; computes nothing.

Shapes: T packed tokens, B decoding tokens, N prompt chunks.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from bmx.compress.policy import CompressionPolicy
from bmx.engine.scheduler import Chunk, Step
from bmx.engine.sequence import Sequence
from bmx.kernels.slot_views import Chunks
from bmx.kernels.transfer import upload


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChunk:
    """A run of prompt tokens of one sequence, and the probe's behind them.

    Attributes:
        rows: packed rows, the probe's included.
        group, slot: where its sequence lives; ``start``: tokens of it before the chunk.
        probes: how many of the packed rows are the probe's: they see the chunk, and leave nothing behind.
        total: tokens of the sequence when its answer is as long as it may get.
        row_limit: rows of the slot that it may use.
        spans: positions from .. to that are never evicted.
    """

    rows: slice
    group: int
    slot: int
    start: int
    total: int
    row_limit: int
    probes: int = 0
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the chunk, without the probe's (T)."""
        return int(self.rows.stop - self.rows.start) - self.probes


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """The decoding tokens of one group, one per slot.

    Attributes:
        rows: their packed rows.
        slots: [B]; positions [B]: the tokens' positions, equal to the tokens of their sequences seen before.
        slots_host, positions_host: the same on the host; ``totals`` as in ``PromptChunk``.
        row_limits_host: rows of its slot that each sequence may use.
        row_limits: [B] the same, where some sequence may not use all of its slot; else None.
        spans: [B, N, 2] positions that are never evicted, or None.
    """

    rows: slice
    group: int
    slots: Tensor
    positions: Tensor
    slots_host: tuple[int, ...]
    positions_host: tuple[int, ...]
    totals: tuple[int, ...]
    row_limits_host: tuple[int, ...]
    row_limits: Tensor | None = None
    spans: Tensor | None = None

    def evicting(self, capacity: int) -> bool:
        """Whether any of these sequences will ever evict in a layer of so many rows."""
        return any(total > min(limit, capacity) for total, limit in zip(self.totals, self.row_limits_host, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """The decoding tokens of all groups, the first ones of the packing.

    Attributes:
        slots: [B] numbers of slots, -1 where a packed row is idle; ``positions`` [B].
        row_limits: [B] rows of its slot that each sequence may use.
        evicting: whether any of their sequences will ever evict in some layer.
    """

    slots: Tensor
    positions: Tensor
    row_limits: Tensor
    evicting: bool


@dataclass(slots=True)
class PackedStep:
    """A step as the device sees it.

    Attributes:
        input_ids, positions: [1, T].
        logits_at: packed rows whose logits are wanted; 0 for all.
        decode_batch: the decoding tokens, or None.
        decode_groups: the same by group; empty if only ``decode_batch`` may be used.
        chunks: the prompt chunks behind them, or None; ``prompts`` the same one by one.
        plain: no chunk and no sequence asks for more than kernels know: no probe, no spans.
        layer: the layer whose turn it is.
        shared: by owner and chunk, what later layers read too.
    """

    input_ids: Tensor
    positions: Tensor
    logits_at: Tensor | int
    decode_batch: DecodeBatch | None = None
    decode_groups: tuple[DecodeGroup, ...] = ()
    chunks: Chunks | None = None
    prompts: tuple[PromptChunk, ...] = ()
    plain: bool = True
    layer: int = 0
    shared: dict[tuple[int, int], Shared] = field(default_factory=dict)


@dataclass(slots=True)
class Shared:
    """A chunk's keys and values that later layers read too, and the attention they have received so far."""

    key: Tensor
    value: Tensor
    sums: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Packer:
    """Packs steps.

    Attributes:
        policy: says how chunks vote.
        slot_offsets: slots of the groups before each.
        probe: token ids behind a chunk whose sequence evicts.
        max_length: most positions that the model knows.
        device: where the step is computed.
    """

    policy: CompressionPolicy
    slot_offsets: tuple[int, ...]
    probe: tuple[int, ...]
    max_length: int
    device: torch.device

    def number(self, sequence: Sequence) -> int:
        """The number of a sequence's slot among those of all groups."""
        group, slot = sequence.slot_index
        return self.slot_offsets[group] + slot

    def asked(self, chunk: Chunk) -> tuple[int, ...]:
        """The probe's tokens behind a chunk: none for a sequence that keeps all it has."""
        sequence = chunk.sequence
        evicts = not chunk.decodes and self.policy.evicts(len(sequence.prompt), sequence.max_tokens)
        return self.probe if evicts else ()

    def packed(self, step: Step, next_ids: Tensor) -> PackedStep:
        """The step as tensors: decoding tokens by group and slot, then prompt chunks.

        Args:
            next_ids: by slot, the token that comes next; those of decoding sequences need not be known here.
        """
        decoding = [chunk for chunk in step.chunks if chunk.decodes]
        reading = [chunk for chunk in step.chunks if not chunk.decodes]
        ids, positions = [0] * len(decoding), [chunk.start for chunk in decoding]
        logits_at = list(range(len(decoding)))
        prompts = []
        for chunk in reading:
            asked, begin, stop = self.asked(chunk), len(ids), chunk.start + chunk.length
            ids += [*chunk.sequence.prompt[chunk.start : stop], *asked]
            positions += range(chunk.start, stop)
            positions += [min(stop + i, self.max_length - 1) for i in range(len(asked))]
            if chunk.samples:
                logits_at.append(begin + chunk.length - 1)
            prompts.append(_prompt_chunk(chunk, slice(begin, len(ids)), len(asked)))
        return self.sent(ids, positions, logits_at, decoding, prompts, next_ids)

    def sent(
        self,
        ids: list[int],
        positions: list[int],
        logits_at: list[int],
        decoding: list[Chunk],
        prompts: list[PromptChunk],
        next_ids: Tensor,
    ) -> PackedStep:
        """All of it on the device, in one go.

        Args:
            ids, positions: of all packed tokens; what is said of the ids of decoding ones does not matter.
            logits_at: packed rows.
            decoding: chunks of decoding sequences, the first of the packing.
        """
        members = [chunk.sequence for chunk in decoding]
        table = _table(prompts, self.slot_offsets)
        numbers, limited = [self.number(s) for s in members], [s.rows_needed for s in members]
        lists = (ids, positions, logits_at, numbers, limited, *table, [s.slot_index.slot for s in members])
        there = _uploaded(lists, self.device)
        input_ids, everywhere, wanted, slots, limits = there[:5]
        if members:
            input_ids[: len(members)] = next_ids[slots]
        spans = any(sequence.spans for sequence in members) or any(chunk.spans for chunk in prompts)
        starts = everywhere[: len(members)]
        return PackedStep(
            input_ids=input_ids.unsqueeze(0),
            positions=everywhere.unsqueeze(0),
            logits_at=wanted,
            decode_batch=self._decode_batch(members, slots, starts, limits) if members else None,
            decode_groups=self._by_group(decoding, there[-1], starts, limits),
            chunks=self._chunks(table, torch.stack(there[5:11]), prompts, len(ids)) if prompts else None,
            prompts=tuple(prompts),
            plain=not spans and not any(chunk.probes for chunk in prompts),
        )

    def _decode_batch(self, members: list[Sequence], slots: Tensor, starts: Tensor, limits: Tensor) -> DecodeBatch:
        evicting = any(self.policy.evicts(len(sequence.prompt), sequence.max_tokens) for sequence in members)
        return DecodeBatch(slots=slots, positions=starts, row_limits=limits, evicting=evicting)

    def _chunks(self, table: list[list[int]], sent: Tensor, prompts: list[PromptChunk], tokens: int) -> Chunks:
        offsets, lengths, slots, starts, row_limits, totals = map(tuple, table)
        query_weights = decay = None
        if self.policy.weighs_queries:
            weights = [0.0] * tokens
            for chunk in prompts:
                begin = chunk.rows.start
                weights[begin : begin + chunk.length] = self.policy.query_weights(chunk.length, 0)[0]
            query_weights = upload(weights, self.device, torch.float32)
            decay = upload([self.policy.decay(length) for length in lengths], self.device, torch.float32)
        return Chunks(
            offsets=offsets,
            lengths=lengths,
            slots=slots,
            starts=starts,
            row_limits=row_limits,
            totals=totals,
            table=sent,
            query_weights=query_weights,
            decay=decay,
        )

    def _by_group(
        self, decoding: list[Chunk], slots: Tensor, starts: Tensor, limits: Tensor
    ) -> tuple[DecodeGroup, ...]:
        found, row = [], 0
        for group, members in groupby(decoding, key=lambda chunk: chunk.sequence.slot_index.group):
            chunks = list(members)
            rows = slice(row, row + len(chunks))
            sequences = [chunk.sequence for chunk in chunks]
            found.append(
                DecodeGroup(
                    rows=rows,
                    group=group,
                    slots=slots[rows],
                    positions=starts[rows],
                    slots_host=tuple(sequence.slot_index.slot for sequence in sequences),
                    positions_host=tuple(chunk.start for chunk in chunks),
                    totals=tuple(sequence.total for sequence in sequences),
                    row_limits_host=tuple(sequence.rows_needed for sequence in sequences),
                    row_limits=limits[rows] if self.policy.budget.share else None,
                    spans=self._spans(sequences),
                )
            )
            row = rows.stop
        return tuple(found)

    def _spans(self, sequences: list[Sequence]) -> Tensor | None:
        """[B, N, 2], those of few filled up with empty ones; None if there are none."""
        most = max(len(sequence.spans) for sequence in sequences)
        if not most:
            return None
        padded = [[*s.spans, *[(0, 0)] * (most - len(s.spans))] for s in sequences]
        return upload(padded, self.device)


def _uploaded(lists: Seq[Seq[int]], device: torch.device) -> list[Tensor]:
    """Lists of whole numbers, which travel to the device together."""
    together = upload([number for numbers in lists for number in numbers], device)
    ends = accumulate(map(len, lists), initial=0)
    return [together[start:stop] for start, stop in pairwise(ends)]


def _prompt_chunk(chunk: Chunk, rows: slice, probes: int) -> PromptChunk:
    sequence = chunk.sequence
    return PromptChunk(
        rows=rows,
        group=sequence.slot_index.group,
        slot=sequence.slot_index.slot,
        start=chunk.start,
        total=sequence.total,
        row_limit=sequence.rows_needed,
        probes=probes,
        spans=sequence.spans,
    )


def _table(prompts: list[PromptChunk], slot_offsets: tuple[int, ...]) -> list[list[int]]:
    """What ``Chunks`` says of each, as six lists."""
    rows = [(c.rows.start, c.length, slot_offsets[c.group] + c.slot, c.start, c.row_limit, c.total) for c in prompts]
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(6)]
