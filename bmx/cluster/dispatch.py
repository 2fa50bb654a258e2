"""One run of all workers: rows are read and fed, reports come in, and a worker that dies is started again.

Knows what to do when; how calls are carried is the crew's business, which row goes where that of the rows' book.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from bmx.cluster.crew import RESUME, Call, Crew, DeadWorkerError
from bmx.cluster.rows import RowBook
from bmx.cluster.worker import BrokenWorkerError, Report, foreseen
from bmx.cluster.worker_state import WorkerState
from bmx.errors import BmxError, DeviceError, MemoryLimitError
from bmx.request import Request, Result
from bmx.shutdown import Stop
from bmx.stats import Stats

POLL = 0.2  # seconds after which the driver looks at signals and clocks
LAST_REPORT = 5.0  # seconds that a worker has to say that it has nothing left
STRIKES = 3  # deaths in a row without an answer between them, after which a worker is given up
TESTING_STRIKES = 8  # the same, with those for which a row may be the reason


class Phase(Enum):
    """What a worker is doing."""

    AWAY = auto()  # its process is being started
    OPENING = auto()  # it loads its model
    PLANNING = auto()
    READY = auto()  # it has a plan, and no rows
    RUNNING = auto()
    ENDING = auto()  # it was told that no more rows will come
    GONE = auto()  # it was given up


RESTARTED = (DeviceError, MemoryLimitError, BrokenWorkerError)  # what a new process may mend
ANSWERS = (Phase.RUNNING, Phase.ENDING)


@dataclass(slots=True)
class Post:
    """A worker's place in a run.

    Attributes:
        index: of the worker in its crew.
        state: what is known of it.
        phase: what it is doing.
        call: what it was asked and has not answered.
        fed: rows that it was given in this run of its own.
        progress: its counters when they last moved.
        moved: when that was, by the monotonic clock.
        strikes: deaths in a row without an answer between them.
        tested: those among them for which a row may be the reason.
        error: what it died of last.
    """

    index: int
    state: WorkerState
    phase: Phase = Phase.READY
    call: Call = None
    fed: int = 0
    progress: tuple[int, ...] = ()
    moved: float = 0.0
    strikes: int = 0
    tested: int = 0
    error: BmxError | None = None


class Dispatch:
    """A run.

    Args:
        crew: carries calls to the workers.
        workers: what is known of them; their counters and plans are kept up to date.
        open_arguments: of a worker: what ``Worker.open`` is called with when it was started again.
        check: is called with a worker that was opened again, and raises a BmxError if it differs from the others.
        lengths: of the prompts, for plans of workers that were started again.
        rows: read as there is room for them.
        stats: the job's counters.
        stop: says when to end early.
        row_timeout: seconds that a row may have its slot, or None.
        worker_timeout: seconds in which a worker must compute something.
        paused: whether nothing may be read for now.
        note: is told what happens to workers.
    """

    def __init__(
        self,
        crew: Crew,
        workers: list[WorkerState],
        *,
        open_arguments: Callable[[WorkerState], tuple[Any, ...]],
        check: Callable[[WorkerState, Any], None],
        lengths: Any,
        rows: Iterable[Request | Result],
        stats: Stats,
        stop: Stop,
        row_timeout: float | None,
        worker_timeout: float,
        paused: Callable[[], bool],
        note: Callable[[str], None],
    ) -> None:
        self._crew, self._stats, self._stop, self._paused, self._note = crew, stats, stop, paused, note
        self._open_arguments, self._check, self._lengths = open_arguments, check, lengths
        self._row_timeout, self._worker_timeout = row_timeout, worker_timeout
        self._rows, self._exhausted, self._told = iter(rows), False, False
        self._posts = [Post(index, state) for index, state in enumerate(workers)]
        self.book = RowBook()

    def results(self) -> Iterator[Result]:
        """The results as they come, until all rows have one or the run is to stop.

        Raises:
            BmxError: no worker is left.
        """
        self._stats.started = time.monotonic()
        while True:
            yield from self._read()
            self._feed()
            if self._is_over():
                return
            waiting = {id(post.call): post for post in self._posts if post.call is not None}
            calls = [post.call for post in waiting.values()]
            for call in self._crew.ready(calls, POLL):
                yield from self._take(waiting[id(call)])
            yield from self._end_hung()
            self._stats.set_workers([(post.state.stats, post.state.past) for post in self._posts])

    def _read(self) -> Iterator[Result]:
        """Read rows ahead; those that could not be read are results at once."""
        while not (self._exhausted or self.book.full or self._paused()):
            row = next(self._rows, None)
            if row is None:
                self._exhausted = True
            elif isinstance(row, Result):
                yield row
            else:
                self.book.add(row)

    def _is_over(self) -> bool:
        """Whether the run has ended, or must; the workers are told to stop when it shall."""
        running = [post for post in self._posts if post.phase in ANSWERS]
        if not self._stop.requested:
            late = time.monotonic() - max(post.moved for post in self._posts) > LAST_REPORT
            return self._exhausted and not self.book.held and (late or not running)
        self.book.drop_waiting()
        if not self._told:
            self._told = True
            for post in running:
                self._crew.call(post.index, "stop", self._stop.within)
        return self._stop.overdue or not any(self.book.on_board(post.index) for post in running)

    def _feed(self) -> None:
        """Hand out rows that wait, to those first that have the fewest for their slots."""
        if self._stop.requested:
            return
        able = [post for post in self._posts if post.phase in (Phase.READY, Phase.RUNNING)]
        fed = True
        while self.book.waiting and able and fed:
            able.sort(key=lambda post: self.book.on_board(post.index) / self._slots(post))
            fed = any(self._fed(post) for post in able)
        if self._exhausted and not self.book.waiting:
            for post in able:
                if post.phase is Phase.RUNNING:
                    self._crew.call(post.index, "feed", self._life(post), [], post.fed)
                    post.phase, post.fed = Phase.ENDING, 0

    def _fed(self, post: Post) -> bool:
        """Give a worker a share, if it should have one."""
        others = [p.index for p in self._posts if p is not post and p.phase is not Phase.GONE]
        was_empty = not self.book.on_board(post.index)
        rows = self.book.share(post.index, self._slots(post), others)
        if not rows:
            return False
        if post.phase is Phase.READY:
            self._begin_life(post)
            post.call = self._crew.answers(post.index, post.state.plan, self._row_timeout)
            post.phase = Phase.RUNNING
        if was_empty:
            post.moved = time.monotonic()
        self._crew.call(post.index, "feed", self._life(post), rows)
        post.fed += len(rows)
        return True

    @staticmethod
    def _slots(post: Post) -> int:
        return post.state.plan.slots if post.state.plan else 1

    @staticmethod
    def _life(post: Post) -> int:
        return post.state.restarts + 1

    def _take(self, post: Post) -> Iterator[Result]:
        """Take what a worker has given, and go on with it."""
        try:
            given = self._crew.take(post.call)
            if not isinstance(given, Report):
                self._opened_further(post, given)
                return
        except DeadWorkerError as death:
            yield from self._died(post, str(death))
            return
        except Exception as error:
            yield from self._failed(post, foreseen(error))
            return
        yield from self._report(post, given)

    def _opened_further(self, post: Post, given: Any) -> None:
        """The next thing that a worker which was started again must do."""
        state = post.state
        if post.phase is Phase.AWAY:
            state.machine, post.phase = given, Phase.OPENING
            post.call = self._crew.call(post.index, "open", *self._open_arguments(state))
        elif post.phase is Phase.OPENING:
            self._check(state, given)
            post.phase = Phase.PLANNING
            post.call = self._crew.call(post.index, "plan", self._lengths)
        else:
            state.plan, post.phase, post.call = given, Phase.READY, None

    def _report(self, post: Post, report: Report) -> Iterator[Result]:
        """Hand on a worker's new results, and look at its counters."""
        stats, post.state.stats = report.stats, report.stats
        for warning in report.warnings:
            self._note(f"worker {post.state.number}: {warning}")
        for result in report.results:
            if self.book.answered(post.index, result):
                post.strikes = post.tested = 0
                if result.error is None and result.finish_reason:
                    self._stats.finish_reasons[result.finish_reason] += 1
                yield result
        progress = (stats.prompt_tokens, stats.reused_prompt_tokens, stats.generated_tokens)
        if report.results or progress != post.progress:
            post.progress, post.moved = progress, time.monotonic()
        if report.error is not None:
            if not isinstance(report.error, RESTARTED):
                raise report.error
            yield from self._failed(post, report.error)
        elif report.ended:
            post.phase, post.call = Phase.READY, None

    def _end_hung(self) -> Iterator[Result]:
        """End workers that have rows and have computed nothing for too long."""
        for post in self._posts:
            if post.phase in ANSWERS and self.book.on_board(post.index):
                quiet = time.monotonic() - post.moved
                if quiet >= self._worker_timeout:
                    self._crew.kill(post.index, post.state.machine)
                    yield from self._died(post, f"it computed nothing for {quiet:,.0f} s (--worker-timeout)")

    def _failed(self, post: Post, error: BmxError) -> Iterator[Result]:
        """A worker has failed in a way that only a new process may mend."""
        post.error = error
        self._crew.kill(post.index, post.state.machine)
        yield from self._died(post, post.error.message)

    @staticmethod
    def _begin_life(post: Post) -> None:
        """What a worker counts from now on is added to what it has counted."""
        post.state.past.append(post.state.stats)
        post.state.stats = Stats()

    def _died(self, post: Post, why: str) -> Iterator[Result]:
        """Give a worker's rows to others, and start it again; errors of rows that only ever killed are results."""
        tested, rows = self.book.tests(post.index), self.book.on_board(post.index)
        failed = self.book.died(post.index, why)
        self._begin_life(post)
        post.state.restarts, post.progress = post.state.restarts + 1, ()
        post.fed = 0
        post.strikes, post.tested = (0, 0) if failed else (post.strikes + (not tested), post.tested + tested)
        if post.strikes >= STRIKES or post.strikes + post.tested >= TESTING_STRIKES:
            post.phase, post.call = Phase.GONE, None
            self._note(f"worker {post.state.number} on {post.state.host} is given up: {why}")
        else:
            post.phase, post.call = Phase.AWAY, self._crew.machine(post.index)
            self._note(
                f"worker {post.state.number} on {post.state.host} died: {why}; it is started again, and its {rows} "
                "unanswered rows go to whoever is free"
            )
        yield from failed
        if all(other.phase is Phase.GONE for other in self._posts):
            raise post.error or BmxError(f"no worker is left; the last one died: {why}", hint=RESUME)
