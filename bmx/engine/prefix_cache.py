"""Leading text that several prompts share: computed once, and what a slot then holds copied into the others.

Knows when one sequence's state is the one that another would have reached alone, who computes, who waits and which
copies are kept; touches no tensor. A row's answer does not depend on any of it.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakValueDictionary

from bmx.compress.policy import CompressionPolicy
from bmx.compress.scorer_api import Needs
from bmx.engine.scheduler import Step
from bmx.engine.sequence import Prefix, Sequence
from bmx.kv.layout import SlotIndex
from bmx.model.spec import ModelSpec
from bmx.plan.chunks import chunk_ends
from bmx.plan.memory import SlotGroup

LEAST = 64  # tokens that are worth a copy
UNIT = 32  # prompts that may be cut anywhere are cut at multiples of it, though they share a little more by chance


class Prompt(Protocol):
    """What must be known of a request, begun or not."""

    @property
    def prompt(self) -> list[int]:
        """Its token ids."""

    @property
    def total(self) -> int:
        """Tokens of prompt and answer."""

    @property
    def rows_needed(self) -> int:
        """Rows of a slot."""

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Positions from .. to that are never evicted."""


@dataclass(frozen=True, slots=True)
class LayerRows:
    """A layer's part of a slot.

    Attributes:
        rows: its capacity.
        lossless: whether all that a later query can still see fits in them.
        noted: whether eviction keeps statistics of each row.
    """

    rows: int
    lossless: bool
    noted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """When the state that one prompt has left in a slot is the one that another would have reached alone.

    Attributes:
        spec, policy: what a slot holds.
        chunk_size: decides where chunks end.
        rows: of the slots in which copies are kept.
    """

    spec: ModelSpec
    policy: CompressionPolicy
    chunk_size: int
    rows: int = sys.maxsize
    _layers: dict[int, tuple[LayerRows, ...]] = field(default_factory=dict, compare=False)

    def shared(self, one: Prompt, other: Prompt) -> int:
        """Leading tokens of which two prompts can share the state; 0 if that is not worth it."""
        if one.prompt[:LEAST] != other.prompt[:LEAST]:
            return 0
        common = common_tokens(one.prompt, other.prompt)
        even = min(common, self._whole(one), self._whole(other)) // UNIT * UNIT
        for tokens in sorted({even, even - UNIT, *chunk_ends(len(one.prompt), self.chunk_size)}, reverse=True):
            if LEAST <= tokens <= common:
                reuse_key = self.reuse_key(one, tokens)
                if (reuse_key or (reuse_key == () and tokens % UNIT == 0)) and reuse_key == self.reuse_key(
                    other, tokens
                ):
                    return tokens
        return 0

    def reuse_key(self, one: Prompt, tokens: int) -> tuple[object, ...] | None:
        """What a prompt's state after so many tokens depends on beside them; None if it never stops there.

        As long as nothing that can be seen was evicted, a prompt may be cut anywhere; else it is at the ends of its
        own chunks, and those before are where they are in any prompt that has a chunk end there.
        """
        if min(tokens, one.rows_needed) > self.rows or tokens >= len(one.prompt):
            return None
        ends = chunk_ends(len(one.prompt), self.chunk_size)
        after = bisect_right(ends, tokens)
        whole = tokens <= self._whole(one)
        if whole and self._uncut and ends[after] - tokens >= self._votes:
            return ()
        if not after or ends[after - 1] != tokens:
            return None
        if whole:
            return ("end",)
        spans = tuple((start, min(stop, tokens)) for start, stop in one.spans if start < tokens)
        rows = tuple(min(layer.rows, tokens) for layer in self._layers_of(one))
        evicts = self.policy.evicts(len(one.prompt), one.total - len(one.prompt))
        return ("end", rows, spans, evicts)

    def scored(self, one: Prompt) -> int:
        """Layers in which attention is added up for a request: those that it will evict in.

        Of two requests that share a state, the one with more of them has those of the other among its own.
        """
        return sum(layer.noted and one.total > layer.rows for layer in self._layers_of(one))

    def _whole(self, one: Prompt) -> int:
        """Tokens up to which nothing of a request is evicted that could be seen."""
        return min((layer.rows for layer in self._layers_of(one) if not layer.lossless), default=sys.maxsize)

    @property
    def _uncut(self) -> bool:
        """Whether states are the same wherever chunks end, up to rounding, while nothing is evicted.

        Where pairs are stored in fewer bits, a chunk sees itself exactly and what came before it not; queries are
        those of a chunk.
        """
        return self.policy.format == "auto" and Needs.QUERIES not in self.policy.needs

    @property
    def _votes(self) -> int:
        """Tokens that the next chunk must have to make what was noted of attention before it count for nothing."""
        scorer = self.policy.scorer
        return 1 if scorer is None or Needs.ATTENTION_MASS not in scorer.needs else scorer.query_weights.window or 1

    def _layers_of(self, one: Prompt) -> tuple[LayerRows, ...]:
        if one.rows_needed not in self._layers:
            layout = self.policy.layout(self.spec, one.rows_needed)
            self._layers[one.rows_needed] = tuple(
                LayerRows(layer.capacity, layer.by_age and layer.capacity == layer.window, bool(layer.row_stats))
                for i, layer in enumerate(layout.layers)
                if layer.owner == i
            )
        return self._layers[one.rows_needed]


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """A copy of a prefix's state: the slot it is in, and the layers in which attention was added up for it."""

    slot_index: SlotIndex
    scored: int


