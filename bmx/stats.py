"""Counters of a run: data only. The engine and the job count, the display reads; neither knows the other."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TOKENS = ("prompt_tokens", "reused_prompt_tokens", "generated_tokens", "decode_tokens", "ended_work", "ended_tokens")
SECONDS = ("prefill_seconds", "decode_seconds")
HELD = (
    *("memory_bytes", "peak_memory_bytes", "kv_bytes", "full_cache_peak_bytes"),
    *("slots", "active_slots", "peak_active_slots"),
)
QUIET_SECONDS = 30.0  # a run in which no row finished for less than this is never unusually quiet


@dataclass(slots=True, kw_only=True)
class Stats:
    """The counters of a run so far.

    A step may read prompts and decode beside them. Its seconds are then those of a step that reads prompts; the speed
    of decoding is that of the steps that do nothing else.
    """

    rows_total: int = 0  # of the input
    rows_before: int = 0  # had their records when the run began
    rows_done: int = 0  # finished in this run, with an answer or an error
    rows_skipped: int = 0  # left out on purpose, in this run or before
    errors: Counter[str] = field(default_factory=Counter)  # failed rows by code, in this run or before
    failed_now: int = 0  # failed rows of this run
    last_row: float | None = None  # when a row was last finished, by the monotonic clock
    longest_quiet: float = 0.0  # most seconds in which no row was finished, before one was
    prompt_tokens: int = 0
    reused_prompt_tokens: int = 0  # copied from another row's slot; not among prompt_tokens
    generated_tokens: int = 0
    prompt_work: int = 0  # tokens of all prompts
    answer_work: int = 0  # most tokens that all answers may have
    ended_work: int = 0  # most tokens that the answers may have had which have ended
    ended_tokens: int = 0  # tokens that these have
    finish_reasons: Counter[str] = field(default_factory=Counter)  # of the answers of this run
    memory_bytes: int = 0
    peak_memory_bytes: int = 0
    active_slots: int = 0
    slots: int = 0
    prefill_seconds: float = 0.0  # of the steps that read prompts
    decode_seconds: float = 0.0  # of the steps that only decoded
    decode_steps: int = 0  # forward passes of these steps
    decode_tokens: int = 0  # tokens of these steps
    kv_bytes: int = 0  # bytes of the slots
    full_cache_peak_bytes: int = 0  # the most bytes that full caches would have held
    peak_active_slots: int = 0
    shrunk_to: list[tuple[int, int]] = field(default_factory=list)  # after running out of memory: slots, step tokens
    eager: str = ""  # why decoding could not be captured as CUDA graphs, if capturing failed
    modules: Mapping[str, Any] = field(default_factory=dict)  # of the model: how many kernels compute, by kind
    started: float = field(default_factory=time.monotonic)

    @property
    def rows_failed(self) -> int:
        """Rows without an answer, in this run or before."""
        return sum(self.errors.values())

    @property
    def rows_answered(self) -> int:
        """Rows with an answer, in this run or before."""
        return self.rows_before + self.rows_done - self.rows_failed - self.rows_skipped

    @property
    def quiet_seconds(self) -> float:
        """Seconds since the last row was finished, or since the run began."""
        return time.monotonic() - (self.last_row or self.started)

    def count_row(self, code: str | None, *, skipped: bool = False) -> None:
        """Add a finished row.

        Args:
            code: its error's code, or None.
            skipped: whether it was left out on purpose.
        """
        self.rows_done += 1
        self.longest_quiet = max(self.longest_quiet, self.quiet_seconds)
        self.last_row = time.monotonic()
        if skipped:
            self.rows_skipped += 1
        elif code is not None:
            self.errors[code] += 1
            self.failed_now += 1

    def note_eager(self, why: str) -> None:
        """Remember why decoding could not be captured as CUDA graphs."""
        self.eager = why

    def set_workers(self, workers: Sequence[tuple[Stats, Sequence[Stats]]]) -> None:
        """Take over what workers have counted that compute at the same time; rows and reasons are counted elsewhere.

        Tokens, slots and bytes are sums. Seconds and steps are means over the workers, so that rates are those of all
        of them together.

        Args:
            workers: of each worker, its counters and those of its runs that have ended.
        """
        every = [part for now, past in workers for part in (now, *past)]
        for name in TOKENS:
            setattr(self, name, sum(getattr(part, name) for part in every))
        for name in SECONDS:
            setattr(self, name, sum(getattr(part, name) for part in every) / len(workers))
        self.decode_steps = round(sum(part.decode_steps for part in every) / len(workers))
        for name in HELD:
            setattr(self, name, sum(getattr(now, name) for now, _ in workers))
        self.shrunk_to = [pair for part in every for pair in part.shrunk_to]
        self.eager = next((part.eager for part in every if part.eager), "")
        self.modules = next((part.modules for part in every if part.modules), {})

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.started

    def count_answer(self, allowed: int, tokens: int, reason: str | None = None) -> None:
        """Add an answer that has ended.

        Args:
            allowed: most tokens that it might have had.
            tokens: those that it has.
            reason: its finish_reason; None for one that failed.
        """
        if reason is not None:
            self.finish_reasons[reason] += 1
        self.ended_work += allowed
        self.ended_tokens += tokens

    @property
    def _prompt_tokens_left(self) -> int:
        return max(0, self.prompt_work - self.prompt_tokens - self.reused_prompt_tokens)

    @property
    def _answer_tokens_left(self) -> float:
        """Tokens that answers will still get, if they use the share of their room that ended answers have used."""
        share = self.ended_tokens / self.ended_work if self.ended_work else 1.0
        begun = self.generated_tokens - self.ended_tokens
        return max(0.0, (self.answer_work - self.ended_work) * share - begun)

    @property
    def _step_seconds(self) -> float:
        """Seconds of all steps so far."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def _overhead(self) -> float:
        """How many times as long as its steps the run has taken: rows are read and written between them."""
        return max(1.0, self.elapsed / self._step_seconds) if self._step_seconds else 1.0

    @property
    def _reading_left(self) -> float | None:
        """Seconds of the steps that read the remaining prompts, at their pace so far; None before the first one."""
        if not self.prompt_tokens:
            return None
        return self._prompt_tokens_left * self.prefill_seconds / self.prompt_tokens

    @property
    def _steps_left(self) -> float | None:
        """Seconds of the remaining steps; None as long as the pace of a kind that is needed is not known.

        Prompts and answers are counted apart, since their tokens differ in cost by orders of magnitude. Answers also
        grow in the steps that read prompts; only the other tokens need steps of their own.
        """
        reading = self._reading_left
        if reading is None or not (self.prompt_work or self.answer_work):
            return None
        beside = (self.generated_tokens - self.decode_tokens) / self.prompt_tokens
        alone = self._answer_tokens_left - beside * self._prompt_tokens_left
        if alone <= 0:
            return reading
        if not self.decode_tokens:
            return None
        rows_left = max(1, self.rows_total - self.rows_before - self.rows_done)
        together = min(rows_left, self.decode_tokens / self.decode_steps)  # the last rows decode beside fewer others
        return reading + alone / together * self.decode_seconds / self.decode_steps

    @property
    def reading_seconds_left(self) -> float | None:
        """Seconds until all prompts are read; None before the first step."""
        return None if self._reading_left is None else self._reading_left * self._overhead

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the remaining work takes; None as long as the speed of prompts or answers is not known."""
        return None if self._steps_left is None else self._steps_left * self._overhead

    @property
    def share_done(self) -> float | None:
        """Share of the run's time that has passed; None as long as the time left is not known."""
        left, passed = self._steps_left, self._step_seconds
        return None if left is None else passed / (passed + left) if passed + left else 0.0

    @property
    def is_unusually_quiet(self) -> bool:
        """Whether no row was finished for much longer than this run's rows take."""
        left = self._steps_left if self._steps_left is not None else self._reading_left
        row_seconds = (self._step_seconds + (left or 0.0)) * self.slots / max(1, self.rows_total - self.rows_before)
        return self.quiet_seconds >= max(QUIET_SECONDS, 2 * row_seconds, 2 * self.longest_quiet)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second of the steps that read prompts; 0 before the first of them."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second of the steps that only decode; 0 before the first of them."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def generated_rate(self) -> float:
        """Generated tokens a second of all steps; 0 before the first of them."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.generated_tokens / seconds if seconds else 0.0

    def count_step(
        self,
        *,
        prompt_tokens: int,
        decode_tokens: int,
        sampled: int,
        rounds: int,
        seconds: float,
        active: int,
        full_cache_bytes: int,
    ) -> None:
        """Add one step.

        Args:
            prompt_tokens: packed prompt tokens.
            decode_tokens: packed decode tokens; tokens after an answer's end are not counted.
            sampled: tokens generated by the step, first tokens of answers included.
            rounds: number of forward passes.
            seconds: wall time of the step.
            active: sequences in flight.
            full_cache_bytes: bytes that full caches of these sequences would hold.
        """
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += sampled
        if prompt_tokens:
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds
            self.decode_steps += rounds
            self.decode_tokens += decode_tokens
        self.active_slots = active
        self.peak_active_slots = max(self.peak_active_slots, active)
        self.full_cache_peak_bytes = max(self.full_cache_peak_bytes, full_cache_bytes)
