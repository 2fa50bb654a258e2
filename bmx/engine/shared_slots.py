"""Slots that many sequences read in place: which leading text each holds, and how many sequences read it.

Knows sequences and slots; touches no tensor. The first sequence that reads a text computes it, straight into the slot;
nothing of it changes afterwards. A slot is given up when no sequence reads it and another text needs it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq

from bmx.engine.sequence import Prefix, Sequence, SharedPart
from bmx.kv.layout import SlotIndex
from bmx.plan.memory import SlotGroup


class SharedSlots:
    """The shared slots of a run.

    Args:
        slots: where they are.
        groups: of the sequences' own slots; those whose ``shared`` is not 0 are for the rest of a prompt.
        usable: whether a sequence gets the same answer if it reads a prefix in a slot that others read.
        rows: of each of them; a slot for copies may hold a longer prefix.
    """

    def __init__(
        self,
        slots: Seq[SlotIndex],
        groups: Seq[SlotGroup],
        usable: Callable[[Sequence, Prefix], bool],
        rows: int = sys.maxsize,
    ) -> None:
        self._free = list(slots)[::-1]
        self._usable, self._rows = usable, rows
        self._room = max((group.capacity for group in groups if group.shared), default=0)
        self._held: dict[Prefix, SlotIndex] = {}  # the least recently used is first
        self._readers: Counter[Prefix] = Counter()
        self._computed: set[Prefix] = set()
        self.enabled = bool(self._free)

    def wanted_by(self, sequence: Sequence) -> Prefix | None:
        """The shortest prefix, the one that most others share, behind which the rest fits in a slot meant for it."""
        if not self.enabled:
            return None
        fitting = (
            p for p in sequence.prefixes if p.length <= self._rows and sequence.rows_needed - p.length <= self._room
        )
        return next((prefix for prefix in fitting if self._usable(sequence, prefix)), None)

    def has_room(self, prefix: Prefix) -> bool:
        """Whether a slot holds it, or can: it is free, or no sequence reads what is in it."""
        return prefix in self._held or bool(self._free) or self._unread() is not None

    def enter(self, sequence: Sequence, prefix: Prefix) -> None:
        """Let a sequence read a prefix for which there is room."""
        index = self._held.pop(prefix, None)
        if index is None:
            index = self._free.pop() if self._free else self._give_up()
        self._held[prefix] = index  # now the most recently used
        self._readers[prefix] += 1
        sequence.shared = SharedPart(prefix, index)

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence reads no more; it still knows what it has read."""
        if sequence.shared:
            self._readers[sequence.shared.prefix] -= 1

    def note_computed(self, prefix: Prefix) -> None:
        """Note that the tokens of a prefix are in its slot."""
        self._computed.add(prefix)

    def computed_at(self, prefix: Prefix) -> SlotIndex | None:
        """The slot that holds a prefix whose tokens are all computed; None if there is none."""
        return self._held.get(prefix) if prefix in self._computed else None

    def _unread(self) -> Prefix | None:
        """The least recently used prefix that no sequence reads."""
        return next((prefix for prefix in self._held if not self._readers[prefix]), None)

    def _give_up(self) -> SlotIndex:
        prefix = self._unread()
        if prefix is None:
            raise RuntimeError("every shared slot is read")
        self._computed.discard(prefix)
        del self._readers[prefix]
        return self._held.pop(prefix)
