"""A step as the device sees it: token ids and positions in one row, and the slot of each token's sequence.

Knows the scheduler's steps and the pool's slots; computes nothing.

Shapes: T packed tokens, B decoding tokens, N prompt chunks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from bmx.compress.policy import CompressionPolicy
from bmx.engine.scheduler import Chunk, Step
from bmx.engine.sequence import Sequence
from bmx.kernels.segments import NO_SEGMENTS, Segments
from bmx.kernels.slot_views import Chunks, SharedRows
from bmx.kernels.transfer import upload
from bmx.kv.layout import SlotIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChunk:
    """Consecutive prompt tokens of one sequence, and the probe's tokens behind them.

    Attributes:
        rows: packed rows, the probe's included.
        group: of slots, in which it is read.
        slot: of the group.
        start: tokens of the sequence before the chunk.
        total: most tokens that pass through the slot.
        row_limit: rows of the slot that the sequence may use.
        archive: where its pairs are archived, or None.
        probes: how many of the packed rows are the probe's: they attend to the chunk and are not stored.
        spans: positions [start, stop) that are never evicted.
        shared: a slot that is read before its own, or None.
        shared_rows: how many rows of it: the positions before those of its own.
    """

    rows: slice
    group: int
    slot: int
    start: int
    total: int
    row_limit: int
    archive: SlotIndex | None = None
    probes: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    shared: SlotIndex | None = None
    shared_rows: int = 0

    @property
    def length(self) -> int:
        """Tokens of the chunk, without the probe's (T)."""
        return int(self.rows.stop - self.rows.start) - self.probes

    @property
    def archived(self) -> PromptChunk:
        """The same chunk as the archive sees it: nothing of it is evicted.

        Raises:
            RuntimeError: it is not archived.
        """
        if self.archive is None:
            raise RuntimeError("the chunk is not archived")
        return replace(self, group=self.archive.group, slot=self.archive.slot, row_limit=sys.maxsize, spans=())

    def used_rows(self, capacity: int) -> int:
        """Rows of its slot in use before the chunk, in a layer of ``capacity`` rows (P)."""
        return min(self.start - self.shared_rows, self.row_limit, capacity)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """The decoding tokens of one group, one per slot; those that read a shared slot all read the same one.

    Attributes:
        rows: their packed rows.
        group: of slots.
        slots: [B] slots of the group.
        positions: [B], of the tokens: equal to the tokens of their sequences seen before.
        slots_host: the slots, on the host.
        positions_host: the positions, on the host.
        totals: tokens that pass through each slot when the answer has its maximum length.
        row_limits_host: rows of its slot that each sequence may use.
        row_limits: [B] the same, where some sequence may not use all of its slot; else None.
        spans: [B, N, 2] positions [start, stop) that are never evicted, or None.
        due: which of the tokens choose the rows that they and later ones read: all, or [Q]; None for none of them.
        shared: the slot that all of them read before their own, or None.
        shared_rows: how many rows of it: the positions before those of their own slots.
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
    due: Tensor | slice | None = None
    shared: SlotIndex | None = None
    shared_rows: int = 0

    @property
    def next_rows(self) -> Tensor:
        """[B] the row of each slot that the token takes, if the slot has so many."""
        return self.positions - self.shared_rows

    @property
    def longest(self) -> int:
        """The most rows that one of the slots would have with its token, if no pair were evicted."""
        return max(self.positions_host) + 1 - self.shared_rows

    def full(self, capacity: int) -> list[bool]:
        """Which slots have no empty row for their token, in a layer of ``capacity`` rows."""
        limits = zip(self.positions_host, self.row_limits_host, strict=True)
        return [position - self.shared_rows >= min(limit, capacity) for position, limit in limits]

    def used_rows(self, capacity: int) -> list[int]:
        """Rows of each slot in use, the tokens' own among them, in a layer of ``capacity`` rows."""
        limits = zip(self.positions_host, self.row_limits_host, strict=True)
        return [min(position + 1 - self.shared_rows, limit, capacity) for position, limit in limits]

    def evicting(self, capacity: int) -> bool:
        """Whether any of these sequences ever evicts in a layer of ``capacity`` rows."""
        return any(total > min(limit, capacity) for total, limit in zip(self.totals, self.row_limits_host, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """The decoding tokens of all groups: the first packed rows.

    Attributes:
        slots: [B] slot numbers over all groups, -1 where a packed row is idle.
        positions: [B], of the tokens.
        row_limits: [B] rows of its slot that each sequence may use.
        evicting: whether any of their sequences ever evicts in some layer.
        shared: rows of other slots that they read before their own; None where no token does.
    """

    slots: Tensor
    positions: Tensor
    row_limits: Tensor
    evicting: bool
    shared: SharedRows | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStep:
    """A step as the device sees it.

    Attributes:
        input_ids: [1, T].
        positions: [1, T].
        logits_at: packed rows whose logits are computed; 0 for all.
        decode_batch: the decoding tokens, or None.
        decode_groups: the same by group; empty if the step is for kernels that fuse whole steps.
        chunks: the prompt chunks behind them, as one table, or None.
        prompts: the same chunks one by one.
        endings: chunks behind them that are read on the archive.
        prompt_segments: all these chunks and their probes as segments, where the model has mixers.
        plain: whether kernels that fuse whole steps can take it: it has no probe and no protected spans.
    """

    input_ids: Tensor
    positions: Tensor
    logits_at: Tensor | int
    decode_batch: DecodeBatch | None = None
    decode_groups: tuple[DecodeGroup, ...] = ()
    chunks: Chunks | None = None
    prompts: tuple[PromptChunk, ...] = ()
    endings: tuple[PromptChunk, ...] = ()
    prompt_segments: Segments = NO_SEGMENTS
    plain: bool = True

    @property
    def segments(self) -> Segments:
        """The packed tokens by sequence, as mixers see them."""
        decoding = None if self.decode_batch is None else self.decode_batch.slots
        return replace(self.prompt_segments, decode_slots=decoding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packer:
    """Packs steps.

    Attributes:
        policy: gives the query weights of chunks.
        slot_offsets: number of slots in the groups before each group.
        archives: whether prompts are read in other slots than those in which answers are written.
        mixes: whether the model has mixers.
        probe: token ids of the probe, behind each chunk whose sequence evicts.
        max_length: most positions that the model knows.
        device: where the step is computed.
    """

    policy: CompressionPolicy
    slot_offsets: tuple[int, ...]
    archives: bool
    mixes: bool
    probe: tuple[int, ...]
    max_length: int
    device: torch.device

    def number_of(self, index: SlotIndex) -> int:
        """The number of a slot over all groups."""
        return self.slot_offsets[index.group] + index.slot

    def slot_number(self, sequence: Sequence) -> int:
        """The number of a sequence's slot over all groups."""
        return self.number_of(sequence.slot_index)

    def probe_behind(self, chunk: Chunk) -> tuple[int, ...]:
        """The probe's token ids behind a chunk; none while decoding, and none for a sequence that never evicts."""
        sequence = chunk.sequence
        answer = sequence.held_total - sequence.read_tokens
        evicts = chunk.start < sequence.read_tokens and self.policy.evicts(sequence.read_tokens, answer)
        return self.probe if evicts else ()

    def pack(self, step: Step, next_ids: Tensor) -> PackedStep:
        """The step as tensors: decoding tokens by group and slot, then prompt chunks.

        Args:
            step: the scheduler's.
            next_ids: [S] on the device, the token that each slot decodes next; the host need not know it.
        """
        decoding = [chunk for chunk in step.chunks if chunk.decodes]
        reading = [chunk for chunk in step.chunks if not chunk.decodes]
        ids, positions = [0] * len(decoding), [chunk.start for chunk in decoding]
        logits_at = list(range(len(decoding)))
        prompts, endings = list[PromptChunk](), list[PromptChunk]()
        for chunk in reading:
            probe, begin, stop = self.probe_behind(chunk), len(ids), chunk.start + chunk.length
            ids += [*chunk.sequence.prompt[chunk.start : stop], *probe]
            positions += range(chunk.start, stop)
            positions += [min(stop + i, self.max_length - 1) for i in range(len(probe))]
            if chunk.samples:
                logits_at.append(begin + chunk.length - 1)
            ends = chunk.start >= chunk.sequence.read_tokens
            (endings if ends else prompts).append(self._prompt_chunk(chunk, slice(begin, len(ids)), len(probe)))
        return self.upload(ids, positions, logits_at, decoding, prompts, next_ids, endings)

    def _prompt_chunk(self, chunk: Chunk, rows: slice, probes: int) -> PromptChunk:
        """A chunk in the slot that it is read in: one under the budget, or, at the end of a prompt, the archive."""
        sequence = chunk.sequence
        index, shared = chunk.slot_index, sequence.shared
        if shared and index == shared.slot_index:  # the chunk is of the shared part itself
            length = shared.prefix.length
            return PromptChunk(
                rows=rows, group=index.group, slot=index.slot, start=chunk.start, total=length, row_limit=length
            )
        archived = self.archives and chunk.start < sequence.read_tokens
        return PromptChunk(
            rows=rows,
            group=0 if archived else index.group,
            slot=index.reading if archived else index.slot,
            start=chunk.start,
            total=sequence.held_total if archived else sequence.total - sequence.shared_rows,
            row_limit=sequence.row_limit if archived else sequence.own_limit,
            archive=index if archived else None,
            probes=probes,
            spans=sequence.spans,
            shared=shared and shared.slot_index,
            shared_rows=sequence.shared_rows,
        )

    def upload(
        self,
        ids: list[int],
        positions: list[int],
        logits_at: list[int],
        decoding: list[Chunk],
        prompts: list[PromptChunk],
        next_ids: Tensor,
        endings: Seq[PromptChunk] = (),
    ) -> PackedStep:
        """A packed step on the device; all its whole numbers travel together.

        Args:
            ids: of all packed tokens; those of decoding tokens are replaced by ``next_ids``.
            positions: of all packed tokens.
            logits_at: packed rows whose logits are computed.
            decoding: chunks of decoding sequences, the first packed rows.
            prompts: the chunks behind them.
            next_ids: [S] on the device, the token that each slot decodes next.
            endings: chunks that are read on the archive.
        """
        sequences = [chunk.sequence for chunk in decoding]
        numbers, row_limits = [self.slot_number(s) for s in sequences], [s.own_limit for s in sequences]
        table = _chunk_table(prompts, (0,) if self.archives else self.slot_offsets)
        slots_of_groups = [s.slot_index.slot for s in sequences]
        others = self._shared_by(sequences)
        lists = (ids, positions, logits_at, numbers, row_limits, slots_of_groups, *others, *table)
        uploaded = _upload_lists(lists, self.device)
        input_ids, all_positions, rows, slots, limits, group_slots, *shared = uploaded[: 6 + len(others)]
        columns = uploaded[6 + len(others) :]
        if sequences:
            input_ids[: len(sequences)] = next_ids[slots]
        spans = any(sequence.spans for sequence in sequences) or any(chunk.spans for chunk in prompts)
        starts = all_positions[: len(sequences)]
        return PackedStep(
            input_ids=input_ids.unsqueeze(0),
            positions=all_positions.unsqueeze(0),
            logits_at=rows,
            decode_batch=self._decode_batch(sequences, slots, starts, limits, shared) if sequences else None,
            decode_groups=self._decode_groups(decoding, group_slots, starts, limits),
            chunks=self._chunks(table, torch.stack(columns), prompts, len(ids)) if prompts else None,
            prompts=tuple(prompts),
            endings=tuple(endings),
            prompt_segments=self._segments([*prompts, *endings] if self.mixes else ()),
            plain=not spans and not any(chunk.probes for chunk in prompts),
        )

    def _segments(self, chunks: Iterable[PromptChunk]) -> Segments:
        """Chunks and the probes behind them as segments; what a probe does to the states is not kept."""
        segments = []
        for chunk in chunks:
            index = chunk.archive or SlotIndex(chunk.group, chunk.slot)
            slot, end = self.slot_offsets[index.group] + index.slot, chunk.rows.start + chunk.length
            segments.append((chunk.rows.start, chunk.length, slot, True))
            if chunk.probes:
                segments.append((end, chunk.probes, slot, False))
        return Segments.of(None, segments, self.device)

    def _shared_by(self, sequences: list[Sequence]) -> list[list[int]]:
        """The shared slot that each sequence reads before its own, and how many rows; nothing if none reads any."""
        parts = [sequence.shared for sequence in sequences]
        if not any(parts):
            return []
        return [
            [self.number_of(part.slot_index) if part else 0 for part in parts],
            [sequence.shared_rows for sequence in sequences],
        ]

    def _decode_batch(
        self, sequences: list[Sequence], slots: Tensor, positions: Tensor, row_limits: Tensor, shared: list[Tensor]
    ) -> DecodeBatch:
        policy = self.policy.answering
        return DecodeBatch(
            slots=slots,
            positions=positions,
            row_limits=row_limits,
            evicting=any(policy.evicts(len(sequence.prompt), sequence.max_tokens) for sequence in sequences),
            shared=SharedRows(*shared) if shared else None,
        )

    def _chunks(self, table: list[list[int]], uploaded: Tensor, prompts: list[PromptChunk], tokens: int) -> Chunks:
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
            table=uploaded,
            shared=self._shared_by_chunks(prompts),
            query_weights=query_weights,
            decay=decay,
        )

    def _shared_by_chunks(self, prompts: list[PromptChunk]) -> tuple[tuple[int, int], ...]:
        """See ``Chunks.shared``."""
        if not any(chunk.shared for chunk in prompts):
            return ()
        return tuple((self.number_of(chunk.shared) if chunk.shared else 0, chunk.shared_rows) for chunk in prompts)

    def _decode_groups(
        self, decoding: list[Chunk], slots: Tensor, positions: Tensor, row_limits: Tensor
    ) -> tuple[DecodeGroup, ...]:
        groups, row = [], 0
        for (group, shared), members in groupby(decoding, key=lambda chunk: _read_slots(chunk.sequence)):
            chunks = list(members)
            rows = slice(row, row + len(chunks))
            sequences = [chunk.sequence for chunk in chunks]
            groups.append(
                DecodeGroup(
                    rows=rows,
                    group=group,
                    slots=slots[rows],
                    positions=positions[rows],
                    slots_host=tuple(sequence.slot_index.slot for sequence in sequences),
                    positions_host=tuple(chunk.start for chunk in chunks),
                    totals=tuple(sequence.total - sequence.shared_rows for sequence in sequences),
                    row_limits_host=tuple(sequence.own_limit for sequence in sequences),
                    row_limits=row_limits[rows] if self.policy.answering.budget.share else None,
                    spans=self._spans(sequences),
                    due=self._due(chunks),
                    shared=shared,
                    shared_rows=sequences[0].shared_rows,
                )
            )
            row = rows.stop
        return tuple(groups)

    def _due(self, chunks: list[Chunk]) -> Tensor | slice | None:
        """Which of a group's decoding tokens choose the rows that are read."""
        recall = self.policy.answering.recall
        if recall is None:
            return None
        due = [i for i, chunk in enumerate(chunks) if recall.due(chunk.start, len(chunk.sequence.prompt))]
        if len(due) == len(chunks):
            return slice(None)
        return upload(due, self.device) if due else None

    def _spans(self, sequences: list[Sequence]) -> Tensor | None:
        """Protected spans [B, N, 2], padded with empty ones; None if no sequence has any."""
        count = max(len(sequence.spans) for sequence in sequences)
        if not count:
            return None
        padded = [[*s.spans, *[(0, 0)] * (count - len(s.spans))] for s in sequences]
        return upload(padded, self.device)


def _read_slots(sequence: Sequence) -> tuple[int, SlotIndex | None]:
    """The group of a sequence's slot, and the shared slot that it reads."""
    return sequence.slot_index.group, sequence.shared and sequence.shared.slot_index


def _upload_lists(lists: Seq[Seq[int]], device: torch.device) -> list[Tensor]:
    """Lists of whole numbers as tensors, uploaded as one."""
    uploaded = upload([number for numbers in lists for number in numbers], device)
    ends = accumulate(map(len, lists), initial=0)
    return [uploaded[start:stop] for start, stop in pairwise(ends)]


def _chunk_table(prompts: list[PromptChunk], slot_offsets: tuple[int, ...]) -> list[list[int]]:
    """The columns of ``Chunks``: six lists with a number for each chunk."""
    rows = [(c.rows.start, c.length, slot_offsets[c.group] + c.slot, c.start, c.row_limit, c.total) for c in prompts]
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(6)]
