"""How long requests are, and what is done with those that are too long."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.errors import RowError, UsageError
from bmx.model.spec import ModelSpec
from bmx.model.text import PromptEncoder
from bmx.planner import Length
from bmx.request import Request

MEASURED_ROWS = 100_000  # of more requests, an even sample of at least half as many is measured


@dataclass(frozen=True, slots=True)
class Reading:
    """A request's token ids, its length, and how many tokens of its prompt were cut out to make it fit."""

    prompt: list[int]
    length: Length
    truncated: int = 0


@dataclass(frozen=True, slots=True)
class Ruler:
    """Measures requests against a model.

    Attributes:
        encoder: turns them into tokens.
        policy: says what rows of a slot so many tokens need.
        max_length: tokens that prompt and answer may have together.
    """

    encoder: PromptEncoder
    policy: CompressionPolicy
    max_length: int

    def read(self, request: Request) -> Reading:
        """A request as the model will see it.

        A prompt that leaves less room than the answer may take is cut, if the job says so; otherwise the answer gets
        the room that there is.

        Raises:
            RowError: it has no text, or its prompt leaves no room for an answer.
        """
        prompt, answer = self.encoder.encode(request), request.params.max_tokens
        before = len(prompt)
        if before + answer > self.max_length and self.encoder.cuts:
            prompt = self.encoder.encode_within(request, max(1, self.max_length - answer, self.max_length // 2))
        room = self.max_length - len(prompt)
        if room < 1:
            message = f"the prompt has {before} tokens; prompt and answer together may have {self.max_length}"
            raise RowError("context_length_exceeded", message)
        return Reading(prompt, self.length(len(prompt), min(answer, room)), before - len(prompt))

    def length(self, prompt_tokens: int, max_tokens: int) -> Length:
        """The length of a request of so many tokens."""
        return Length(prompt_tokens, max_tokens, self.policy.rows_needed(prompt_tokens + max_tokens))

    def measure(self, requests: Iterable[Request]) -> list[Length]:
        """The lengths of those requests that can be answered at all."""
        lengths = []
        for request in requests:
            with suppress(RowError):
                lengths.append(self.read(request).length)
        return lengths


def max_length(config: EngineConfig, spec: ModelSpec) -> int:
    """The most tokens that prompt and answer may have together.

    Raises:
        UsageError: more are asked for than the model can tell apart.
    """
    if config.max_model_len and config.max_model_len > spec.max_length:
        raise UsageError(f"max_model_len {config.max_model_len} is more than the {spec.max_length} of {spec.name}")
    return config.max_model_len or spec.max_length


def sampling_step(rows: int) -> int:
    """Measure every so many-th of ``rows`` requests."""
    return max(1, -(-rows // MEASURED_ROWS))
