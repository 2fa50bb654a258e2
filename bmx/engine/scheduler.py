"""Decides which chunks run together in the next step. Pure Python: no tensor, no clock, no model; fuzzed without torch.

There is no prefill phase and no decode phase: a sequence has known tokens and computed tokens, and each step computes
some of the difference, one token or a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice

from bmx.engine.sequence import Prefix, Sequence
from bmx.engine.shared_slots import SharedSlots
from bmx.kv.layout import NOT_READING, SlotIndex
from bmx.plan.memory import SlotGroup, StepSize, group_for


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start .. start + length - 1 of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def decodes(self) -> bool:
        """Whether these are tokens of the answer, of which each one is sampled before it is computed."""
        return self.start >= len(self.sequence.prompt)

    @property
    def samples(self) -> int:
        """Tokens of the answer that the step samples: one for each decoding token, one for a prompt's last token."""
        return self.length if self.decodes else int(self.start + self.length == len(self.sequence.prompt))

    @property
    def slot_index(self) -> SlotIndex:
        """The slot in which its pairs are stored: the sequence's own, or a shared one."""
        shared = self.sequence.shared
        return shared.slot_index if shared and self.start < shared.prefix.length else self.sequence.slot_index

    @property
    def begins(self) -> bool:
        """Whether its pairs are the first in that slot."""
        return self.start in (0, self.sequence.shared_rows)


@dataclass(frozen=True, slots=True)
class Step:
    """The chunks that run together: decoding sequences first, by slot; then prompts, in order of admission.

    In a step without prompts, sequences may decode several tokens each, and not all of them equally many.
    """

    chunks: tuple[Chunk, ...]

    @property
    def rounds(self) -> int:
        """How often the model runs."""
        return max(chunk.length if chunk.decodes else 1 for chunk in self.chunks)

    @property
    def tokens(self) -> int:
        """Packed tokens."""
        return sum(chunk.length for chunk in self.chunks)


