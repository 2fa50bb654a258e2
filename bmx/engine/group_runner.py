"""Steps on a model that several processes share: the leader's, which samples, and the followers' of the same steps.

What a follower is sent of a step is what it must know to pack it: of a prompt the tokens of the chunk, of an answer
none. The tokens that the leader samples are given to all on their devices.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from bmx.engine.backend import Sampled
from bmx.engine.group import Group
from bmx.engine.runner import ModelRunner
from bmx.engine.scheduler import Chunk, Step
from bmx.engine.sequence import Sequence, SharedPart
from bmx.kv.layout import SlotIndex
from bmx.plan.memory import StepSize
from bmx.request import Request


@dataclass(frozen=True, slots=True)
class PartOfPrompt:
    """A prompt of which only the tokens of one chunk are known.

    Args:
        length: tokens of the prompt.
        start: of the chunk.
        ids: token ids of the chunk.
    """

    length: int
    start: int = 0
    ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, tokens: slice) -> Seq[int]:
        return self.ids[tokens.start - self.start : tokens.stop - self.start]


@dataclass(frozen=True, slots=True)
class SentChunk:
    """A chunk as a follower is sent it: see ``Chunk`` and ``Sequence``."""

    start: int
    length: int
    slot: SlotIndex
    prompt: PartOfPrompt
    max_tokens: int
    rows_needed: int
    reading_rows: int
    spans: tuple[tuple[int, int], ...]
    shared: SharedPart | None

    @classmethod
    def of(cls, chunk: Chunk) -> SentChunk:
        """What is sent of a chunk."""
        sequence, start, stop = chunk.sequence, chunk.start, chunk.start + chunk.length
        ids = () if chunk.decodes else tuple(sequence.prompt[start:stop])
        return cls(
            start=start,
            length=chunk.length,
            slot=sequence.slot_index,
            prompt=PartOfPrompt(len(sequence.prompt), start, ids),
            max_tokens=sequence.max_tokens,
            rows_needed=sequence.rows_needed,
            reading_rows=sequence.reading_rows,
            spans=sequence.spans,
            shared=sequence.shared,
        )

    def received(self) -> Chunk:
        """The chunk, of a sequence that has nothing but what a step needs of it."""
        prompt: Any = self.prompt
        sequence = Sequence(
            request=Request(id="", prompt=""),
            prompt=prompt,
            max_tokens=self.max_tokens,
            rows_needed=self.rows_needed,
            end_token_ids=frozenset(),
            tokenizer=None,
            spans=self.spans,
            reading_rows=self.reading_rows,
        )
        sequence.slot, sequence.shared = self.slot, self.shared
        return Chunk(sequence, self.start, self.length)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of a step, where waiting for them may find that another process has ended."""

    group: Group
    tokens: Sampled

    def read(self) -> list[int | None]:
        """See ``Sampled``."""
        with self.group.failures():
            return self.tokens.read()


class LeadingRunner(ModelRunner):
    """Computes the steps of a plan together with the followers, which do as they are told before each step.

    Args:
        group: the followers.
        arguments: those of ``ModelRunner``.
    """

    def __init__(self, group: Group, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._group = group

    def run(self, step: Step) -> Any:
        """See ``ModelRunner``.

        Raises:
            DeviceError: another process failed, or was killed.
        """
        with self._group.failures():
            self._group.tell("step", tuple(map(SentChunk.of, step.chunks)))
            tokens = super().run(step)
            if any(chunk.samples for chunk in step.chunks):
                distributed.broadcast(self._next_ids, src=0)
        return _Tokens(self._group, tokens)

    def copy(self, source: SlotIndex, target: SlotIndex, tokens: int) -> None:
        """See ``ModelRunner``."""
        with self._group.failures():
            self._group.tell("copy", source, target, tokens)
            super().copy(source, target, tokens)

    def profile_step(self, size: StepSize, sampled: int) -> None:
        """See ``ModelRunner``."""
        with self._group.failures():
            self._group.tell("profile", size, sampled)
            super().profile_step(size, sampled)
            self._group.answers()


class FollowingRunner(ModelRunner):
    """Computes the same steps on another part of the model, and samples nothing."""

    @torch.inference_mode()
    def follow(self, chunks: Seq[SentChunk]) -> None:
        """Compute a step that the leader computes too."""
        step = Step(tuple(chunk.received() for chunk in chunks))
        self._forward(step)
        if any(chunk.samples for chunk in step.chunks):
            distributed.broadcast(self._next_ids, src=0)
