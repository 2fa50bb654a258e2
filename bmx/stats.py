"""Counters of a run: data only. The engine and the job count, the display reads; neither knows the other."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


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
    prompt_tokens: int = 0
    reused_prompt_tokens: int = 0  # copied from another row's slot; not among prompt_tokens
    generated_tokens: int = 0
    work_total: int = 0  # tokens of all prompts and of answers of full length
    work_saved: int = 0  # tokens of them that early ends made unnecessary
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
        self.last_row = time.monotonic()
        if skipped:
            self.rows_skipped += 1
        elif code is not None:
            self.errors[code] += 1
            self.failed_now += 1

    def note_eager(self, why: str) -> None:
        """Remember why decoding could not be captured as CUDA graphs."""
        self.eager = why

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.started

    @property
    def work_done(self) -> int:
        """Tokens of ``work_total`` that were computed or copied, or that an early end made unnecessary."""
        return self.prompt_tokens + self.reused_prompt_tokens + self.generated_tokens + self.work_saved

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the remaining work takes at the pace so far; None before the first step."""
        if not self.work_done or not self.work_total:
            return None
        return self.elapsed * max(0, self.work_total - self.work_done) / self.work_done

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