class PrefixCache:
    """The prefixes that a run's prompts share, found as they are read, and the copies that are kept of them.

    Args:
        reuse: what may be shared.
        prefix_slots: slots for copies; empty if nothing is shared.
        group: the number of their first group.
        copy: puts the first tokens' state of a slot into another.
    """

    def __init__(
        self, reuse: Reuse, prefix_slots: Seq[SlotGroup], group: int, copy: Callable[[SlotIndex, SlotIndex, int], None]
    ) -> None:
        self._reuse = reuse
        self._copy = copy
        self._free = [SlotIndex(group + i, slot) for i, part in enumerate(prefix_slots) for slot in range(part.slots)]
        self._known: WeakValueDictionary[tuple[object, ...], Prefix] = WeakValueDictionary()
        self._kept: dict[Prefix, CachedPrefix] = {}  # the least recently used first
        self._before: Sequence | None = None  # the one that was read last
        self._on = bool(self._free)

    def join(self, sequence: Sequence) -> None:
        """Find what a sequence shares with the one that was read before it."""
        before, self._before = self._before, sequence
        length = self._reuse.shared(sequence, before) if self._on and before else 0
        if not before or not length:
            return
        common = common_tokens(sequence.prompt, before.prompt)
        sequence.prefixes = [p for p in before.prefixes if p.length <= common and self._fits(p, sequence)]
        if any(prefix.length == length for prefix in sequence.prefixes):
            return
        reuse_key = self._reuse.reuse_key(sequence, length) or ()
        prefix = self._known.setdefault((reuse_key, *sequence.prompt[:length]), Prefix(length, reuse_key))
        for one in (before, sequence):
            one.prefixes = sorted([*one.prefixes, prefix], key=lambda prefix: prefix.length)

    def _fits(self, prefix: Prefix, sequence: Sequence) -> bool:
        return self._reuse.reuse_key(sequence, prefix.length) == prefix.reuse_key

    def arrange(self, sequences: Seq[Sequence]) -> int:
        """Decide who begins with a copy, who computes a prefix, and who waits for one that another is computing.

        Only those wait that have not begun, and only for those that do not: someone always goes on.

        Args:
            sequences: those that have a slot, in order of admission.

        Returns:
            Prompt tokens that were copied.
        """
        copied = 0
        computing: dict[Prefix, int] = {}  # with the layers that are scored
        reading = [one for one in sequences if self._on and one.prefixes and not one.decoding]
        for one in sorted(reading, key=lambda one: one.computed == 0):
            scored = self._reuse.scored(one)
            ready = [p for p in one.prefixes if p in self._kept and self._kept[p].scored >= scored]
            coming = [p for p in one.prefixes if computing.get(p, -1) >= scored]
            if not one.computed:
                best = max((p.length for p in ready), default=0)
                one.waits = any(p.length > best for p in coming)
                if one.waits:
                    continue
                if ready:
                    copied += self._begin(one, ready[-1])
            mine = [p for p in one.prefixes if p.length > one.computed and p not in ready and p not in coming]
            one.stops = tuple(p.length for p in mine)
            computing |= dict.fromkeys(mine, scored)
        return copied

    def _begin(self, sequence: Sequence, prefix: Prefix) -> int:
        """Put the copy of a prefix into a sequence's slot; returns its tokens."""
        kept = self._kept[prefix] = self._kept.pop(prefix)  # now the most recently used
        self._copy(kept.slot_index, sequence.slot_index, prefix.length)
        sequence.computed = prefix.length
        return prefix.length

    def keep(self, step: Step) -> None:
        """Copy what a step has computed of prefixes: over the least recently used copy, if there is no room."""
        for chunk in step.chunks:
            one, end = chunk.sequence, chunk.start + chunk.length
            if end in one.stops:
                prefix = next(p for p in one.prefixes if p.length == end)
                slot_index = self._slot_for(prefix)
                self._copy(one.slot_index, slot_index, end)
                self._kept[prefix] = CachedPrefix(slot_index, self._reuse.scored(one))

    def _slot_for(self, prefix: Prefix) -> SlotIndex:
        """A slot for the copy; whatever was in it is a copy no longer."""
        if prefix not in self._kept and self._free:
            return self._free.pop()
        going = prefix if prefix in self._kept else next(iter(self._kept))
        return self._kept.pop(going).slot_index


def common_tokens(one: list[int], other: list[int]) -> int:
    """Leading tokens that two prompts have in common, the last one of either left out."""
    least = min(len(one), len(other)) - 1
    return next((i for i, (a, b) in enumerate(zip(one[:least], other[:least], strict=True)) if a != b), least)
