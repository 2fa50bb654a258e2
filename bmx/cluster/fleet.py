"""The workers of a job, used as one engine is: opened, measured, planned and run together.

Knows the order of things; how calls are carried is the crew's business, what happens during a run that of the dispatch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from bmx.cluster.crew import RESUME, Call, Crew, DeadWorkerError
from bmx.cluster.dispatch import STRIKES, Dispatch
from bmx.cluster.machines import check_alike, shares
from bmx.cluster.worker import Opened
from bmx.cluster.worker_state import WorkerState
from bmx.compress.budgets import Budget
from bmx.errors import BmxError, UsageError
from bmx.plan.planner import Length, Plan
from bmx.request import Request, Result
from bmx.run_config import RunConfig
from bmx.shutdown import Stop
from bmx.stats import Stats

INSTALL = "pip install 'bmx-llm[ray]'"
BLOCK_ROWS, BLOCK_CHARACTERS = 256, 1 << 22  # of prompts that a worker measures in one call
BLOCKS_AHEAD = 2  # of each worker
CLOSING_SECONDS = 5.0  # that workers have to close models which are split over several processes


class Fleet:
    """Workers that are open; a context manager, after which nothing of them is left.

    Args:
        config: all settings.
        note: is told what happens to workers.

    Attributes:
        workers: what is known of each.
        budget: how many KV pairs a sequence may keep; None for all.
        most_held: rows that the driver has held at once, in the newest run.
    """

    def __init__(self, config: RunConfig, note: Callable[[str], None]) -> None:
        self._config, self._note = config, note
        self._stack = ExitStack()
        self._crew: Crew
        self._lengths: Any = None
        self._dispatch: Dispatch | None = None
        self._opened: Opened
        self.workers: list[WorkerState] = []
        self.budget: Budget | None = None

    @classmethod
    def open(cls, config: RunConfig, note: Callable[[str], None]) -> Self:
        """Start Ray, or join its cluster, and the workers; each loads the model.

        Args:
            config: all settings.
            note: is told what happens to workers, in lines for people.

        Raises:
            UsageError: Ray is not installed, there is no cluster, it has fewer GPUs than workers, or the workers would
                answer in different ways.
            BmxError: what the workers raise when they load their model.
        """
        fleet = cls(config, note)
        try:
            fleet._open(fleet._start())
        except BaseException:
            fleet.close()
            raise
        return fleet

    def _start(self) -> Crew:
        """The workers' processes.

        Raises:
            UsageError: see ``open``.
        """
        if find_spec("ray") is None:
            raise UsageError("several workers need Ray, which is not installed", hint=INSTALL)
        from bmx.cluster import start

        self._crew = self._stack.enter_context(start.crew(self._config))
        return self._crew

    def _open(self, crew: Crew) -> None:
        """Let every worker load its model.

        Raises:
            UsageError: the workers differ.
        """
        machines = [crew.take(call) for call in [crew.machine(index) for index in range(crew.size)]]
        check_alike(machines)
        parts = shares(machines, self._config.engine, crew.gpus)
        self.workers = [
            WorkerState(number=number, machine=machine, share=share)
            for number, (machine, share) in enumerate(zip(machines, parts, strict=True), 1)
        ]
        opened = self._all("open", self._open_arguments)
        self._opened, self.budget = opened[0], opened[0].budget
        for state, one in zip(self.workers, opened, strict=True):
            self._check(state, one)

    def _open_arguments(self, state: WorkerState) -> tuple[Any, ...]:
        return state.restarts + 1, self._config.engine, self._config.prompt, state.share

    def _check(self, state: WorkerState, opened: Opened) -> None:
        """Note what a worker has loaded.

        Raises:
            UsageError: it is not what the first one has.
        """
        check_alike([state.machine])
        first, model = self._opened, opened.model
        for name, here, there in (
            *((name, first.model.get(name), model.get(name)) for name in ("architecture", "commit", "dtype")),
            ("files", first.files, opened.files),
        ):
            if here != there:
                raise UsageError(
                    f"worker {state.number} on {state.host} has another model: {name} {there}, worker 1 {here}",
                    hint="every machine needs the same files; --revision and --dtype say which",
                )
        state.model = model

    def describe(self) -> dict[str, Any]:
        """What computes the answers, for the record: of the first worker."""
        return self._opened.model

    def measure(self, requests: Iterable[Request]) -> list[Length]:
        """The length of each request that can be answered at all, in their order; the workers share the work."""
        found: dict[int, list[Length]] = {}
        under_way: list[tuple[Call, int, int, list[Request]]] = []  # with the worker, the block's number and its rows
        blocks = enumerate(_blocks(requests))
        free = deque(list(range(len(self.workers))) * BLOCKS_AHEAD)
        while True:
            while free and (block := next(blocks, None)) is not None:
                index = free.popleft()
                under_way.append((self._crew.call(index, "measure", block[1]), index, *block))
            if not under_way:
                break
            ready = self._crew.ready([entry[0] for entry in under_way], 1.0)
            for entry in [entry for entry in under_way if any(entry[0] is call for call in ready)]:
                under_way.remove(entry)
                call, index, number, rows = entry
                found[number] = self._insisted(self.workers[index], call, "measure", rows)
                free.append(index)
        return [length for number in sorted(found) for length in found[number]]

    def prompt_warnings(self) -> list[str]:
        """What a person should know of the prompts that were measured: each in a line."""
        lines = self._all("prompt_warnings", lambda _: ())
        return list(dict.fromkeys(line for worker in lines for line in worker))

    def plan(self, lengths: Sequence[Length]) -> list[Plan]:
        """The workers' plans, which each makes for itself, as machines and GPUs may differ.

        Raises:
            MemoryLimitError: not even one slot fits on one of them.
        """
        self._lengths = self._crew.shared(lengths)
        plans: list[Plan] = self._all("plan", lambda _: (self._lengths,))
        for state, plan in zip(self.workers, plans, strict=True):
            state.plan = plan
        return plans

    def run(
        self,
        rows: Iterable[Request | Result],
        *,
        stats: Stats,
        stop: Stop,
        row_timeout: float | None = None,
        paused: Callable[[], bool] | None = None,
    ) -> Generator[Result]:
        """Answer rows; results come as they finish, not in order.

        The rows of a worker that dies are answered by others, and the worker is started again. A row that was there
        each time, in the end alone, is an error.

        Args:
            rows: read as workers have room for them; a Result among them is handed on as it is.
            stats: counts what the workers do.
            stop: when it is requested, nothing is begun any more.
            row_timeout: seconds that a row may have its slot; one that takes longer is an error.
            paused: called before each row is read; while it returns True, no row is read.

        Raises:
            BmxError: no worker is left, or the model cannot answer.
        """
        self._dispatch = Dispatch(
            self._crew,
            self.workers,
            open_arguments=self._open_arguments,
            check=self._check,
            lengths=self._lengths,
            rows=rows,
            stats=stats,
            stop=stop,
            row_timeout=row_timeout,
            worker_timeout=self._config.cluster.worker_timeout,
            paused=paused or (lambda: False),
            note=self._note,
        )
        yield from self._dispatch.results()

    @property
    def most_held(self) -> int:
        """The most rows that the driver has held at once."""
        return self._dispatch.book.most if self._dispatch else 0

    def _all(self, method: str, arguments: Callable[[WorkerState], tuple[Any, ...]]) -> list[Any]:
        """What every worker gives for a call that all do at once."""
        calls = [self._crew.call(i, method, *arguments(state)) for i, state in enumerate(self.workers)]
        return [
            self._insisted(state, call, method, *arguments(state))
            for state, call in zip(self.workers, calls, strict=True)
        ]

    def _insisted(self, state: WorkerState, call: Call, method: str, *arguments: Any) -> Any:
        """What a call gives; a worker that dies is started again and asked again.

        Raises:
            BmxError: it dies each time.
        """
        index = state.number - 1
        for tries in range(STRIKES):
            try:
                if tries:
                    state.machine = self._crew.take(self._crew.machine(index))
                    state.restarts += 1
                    opened = self._crew.take(self._crew.call(index, "open", *self._open_arguments(state)))
                    if method == "open":
                        return opened
                    call = self._crew.call(index, method, *arguments)
                return self._crew.take(call)
            except DeadWorkerError as death:
                why = str(death)
                self._note(f"worker {state.number} on {state.host} died: {why}; it is started again")
        raise BmxError(f"worker {state.number} on {state.host} died {STRIKES} times: {why}", hint=RESUME)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and what was started for them."""
        if self.workers and self._config.engine.tensor_parallel_size > 1:
            with suppress(Exception):  # they are about to be ended in any case
                self._close_models()
        self._stack.close()

    def _close_models(self) -> None:
        """Let each worker end the other processes of its model, which leave files when they are killed with it."""
        calls = [self._crew.call(index, "close") for index in range(len(self.workers))]
        until = time.monotonic() + CLOSING_SECONDS
        while calls and (seconds := until - time.monotonic()) > 0:
            ready = self._crew.ready(calls, seconds)
            calls = [call for call in calls if not any(call is one for one in ready)]


def _blocks(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """Requests in blocks that a worker measures in one call."""
    block: list[Request] = []
    characters = 0
    for request in requests:
        block.append(request)
        characters += len(request.prompt or "") or sum(len(str(m.get("content"))) for m in request.messages or ())
        if len(block) >= BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block
