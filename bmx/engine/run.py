"""One run: requests become sequences, sequences share slots, steps follow each other, results come out as they finish.

Knows the loop and what to do when memory runs out; how a step is computed is the runner's business, what fits the
planner's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from bmx.compress.policy import CompressionPolicy
from bmx.engine.backend import Runner, Sampled
from bmx.engine.memory_meter import FullCacheSize, MemoryMeter, device_errors, is_out_of_memory, release
from bmx.engine.prefix_cache import PrefixCache, Reuse
from bmx.engine.prompt_lengths import EncodedPrompt
from bmx.engine.scheduler import Scheduler, Step
from bmx.engine.sequence import Sequence
from bmx.engine.shared_slots import SharedSlots
from bmx.engine.window import ROWS, TOKENS, Window
from bmx.errors import RowError
from bmx.model.spec import ModelSpec
from bmx.plan.memory import SlotGroup
from bmx.plan.planner import Plan
from bmx.request import Request, Result
from bmx.shutdown import Stop
from bmx.stats import Stats

LOOKAHEAD = 64  # fewest requests that wait tokenised, so that a free slot of any size finds one
FIRST_TOKENS = 1 << 20  # prompt tokens that are read into the window before the first step
MORE_TOKENS = 1 << 15  # and at each later step, until the window is full


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What a run works with.

    Attributes:
        spec: the model's sizes.
        policy: which KV pairs stay in a slot.
        meter: measures the memory that is held.
        stats: counts what is done.
        runner: makes what computes the steps of a plan.
        read: turns a request into tokens, or raises a RowError.
        begin: makes a sequence of a request and its tokens, or raises a RowError.
        shrunk: makes a smaller plan when memory ran out under one; None if there is no smaller one.
        chunk_size: tokens of a chunk where its ends decide what is evicted; a plan made from other requests must not
            change it. None where they decide nothing.
        stop: says whether to end early.
        row_timeout: seconds that a sequence may have its slot, or None.
    """

    spec: ModelSpec
    policy: CompressionPolicy
    meter: MemoryMeter
    stats: Stats
    runner: Callable[[Plan], AbstractContextManager[Runner]]
    read: Callable[[Request], EncodedPrompt]
    begin: Callable[[Request, EncodedPrompt], Sequence]
    shrunk: Callable[[Plan], Plan | None]
    chunk_size: int | None
    stop: Stop
    row_timeout: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlightStep:
    """A step that was launched and whose tokens have not been read.

    Attributes:
        step: its chunks.
        sampled: the tokens it gives.
        launched_at: when it was launched, by the monotonic clock.
        active: sequences that had a slot then.
        held: tokens computed by each of them, with those of this step.
    """

    step: Step
    sampled: Sampled
    launched_at: float
    active: int
    held: list[int]


class _Source:
    """The requests of a run, read one at a time; the next one stays here until it is taken.

    Args:
        items: requests, and results of those that could not be read.
        paused: whether nothing may be read for now.

    Attributes:
        exhausted: whether all were read.
        broken: whether reading failed; another attempt would mistake that for the end.
    """

    def __init__(self, items: Iterable[Request | Result], paused: Callable[[], bool] | None) -> None:
        self._items = iter(items)
        self._paused = paused or (lambda: False)
        self._next: Request | Result | None = None
        self.exhausted = False
        self.broken = False

    def peek(self) -> Request | Result | None:
        """The next item; None at the end, and while reading is paused."""
        if self._next is None and not self.exhausted and not self._paused():
            try:
                self._next = next(self._items)
            except StopIteration:
                self.exhausted = True
            except BaseException:
                self.broken = True
                raise
        return self._next

    def take(self) -> None:
        """Remove the item that ``peek`` returned."""
        self._next = None