class Scheduler:
    """Gives sequences their slots and decides the steps: enqueue, admit_waiting, schedule, launched, update.

    Args:
        groups: slots by capacity.
        size: how large steps may get; one prompt chunk always fits, so that prompts make progress.
        reading: slots in which prompts are read before they are archived; None where a sequence reads in its own slot.
        shared: slots that many sequences read beside their own.
    """

    def __init__(
        self,
        groups: Seq[SlotGroup],
        size: StepSize,
        reading: int | None = None,
        shared: SharedSlots | None = None,
    ) -> None:
        self._groups = tuple(groups)
        self._chunk_size, self._probe = size.chunk_size, size.probe
        self._max_tokens = size.max_num_batched_tokens
        self._free = [list(range(group.slots))[::-1] for group in self._groups]
        self._free_reading = None if reading is None else list(range(reading))[::-1]
        self._shared = shared or SharedSlots((), (), lambda *_: False)
        self._overtaken = 0  # sequences with a shared slot that came after the first one that has found none
        self._running: list[Sequence] = []
        self._leaving: list[Sequence] = []  # their last tokens are launched but not read; their slots are free already
        self._waiting: list[Sequence] = []

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The sequences without a slot, in the order in which they will be admitted."""
        return tuple(self._waiting)

    @property
    def running(self) -> int:
        """How many sequences have a slot."""
        return len(self._running)

    @property
    def in_slots(self) -> list[Sequence]:
        """The sequences that have a slot."""
        return list(self._running)

    @property
    def held_tokens(self) -> list[int]:
        """Tokens computed so far of each sequence that has a slot, or had one until its last step."""
        return [sequence.computed for sequence in (*self._leaving, *self._running)]

    @property
    def largest(self) -> int:
        """Rows of the largest slot."""
        return max(group.capacity for group in self._groups)

    @property
    def slots(self) -> int:
        """The number of slots."""
        return sum(group.slots for group in self._groups)

    @property
    def unfinished(self) -> list[Sequence]:
        """All sequences that have a slot, or wait for one or for their last tokens."""
        return [*self._leaving, *self._running, *self._waiting]

    def enqueue(self, sequence: Sequence) -> None:
        """Let a sequence wait for a slot."""
        self._waiting.append(sequence)

    def discard_waiting(self) -> None:
        """Forget the sequences without a slot."""
        self._waiting.clear()

    def reject_too_large(self) -> list[Sequence]:
        """Remove, and return, the waiting sequences that no slot can ever hold."""
        largest = self.largest
        rejected = [sequence for sequence in self._waiting if sequence.rows_needed > largest]
        if rejected:
            self._waiting = [sequence for sequence in self._waiting if sequence.rows_needed <= largest]
        return rejected

    def admit_waiting(self, draining: bool = False) -> None:
        """Admit waiting sequences while a free slot fits; one that fits nowhere does not block those behind it.

        Args:
            draining: no more will be enqueued, so the longest are admitted first, and no long one is left to run alone.
                Those that share a prefix stay together, so that it is computed once.
        """
        if not self._has_free_slots():
            return
        if draining:
            self._sort_longest_first()
        candidates, self._waiting = self._waiting, []
        blocked = False
        for index, sequence in enumerate(candidates):
            if not self._has_free_slots():
                self._waiting += candidates[index:]
                return
            if (blocked and self._must_wait(sequence)) or not self.admit(sequence):
                self._waiting.append(sequence)
                blocked = blocked or self._finds_no_shared_slot(sequence)
            elif blocked and sequence.shared:
                self._overtaken += 1
        if not blocked:
            self._overtaken = 0

    def _finds_no_shared_slot(self, sequence: Sequence) -> bool:
        """Whether all shared slots are read, and none of them is the one that a sequence needs."""
        prefix = self._shared.wanted_by(sequence)
        return prefix is not None and not self._shared.has_room(prefix)

    def _must_wait(self, sequence: Sequence) -> bool:
        """Whether a sequence leaves the shared slots to one that waits for them: as many as slots have overtaken it."""
        return self._overtaken >= self.slots and self._shared.wanted_by(sequence) is not None

    def _sort_longest_first(self) -> None:
        """Sort those that wait: first those that share a prefix with one that has a slot, then by the longest of them.

        The same holds for those within that share more, down to single sequences.
        """
        begun = {prefix for sequence in self._running for prefix in sequence.prefixes}
        longest: dict[Prefix, tuple[bool, int, int]] = {}
        alone = [(True, -sequence.steps(self._chunk_size), i) for i, sequence in enumerate(self._waiting)]
        for sequence, (_, steps, i) in zip(self._waiting, alone, strict=True):
            for prefix in sequence.prefixes:
                rank = (prefix not in begun, steps, i)
                longest[prefix] = min(rank, longest.get(prefix, rank))
        alone.sort(key=lambda rank: [*(longest[p] for p in self._waiting[rank[2]].prefixes), rank])
        self._waiting = [self._waiting[i] for *_, i in alone]

    def _has_free_slots(self) -> bool:
        """Whether some sequence could get a slot, and one to read its prompt in where it needs one."""
        return any(self._free) and self._free_reading != []

    def admit(self, sequence: Sequence) -> bool:
        """Give the sequence the smallest free slot that is large enough; False if no such slot is free.

        A sequence whose prompt begins with text that others share reads that in a shared slot, if one has room.
        """
        if not self._has_free_slots():
            return False
        prefix = self._shared.wanted_by(sequence)
        length = prefix.length if prefix and self._shared.has_room(prefix) else 0
        group = group_for(sequence.rows_needed - length, self._groups, self._free)
        if group is None:
            return False
        if prefix and length:
            self._shared.enter(sequence, prefix)
        reading = self._free_reading.pop() if self._free_reading else NOT_READING
        sequence.slot = SlotIndex(group, self._free[group].pop(), reading)
        self._running.append(sequence)
        return True

    def schedule(self, rounds: int = 1) -> Step | None:
        """The next step: every decoding sequence, then whole prompt chunks while they fit. None if nothing can run.

        A sequence that waits for another one's prefix does not block those behind it.

        Args:
            rounds: most tokens that a sequence decodes in a step without prompts.
        """
        decodes = sorted((s for s in self._running if s.decoding), key=_decoding_order)
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
        """Take a launched step as computed, before its tokens are read.

        Later steps find the slots as this one leaves them: a sequence whose last token is launched gives up its slot.
        """
        for chunk in step.chunks:
            chunk.sequence.computed = chunk.start + chunk.length
            chunk.sequence.promised += chunk.samples
            if chunk.sequence.decoding:
                self._end_reading(chunk.sequence)
        leaving = [sequence for sequence in self._running if sequence.decoding and not sequence.left]
        self.drop(leaving)
        self._leaving += leaving

    def update(self, step: Step, tokens: Seq[int | None]) -> list[Sequence]:
        """Give the tokens of a launched step to their sequences, and free the slots of finished ones.

        Tokens of a sequence that has ended since the launch are dropped.

        Args:
            step: the launched step.
            tokens: one for each token that it sampled, in order; None where the logits were not numbers.

        Returns:
            The sequences that are finished; ``slot_index`` still says the slot they had.
        """
        following, active = iter(tokens), [*self._leaving, *self._running]
        known = set(map(id, active))
        for chunk in step.chunks:
            for token in islice(following, chunk.samples):
                if id(chunk.sequence) in known and not chunk.sequence.finish_reason:
                    chunk.sequence.accept(token)
        self.drop([sequence for sequence in self._running if sequence.finish_reason])
        self._leaving = [sequence for sequence in self._leaving if not sequence.finish_reason]
        return [sequence for sequence in active if sequence.finish_reason]

    def drop(self, sequences: Seq[Sequence]) -> None:
        """Free the slots of sequences; ``slot_index`` still says the slot they had."""
        gone = set(map(id, sequences))
        self._running = [s for s in self._running if id(s) not in gone]
        for sequence in sequences:
            self._end_reading(sequence)
            self._shared.leave(sequence)
            self._free[sequence.slot_index.group].append(sequence.slot_index.slot)

    def _end_reading(self, sequence: Sequence) -> None:
        """Free the slot in which the sequence has read its prompt."""
        index = sequence.slot_index
        if self._free_reading is not None and index.reading != NOT_READING:
            self._free_reading.append(index.reading)
            sequence.slot = index._replace(reading=NOT_READING)

    def capacity(self, sequence: Sequence) -> int:
        """Rows of the slot that the sequence has or had, with those that it reads or read in a shared one."""
        return self._groups[sequence.slot_index.group].capacity + sequence.shared_rows


def _decoding_order(sequence: Sequence) -> tuple[int, SlotIndex, SlotIndex]:
    """By group; in it, those that read the same shared slot together."""
    index, none = sequence.slot_index, SlotIndex(-1, -1)
    return index.group, sequence.shared.slot_index if sequence.shared else none, index
