"""Prefix reuse: leading text that several prompts share is computed once, and the slot's state copied to the others.

Decides when the state of one sequence equals the state that another would have reached alone, which sequence computes a
prefix, which wait for it, and which copies are kept; touches no tensor. No answer depends on any of it.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Protocol
from weakref import WeakValueDictionary

from bmx.compress.policy import CompressionPolicy
from bmx.compress.scorer_api import Needs
from bmx.engine.scheduler import Step
from bmx.engine.sequence import Prefix, Sequence
from bmx.engine.shared_slots import SharedSlots
from bmx.engine.window import chained_keys
from bmx.kv.layout import SlotIndex
from bmx.model.spec import ModelSpec
from bmx.plan.chunks import chunk_ends
from bmx.plan.memory import SlotGroup

LEAST = 64  # tokens of the shortest prefix that is worth a copy
JOINED = 1024  # most sequences that are known while they wait
UNIT = 32  # where chunks may end anywhere, prefixes end at multiples of it, even if prompts share a few tokens more


class Prompt(Protocol):
    """What prefix reuse must know of a request, whether it has a slot or not."""

    @property
    def prompt(self) -> Seq[int]:
        """Its token ids."""

    @property
    def read_tokens(self) -> int:
        """Tokens of its prompt that are read in a slot under the budget."""

    @property
    def held_total(self) -> int:
        """Most tokens that pass through the slot in which its prompt is read."""

    @property
    def row_limit(self) -> int:
        """Rows that it may use of the slot in which its prompt is read."""

    @property
    def rows_needed(self) -> int:
        """Rows of a slot that it needs."""

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Positions [start, stop) that are never evicted."""