class Run:
    """Answers requests under a plan, and under smaller ones when memory runs out.

    Args:
        context: the model, its policy and its counters.
        requests: read as slots become free; a Result among them is handed on.
        paused: whether nothing more may be read for now.
    """

    def __init__(
        self,
        context: RunContext,
        requests: Iterable[Request | Result],
        paused: Callable[[], bool] | None = None,
    ) -> None:
        self._context = context
        self._source = _Source(requests, paused)
        self._window: Window[tuple[Request, EncodedPrompt]] = Window(ROWS, TOKENS)
        self._given: tuple[Request, EncodedPrompt] | None = None  # the window has given it out; it has not begun
        self._ahead = FIRST_TOKENS  # tokens that may be read into the window now
        self._full_cache = FullCacheSize(context.spec)
        self._unfinished: list[Sequence] = []  # begun under an earlier plan, or read and not begun
        self._finished: deque[tuple[Sequence, int]] = deque()  # not handed out yet, with the rows of their slots
        self._collected_at = 0.0  # when the newest step was collected

    def results(self, plan: Plan) -> Iterator[Result]:
        """All results. Each attempt leaves what it could not finish to the next one, under a smaller plan."""
        stats = self._context.stats
        stats.started = time.monotonic()
        self._context.meter.reset(spares_files=plan.memory.file > 0)
        while not (yield from self._attempt(plan)):
            smaller = self._context.shrunk(plan)
            if smaller is None:
                yield from self._one_by_one(plan)
                return
            plan = smaller
            stats.shrunk_to.append((plan.slots, plan.step.max_num_batched_tokens))

    def _attempt(self, plan: Plan, alone: bool = False) -> Generator[Result, None, bool]:
        """Answer what is left, or until memory runs out; returns whether all was answered.

        Args:
            plan: the slots, and how large steps may get.
            alone: answer only unfinished sequences, and read no further requests.
        """
        context = self._context
        chunk_size = context.chunk_size or plan.step.chunk_size
        reading = plan.reading.slots - sum(group.slots for group in plan.prefix_slots) if plan.reading else None
        rows = max((group.capacity for group in (*plan.prefix_slots, *plan.shared_slots)), default=0)
        reuse = Reuse(spec=context.spec, policy=context.policy, chunk_size=chunk_size, rows=rows)
        shared = SharedSlots(
            plan.shared_indexes,
            plan.groups,
            lambda sequence, prefix: reuse.reads_in_place(sequence, prefix.length),
            min((group.capacity for group in plan.shared_slots), default=0),
        )
        scheduler = Scheduler(plan.groups, replace(plan.step, chunk_size=chunk_size), reading, shared)
        unfinished, self._unfinished = self._unfinished, []
        for sequence in unfinished:
            scheduler.enqueue(sequence)
        try:
            with device_errors(), context.runner(plan) as runner:
                context.stats.slots, context.stats.kv_bytes = plan.slots, runner.kv_bytes
                context.stats.modules = runner.modules
                prefixes = PrefixCache(reuse, plan.prefix_slots, len(plan.groups), runner.copy, reading or 0, shared)
                for sequence in unfinished:
                    prefixes.join(sequence)
                yield from _Attempt(self, scheduler, runner, prefixes, plan.memory.total, alone).results()
            return True
        except Exception as error:
            if self._source.broken or not is_out_of_memory(error):
                raise
        self._unfinished = [sequence.restarted() for sequence in scheduler.unfinished]
        return False

    def _one_by_one(self, plan: Plan) -> Iterator[Result]:
        """The last resort: each sequence alone in one slot of its own size; one that fails even so is an error."""
        context, waiting = self._context, self._unfinished
        largest = max(group.capacity for group in plan.groups)
        while True:
            yield from self.drain_finished()
            yield from self.read_ahead(1 - len(waiting), waiting.append, None)
            if not waiting or context.stop.requested:
                return
            sequence = waiting.pop(0)
            if sequence.rows_needed > largest:
                yield failure(sequence, "out_of_memory", too_large(sequence, largest))
                continue
            self._unfinished = [sequence]
            layout = context.policy.answering.layout(context.spec, sequence.rows_needed)
            own = plan.alone(SlotGroup(sequence.rows_needed, 1), layout)
            if not (yield from self._attempt(own, alone=True)):
                release()
                yield failure(sequence, "out_of_memory", "memory runs out even with nothing else in it")

    @property
    def context(self) -> RunContext:
        """What this run works with."""
        return self._context

    @property
    def exhausted(self) -> bool:
        """Whether every request was read and given out."""
        return self._source.exhausted and not self._window and self._given is None

    def read_ahead(
        self, missing: int, enqueue: Callable[[Sequence], None], prefixes: PrefixCache | None
    ) -> Iterator[Result]:
        """Take requests from the window until enough sequences wait; those that cannot be answered are results at once.

        The window is filled in portions, so that the first step need not wait until thousands of prompts are tokenised.

        Args:
            missing: how many more sequences should wait.
            enqueue: is given each new sequence.
            prefixes: is told of new sequences, so that they share what others compute. Where nothing is shared, no more
                is read than is missing.
        """
        shares = prefixes is not None and prefixes.enabled
        more = not shares or (yield from self._fill(prefixes))
        while missing > 0:
            if self._given is None:
                if more and (shares or not self._window):
                    more = yield from self._fill(prefixes)
                if not self._window:
                    break
                self._given = self._window.pop()  # and it stays there while memory may run out, for another attempt
                self._ahead += len(self._given[1].prompt)
            request, encoded = self._given
            try:
                sequence = self._context.begin(request, encoded)
            except RowError as error:
                self._given = None
                yield Result(id=request.id, error=error)
                continue
            enqueue(sequence)
            self._given = None
            missing -= 1
            if prefixes:
                prefixes.join(sequence)
        self._ahead = MORE_TOKENS

    def _fill(self, prefixes: PrefixCache | None) -> Generator[Result, None, bool]:
        """Read requests into the window: as many as are due where text is shared, else one.

        Returns:
            Whether the source may have more for now. If it has not, those that are there are given out.
        """
        window, shares = self._window, prefixes is not None and prefixes.enabled
        while not window or (shares and self._ahead > 0 and not window.full and not self._context.stop.requested):
            item = self._source.peek()
            if item is None:
                return False
            if isinstance(item, Result):
                self._source.take()
                yield item
                continue
            try:
                encoded = self._context.read(item)
            except RowError as error:
                self._source.take()
                yield Result(id=item.id, error=error)
                continue
            keys = prefixes.keys(encoded) if prefixes else ()
            self._source.take()
            window.add((item, encoded), keys, len(encoded.prompt))
            self._ahead -= len(encoded.prompt)
        return True

    def collect(self, scheduler: Scheduler, launched: InFlightStep) -> None:
        """Wait for the tokens of a step, give them to their sequences, and count them.

        Args:
            scheduler: has launched the step.
            launched: the oldest step in flight.
        """
        stats, meter, step = self._context.stats, self._context.meter, launched.step
        tokens = launched.sampled.read()
        before, self._collected_at = self._collected_at, time.monotonic()
        known = [len(chunk.sequence.answer) for chunk in step.chunks]
        finished = scheduler.update(step, tokens)
        self._finished += [(sequence, scheduler.capacity(sequence)) for sequence in finished]
        taken = [len(chunk.sequence.answer) - n for chunk, n in zip(step.chunks, known, strict=True)]
        stats.count_step(
            prompt_tokens=sum(chunk.length for chunk in step.chunks if not chunk.decodes),
            decode_tokens=sum(n for chunk, n in zip(step.chunks, taken, strict=True) if chunk.decodes),
            sampled=sum(taken),
            rounds=step.rounds,
            seconds=self._collected_at - max(before, launched.launched_at),
            active=launched.active,
            full_cache_bytes=self._full_cache.nbytes(launched.held),
        )
        stats.memory_bytes, stats.peak_memory_bytes = meter.now, meter.peak
        for sequence in finished:
            reason = None if sequence.error else sequence.finish_reason
            stats.count_answer(sequence.max_tokens, len(sequence.answer), reason)

    def drain_finished(self) -> Iterator[Result]:
        """The results of finished sequences that were not handed out yet."""
        while self._finished:
            result = self._result(*self._finished[0])
            self._finished.popleft()
            yield result

    def _result(self, sequence: Sequence, capacity: int) -> Result:
        if sequence.error:
            return Result(id=sequence.request.id, error=sequence.error)
        policy = self._context.policy
        if policy.answering.scorer is None:
            return sequence.result(capacity, kv_format=policy.answering.format)
        budget = policy.budget.pairs or sequence.rows_needed
        return sequence.result(budget, policy.budget.asked, policy.format)


