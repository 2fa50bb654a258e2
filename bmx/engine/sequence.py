"""A request in flight: its tokens, how many of them are computed, its slot, and when it is finished.

Knows one sequence; knows nothing of the others, of steps or of tensors.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

from bmx.engine.grammar import Grammar, Matcher
from bmx.engine.repetition import repeats
from bmx.errors import RowError
from bmx.kv.layout import SlotIndex
from bmx.model.detokenizer import Detokenizer, decode
from bmx.model.reasoning import ReasoningMarks
from bmx.plan.chunks import chunk_ends, ending_of, steps_needed
from bmx.request import KVUsage, Request, Result, SamplingParams, Usage


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Prefix:
    """Leading tokens that several prompts of a run share; one object for all of these prompts.

    Attributes:
        length: how many tokens.
        reuse_key: see ``Reuse.reuse_key``.
    """

    length: int
    reuse_key: tuple[object, ...]


class SharedPart(NamedTuple):
    """The first tokens of a prompt whose pairs are in a slot that other sequences read too, and not in its own.

    Attributes:
        prefix: these tokens.
        slot_index: the slot; none of its rows changes once they are computed.
    """

    prefix: Prefix
    slot_index: SlotIndex


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in flight.

    What it is, given at the start:

    Attributes:
        request: the request.
        prompt: its token ids.
        max_tokens: longest answer, after the model's own limit.
        rows_needed: rows of a slot that it needs.
        reading_rows: rows of the slot in which its prompt is read before it is archived; 0 where nothing is archived.
        end_token_ids: ids that end the answer.
        tokenizer: turns the answer into text.
        truncated: prompt tokens that were cut out to make it fit.
        spans: positions [start, stop) that are never evicted.
        forced_answer: token ids of the answer, where the model does not choose them.
        grammar: what the answer must fit; None for any text.
        reasoning: the marks around its reasoning, if the model's chat template knows any.

    How far it has come, which ``restarted`` sets back to the start:

    Attributes:
        started: when it was given its slot, by the monotonic clock.
        computed: tokens whose keys and values are computed, or will be by launched steps.
        promised: tokens of the answer that launched steps will give, and that have not been read yet.
        slot: its slot while it has one, and after.
        shared: the part of its prompt that it reads in a shared slot, given to it with its own; None for none.
        prefixes: leading parts of its prompt that others share, the shortest first.
        stops: lengths of prefixes at which a chunk must end, since the slot is copied there.
        waits: whether it waits for another sequence that computes a prefix of this one.
        answer: token ids of the answer so far.
        finish_reason: why it is finished; None while it is not.
        error: why there is no answer, if the reason is ``error``.
        matcher: how far the answer has come within its format; None where it has none, and while the model reasons.
    """

    request: Request
    prompt: Seq[int]
    max_tokens: int
    rows_needed: int
    end_token_ids: frozenset[int]
    tokenizer: Any
    truncated: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    forced_answer: tuple[int, ...] = ()
    reading_rows: int = 0
    grammar: Grammar | None = None
    reasoning: ReasoningMarks | None = None

    started: float | None = field(init=False, default=None)
    computed: int = field(init=False, default=0)
    promised: int = field(init=False, default=0)
    slot: SlotIndex | None = field(init=False, default=None)
    shared: SharedPart | None = field(init=False, default=None)
    prefixes: list[Prefix] = field(init=False, default_factory=list)
    stops: tuple[int, ...] = field(init=False, default=())
    waits: bool = field(init=False, default=False)
    answer: list[int] = field(init=False, default_factory=list)
    finish_reason: str | None = field(init=False, default=None)
    error: RowError | None = field(init=False, default=None)
    matcher: Matcher | None = field(init=False, default=None)
    _cut: int | None = field(init=False, default=None)  # where a stop string begins in what was said
    _detokenizer: Detokenizer | None = field(init=False, default=None)
    _said: str = field(init=False, default="")  # with special tokens spelled out; kept where there are stop strings
    _unwritten: list[tuple[int, int]] = field(init=False, default_factory=list)  # where these spellings are in it
    _random: random.Random | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.grammar and not self._opens_with_reasoning:
            self.matcher = self.grammar.begin()
        if self.params.stop:
            self._detokenizer = Detokenizer(self.tokenizer)
        if self.params.temperature > 0:
            seed, request = self.params.seed, self.request
            self._random = random.Random(f"{seed}" if request.seeded else f"{seed}/{request.id}")

    def restarted(self) -> Sequence:
        """The same sequence with nothing computed; its answer does not depend on how often it was started."""
        return replace(self)

    @property
    def params(self) -> SamplingParams:
        """How its tokens are sampled."""
        return self.request.params

    @property
    def slot_index(self) -> SlotIndex:
        """The slot that it has or had.

        Raises:
            RuntimeError: it was never given one.
        """
        if self.slot is None:
            raise RuntimeError(f"sequence {self.request.id!r} was never given a slot")
        return self.slot

    @property
    def shared_rows(self) -> int:
        """Rows that it reads in a shared slot: the positions before those of its own slot."""
        return self.shared.prefix.length if self.shared else 0

    @property
    def own_limit(self) -> int:
        """Rows that it may use of the slot on which its answer is written."""
        return self.rows_needed - self.shared_rows

    @property
    def left(self) -> int:
        """Tokens that its answer may still get, beside the promised ones."""
        return self.max_tokens - len(self.answer) - self.promised

    @property
    def total(self) -> int:
        """Tokens of prompt and answer when the answer has its maximum length."""
        return len(self.prompt) + self.max_tokens

    @property
    def row_limit(self) -> int:
        """Rows that it may use of the slot in which its prompt is read."""
        return self.reading_rows or self.rows_needed

    @property
    def read_tokens(self) -> int:
        """Tokens of its prompt that are read in a slot under the budget; the others are read on the archive."""
        return len(self.prompt) - ending_of(len(self.prompt), self.reading_rows)

    @property
    def held_total(self) -> int:
        """Most tokens that pass through the slot in which its prompt is read."""
        return self.read_tokens if self.reading_rows else self.total

    @property
    def forced(self) -> int | None:
        """The next token of a forced answer; None where the model chooses it."""
        index = len(self.answer) + self.promised
        return self.forced_answer[index] if index < len(self.forced_answer) else None

    @property
    def needs_host_tokens(self) -> bool:
        """Whether its next token depends on tokens that the device does not keep."""
        return self.params.repetition_penalty != 1 or bool(self.forced_answer) or self.grammar is not None

    @property
    def _opens_with_reasoning(self) -> bool:
        """Whether the prompt left a part open in which the model reasons: the format begins behind it."""
        return self.reasoning is not None and self.reasoning.open and bool(self.reasoning.end_ids[0])

    @property
    def allowed(self) -> Matcher | tuple[int, ...] | None:
        """What says which tokens may follow: the matcher, or token ids that may not; None where all may."""
        return self.last_ids if self.grammar and not self.matcher else self.matcher

    @property
    def decoding(self) -> bool:
        """Whether its prompt is computed, so that it decodes."""
        return self.computed >= len(self.prompt)

    def chunk_length(self, chunk_size: int) -> int:
        """Tokens of the next chunk: one while decoding, else up to the next end of a chunk, or stop.

        Where chunks end depends on this sequence alone, since it decides what is evicted. Stops are only where it
        decides nothing.
        """
        if self.decoding:
            return 1
        ends = (*chunk_ends(self.read_tokens, chunk_size), len(self.prompt), *self.stops)
        return min(end for end in ends if end > self.computed) - self.computed

    def steps(self, chunk_size: int) -> int:
        """Steps from its first chunk to its last token, when its answer has its maximum length."""
        return steps_needed(len(self.prompt), self.max_tokens, chunk_size, len(self.prompt) - self.read_tokens)

    def draw(self) -> float:
        """The next random number of this sequence, in [0, 1), which does not depend on the batch."""
        return self._random.random() if self._random else 0.0

    def accept(self, token_id: int | None) -> None:
        """Add the next token to the answer and check whether it ends; None means that the logits were not numbers."""
        self.promised -= 1
        if token_id is None:
            problem = "the model's logits are not numbers (overflow in this dtype?)"
            self.finish_reason, self.error = "error", RowError("nan_logits", problem)
            return
        self.answer.append(token_id)
        try:
            self._follow_format(token_id)
        except RowError as error:
            self.finish_reason, self.error = "error", error
            return
        complete = self.matcher is not None and self.matcher.complete
        if self._meets_stop_string(token_id) or token_id in self.last_ids or complete:
            self.finish_reason = "stop"
        elif self._may_repeat and repeats(self.answer):
            self.finish_reason = "repetition"
        elif len(self.answer) >= self.max_tokens:
            self.finish_reason = "length"

    def _follow_format(self, token_id: int) -> None:
        """Take the next token into the format; behind the reasoning, the format begins.

        Raises:
            RowError: the format is too complex, or no answer fits it.
        """
        if self.matcher:
            self.matcher.accept(token_id)
        elif self.grammar and self.reasoning:
            mark = self.reasoning.end_ids[0]
            if tuple(self.answer[-len(mark) :]) == mark:
                self.matcher = self.grammar.begin()

    @property
    def _may_repeat(self) -> bool:
        """Whether a repetition ends the answer: not where its tokens are forced, or it must go on to its limit."""
        return self.params.stop_repetition and not self.params.ignore_eos and not self.forced_answer

    def _meets_stop_string(self, token_id: int) -> bool:
        """Whether a stop string is met in what was said, special tokens spelled out; the text ends before it."""
        if self._detokenizer is None:
            return False
        before, added = len(self._said), self._detokenizer.add(token_id)
        if not added and (added := self._detokenizer.spelling(token_id)):
            self._unwritten.append((before, before + len(added)))
        self._said += added
        longest = max(map(len, self.params.stop))
        ends = [end for stop in self.params.stop if (end := self._found(stop, max(0, before - longest + 1))) >= 0]
        self._cut = min(ends, default=None)
        return bool(ends)

    def _found(self, stop: str, start: int) -> int:
        """Where a stop string is in what was said, from ``start`` on; it neither begins nor ends inside a spelling."""
        at = self._said.find(stop, start)
        while at >= 0 and any(first < edge < last for first, last in self._unwritten for edge in (at, at + len(stop))):
            at = self._said.find(stop, at + 1)
        return at

    def result(self, budget: int, asked: str = "", kv_format: str = "model") -> Result:
        """The answer, once finished.

        Args:
            budget: KV pairs that each layer and head may keep.
            asked: the budget as the user gave it, where that is a share.
            kv_format: how they are stored.
        """
        reasoning, text = self._texts()
        seen = len(self.prompt) + len(self.answer) - 1  # the last token is never computed
        kept = min(seen, budget)
        return Result(
            id=self.request.id,
            text=text,
            reasoning=reasoning,
            token_ids=tuple(self.answer),
            finish_reason=self.finish_reason,
            usage=Usage(prompt_tokens=len(self.prompt), completion_tokens=len(self.answer)),
            kv=KVUsage(budget=budget, kept=kept, evicted=seen - kept, format=kv_format, asked=asked),
            truncated=self.truncated,
            clamped_to=self.max_tokens if self.max_tokens < self.params.max_tokens else None,
        )

    def _texts(self) -> tuple[str | None, str]:
        """The reasoning of the answer, None if it has none, and its text."""
        if self._cut is not None:
            return self._texts_before(self._cut)
        ended = self.finish_reason == "stop" and self.answer[-1] in self.last_ids
        ids = self.answer[:-1] if ended else self.answer
        if self.reasoning:
            return self.reasoning.split(ids, spelled=self._spelled)
        return None, decode(self.tokenizer, ids, spelled=self._spelled)

    def _texts_before(self, cut: int) -> tuple[str | None, str]:
        """The same of what was said before a stop string."""
        said = self._said[:cut]
        inside, rest = self.reasoning.borders(said) if self.reasoning else (None, slice(0, cut))
        if self.reasoning is None or inside is None:
            return None, self._written(rest)
        return self.reasoning.tidied(said[inside]) or None, self._written(rest).lstrip()

    def _written(self, part: slice) -> str:
        """A part of what was said, without the spellings of special tokens where these are left out."""
        gone = [] if self._spelled else [span for span in self._unwritten if part.start <= span[0] < part.stop]
        edges = [part.start, *chain.from_iterable(gone), part.stop]
        return "".join(self._said[first:last] for first, last in zip(edges[::2], edges[1::2], strict=True))

    @property
    def _spelled(self) -> bool:
        """Whether special tokens are spelled in the text: they may mark calls of tools."""
        return bool(self.request.tools)

    @property
    def last_ids(self) -> tuple[int, ...]:
        """Token ids that end its answer."""
        return (*self.params.stop_token_ids, *(() if self.params.ignore_eos else sorted(self.end_token_ids)))