@dataclass(frozen=True, slots=True)
class LayerRows:
    """A layer's part of a slot: kv heads of one capacity.

    Attributes:
        rows: their capacity.
        lossless: whether all that a later query can see fits in them.
        scored: whether eviction stores statistics for each row.
        by_channel: whether keys are scaled by channel.
    """

    rows: int
    lossless: bool
    scored: bool
    by_channel: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """Decides when the state of one prompt's slot equals the state that another prompt would have reached alone.

    Attributes:
        spec: the model's sizes.
        policy: which pairs stay in a slot.
        chunk_size: tokens of a chunk.
        rows: of the slots in which copies are kept.
    """

    spec: ModelSpec
    policy: CompressionPolicy
    chunk_size: int
    rows: int = sys.maxsize
    _layers: dict[int, tuple[LayerRows, ...]] = field(default_factory=dict, compare=False)

    def shared(self, first: Prompt, second: Prompt, in_place: bool = False) -> int:
        """The number of leading tokens whose state two prompts can share; 0 if it is not worth a copy.

        Args:
            first: a prompt.
            second: another one.
            in_place: count only so many tokens as may be read in place, see ``reads_in_place``.
        """
        if first.prompt[:LEAST] != second.prompt[:LEAST]:
            return 0
        common = common_tokens(first.prompt, second.prompt)
        even = min(common, self._lossless_tokens(first), self._lossless_tokens(second)) // UNIT * UNIT
        for tokens in sorted({even, even - UNIT, *chunk_ends(first.read_tokens, self.chunk_size)}, reverse=True):
            if LEAST <= tokens <= common:
                key = self.reuse_key(first, tokens)
                usable = key is not None and ((key != () and not in_place) or tokens % UNIT == 0)
                if usable and key == self.reuse_key(second, tokens):
                    return tokens
        return 0

    def keys(self, request: Prompt) -> tuple[int, ...]:
        """The keys of a prompt's beginnings that end where others may share its state, for a window."""
        tokens = array("I", request.prompt)
        return chained_keys(tokens.tobytes(), [tokens.itemsize * end for end in self._ends_of_prefixes(request)])

    def _ends_of_prefixes(self, request: Prompt) -> list[int]:
        """Where a prefix of a prompt may end; those of its own that few others have come last."""
        ends = chunk_ends(request.read_tokens, self.chunk_size)
        free = min(self._lossless_tokens(request), request.read_tokens - 1) if self._chunks_end_anywhere else 0
        anywhere = range(LEAST, free + 1, UNIT)
        return [*anywhere, *(end for end in ends[:-1] if end >= LEAST and end > free)]

    def reuse_key(self, request: Prompt, tokens: int) -> tuple[object, ...] | None:
        """Reuse key of the slot after the first tokens: equal tokens and equal keys mean equal states.

        While nothing visible was evicted, a chunk may end anywhere. After that, only the ends of the prompt's own
        chunks count; earlier chunks then end where they do in any prompt with a chunk end there.

        Args:
            request: the prompt.
            tokens: how many leading tokens.

        Returns:
            The key; None if no chunk can end there.
        """
        if min(tokens, request.rows_needed) > self.rows or tokens >= request.read_tokens:
            return None
        ends = chunk_ends(request.read_tokens, self.chunk_size)
        after = bisect_right(ends, tokens)
        lossless = tokens <= self._lossless_tokens(request)
        if lossless and self._chunks_end_anywhere and ends[after] - tokens >= self._query_window:
            return ()
        if not after or ends[after - 1] != tokens:
            return None
        if lossless:
            return ("end",)
        spans = tuple((start, min(stop, tokens)) for start, stop in request.spans if start < tokens)
        rows = tuple(min(layer.rows, tokens) for layer in self._layers_of(request))
        evicts = self.policy.evicts(request.read_tokens, request.held_total - request.read_tokens)
        return ("end", rows, spans, evicts)

    def reads_in_place(self, request: Prompt, tokens: int) -> bool:
        """Whether a request gets the same answer if it reads so many of its tokens in a slot that others read too.

        Nothing of the request is ever evicted then, every layer has rows of its own for all of its tokens, and rows are
        stored one by one.
        """
        if tokens % UNIT or self.policy.archive or self.policy.recall or self.spec.states:
            return False
        owned = all(layer.owner == i for i, layer in enumerate(self.spec.layers))
        layers = self._layers_of(request)
        return owned and all(layer.rows >= request.held_total and not layer.by_channel for layer in layers)

    def scored(self, request: Prompt) -> int:
        """The number of layers in which attention is summed for a request: those in which it will evict.

        Of two requests that share a state, the one with more such layers has all those of the other.
        """
        return sum(layer.scored and request.held_total > layer.rows for layer in self._layers_of(request))

    def _lossless_tokens(self, request: Prompt) -> int:
        """The number of tokens up to which nothing visible of a request is evicted."""
        return min((layer.rows for layer in self._layers_of(request) if not layer.lossless), default=sys.maxsize)

    @property
    def _chunks_end_anywhere(self) -> bool:
        """Whether states are equal wherever chunks end, up to rounding, while nothing is evicted.

        They are not if pairs are encoded (a chunk attends to its own pairs exactly, and to earlier ones decoded), if
        recurrent states are rounded where a chunk ends, or if the scorer looks at the queries of a chunk.
        """
        rounded = any(state.rounds for state in self.spec.states)
        return self.policy.format == "model" and not rounded and Needs.QUERIES not in self.policy.needs

    @property
    def _query_window(self) -> int:
        """Tokens that the next chunk must have so that earlier attention has no weight in the scores."""
        scorer = self.policy.scorer
        return 1 if scorer is None or Needs.ATTENTION_MASS not in scorer.needs else scorer.query_weights.window or 1

    def _layers_of(self, request: Prompt) -> tuple[LayerRows, ...]:
        if request.row_limit not in self._layers:
            layout = self.policy.layout(self.spec, request.row_limit)
            self._layers[request.row_limit] = tuple(
                LayerRows(rows, layer.by_age and rows == layer.window, bool(layer.row_stats), layer.by_channel)
                for i, layer in enumerate(layout.layers)
                if layer.owner == i
                for rows in dict.fromkeys(layer.capacities)
            )
        return self._layers[request.row_limit]


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """A copy of a prefix's state: its slot, and the number of layers in which attention was summed for it."""

    slot_index: SlotIndex
    scored: int


