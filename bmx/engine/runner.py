"""Everything that touches the device for a step: packing tokens, running the model, sampling.

Knows the model and the pool; the scheduler's decisions come in as a Step, token ids go out as numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from itertools import groupby

import torch

from bmx.compress.policy import CompressionPolicy
from bmx.engine.attention import Decodes, PackedStep, PromptChunk, SlotAttention
from bmx.engine.sampler import Row, sample
from bmx.engine.scheduler import Chunk, Step
from bmx.engine.sequence import Sequence
from bmx.kernels import Kernels
from bmx.kv.pool import KVPool
from bmx.model.blocks import taken_over
from bmx.model.loader import LoadedModel
from bmx.model.rope import Segment
from bmx.model.spec import attention_of
from bmx.planner import SAMPLER_ROWS, Plan, StepSize
from bmx.request import Request, SamplingParams

Watch = Callable[[Request, int, torch.Tensor], None]


class ModelRunner:
    """Runs steps of one plan on one model. A context manager, since the model gets its own ways back at the end.

    Args:
        loaded: the model.
        policy: who stays in the cache.
        plan: slots and sizes.
        kernels: how attention and linear layers are computed.
        probe: token ids that are asked after each chunk.
        watch: is shown the logits [V] of every token that is to be sampled.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        policy: CompressionPolicy,
        plan: Plan,
        kernels: Kernels,
        probe: tuple[int, ...] = (),
        watch: Watch | None = None,
    ) -> None:
        self._model = loaded.model
        self._vocab = loaded.spec.vocab
        self._policy = policy
        self._rope = loaded.rope
        self._max_length = loaded.spec.max_length
        slots = tuple(group.slots for group in (*plan.groups, *plan.spare))
        self.pool = KVPool(plan.layouts, slots, self._model.dtype, self._model.device)
        self.kv_bytes = self.pool.nbytes
        self._probe = list(probe)
        self._watch = watch
        self._capacities = tuple(group.capacity for group in plan.groups)
        self._attention = SlotAttention(self.pool, policy, kernels)
        self._kernels = kernels
        self._attached = ExitStack()

    def __enter__(self) -> ModelRunner:
        self._attached.enter_context(attention_of(self._model, self._attention))
        self._attached.enter_context(taken_over(self._model, self._kernels))
        return self

    def __exit__(self, *_: object) -> None:
        self._attached.close()

    @torch.inference_mode()
    def run(self, step: Step) -> list[int | None]:
        """Compute a step.

        Returns:
            The next token of each sampling chunk, in order; None where the logits were no numbers.
        """
        for chunk in step.chunks:
            if chunk.start == 0:
                self.pool.reset(*chunk.sequence.home)
        sampling = [chunk.sequence for chunk in step.chunks if chunk.samples]
        rows = [_row(sequence) for sequence in sampling]
        segments = [Segment(chunk.length + len(self._asked(chunk)), chunk.sequence.total) for chunk in step.chunks]
        logits = self._logits(self._pack(step), segments)
        if self._watch is not None:
            for sequence, row in zip(sampling, logits, strict=True):
                self._watch(sequence.request, len(sequence.answer), row)
        tokens = sample(logits, rows) if rows else []
        told = [sequence.forced for sequence in sampling]
        return [own if own is None or other is None else other for own, other in zip(tokens, told, strict=True)]

    @torch.inference_mode()
    def copy(self, source: tuple[int, int], target: tuple[int, int], tokens: int) -> None:
        """Put what a slot (group and slot) holds of the first tokens of a sequence into another."""
        self.pool.copy_state(source, target, tokens)

    def _asked(self, chunk: Chunk) -> list[int]:
        """The probe's tokens behind a chunk: none for a sequence that keeps all it has."""
        sequence = chunk.sequence
        asked = not sequence.decoding and self._policy.evicts(len(sequence.prompt), sequence.max_tokens)
        return self._probe if asked else []

    @torch.inference_mode()
    def rehearse(self, size: StepSize, sampled: int) -> None:
        """Compute the largest step that a plan allows, on made-up tokens, to see what memory it takes.

        Chunks read slot 0 of the last group as if it were full, or would be with them where nothing is evicted.

        Args:
            sampled: rows of logits, of which as many are drawn from as a step ever draws together.
        """
        device, tokens = self._model.device, size.max_num_batched_tokens
        chunk = size.chunk_size + size.probe
        group, capacity = len(self._capacities) - 1, self._capacities[-1]
        evicts = self._policy.evicts(capacity, 1)
        start = max(0, min(capacity, self._max_length - chunk) if evicts else capacity - chunk)
        self.pool.reset(group, 0)
        spots = [slice(at, min(at + chunk, tokens)) for at in range(0, tokens, chunk)]
        prompts = tuple(
            PromptChunk(
                rows=rows,
                group=group,
                slot=0,
                start=start,
                total=start + chunk + evicts,
                limit=capacity,
                probes=min(size.probe, rows.stop - rows.start - 1),
            )
            for rows in spots
        )
        every = torch.arange(tokens, device=device)
        packed = PackedStep(
            input_ids=(every % self._vocab).unsqueeze(0),
            positions=(start + every % chunk).unsqueeze(0),
            logits_at=torch.arange(sampled, device=device) % tokens,
            decodes=(),
            prompts=prompts,
        )
        drawn = Row(SamplingParams(temperature=1.0), 0.5)
        logits = self._logits(packed, [Segment(tokens, start + chunk)])
        sample(logits, [drawn] * min(sampled, SAMPLER_ROWS) + [Row(SamplingParams())] * max(0, sampled - SAMPLER_ROWS))

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

    def _pack(self, step: Step) -> PackedStep:
        """The step as tensors: decoding tokens by group and slot, then prompt chunks."""
        ids: list[int] = []
        positions: list[int] = []
        logits_at: list[int] = []
        prompts = []
        for chunk in step.chunks:
            rows = slice(len(ids), len(ids) + chunk.length)
            sequence, stop = chunk.sequence, chunk.start + chunk.length
            ids += sequence.token_ids(chunk.start, chunk.length)
            positions += range(chunk.start, stop)
            if chunk.samples:
                logits_at.append(rows.stop - 1)
            if sequence.decoding:
                continue
            asked = self._asked(chunk)
            ids += asked
            positions += [min(stop + i, self._max_length - 1) for i in range(len(asked))]
            prompts.append(
                PromptChunk(
                    rows=slice(rows.start, rows.stop + len(asked)),
                    group=sequence.home[0],
                    slot=sequence.home[1],
                    start=chunk.start,
                    total=sequence.total,
                    limit=sequence.rows_needed,
                    probes=len(asked),
                    spans=sequence.spans,
                )
            )
        return PackedStep(
            input_ids=self._tensor(ids).unsqueeze(0),
            positions=self._tensor(positions).unsqueeze(0),
            logits_at=self._tensor(logits_at),
            decodes=self._decodes(step),
            prompts=tuple(prompts),
        )

    def _decodes(self, step: Step) -> tuple[Decodes, ...]:
        decoding = [chunk for chunk in step.chunks if chunk.sequence.decoding]
        found, row = [], 0
        for group, members in groupby(decoding, key=lambda chunk: chunk.sequence.home[0]):
            chunks = list(members)
            starts = tuple(chunk.start for chunk in chunks)
            sequences = [chunk.sequence for chunk in chunks]
            limits = tuple(sequence.rows_needed for sequence in sequences)
            found.append(
                Decodes(
                    rows=slice(row, row + len(chunks)),
                    group=group,
                    slots=self._tensor([sequence.home[1] for sequence in sequences]),
                    positions=self._tensor(starts),
                    seen=starts,
                    totals=tuple(sequence.total for sequence in sequences),
                    limits=limits,
                    limited=self._tensor(limits) if self._policy.budget.share else None,
                    spans=self._spans(sequences),
                )
            )
            row += len(chunks)
        return tuple(found)

    def _spans(self, sequences: list[Sequence]) -> torch.Tensor | None:
        """[B, N, 2], those of few filled up with empty ones; None if there are none."""
        most = max(len(sequence.spans) for sequence in sequences)
        if not most:
            return None
        padded = [[*s.spans, *[(0, 0)] * (most - len(s.spans))] for s in sequences]
        return torch.tensor(padded, dtype=torch.long, device=self._model.device)

    def _tensor(self, numbers: Seq[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._model.device)


def _row(sequence: Sequence) -> Row:
    seen = [*sequence.prompt, *sequence.answer] if sequence.params.repetition_penalty != 1 else ()
    return Row(sequence.params, sequence.draw(), seen)