class _Attempt:
    """The steps of a run under one plan, until all requests are answered or memory runs out.

    Args:
        run: reads requests and takes results.
        scheduler: gives out the plan's slots.
        runner: computes steps.
        prefixes: text that several prompts share.
        planned: bytes that the plan may take.
        alone: whether no further requests are read.
    """

    def __init__(
        self,
        run: Run,
        scheduler: Scheduler,
        runner: Runner,
        prefixes: PrefixCache,
        planned: int,
        alone: bool,
    ) -> None:
        self._run, self._context = run, run.context
        self._scheduler, self._runner, self._prefixes = scheduler, runner, prefixes
        self._planned, self._alone = planned, alone
        self._in_flight: deque[InFlightStep] = deque()

    def results(self) -> Iterator[Result]:
        """Results as sequences finish."""
        while True:
            yield from self._run.drain_finished()
            if self._context.stop.overdue:
                return
            yield from self._admit()
            may_stay = self._launch_next()
            if not self._in_flight and self._nothing_left:
                return
            self._collect_due(may_stay)

    def _admit(self) -> Iterator[Result]:
        """Read requests and give them slots; those that can never have one, or had it too long, are results."""
        scheduler = self._scheduler
        if self._context.stop.requested:
            scheduler.discard_waiting()
        elif not self._alone:
            missing = max(LOOKAHEAD, 2 * scheduler.slots) - len(scheduler.waiting)
            yield from self._run.read_ahead(missing, scheduler.enqueue, self._prefixes)
        for sequence in scheduler.reject_too_large():
            yield failure(sequence, "out_of_memory", too_large(sequence, scheduler.largest))
        scheduler.admit_waiting(draining=self._run.exhausted)
        yield from self._end_late()

    def _end_late(self) -> Iterator[Result]:
        """End the sequences that have had their slot for too long."""
        allowed = self._context.row_timeout
        if allowed is None:
            return
        now, late = time.monotonic(), []
        for sequence in self._scheduler.in_slots:
            if sequence.started is None:
                sequence.started = now
            elif now - sequence.started >= allowed:
                late.append(sequence)
        self._scheduler.drop(late)
        for sequence in late:
            self._context.stats.count_answer(sequence.max_tokens, len(sequence.answer))
            yield failure(sequence, "timeout", f"not finished after {allowed:g} s (--row-timeout)")

    def _launch_next(self) -> int:
        """Launch the next step, if any sequence can run; returns how many steps may stay in flight."""
        scheduler = self._scheduler
        self._context.stats.reused_prompt_tokens += self._prefixes.arrange(scheduler.in_slots)
        needs_tokens = any(sequence.needs_host_tokens for sequence in scheduler.in_slots)
        step = scheduler.schedule(1 if needs_tokens else self._runner.rounds)
        if step is None:
            return 0
        launched_at, active = time.monotonic(), scheduler.running
        sampled = self._runner.run(step)
        scheduler.launched(step)
        self._in_flight.append(
            InFlightStep(step=step, sampled=sampled, launched_at=launched_at, active=active, held=scheduler.held_tokens)
        )
        self._prefixes.keep(step, scheduler.unfinished)
        return 0 if needs_tokens else self._runner.ahead

    @property
    def _nothing_left(self) -> bool:
        """Whether no sequence waits and no request will come."""
        ended = self._alone or self._run.exhausted or self._context.stop.requested
        return ended and not self._scheduler.waiting

    def _collect_due(self, may_stay: int) -> None:
        """Collect the oldest steps in flight until no more than ``may_stay`` are left."""
        while len(self._in_flight) > may_stay:
            self._run.collect(self._scheduler, self._in_flight.popleft())
        self._context.meter.keep_to(self._planned)


def failure(sequence: Sequence, code: str, message: str) -> Result:
    """The result of a sequence that cannot be answered.

    Args:
        sequence: the sequence.
        code: of the error.
        message: why, in one line.
    """
    return Result(id=sequence.request.id, error=RowError(code, message))


def too_large(sequence: Sequence, largest: int) -> str:
    """The error message of a sequence that fits in no slot; ``largest``: rows of the largest one."""
    return f"it needs a slot of {sequence.rows_needed} rows; the plan's largest has {largest}"
