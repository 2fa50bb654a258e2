"""Computes steps on the device: packs tokens, runs the model, samples.

Knows the model and the pool. The scheduler's decision comes in as a Step; sampled token ids stay on the device until
they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from bmx.compress.policy import CompressionPolicy
from bmx.engine.allowed_tokens import AllowedTokens
from bmx.engine.attention import SlotAttention
from bmx.engine.graphs import ROUNDS, DecodeGraphs, GraphRow, Rounds
from bmx.engine.packed import PackedStep, Packer, PromptChunk
from bmx.engine.ranking import DecodingSlot
from bmx.engine.sampler import NO_TOKEN, SamplingRow, sample
from bmx.engine.scheduler import Chunk, Step
from bmx.engine.sequence import Sequence
from bmx.kernels import Kernels
from bmx.kernels.transfer import Download, upload
from bmx.kernels.workspace import SAMPLER_ROWS
from bmx.kv.layout import SlotIndex
from bmx.kv.pool import KVPool
from bmx.kv.states import StatePool
from bmx.model.fused_modules import fused_modules
from bmx.model.loader import LoadedModel
from bmx.model.mixers import Mixers
from bmx.model.rope import Segment
from bmx.model.spec import use_attention
from bmx.plan.chunks import ENDING
from bmx.plan.memory import StepSize
from bmx.plan.planner import Plan
from bmx.request import Request, SamplingParams

Watch = Callable[[Request, int, Tensor], None]


class Tokens:
    """The tokens that a step sampled, while they are copied to the host."""

    def __init__(self, ids: Tensor) -> None:
        self._ids = Download(ids)

    def read(self) -> list[int | None]:
        """Wait for the tokens: one for each sampling chunk, in order; None where the logits were not numbers."""
        return [None if token == NO_TOKEN else token for token in self._ids.read()]


class ModelRunner:
    """Runs the steps of one plan on one model. A context manager: on exit the model gets its own attention back.

    Args:
        loaded: the model.
        policy: chooses which KV pairs stay.
        plan: slots and step sizes.
        kernels: compute attention and linear layers.
        probe: token ids that follow each chunk.
        watch: is given the logits [V] of every token that is sampled, or None.
        refused: is called with the reason if decoding rounds cannot be captured; None if they must not be captured.

    Attributes:
        policy: as given.
        pool: the slots in which prompts are read.
        answering: the slots on which answers are written: the archive's, or the same.
        kv_bytes: bytes of the slots on the device.
        ahead: see ``Runner``.
        rounds: see ``Runner``.
        modules: see ``Runner``, once it is entered; counted on a GPU alone.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        policy: CompressionPolicy,
        plan: Plan,
        kernels: Kernels,
        probe: tuple[int, ...] = (),
        watch: Watch | None = None,
        refused: Callable[[str], None] | None = None,
    ) -> None:
        self._model, self._rope, self._kernels, self._watch = loaded.model, loaded.rope, kernels, watch
        self._draw = kernels.module.draw
        self._vocab, self._max_length = loaded.spec.vocab, loaded.spec.max_length
        device = self._model.device
        slots = tuple(group.slots for group in plan.all_groups)
        self.policy = policy
        self.answering = self.pool = KVPool.placed(plan.layouts, slots, self._model.dtype, device, plan.limits.place)
        if plan.reading:
            self.pool = KVPool((plan.reading.layout,), (plan.reading.slots,), self._model.dtype, device)
        self._states = StatePool(plan.layouts[0].states, sum(slots), self._model.dtype, device)
        self._mixers = Mixers(self._model, kernels.module)
        self.kv_bytes = sum(pool.device_bytes for pool in {self.pool, self.answering}) + self._states.nbytes
        self.ahead = int(kernels.capabilities.runs_ahead(device.type) and watch is None)
        self._largest_slot = plan.groups[-1].capacity
        self._largest_group = len(plan.groups) - 1
        self._attention = SlotAttention(self.pool, policy, kernels, self.answering if plan.reading else None)
        fuses_all_layers = self._attention.fuses_all_layers and not policy.protects
        self._reads_no_empty_rows = kernels.capabilities.skips_empty_rows and fuses_all_layers
        self._packer = Packer(
            policy=policy,
            slot_offsets=self.answering.slot_offsets,
            archives=plan.reading is not None,
            mixes=bool(loaded.spec.states),
            probe=probe,
            max_length=self._max_length,
            device=device,
        )
        self._next_ids = torch.zeros(sum(slots) + 1, dtype=torch.long, device=device)  # the last one is no slot's
        self._graphs = self._decode_graphs(refused) if refused is not None else None
        self.rounds = 1 if self._graphs is None else ROUNDS
        self._attached = ExitStack()
        self.modules: Mapping[str, Any] = {}

    def _decode_graphs(self, refused: Callable[[str], None]) -> DecodeGraphs | None:
        """Graphs of decoding rounds, where rounds can follow each other without the host."""
        rope_on_device = self._rope is None or self._rope.two_sets
        capturable = self._reads_no_empty_rows and self._kernels.capabilities.capturable
        if not (self.ahead and rope_on_device and capturable):
            return None
        return DecodeGraphs(self._decode_round, self._next_ids, self._draw, refused, self._before_round)

    def __enter__(self) -> ModelRunner:
        self._attached.enter_context(use_attention(self._model, self._attention))
        self._attached.enter_context(self._mixers.attached())
        modules = self._attached.enter_context(fused_modules(self._model, self._kernels))
        self.modules = modules if self._model.device.type == "cuda" else {}
        return self

    def __exit__(self, *_: object) -> None:
        self._attached.close()
        self._graphs = None  # it refers to this runner, whose slots would stay until garbage is collected

    @torch.inference_mode()
    def run(self, step: Step) -> Tokens | Rounds:
        """Launch a step; nothing waits for the device until its tokens are read."""
        if self._graphs is not None and all(c.decodes and not c.sequence.needs_host_tokens for c in step.chunks):
            return self._graphs.decode([self._graph_row(chunk) for chunk in step.chunks])
        sampling = [chunk.sequence for chunk in step.chunks if chunk.samples]
        allowed = AllowedTokens([sequence.allowed for sequence in sampling])
        return self._sample(sampling, self._forward(step), allowed)

    def _forward(self, step: Step) -> Tensor:
        """Compute a step without sampling: logits [N, V], one row for each chunk that samples."""
        if not self._reads_no_empty_rows:
            for chunk in step.chunks:
                if chunk.begins:
                    self._reset(chunk.slot_index)
        self._states.clear([self._packer.slot_number(c.sequence) for c in step.chunks if c.start == 0])
        decoding = (chunk for chunk in step.chunks if chunk.decodes)
        self._attention.rank(
            DecodingSlot(self._packer.slot_number(chunk.sequence), chunk.start, chunk.sequence.rows_needed)
            for chunk in decoding
        )
        return self._logits(self._packer.pack(step, self._next_ids), self._segments(step))

    def _segments(self, step: Step) -> list[Segment]:
        """The packed tokens by sequence, where rotary frequencies depend on the sequence's length."""
        if self._rope is None:
            return []
        return [Segment(c.length + len(self._packer.probe_behind(c)), c.sequence.total) for c in step.chunks]

    def _graph_row(self, chunk: Chunk) -> GraphRow:
        sequence = chunk.sequence
        drawn = range(chunk.length) if sequence.params.temperature > 0 else ()
        return GraphRow(
            slot=self._packer.slot_number(sequence),
            position=chunk.start,
            row_limit=sequence.rows_needed,
            tokens=chunk.length,
            ends=sequence.last_ids,
            long=self._rope is not None and self._rope.is_long(sequence.total),
            draws=tuple(_sampling_row(sequence) for _ in drawn),
        )

    def _before_round(self, rows: Iterable[GraphRow], number: int) -> None:
        """What is launched before a round of decoding, when ``number`` rounds of these rows came before."""
        decoding = (row for row in rows if number < row.tokens)
        self._attention.rank(DecodingSlot(row.slot, row.position + number, row.row_limit) for row in decoding)

    def _decode_round(self, packed: PackedStep, long: Tensor) -> Tensor:
        """Logits [N, V] of decoding rows; ``long`` [N] says which belong to sequences with long-context frequencies."""
        return self._logits(packed, is_long=None if self._rope is None else long.bool())

    def _sample(self, sequences: list[Sequence], logits: Tensor, allowed: AllowedTokens) -> Tokens:
        """The next token of each sequence, which stays on the device for the next step too."""
        rows = [_sampling_row(sequence) for sequence in sequences]
        if self._watch is not None:
            for sequence, row in zip(sequences, logits, strict=True):
                self._watch(sequence.request, len(sequence.answer), row)
        if not sequences:
            return Tokens(self._next_ids[:0])
        allowed.keep_in(logits)
        ids, forced_ids = sample(logits, rows, self._draw), [sequence.forced for sequence in sequences]
        if any(token is not None for token in forced_ids):
            forced = upload([NO_TOKEN if token is None else token for token in forced_ids], ids.device)
            ids = torch.where((forced == NO_TOKEN) | (ids == NO_TOKEN), ids, forced)
        slots = upload([self._packer.slot_number(sequence) for sequence in sequences], ids.device)
        self._next_ids[slots] = ids.clamp(min=0)
        return Tokens(ids)

    @torch.inference_mode()
    def copy(self, source: SlotIndex, target: SlotIndex, tokens: int) -> None:
        """Copy the state of a sequence's first ``tokens`` tokens from one slot to another.

        Args:
            source: the slot that is copied.
            target: the slot that is overwritten.
            tokens: tokens of the sequence whose state it is.
        """
        self.answering.copy_state(source, target, tokens)
        self._states.copy(*(self.answering.slot_offsets[index.group] + index.slot for index in (source, target)))
        if self.pool is not self.answering:
            self.pool.copy_state(SlotIndex(0, source.reading), SlotIndex(0, target.reading), tokens)

    def _reset(self, index: SlotIndex) -> None:
        """Empty a sequence's slots."""
        self.answering.reset(index.group, index.slot)
        if self.pool is not self.answering:
            self.pool.reset(0, index.reading)

    @torch.inference_mode()
    def profile_step(self, size: StepSize, sampled: int) -> None:
        """Compute the largest step that a plan allows, on made-up tokens, so that its memory can be measured.

        Chunks read slot 0 of the last group. Where the policy evicts, the slot is full; else they fill it. Where
        prompts are archived, the first tokens are the end of one, which reads the whole archive.

        Args:
            size: how large the step is.
            sampled: rows of logits; as many of them are drawn at random as the sampler ever draws at once.
        """
        tokens, chunk = size.max_num_batched_tokens, size.chunk_size + size.probe
        last, archives = SlotIndex(self._largest_group, 0, 0), self.pool is not self.answering
        capacity = self._largest_slot
        evicts = not archives and self.policy.evicts(capacity, 1)
        start = max(0, min(capacity, self._max_length - chunk) if evicts else capacity - chunk)
        self._reset(last)
        ending = min(ENDING, tokens // 2, capacity) if archives else 0
        prompts = [
            PromptChunk(
                rows=slice(begin, min(begin + chunk, tokens)),
                group=0 if archives else last.group,
                slot=0,
                start=start,
                total=start + chunk + evicts,
                row_limit=capacity,
                archive=last if archives else None,
                probes=min(size.probe, min(chunk, tokens - begin) - 1),
            )
            for begin in range(ending, tokens, chunk)
        ]
        at_end = PromptChunk(
            rows=slice(0, ending),
            group=last.group,
            slot=0,
            start=capacity - ending,
            total=capacity,
            row_limit=capacity,
        )
        ids, positions = [i % self._vocab for i in range(tokens)], [start + i % chunk for i in range(tokens)]
        logits_at = [i % tokens for i in range(sampled)]
        packed = self._packer.upload(ids, positions, logits_at, [], prompts, self._next_ids, [at_end] if ending else [])
        logits = self._logits(packed, [Segment(tokens, start + chunk)])
        drawn = min(sampled, SAMPLER_ROWS)
        rows = [SamplingRow(SamplingParams(temperature=1.0), 0.5)] * drawn
        sample(logits, rows + [SamplingRow.likeliest()] * (sampled - drawn), self._draw)

    def _logits(
        self, packed: PackedStep, segments: list[Segment] | None = None, is_long: Tensor | None = None
    ) -> Tensor:
        """Logits [N, V] of a packed step, at the rows that it says.

        Args:
            packed: the step.
            segments: the packed tokens by sequence, where rotary frequencies depend on the sequence's length.
            is_long: [T] bool, instead of segments: which tokens are of long sequences.
        """
        rope = nullcontext() if self._rope is None else self._rope.sequences(segments or (), is_long)
        mixing = self._mixers.step(packed.segments, self._states.tensors)
        with rope, mixing, self._attention.forward(packed):
            output = self._model(
                input_ids=packed.input_ids,
                position_ids=packed.positions,
                past_key_values=None,
                use_cache=False,
                logits_to_keep=packed.logits_at,
            )
        return output.logits[0]  # type: ignore[no-any-return]


def _sampling_row(sequence: Sequence) -> SamplingRow:
    """How the sequence's next token is sampled; a repetition penalty needs the tokens so far."""
    seen = [*sequence.prompt, *sequence.answer] if sequence.params.repetition_penalty != 1 else ()
    return SamplingRow(sequence.params, sequence.draw(), seen)
