"""The lengths of requests, and the truncation of prompts that are too long."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest

from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.engine.prefix_cache import Reuse
from bmx.engine.window import ROWS, TOKENS, Window
from bmx.errors import RowError, UsageError
from bmx.model.prompt_encoder import PromptEncoder
from bmx.model.spec import ModelSpec
from bmx.plan.planner import Length
from bmx.request import Request

MEASURED_ROWS = 100_000  # of more requests, an even sample is measured, of at least half as many
ROW_BYTES = 2048  # of a row in the window, however short
TOKEN_BYTES = 12  # and for each of its tokens: 4 of the id, about 5 of text, keys, and what the heap loses


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A request as the model will see it.

    Attributes:
        prompt: its token ids, in 4 bytes each.
        length: tokens of prompt and answer, and rows of the slot.
        truncated: prompt tokens that were cut out to make the prompt fit.
        spans: positions (from, to) of tokens that are never evicted.
    """

    prompt: array[int]
    length: Length
    truncated: int = 0
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def read_tokens(self) -> int:
        """Tokens of the prompt that are read in a slot under the budget."""
        return self.length.prompt_tokens - self.length.ending

    @property
    def held_total(self) -> int:
        """Most tokens that pass through the slot in which the prompt is read."""
        return self.read_tokens + (0 if self.length.reading_rows else self.length.max_tokens)

    @property
    def row_limit(self) -> int:
        """Rows that it may use of the slot in which the prompt is read."""
        return self.length.reading_rows or self.length.rows_needed

    @property
    def rows_needed(self) -> int:
        """Rows of a slot."""
        return self.length.rows_needed


