"""A request in flight: its tokens, how many are computed, where it lives, and when it is done.

Knows one sequence; knows nothing of the others, of steps or of tensors.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from bmx.kv.layout import SlotIndex
from bmx.model.prompt_encoder import Detokenizer, decode
from bmx.plan.chunks import chunk_ends, steps_needed
from bmx.request import KVUsage, Request, Result, SamplingParams, Usage


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Prefix:
    """Leading tokens that several prompts of a run share; one and the same object for all of them.

    Attributes:
        length: how many tokens.
        reuse_key: what the state of a slot depends on at this place, beside those tokens.
    """

    length: int
    reuse_key: tuple[object, ...]


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in flight.

    Attributes:
        request: what was asked.
        prompt: its token ids.
        max_tokens: longest answer, after the model's own limit.
        rows_needed: rows of a slot that it needs.
        end_token_ids: ids that end the answer.
        tokenizer: turns the answer into text.
        truncated: prompt tokens that were cut out to make it fit.
        spans: positions from .. to that are never evicted.
        forced_answer: token ids of the answer, where the model is not to choose them.
        started: when it was given its slot, by the monotonic clock.
        computed: tokens whose keys and values have been computed, or will be by what was launched.
        promised: tokens of the answer that what was launched gives, and that have not been read yet.
        slot: (group, slot) while it has one.
        prefixes: parts of its prompt that others share, the shortest first.
        stops: places where a chunk must end, since a copy of its state is to be made.
        waits: for another sequence, which computes a prefix of this one.
    """

    request: Request
    prompt: list[int]
    max_tokens: int
    rows_needed: int
    end_token_ids: frozenset[int]
    tokenizer: Any
    truncated: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    forced_answer: tuple[int, ...] = ()
    started: float | None = None
    computed: int = 0
    promised: int = 0
    slot: SlotIndex | None = None
    prefixes: list[Prefix] = field(default_factory=list)
    stops: tuple[int, ...] = ()
    waits: bool = False
    answer: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    _text: str | None = None
    _detokenizer: Detokenizer | None = None
    _random: random.Random | None = None

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin again as if nothing had been computed: a row's answer does not depend on how often it was begun."""
        self.computed, self.promised, self.slot, self.answer, self._text = 0, 0, None, [], None
        self.finish_reason, self.error, self.started = None, None, None
        self.prefixes, self.stops, self.waits = [], (), False
        self._detokenizer = Detokenizer(self.tokenizer) if self.params.stop else None
        if self.params.temperature > 0:
            request = self.request
            self._random = random.Random(
                f"{self.params.seed}" if request.seeded else f"{self.params.seed}/{request.id}"
            )

    @property
    def params(self) -> SamplingParams:
        """How to sample it."""
        return self.request.params

    @property
    def slot_index(self) -> SlotIndex:
        """(group, slot) of a sequence that has or had one."""
        if self.slot is None:
            raise RuntimeError(f"sequence {self.request.id!r} was never given a slot")
        return self.slot

    @property
    def left(self) -> int:
        """Tokens that its answer may still get, those that are promised left out."""
        return self.max_tokens - len(self.answer) - self.promised

    @property
    def total(self) -> int:
        """Tokens, prompt and answer, when the answer is as long as it may get."""
        return len(self.prompt) + self.max_tokens

    @property
    def forced(self) -> int | None:
        """The next token of a forced answer; None where the model chooses it."""
        place = len(self.answer) + self.promised
        return self.forced_answer[place] if place < len(self.forced_answer) else None

    @property
    def needs_host_tokens(self) -> bool:
        """Whether its next token depends on more than the tokens that the device knows."""
        return self.params.repetition_penalty != 1 or bool(self.forced_answer)

    @property
    def decoding(self) -> bool:
        """Whether only the newest token is still to be computed."""
        return self.computed >= len(self.prompt)

    def chunk_length(self, chunk_size: int) -> int:
        """Tokens of the next chunk: one while decoding, else up to the next of its chunk's ends, or of its stops.

        The ends depend on this sequence alone, since what is evicted depends on them; stops are where they do not
        matter.
        """
        if self.decoding:
            return 1
        ends = (*chunk_ends(len(self.prompt), chunk_size), *self.stops)
        return min(end for end in ends if end > self.computed) - self.computed

    def steps(self, chunk_size: int) -> int:
        """Steps that it takes from its first chunk to its last token, if its answer is as long as it may get."""
        return steps_needed(len(self.prompt), self.max_tokens, chunk_size)

    def draw(self) -> float:
        """The next random number of this sequence, in [0, 1); its own, whatever else is in the batch."""
        return self._random.random() if self._random else 0.0

    def accept(self, token_id: int | None) -> None:
        """Take the next token of the answer and see whether it ends it; None means the model gave no number."""
        self.promised -= 1
        if token_id is None:
            self.finish_reason, self.error = "error", "nan_logits"
            return
        self.answer.append(token_id)
        if token_id in self.last_ids or self._meets_stop_string(token_id):
            self.finish_reason = "stop"
        elif len(self.answer) >= self.max_tokens:
            self.finish_reason = "length"

    def _meets_stop_string(self, token_id: int) -> bool:
        if self._detokenizer is None:
            return False
        added = self._detokenizer.add(token_id)
        text = self._detokenizer.text
        longest = max(map(len, self.params.stop))
        start = max(0, len(text) - len(added) - longest + 1)
        found = [at for at in (text.find(stop, start) for stop in self.params.stop) if at >= 0]
        if found:
            self._text = text[: min(found)]
        return bool(found)

    def result(self, budget: int) -> Result:
        """The answer, once finished.

        Args:
            budget: KV pairs that each layer and head might keep, at most.
        """
        ended = self.finish_reason == "stop" and self._text is None and self.answer[-1] in self.last_ids
        ids = self.answer[:-1] if ended else self.answer
        seen = len(self.prompt) + len(self.answer) - 1  # nothing has read the last token
        kept = min(seen, budget)
        return Result(
            id=self.request.id,
            text=decode(self.tokenizer, ids) if self._text is None else self._text,
            token_ids=tuple(self.answer),
            finish_reason=self.finish_reason,
            usage=Usage(prompt_tokens=len(self.prompt), completion_tokens=len(self.answer)),
            kv=KVUsage(budget=budget, kept=kept, evicted=seen - kept),
            truncated=self.truncated,
            clamped_to=self.max_tokens if self.max_tokens < self.params.max_tokens else None,
        )

    @property
    def last_ids(self) -> tuple[int, ...]:
        """Token ids that end its answer."""
        return (*self.params.stop_token_ids, *(() if self.params.ignore_eos else sorted(self.end_token_ids)))
