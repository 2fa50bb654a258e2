"""How long requests are: tokenised once, one at a time, and only the numbers kept."""

from __future__ import annotations

import random
from collections.abc import Iterable
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

    def read(self, request: Request) -> tuple[list[int], Length]:
        """A request's token ids and its length.

        Raises:
            RowError: it has no text, or its prompt leaves no room for an answer.
        """
        prompt = self.encoder.encode(request)
        room = self.max_length - len(prompt)
        if room < 1:
            message = f"the prompt has {len(prompt)} tokens; prompt and answer together may have {self.max_length}"
            raise RowError("context_length_exceeded", message)
        return prompt, self.length(len(prompt), min(request.params.max_tokens, room))

    def length(self, prompt_tokens: int, max_tokens: int) -> Length:
        """The length of a request of so many tokens."""
        return Length(prompt_tokens, max_tokens, self.policy.rows_needed(prompt_tokens + max_tokens))

    def measure(self, requests: Iterable[Request], every: int = 1) -> list[Length]:
        """The lengths of those requests that can be answered at all.

        Args:
            every: look only at one of so many, at random, the same ones each time.
        """
        chance = random.Random(0)
        lengths = []
        for at, request in enumerate(requests):
            if at % every == 0:
                wanted = at + chance.randrange(every)
            if at != wanted:
                continue
            try:
                lengths.append(self.read(request)[1])
            except RowError:
                continue
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