@dataclass(frozen=True, slots=True)
class PromptMeasurer:
    """Measures requests against a model.

    Attributes:
        encoder: turns requests into token ids.
        policy: says how many rows of a slot a request needs.
        max_length: most tokens of prompt and answer together.
        reuse: says how many leading tokens two requests share; None if nothing is shared.
        vocab: tokens that the model has; a tokenizer may have more. None looks at no token.
    """

    encoder: PromptEncoder
    policy: CompressionPolicy
    max_length: int
    reuse: Reuse | None = None
    vocab: int | None = None

    def read(self, request: Request) -> EncodedPrompt:
        """A request as the model will see it.

        A prompt that leaves too little room for the longest answer is truncated, if the settings say so; otherwise
        the answer gets the room that is left.

        Raises:
            RowError: it has no text, a token that the model does not have, or no room for an answer.
        """
        if not self.encoder.truncates and self.encoder.surely_longer(request, self.max_length):
            message = f"the prompt is far longer than the {self.max_length} tokens that it and the answer may have"
            raise RowError("context_length_exceeded", message)
        prompt, answer = self.encoder.encode(request), request.params.max_tokens
        self._check_tokens("the prompt has", prompt)
        self._check_tokens("stop_token_ids has", request.params.stop_token_ids)
        before = len(prompt)
        if before + answer > self.max_length and self.encoder.truncates:
            request, prompt = self.encoder.truncate(request, max(1, self.max_length - answer, self.max_length // 2))
        room = self.max_length - len(prompt)
        if room < 1:
            message = f"the prompt has {before} tokens; prompt and answer together may have {self.max_length}"
            raise RowError("context_length_exceeded", message)
        length = Length.of(self.policy, len(prompt), min(answer, room))
        return EncodedPrompt(array("I", prompt), length, before - len(prompt), self._spans(request, length))

    def _check_tokens(self, where: str, ids: Sequence[int]) -> None:
        """Refuse tokens that the model has no embedding for, before they are in a step with other rows.

        Raises:
            RowError: one of them is such a token.
        """
        for token in (max(ids, default=0), min(ids, default=0)):
            if self.vocab and not 0 <= token < self.vocab:
                message = f"{where} the token {token}, and the model has the tokens 0 to {self.vocab - 1} only"
                raise RowError("invalid_request", message)

    def _spans(self, request: Request, length: Length) -> tuple[tuple[int, int], ...]:
        """The protected spans of a request whose KV pairs will be evicted; none if nothing will be evicted.

        Raises:
            RowError: they leave no room for other pairs.
        """
        answer = length.max_tokens
        if not self.policy.protects or not self.policy.evicts(length.prompt_tokens, answer):
            return ()
        spans = self.encoder.instruction_spans(request, length.prompt_tokens)
        kept = sum(stop - start for start, stop in spans) + self.policy.sink + self.policy.recent
        room = self.policy.least_rows(length.prompt_tokens, answer)
        if kept >= room:
            message = f"{kept} tokens of its instructions, sinks and newest tokens never go; a layer may keep {room}"
            raise RowError("invalid_request", message)
        return spans

    def measure(
        self, requests: Iterable[Request], on_error: Callable[[Request, RowError], None] | None = None
    ) -> list[Length]:
        """The lengths of the requests that can be answered.

        Args:
            requests: what is measured.
            on_error: is called with each request that cannot be answered, and why.
        """
        shared = _SharedText(self.reuse)
        for request in requests:
            self.encoder.note(request)
            try:
                shared.add(self.read(request))
            except RowError as error:
                if on_error:
                    on_error(request, error)
        return shared.lengths()


@dataclass(slots=True)
class _OpenPrefix:
    """Leading tokens that the newest requests share: how many, the requests, and how many prefixes lie within."""

    length: int
    requests: list[int]
    nested: int


class _SharedText:
    """Finds what requests share with the one before them when they run in the order of a window.

    Args:
        reuse: says how much two requests share; None if nothing is shared.
    """

    def __init__(self, reuse: Reuse | None) -> None:
        self._reuse = reuse
        self._window: Window[tuple[int, EncodedPrompt]] = Window(ROWS, TOKENS)
        self._lengths: list[Length] = []
        self._before: tuple[int, EncodedPrompt] | None = None  # the request that the window gave out last
        self._open: list[_OpenPrefix] = []  # those of that request, each of them a part of the next

    def add(self, encoded: EncodedPrompt) -> None:
        """Take the next request."""
        self._lengths.append(encoded.length)
        if self._reuse is None:
            return
        while self._window.full:
            self._give_out(self._reuse)
        self._window.add((len(self._lengths) - 1, encoded), self._reuse.keys(encoded), len(encoded.prompt))

    def lengths(self) -> list[Length]:
        """The lengths of all requests, in the order in which they came."""
        while self._reuse and self._window:
            self._give_out(self._reuse)
        self._close(0)
        return self._lengths

    def _give_out(self, reuse: Reuse) -> None:
        """Compare the window's next request with the one before it."""
        index, encoded = self._window.pop()
        at, before = self._before or (0, None)
        length = reuse.shared(encoded, before) if before else 0
        if before and length:
            in_place = reuse.shared(encoded, before, in_place=True)
            for number, one in ((at, before), (index, encoded)):
                self._note_in_place(reuse, number, one, in_place)
        self._before = index, encoded
        nested = self._close(length)
        if not length:
            return
        if not self._open or self._open[-1].length < length:
            self._open.append(_OpenPrefix(length, [], 0))
        self._open[-1].nested = max(self._open[-1].nested, nested)
        self._open[-1].requests.append(index)

    def _note_in_place(self, reuse: Reuse, index: int, encoded: EncodedPrompt, tokens: int) -> None:
        """Note what a request can read in a slot that another one reads too."""
        length = self._lengths[index]
        if tokens > length.in_place and reuse.reads_in_place(encoded, tokens):
            self._lengths[index] = replace(length, in_place=tokens)

    def _close(self, length: int) -> int:
        """Note the prefixes that go on beyond this length with their requests; returns how many lay in each other."""
        nested = 0
        while self._open and self._open[-1].length > length:
            prefix = self._open.pop()
            prefix.nested = max(prefix.nested, nested)
            for index in prefix.requests:
                self._lengths[index] = replace(self._lengths[index], shared=prefix.length, nested=prefix.nested)
            nested = prefix.nested + 1
        return nested


def window_bytes(lengths: Iterable[Length]) -> int:
    """The most bytes that a full window of these requests takes: their texts, token ids and keys."""
    longest = nlargest(ROWS, (length.prompt_tokens for length in lengths))
    return ROW_BYTES * len(longest) + TOKEN_BYTES * min(sum(longest), TOKENS)


def max_length(config: EngineConfig, spec: ModelSpec) -> int:
    """Most tokens of prompt and answer together.

    Raises:
        UsageError: ``max_model_len`` is more than the model's positions.
    """
    if config.max_model_len and config.max_model_len > spec.max_length:
        raise UsageError(f"max_model_len {config.max_model_len} is more than the {spec.max_length} of {spec.name}")
    return config.max_model_len or spec.max_length


def sampling_step(rows: int) -> int:
    """The interval at which ``rows`` requests are sampled for measuring."""
    return max(1, -(-rows // MEASURED_ROWS))
