"""Which chunks run together next. Pure Python: no tensor, no clock, no model; fuzzed without torch.

There is no prefill phase and no decode phase: each sequence has tokens known and tokens computed, and a step lets
it catch up, by one token or by a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice

from bmx.engine.sequence import Sequence
from bmx.kv.layout import SlotIndex
from bmx.plan.memory import SlotGroup, StepSize, group_for


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start .. start + length of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def decodes(self) -> bool:
        """Whether these are tokens of the answer, each computed from the one before."""
        return self.start >= len(self.sequence.prompt)

    @property
    def samples(self) -> int:
        """Tokens of the answer that the step gives: one for each that decodes, one for a prompt's last."""
        return self.length if self.decodes else int(self.start + self.length == len(self.sequence.prompt))


@dataclass(frozen=True, slots=True)
class Step:
    """The chunks that run together: decoding sequences first, by slot; then prompts, in order of admission.

    Where nothing else happens, sequences may decode several tokens, some of them fewer than others.
    """

    chunks: tuple[Chunk, ...]

    @property
    def rounds(self) -> int:
        """How often the model is run."""
        return max(chunk.length if chunk.decodes else 1 for chunk in self.chunks)

    @property
    def tokens(self) -> int:
        """Packed tokens."""
        return sum(chunk.length for chunk in self.chunks)


class Scheduler:
    """Gives sequences their slots and cuts steps.

    Args:
        groups: slots by capacity.
        size: how large steps may get; one prompt chunk is taken all the same, so that prompts go on.

    Attributes:
        waiting: sequences without a slot, in the order in which they came.
        draining: no more will come, so the longest of the waiting go first, and no long one is left to run alone.
    """

    def __init__(self, groups: Seq[SlotGroup], size: StepSize) -> None:
        self._groups = tuple(groups)
        self._chunk_size, self._probe = size.chunk_size, size.probe
        self._max_tokens = size.max_num_batched_tokens
        self._free = [list(range(group.slots))[::-1] for group in self._groups]
        self._running: list[Sequence] = []
        self._leaving: list[Sequence] = []  # whose last tokens are promised: their slots are others' already
        self.waiting: list[Sequence] = []
        self.draining = False

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return len(self._running)

    @property
    def in_slots(self) -> list[Sequence]:
        """The sequences that have a slot."""
        return list(self._running)

    @property
    def held_tokens(self) -> list[int]:
        """Tokens computed so far by each of the sequences that have a slot, or had one until their last step."""
        return [sequence.computed for sequence in (*self._leaving, *self._running)]

    @property
    def largest(self) -> int:
        """Rows of the largest slot."""
        return max(group.capacity for group in self._groups)

    @property
    def slots(self) -> int:
        """Slots in all."""
        return sum(group.slots for group in self._groups)

    @property
    def unfinished(self) -> list[Sequence]:
        """All that have a slot or wait for one, or for their last tokens."""
        return [*self._leaving, *self._running, *self.waiting]

    def reject_too_large(self) -> list[Sequence]:
        """Those that wait and that no slot can ever hold; they wait no longer."""
        largest = self.largest
        rejected = [sequence for sequence in self.waiting if sequence.rows_needed > largest]
        if rejected:
            self.waiting = [sequence for sequence in self.waiting if sequence.rows_needed <= largest]
        return rejected

    def admit_waiting(self) -> None:
        """Give slots to those who wait, as long as any fits; one that finds none lets others pass."""
        if not any(self._free):
            return
        if self.draining:
            self.waiting.sort(key=lambda sequence: -sequence.steps(self._chunk_size))
        before, self.waiting = self.waiting, []
        for at, sequence in enumerate(before):
            if not any(self._free):
                self.waiting += before[at:]
                return
            if not self.admit(sequence):
                self.waiting.append(sequence)

    def admit(self, sequence: Sequence) -> bool:
        """Give the sequence the smallest free slot that is large enough; False if there is none now."""
        group = group_for(sequence.rows_needed, self._groups, self._free)
        if group is None:
            return False
        sequence.slot = SlotIndex(group, self._free[group].pop())
        self._running.append(sequence)
        return True

    def schedule(self, rounds: int = 1) -> Step | None:
        """The next step: every decoding sequence, then whole prompt chunks while they fit. None: nothing to do.

        A sequence that waits for another's prefix lets those behind it pass.

        Args:
            rounds: most tokens that sequences decode where there is no prompt to read.
        """
        decodes = sorted((s for s in self._running if s.decoding), key=lambda s: s.slot_index)
        reading = any(not (s.decoding or s.waits) for s in self._running)
        chunks = [Chunk(s, s.computed, 1 if reading else min(rounds, s.left)) for s in decodes]
        tokens = len(chunks)
        prompts = 0
        for sequence in self._running:
            if sequence.decoding or sequence.waits:
                continue
            length = sequence.chunk_length(self._chunk_size)
            if prompts and tokens + length + self._probe > self._max_tokens:
                break
            chunks.append(Chunk(sequence, sequence.computed, length))
            tokens, prompts = tokens + length + self._probe, prompts + 1
        return Step(tuple(chunks)) if chunks else None

    def launched(self, step: Step) -> None:
        """Go on from where a step will have come to, whose tokens are promised.

        What is launched later finds slots as this step leaves them: who needs none any more gives it to the next.
        """
        for chunk in step.chunks:
            chunk.sequence.computed = chunk.start + chunk.length
            chunk.sequence.promised += chunk.samples
        leaving = [sequence for sequence in self._running if sequence.decoding and not sequence.left]
        self.drop(leaving)
        self._leaving += leaving

    def update(self, step: Step, tokens: Seq[int | None]) -> list[Sequence]:
        """Write down what a step gave that was launched before, and free the slots of those that are done.

        What it gave to a sequence that has ended since is not looked at.

        Args:
            tokens: of each chunk that samples, in order; None where the logits were no numbers.

        Returns:
            The sequences that are finished, still knowing the slot they had.
        """
        following, here = iter(tokens), [*self._leaving, *self._running]
        known = set(map(id, here))
        for chunk in step.chunks:
            for token in islice(following, chunk.samples):
                if id(chunk.sequence) in known and not chunk.sequence.finish_reason:
                    chunk.sequence.accept(token)
        self.drop([sequence for sequence in self._running if sequence.finish_reason])
        self._leaving = [sequence for sequence in self._leaving if not sequence.finish_reason]
        return [sequence for sequence in here if sequence.finish_reason]

    def drop(self, sequences: Seq[Sequence]) -> None:
        """Free the slots of sequences; they still know the slot they had."""
        gone = set(map(id, sequences))
        self._running = [s for s in self._running if id(s) not in gone]
        for sequence in sequences:
            group, slot = sequence.slot_index
            self._free[group].append(slot)

    def capacity(self, sequence: Sequence) -> int:
        """Rows of the slot that a sequence has or had."""
        return self._groups[sequence.slot_index.group].capacity
