"""Everything that touches the device for a step: packing tokens, running the model, sampling.

Knows the model and the pool; the scheduler's decisions come in as a Step, token ids stay on the device until they are
read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from bmx.compress.policy import CompressionPolicy
from bmx.engine.attention import SlotAttention
from bmx.engine.graphs import ROUNDS, DecodeGraphs, GraphRow, Rounds
from bmx.engine.packed import PackedStep, Packer, PromptChunk
from bmx.engine.sampler import NO_TOKEN, SamplingRow, sample
from bmx.engine.scheduler import Chunk, Step
from bmx.engine.sequence import Sequence
from bmx.kernels import Kernels
from bmx.kernels.transfer import Download, upload
from bmx.kv.layout import SlotIndex
from bmx.kv.pool import KVPool
from bmx.model.fused_modules import fused_modules
from bmx.model.loader import LoadedModel
from bmx.model.rope import Segment
from bmx.model.spec import use_attention
from bmx.plan.memory import SAMPLER_ROWS, StepSize
from bmx.plan.planner import Plan
from bmx.request import Request, SamplingParams

Watch = Callable[[Request, int, Tensor], None]


class Tokens:
    """Tokens that a step gives, on their way to the host."""

    def __init__(self, ids: Tensor) -> None:
        self._ids = Download(ids)

    def read(self) -> list[int | None]:
        """Of each chunk that samples, in order, once they are there; None where the logits were no numbers."""
        return [None if token == NO_TOKEN else token for token in self._ids.read()]


class ModelRunner:
    """Runs steps of one plan on one model. A context manager, since the model gets its own ways back at the end.

    Args:
        loaded: the model.
        policy: who stays in the cache.
        plan: slots and sizes.
        kernels: how attention and linear layers are computed.
        probe: token ids that are asked after each chunk.
        watch: is shown the logits [V] of every token that is to be sampled.
        refused: is told why decoding cannot be captured, where that shows; None if it shall not be.

    Attributes:
        policy: as given; ``pool``: the slots; ``kv_bytes`` of them.
        ahead, rounds: see ``Runner``.
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
        self._model = loaded.model
        self._vocab = loaded.spec.vocab
        self.policy = policy
        self._rope = loaded.rope
        self._max_length = loaded.spec.max_length
        slots = tuple(group.slots for group in (*plan.groups, *plan.prefix_slots))
        self.pool = KVPool(plan.layouts, slots, self._model.dtype, self._model.device)
        self.kv_bytes = self.pool.nbytes
        capabilities = kernels.capabilities
        self.ahead = int(capabilities.runs_ahead(self._model.device.type) and watch is None)
        self._watch = watch
        self._capacities = tuple(group.capacity for group in plan.groups)
        self._attention = SlotAttention(self.pool, policy, kernels)
        self._kernels = kernels
        self._packer = Packer(
            policy=policy,
            slot_offsets=self.pool.slot_offsets,
            probe=probe,
            max_length=self._max_length,
            device=self._model.device,
        )
        self._next_ids = torch.zeros(sum(slots) + 1, dtype=torch.long, device=self._model.device)  # the last: nobody's
        self._graphs = None
        self._masked = capabilities.skips_empty_rows and self._attention.alone and not policy.protects
        known = self._rope is None or self._rope.two_sets
        if self.ahead and refused is not None and known and self._masked and capabilities.capturable:
            self._graphs = DecodeGraphs(self._round, self._next_ids, refused)
        self.rounds = 1 if self._graphs is None else ROUNDS
        self._attached = ExitStack()

    def __enter__(self) -> ModelRunner:
        self._attached.enter_context(use_attention(self._model, self._attention))
        self._attached.enter_context(fused_modules(self._model, self._kernels))
        return self

    def __exit__(self, *_: object) -> None:
        self._attached.close()
        self._graphs = None  # it knows this runner: without, slots would live on until garbage is collected

    @torch.inference_mode()
    def run(self, step: Step) -> Tokens | Rounds:
        """Launch a step; nothing waits for the device until its tokens are read."""
        if self._graphs is not None and all(
            chunk.decodes and not chunk.sequence.needs_host_tokens for chunk in step.chunks
        ):
            return self._graphs.decode([self._decoding_row(chunk) for chunk in step.chunks])
        for chunk in step.chunks:
            if chunk.start == 0 and not self._masked:
                self.pool.reset(*chunk.sequence.slot_index)
        logits = self._logits(self._packer.packed(step, self._next_ids), self._segments(step))
        return self._sampled([chunk.sequence for chunk in step.chunks if chunk.samples], logits)

    def _segments(self, step: Step) -> list[Segment]:
        """Whose frequencies the packed tokens have, where that depends on their sequence."""
        if self._rope is None:
            return []
        return [Segment(c.length + len(self._packer.asked(c)), c.sequence.total) for c in step.chunks]

    def _decoding_row(self, chunk: Chunk) -> GraphRow:
        sequence = chunk.sequence
        drawn = range(chunk.length) if sequence.params.temperature > 0 else ()
        return GraphRow(
            slot=self._packer.number(sequence),
            position=chunk.start,
            row_limit=sequence.rows_needed,
            tokens=chunk.length,
            ends=sequence.last_ids,
            long=self._rope is not None and self._rope.is_long(sequence.total),
            draws=tuple(_row(sequence) for _ in drawn),
        )

    def _round(self, packed: PackedStep, long: Tensor) -> Tensor:
        """Logits of decoding rows, of which some belong to long sequences."""
        if self._rope is None:
            return self._logits(packed, [])
        self._rope.long = long.bool()
        try:
            return self._logits(packed, [])
        finally:
            self._rope.long = None

    def _sampled(self, sequences: list[Sequence], logits: Tensor) -> Tokens:
        """The next token of each sequence, of which the device takes note."""
        rows = [_row(sequence) for sequence in sequences]
        if self._watch is not None:
            for sequence, row in zip(sequences, logits, strict=True):
                self._watch(sequence.request, len(sequence.answer), row)
        if not sequences:
            return Tokens(self._next_ids[:0])
        ids, told = sample(logits, rows), [sequence.forced for sequence in sequences]
        if any(token is not None for token in told):
            forced = upload([NO_TOKEN if token is None else token for token in told], ids.device)
            ids = torch.where((forced == NO_TOKEN) | (ids == NO_TOKEN), ids, forced)
        slots = upload([self._packer.number(sequence) for sequence in sequences], ids.device)
        self._next_ids[slots] = ids.clamp(min=0)
        return Tokens(ids)

    @torch.inference_mode()
    def copy(self, source: SlotIndex, target: SlotIndex, tokens: int) -> None:
        """Put what a slot (group and slot) holds of the first tokens of a sequence into another."""
        self.pool.copy_state(source, target, tokens)

    @torch.inference_mode()
    def profile_step(self, size: StepSize, sampled: int) -> None:
        """Compute the largest step that a plan allows, on made-up tokens, to see what memory it takes.

        Chunks read slot 0 of the last group as if it were full, or would be with them where nothing is evicted.

        Args:
            sampled: rows of logits, of which as many are drawn from as a step ever draws together.
        """
        tokens = size.max_num_batched_tokens
        chunk = size.chunk_size + size.probe
        group, capacity = len(self._capacities) - 1, self._capacities[-1]
        evicts = self.policy.evicts(capacity, 1)
        start = max(0, min(capacity, self._max_length - chunk) if evicts else capacity - chunk)
        self.pool.reset(group, 0)
        spots = [slice(at, min(at + chunk, tokens)) for at in range(0, tokens, chunk)]
        prompts = [
            PromptChunk(
                rows=rows,
                group=group,
                slot=0,
                start=start,
                total=start + chunk + evicts,
                row_limit=capacity,
                probes=min(size.probe, rows.stop - rows.start - 1),
            )
            for rows in spots
        ]
        ids, positions = [i % self._vocab for i in range(tokens)], [start + i % chunk for i in range(tokens)]
        wanted = [i % tokens for i in range(sampled)]
        packed = self._packer.sent(ids, positions, wanted, [], prompts, self._next_ids)
        drawn = SamplingRow(SamplingParams(temperature=1.0), 0.5)
        logits = self._logits(packed, [Segment(tokens, start + chunk)])
        sample(
            logits,
            [drawn] * min(sampled, SAMPLER_ROWS) + [SamplingRow(SamplingParams())] * max(0, sampled - SAMPLER_ROWS),
        )

    def _logits(self, packed: PackedStep, segments: list[Segment]) -> torch.Tensor:
        """Logits [N, V] of the wanted rows of a packed step."""
        if self._rope is not None:
            self._rope.segments = segments
        self._attention.step = packed
        try:
            output = self._model(
                input_ids=packed.input_ids,
                position_ids=packed.positions,
                past_key_values=None,
                use_cache=False,
                logits_to_keep=packed.logits_at,
            )
        finally:
            self._attention.step = None
            if self._rope is not None:
                self._rope.segments = ()
        return output.logits[0]  # type: ignore[no-any-return]


def _row(sequence: Sequence) -> SamplingRow:
    seen = [*sequence.prompt, *sequence.answer] if sequence.params.repetition_penalty != 1 else ()
    return SamplingRow(sequence.params, sequence.draw(), seen)
