"""One run: requests become sequences, sequences share slots, steps follow each other, results come out as they finish.

Knows the loop and what to do when memory runs out; how a step is computed is the runner's business, what fits the
planner's.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from bmx.compress.policy import CompressionPolicy
from bmx.engine.memory_meter import MemoryMeter, device_errors, is_out_of_memory, release
from bmx.engine.prefix_cache import PrefixCache, Reuse
from bmx.engine.scheduler import Scheduler, Step
from bmx.engine.sequence import Sequence
from bmx.errors import RowError
from bmx.model.spec import ModelSpec
from bmx.plan.planner import Plan, SlotGroup
from bmx.request import Request, Result
from bmx.shutdown import Stop
from bmx.stats import Stats

LOOKAHEAD = 64  # fewest requests that wait tokenised, so that a free slot of any size finds one


class Sampled(Protocol):
    """Tokens that a step gives, once it is done."""

    def read(self) -> list[int | None]:
        """Of each chunk that samples, in order, once they are there; None where the logits were no numbers."""


class Runner(Protocol):
    """What computes steps: the model on its device, or a fake.

    Attributes:
        kv_bytes: of the slots it holds.
        ahead: steps that may be launched before the tokens of an earlier one are read.
        rounds: most tokens that sequences should decode in one step.
    """

    kv_bytes: int
    ahead: int
    rounds: int

    def run(self, step: Step) -> Sampled:
        """Launch a step."""

    def copy(self, source: tuple[int, int], target: tuple[int, int], tokens: int) -> None:
        """Put what a slot (group and slot) holds of the first tokens of a sequence into another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What runs work with.

    Attributes:
        spec, policy: what a slot holds.
        meter, stats: what counts.
        runner: what computes the steps of a plan.
        read: a request as a sequence, or a RowError.
        shrunk: a smaller plan for when memory ran out under one; None if there is none.
        chunk_size: where chunks end, if that decides what is evicted: a plan made from other rows must not change it.
        stop: whether to end early.
        row_timeout: seconds that a sequence may have its slot, or None.
    """

    spec: ModelSpec
    policy: CompressionPolicy
    meter: MemoryMeter
    stats: Stats
    runner: Callable[[Plan], AbstractContextManager[Runner]]
    read: Callable[[Request], Sequence]
    shrunk: Callable[[Plan], Plan | None]
    chunk_size: int | None
    stop: Stop
    row_timeout: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlightStep:
    """A step on its way.

    Attributes:
        sampled: the tokens it gives.
        at: when it was launched, by the monotonic clock.
        active: sequences that had a slot then; ``held``: tokens of each, with those of this step.
    """

    step: Step
    sampled: Sampled
    at: float
    active: int
    held: list[int]


class Run:
    """Answers requests under a plan, and under smaller ones when memory runs out.

    Args:
        setup: the model, its policy and its counters.
        requests: read as slots become free; None among them says that there is none for now, but after a step perhaps.
    """

    def __init__(self, setup: RunContext, requests: Iterable[Request | None]) -> None:
        self._setup = setup
        self._pair_bytes: Counter[int | None] = Counter()  # of one KV pair of all layers, by their windows
        for index, layer in enumerate(setup.spec.layers):
            if layer.owner == index:
                size = layer.kv_heads * (layer.key_dim + layer.value_dim) * setup.spec.itemsize
                self._pair_bytes[layer.window] += size
        self._source = iter(requests)
        self._exhausted = False
        self._unfinished: list[Sequence] = []  # begun under an earlier plan, or read and not begun
        self._finished: deque[tuple[Sequence, int]] = deque()  # and not handed out yet, with the rows of their slots
        self._request: Request | None = None  # taken from the source and not read yet
        self._collected = 0.0  # when the last step was done
        self._broken = False  # the source has failed, and would seem to be at its end if it were asked again

    def results(self, plan: Plan) -> Iterator[Result]:
        """All results. Each attempt leaves over what it could not finish for the next, smaller one."""
        stats = self._setup.stats
        stats.started = time.monotonic()
        self._setup.meter.reset()
        while not (yield from self._attempt(plan)):
            smaller = self._setup.shrunk(plan)
            if smaller is None:
                yield from self._one_by_one(plan)
                return
            plan = smaller
            stats.shrunk_to.append((plan.slots, plan.step.max_num_batched_tokens))

    def _attempt(self, plan: Plan, alone: bool = False) -> Generator[Result, None, bool]:
        """Answer what is left, or until memory runs out; returns whether all was answered.

        Args:
            alone: only what is left over, without reading on.
        """
        setup = self._setup
        chunk_size = setup.chunk_size or plan.step.chunk_size
        scheduler = Scheduler(plan.groups, replace(plan.step, chunk_size=chunk_size))
        scheduler.waiting, self._unfinished = self._unfinished, []
        try:
            with device_errors(), setup.runner(plan) as runner:
                setup.stats.slots, setup.stats.kv_bytes = plan.slots, runner.kv_bytes
                rows = max((group.capacity for group in plan.prefix_slots), default=0)
                reuse = Reuse(spec=setup.spec, policy=setup.policy, chunk_size=chunk_size, rows=rows)
                prefixes = PrefixCache(reuse, plan.prefix_slots, len(plan.groups), runner.copy)
                yield from self._loop(scheduler, runner, prefixes, alone, plan.memory.total)
            return True
        except Exception as error:
            if self._broken or not is_out_of_memory(error):
                raise
        self._unfinished = scheduler.unfinished
        for sequence in self._unfinished:
            sequence.restart()
        return False

    def _one_by_one(self, plan: Plan) -> Iterator[Result]:
        """The last resort: every row in the only slot, of its own size; one that fails even so is an error."""
        setup, waiting = self._setup, self._unfinished
        largest = max(group.capacity for group in plan.groups)
        while True:
            yield from self._drain_finished()
            yield from self._read_ahead(waiting, 1, None)
            if not waiting or self._setup.stop.requested:
                return
            row = waiting.pop(0)
            if row.rows_needed > largest:
                yield self._failed(row, "out_of_memory", _too_large(row, largest))
                continue
            self._unfinished = [row]
            layout = setup.policy.layout(setup.spec, row.rows_needed)
            own = replace(plan, groups=(SlotGroup(row.rows_needed, 1),), layouts=(layout,), prefix_slots=())
            if not (yield from self._attempt(own, alone=True)):
                release()
                yield self._failed(row, "out_of_memory", "memory runs out even with nothing else in it")

    def _loop(
        self, scheduler: Scheduler, runner: Runner, prefixes: PrefixCache, alone: bool, planned: int
    ) -> Iterator[Result]:
        on_their_way: deque[InFlightStep] = deque()
        while True:
            yield from self._drain_finished()
            if self._setup.stop.requested:
                scheduler.waiting.clear()
                if self._setup.stop.overdue:
                    return
            elif not alone:
                yield from self._read_ahead(scheduler.waiting, max(LOOKAHEAD, 2 * scheduler.slots), prefixes)
                scheduler.draining = self._exhausted
            for sequence in scheduler.reject_too_large():
                yield self._failed(sequence, "out_of_memory", _too_large(sequence, scheduler.largest))
            scheduler.admit_waiting()
            yield from self._late(scheduler)
            self._setup.stats.reused_prompt_tokens += prefixes.arrange(scheduler.in_slots)
            looking_back = any(sequence.needs_host_tokens for sequence in scheduler.in_slots)
            ahead, rounds = (0, 1) if looking_back else (runner.ahead, runner.rounds)
            step = scheduler.schedule(rounds)
            if step is not None:
                on_their_way.append(self._launch(scheduler, runner, step))
                prefixes.keep(step)
            elif not on_their_way:
                if scheduler.waiting:
                    continue  # all that had slots were late
                if alone or self._exhausted or self._setup.stop.requested:
                    return
                continue
            while len(on_their_way) > (0 if step is None else ahead):
                self._collect(scheduler, on_their_way.popleft())
            self._setup.meter.keep_to(planned)

    def _read_ahead(self, waiting: list[Sequence], enough: int, prefixes: PrefixCache | None) -> Iterator[Result]:
        """Tokenise requests until enough wait; those that cannot be answered are results at once."""
        while len(waiting) < enough and not self._exhausted:
            request = self._request = self._request or self._next_request()
            if request is None:
                return
            try:
                waiting.append(self._setup.read(request))
                self._request = None
                if prefixes:
                    prefixes.join(waiting[-1])
            except RowError as error:
                self._request = None
                yield Result(id=request.id, error=error)

    def _next_request(self) -> Request | None:
        try:
            return next(self._source)
        except StopIteration:
            self._exhausted = True
            return None
        except BaseException:
            self._broken = True
            raise

    def _late(self, scheduler: Scheduler) -> Iterator[Result]:
        """End the sequences that have had their slot for too long."""
        allowed = self._setup.row_timeout
        if allowed is None:
            return
        now, late = time.monotonic(), []
        for sequence in scheduler.in_slots:
            if sequence.started is None:
                sequence.started = now
            elif now - sequence.started >= allowed:
                late.append(sequence)
        scheduler.drop(late)
        self._setup.stats.work_saved += sum(sequence.max_tokens - len(sequence.answer) for sequence in late)
        for sequence in late:
            yield self._failed(sequence, "timeout", f"not finished after {allowed:g} s (--row-timeout)")

    @staticmethod
    def _launch(scheduler: Scheduler, runner: Runner, step: Step) -> InFlightStep:
        """Have one step begin."""
        at, active = time.monotonic(), scheduler.running
        sampled = runner.run(step)
        scheduler.launched(step)
        return InFlightStep(step=step, sampled=sampled, at=at, active=active, held=scheduler.held_tokens)

    def _collect(self, scheduler: Scheduler, launched: InFlightStep) -> None:
        """Take what a step gave, and count it."""
        setup, step = self._setup, launched.step
        tokens = launched.sampled.read()
        before, self._collected = self._collected, time.monotonic()
        known = [len(chunk.sequence.answer) for chunk in step.chunks]
        finished = scheduler.update(step, tokens)
        self._finished += [(sequence, scheduler.capacity(sequence)) for sequence in finished]
        taken = [len(chunk.sequence.answer) - n for chunk, n in zip(step.chunks, known, strict=True)]
        setup.stats.count_step(
            prompt_tokens=sum(chunk.length for chunk in step.chunks if not chunk.decodes),
            decode_tokens=sum(n for chunk, n in zip(step.chunks, taken, strict=True) if chunk.decodes),
            sampled=sum(taken),
            rounds=step.rounds,
            seconds=self._collected - max(before, launched.at),
            active=launched.active,
            full_cache_bytes=self._full_cache_bytes(launched.held),
        )
        setup.stats.memory_bytes = setup.meter.now
        setup.stats.peak_memory_bytes = setup.meter.peak
        setup.stats.work_saved += sum(sequence.max_tokens - len(sequence.answer) for sequence in finished)

    def _full_cache_bytes(self, held: list[int]) -> int:
        """What full caches of so many tokens each hold; windowed layers hold their window."""
        return sum(
            size * sum(min(tokens, window) for tokens in held) if window else size * sum(held)
            for window, size in self._pair_bytes.items()
        )

    def _drain_finished(self) -> Iterator[Result]:
        """The results of what has finished."""
        while self._finished:
            result = self._result(*self._finished[0])
            self._finished.popleft()
            yield result

    def _result(self, sequence: Sequence, capacity: int) -> Result:
        if sequence.error:
            error = RowError(sequence.error, "the model's logits are not numbers (overflow in this dtype?)")
            return Result(id=sequence.request.id, error=error)
        policy = self._setup.policy
        return sequence.result(capacity if policy.scorer is None else policy.budget.pairs or sequence.rows_needed)

    @staticmethod
    def _failed(sequence: Sequence, code: str, why: str) -> Result:
        return Result(id=sequence.request.id, error=RowError(code, why))


def _too_large(sequence: Sequence, largest: int) -> str:
    return f"it needs a slot of {sequence.rows_needed} rows; the plan's largest has {largest}"