class PrefixCache:
    """The prefixes that the prompts of a run share, found as prompts are read, and the copies kept of them.

    Args:
        reuse: decides what may be shared.
        prefix_slots: slots for copies; empty if nothing is shared.
        group: the number of their first group.
        reading: the number of the first slot in which prompts are read that belongs to them.
        copy: copies the state of a sequence's first tokens from one slot to another.
        shared: slots whose prefixes are read in place, and not copied.
    """

    def __init__(
        self,
        reuse: Reuse,
        prefix_slots: Seq[SlotGroup],
        group: int,
        copy: Callable[[SlotIndex, SlotIndex, int], None],
        reading: int = 0,
        shared: SharedSlots | None = None,
    ) -> None:
        self._reuse = reuse
        self._copy = copy
        self._shared = shared or SharedSlots((), (), lambda *_: False)
        slots = [(group + i, slot) for i, part in enumerate(prefix_slots) for slot in range(part.slots)]
        self._free = [SlotIndex(*slot, reading + n) for n, slot in enumerate(slots)]
        self._capacity = {group + i: part.capacity for i, part in enumerate(prefix_slots)}
        self._known: WeakValueDictionary[tuple[object, ...], Prefix] = WeakValueDictionary()
        self._kept: dict[Prefix, CachedPrefix] = {}  # the least recently used is first
        self._joined: deque[Sequence] = deque(maxlen=JOINED)  # the newest last
        self._waiting_for: dict[Prefix, list[Sequence]] = {}  # sequences that wait while a step is computed
        self._copied = 0  # prompt tokens that were copied and not counted yet
        self.enabled = bool(self._free) or self._shared.enabled

    def keys(self, prompt: Prompt) -> tuple[int, ...]:
        """The keys of a prompt's beginnings, for a window; none where nothing is shared."""
        return self._reuse.keys(prompt) if self.enabled else ()

    def join(self, sequence: Sequence) -> None:
        """Find what a sequence shares with the one that joined before it.

        Those before that share as much, and have not computed it yet, learn of it too.
        """
        if not self.enabled:
            return
        while len(self._joined) > 1 and self._joined[0].decoding:
            self._joined.popleft()
        previous = self._joined[-1] if self._joined else None
        length = self._reuse.shared(sequence, previous) if previous else 0
        self._joined.append(sequence)
        if not previous or not length:
            return
        common = common_tokens(sequence.prompt, previous.prompt)
        sequence.prefixes = [p for p in previous.prefixes if p.length <= common and self._fits(p, sequence)]
        self._note(length, sequence)
        if self._shared.enabled and length % UNIT:
            self._note(self._reuse.shared(sequence, previous, in_place=True), sequence)

    def _note(self, length: int, sequence: Sequence) -> None:
        """Note a prefix of the sequence that joined last, and of those before it that have it too."""
        if not length or any(prefix.length == length for prefix in sequence.prefixes):
            return
        reuse_key = self._reuse.reuse_key(sequence, length) or ()
        tokens = array("I", sequence.prompt[:length])
        prefix = self._known.setdefault((reuse_key, tokens.tobytes()), Prefix(length, reuse_key))
        for sharer in reversed(self._joined):
            if sharer.prompt[:length] != sequence.prompt[:length]:
                break
            if prefix not in sharer.prefixes and self._fits(prefix, sharer):
                sharer.prefixes = sorted([*sharer.prefixes, prefix], key=lambda prefix: prefix.length)

    def _fits(self, prefix: Prefix, sequence: Sequence) -> bool:
        return self._reuse.reuse_key(sequence, prefix.length) == prefix.reuse_key

    def arrange(self, sequences: Seq[Sequence]) -> int:
        """Decide which sequences start behind a prefix, which compute one, and which wait for one being computed.

        A sequence waits only before it has computed anything, and only for one that does not wait: some sequence can
        always run.

        Args:
            sequences: those that have a slot, in order of admission.

        Returns:
            The number of prompt tokens that were copied, or need not be computed since they are read in place.
        """
        copied, self._copied = self._copied, 0
        self._waiting_for.clear()
        computing: dict[Prefix, int] = {}  # with the number of layers in which attention is summed
        in_place: set[Prefix] = set()  # that are being computed in the slots in which they are read
        reading = [s for s in sequences if self.enabled and s.prefixes and not s.decoding]
        for sequence in sorted(reading, key=lambda s: s.computed == 0):
            if sequence.shared:
                copied += self._read_in_place(sequence, sequence.shared.prefix, in_place)
                continue
            scored = self._reuse.scored(sequence)
            ready = [p for p in sequence.prefixes if (kept := self._copy_of(p)) and kept.scored >= scored]
            coming = [p for p in sequence.prefixes if computing.get(p, -1) >= scored]
            if not sequence.computed:
                longest = max((p.length for p in ready), default=0)
                sequence.waits = any(p.length > longest for p in coming)
                if sequence.waits:
                    self._waiting_for.setdefault(coming[-1], []).append(sequence)
                    continue
                if ready:
                    copied += self._start_from(ready[-1], sequence)
            missing = [p for p in sequence.prefixes if p not in ready and p not in coming]
            to_compute = [p for p in missing if p.length > sequence.computed and self._has_slot(p, sequence)]
            sequence.stops = tuple(p.length for p in to_compute)
            computing |= dict.fromkeys(to_compute, scored)
        return copied

    def _copy_of(self, prefix: Prefix) -> CachedPrefix | None:
        """What a prefix can be copied from: a copy, or the slot in which others read it; None if there is nothing."""
        index = self._shared.computed_at(prefix)
        return self._kept.get(prefix) or (CachedPrefix(index, 0) if index else None)

    def _has_slot(self, prefix: Prefix, sequence: Sequence) -> bool:
        """Whether some slot for copies is large enough for a prefix."""
        return max(self._capacity.values(), default=0) >= min(prefix.length, sequence.rows_needed)

    def _read_in_place(self, sequence: Sequence, prefix: Prefix, computing: set[Prefix]) -> int:
        """Let a sequence start behind its shared part, compute that, or wait for it; returns tokens that it is spared.

        Args:
            sequence: it has a shared part.
            prefix: that part.
            computing: prefixes that are being computed; this one is added if the sequence computes it.
        """
        sequence.waits, sequence.stops = False, ()
        if sequence.computed >= prefix.length:
            return 0
        if self._shared.computed_at(prefix):
            sequence.computed = prefix.length
            return prefix.length
        if not sequence.computed and prefix in computing:
            sequence.waits = True
            return 0
        sequence.stops = (prefix.length,)
        computing.add(prefix)
        return 0

    def _start_from(self, prefix: Prefix, sequence: Sequence) -> int:
        """Copy a prefix into a sequence's slot; returns its tokens."""
        cached = self._copy_of(prefix)
        if cached is None:
            return 0
        if prefix in self._kept:
            self._kept[prefix] = self._kept.pop(prefix)  # now the most recently used
        self._copy(cached.slot_index, sequence.slot_index, prefix.length)
        sequence.computed = prefix.length
        return prefix.length

    def keep(self, step: Step, unfinished: Seq[Sequence]) -> None:
        """Copy the prefixes that a step has completed: to those that wait for them, and to a slot for those to come.

        Without a free slot for copies, the one is given up that is needed last.

        Args:
            step: has been launched.
            unfinished: those that have or want a slot, in order of admission.
        """
        for chunk in step.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.length
            if sequence.shared and end in sequence.stops:
                self._shared.note_computed(sequence.shared.prefix)
            elif end in sequence.stops:
                prefix = next(p for p in sequence.prefixes if p.length == end)
                cached = CachedPrefix(sequence.slot_index, self._reuse.scored(sequence))
                self._hand_out(prefix, cached)
                if (slot_index := self._slot_for(prefix, min(end, sequence.rows_needed), unfinished)) is not None:
                    self._copy(sequence.slot_index, slot_index, end)
                    self._kept[prefix] = replace(cached, slot_index=slot_index)

    def _hand_out(self, prefix: Prefix, source: CachedPrefix) -> None:
        """Copy a prefix to the sequences that wait for it; of those that share more, the first computes that too."""
        coming: set[Prefix] = set()
        for sequence in self._waiting_for.get(prefix, ()):
            longer = [p for p in sequence.prefixes if p.length > prefix.length]
            waits = sequence.waits and coming.isdisjoint(longer)
            if waits and source.scored >= self._reuse.scored(sequence):
                coming.update(longer)
                self._copy(source.slot_index, sequence.slot_index, prefix.length)
                sequence.computed, sequence.waits = prefix.length, False
                self._copied += prefix.length

    def _slot_for(self, prefix: Prefix, rows: int, unfinished: Seq[Sequence]) -> SlotIndex | None:
        """The smallest slot that holds a copy of so many rows; None if all others are needed before this one."""
        if prefix in self._kept:
            return self._kept.pop(prefix).slot_index
        for i, index in enumerate(self._free):
            if self._capacity[index.group] >= rows:
                return self._free.pop(i)
        fitting = [p for p, cached in self._kept.items() if self._capacity[cached.slot_index.group] >= rows]
        needed: dict[Prefix, int] = {}  # the place of the first that needs a prefix
        for place, sequence in enumerate(unfinished):
            if not sequence.computed:
                needed |= {p: place for p in sequence.prefixes if p not in needed}
        last = max((*fitting, prefix), key=lambda p: needed.get(p, sys.maxsize))
        return None if last is prefix else self._kept.pop(last).slot_index


def common_tokens(first: Seq[int], second: Seq[int]) -> int:
    """The number of leading tokens that two prompts have in common; the last token of a prompt does not count."""
    least = min(len(first), len(second)) - 1
    return bisect_left(range(least), True, key=lambda i: first[: i + 1] != second[: i + 1])
