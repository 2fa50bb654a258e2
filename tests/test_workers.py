"""What becomes of rows whose workers die, whatever carries the calls: here workers are threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import pytest
from conftest import watched

from bmx.cluster.crew import DeadWorkerError
from bmx.cluster.fleet import Fleet
from bmx.cluster.rows import RowBook, target
from bmx.cluster.worker import Worker
from bmx.engine.engine import Engine
from bmx.errors import BmxError, DeviceError, MemoryLimitError, ModelError, UsageError
from bmx.request import Request, Result, SamplingParams
from bmx.run_config import RunConfig
from bmx.shutdown import Stop
from bmx.stats import Stats


class Death(BaseException):
    """The end of a worker's process."""


class Stream:
    """A worker's reports, read on a thread as Ray does it, until its process ends."""

    def __init__(self, reports: Iterable[Any]) -> None:
        self.items: SimpleQueue[Any] = SimpleQueue()
        Thread(target=self._read, args=(reports,), daemon=True).start()

    def _read(self, reports: Iterable[Any]) -> None:
        for report in reports:
            self.items.put(report)

    def take(self) -> Any:
        return self.items.get()


class Threads:
    """A crew of workers in this process. ``hook(worker, step)`` is called before each step, and may end a worker."""

    gpus = False

    def __init__(self, size: int, hook: Callable[[int, Any], None]) -> None:
        self.size, self._hook = size, hook
        self.workers = [Worker() for _ in range(size)]
        self.streams: list[Stream | None] = [None] * size
        self.ended = [0] * size

    def shared(self, value: Any) -> Any:
        return value

    def machine(self, worker: int) -> Any:
        return self.workers[worker].machine("here")

    def call(self, worker: int, method: str, *arguments: Any) -> Any:
        try:
            result = getattr(self.workers[worker], method)(*arguments)
        except BmxError as error:
            return error
        if method == "open":
            own = self.workers[worker]
            own._engine = watched(own.engine, lambda _, step: self._before(worker, own, step))
        return result

    def _before(self, worker: int, own: Worker, step: Any) -> None:
        if self.workers[worker] is not own:
            raise Death
        try:
            self._hook(worker, step)
        except Death:
            self.kill(worker, None)
            raise

    def answers(self, worker: int, *arguments: Any) -> Stream:
        self.streams[worker] = Stream(self.workers[worker].answers(*arguments))
        return self.streams[worker]

    def kill(self, worker: int, _: Any) -> None:
        """Its process ends: calls under way give nothing more, later ones go to a new process."""
        self.workers[worker] = Worker()
        self.ended[worker] += 1
        self.streams[worker].items.put(DeadWorkerError("its process was killed"))

    def ready(self, calls: Sequence[Any], _: float) -> list[Any]:
        return [call for call in calls if not isinstance(call, Stream)] or [self._next(calls)]

    def _next(self, calls: Sequence[Stream]) -> Stream:
        while True:
            for call in calls:
                if not call.items.empty():
                    return call

    def take(self, call: Any) -> Any:
        value = call.take() if isinstance(call, Stream) else call
        if isinstance(value, Exception):
            raise value
        return value


@pytest.fixture(autouse=True)
def quiet_deaths(monkeypatch):
    """Threads that end with their worker say nothing."""
    monkeypatch.setattr("threading.excepthook", lambda _: None)


def rows(count: int, **params: Any) -> list[Request]:
    return [Request(id=i, prompt=f"row {i}", params=SamplingParams(max_tokens=30, **params)) for i in range(count)]


def is_in(step: Any, name: int) -> bool:
    """Whether a row is computed in a step."""
    return any(chunk.sequence.request.id == name for chunk in step.chunks)


def run(
    requests: Sequence[Request], workers: int, hook: Callable[[int, Any], None], **settings: Any
) -> tuple[dict[Any, Result], list[str], Fleet, Threads]:
    """Results by id, what was said of workers, and who they were."""
    notes: list[str] = []
    fleet = Fleet(RunConfig.of(("-",), {"model": "fake", "workers": workers, **settings}), notes.append)
    fleet._crew = crew = Threads(workers, hook)
    fleet._open(crew)
    fleet.plan(fleet.measure(requests))
    results = list(fleet.run(iter(requests), stats=Stats(), stop=Stop()))
    assert sorted(result.id for result in results) == [request.id for request in requests]
    return {result.id: result for result in results}, notes, fleet, crew


def expected(requests: Sequence[Request]) -> dict[Any, str]:
    return {result.id: result.text for result in Engine.open("fake").run(requests)}


def texts(found: dict[Any, Result]) -> dict[Any, str]:
    return {name: result.text for name, result in found.items() if result.error is None}


def nothing(worker: int, step: Any) -> None:
    pass


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (1, 3), (2, 3), (50, 1), (400, 3)])
def test_w4_a_row_that_kills_its_worker_is_an_error_and_all_others_are_answered(count, workers):
    def poison(worker: int, step: Any) -> None:
        if is_in(step, count // 2):
            raise Death

    requests = rows(count)
    found, notes, fleet, crew = run(requests, workers, poison, max_num_seqs=16)
    error = found[count // 2].error
    assert error.code == "worker_died"
    assert "its process was killed" in error.message
    right = expected(requests)
    del right[count // 2]
    assert texts(found) == right
    assert 3 <= sum(crew.ended) <= 8
    assert sum(worker.restarts for worker in fleet.workers) == sum(crew.ended)
    assert not any("given up" in line for line in notes)


@pytest.mark.parametrize("error", [DeviceError("the GPU stopped"), MemoryLimitError("memory ran out")])
def test_w3_a_worker_that_fails_once_is_started_again(error):
    failed = []

    def fails(worker: int, step: Any) -> None:
        if is_in(step, 100) and not failed:
            failed.append(worker)
            raise error

    requests = rows(300)
    found, notes, _, crew = run(requests, 2, fails, max_num_seqs=16)
    assert texts(found) == expected(requests)
    assert sum(crew.ended) == 1
    assert error.message in notes[0]


def test_w3_a_worker_that_always_fails_is_given_up_and_the_others_answer_all():
    deaths, given_up = [], Event()

    def fails(worker: int, step: Any) -> None:
        if worker != 1:
            given_up.wait()
            return
        deaths.append(worker)
        if len(deaths) == 3:
            given_up.set()
        raise DeviceError("the GPU stopped")

    requests = rows(600)
    found, notes, _, crew = run(requests, 3, fails, max_num_seqs=16)
    assert texts(found) == expected(requests)
    assert crew.ended == [0, 3, 0]
    assert [line for line in notes if "given up" in line] == [notes[-1]]
    assert "worker 2 on" in notes[-1]


def test_w3_when_no_worker_is_left_the_job_ends_with_what_they_died_of():
    def fails(worker: int, step: Any) -> None:
        raise DeviceError("the GPU stopped")

    with pytest.raises(DeviceError, match="the GPU stopped"):
        run(rows(300), 2, fails, max_num_seqs=16)


def test_w5_an_error_of_the_model_ends_the_job_at_once():
    def fails(worker: int, step: Any) -> None:
        raise ModelError("no numbers")

    with pytest.raises(ModelError, match="no numbers"):
        run(rows(30), 2, fails)


def test_w5_a_worker_of_another_version_or_model_is_refused():
    fleet = Fleet(RunConfig.of(("-",), {"model": "fake", "workers": 2}), print)
    fleet._crew = crew = Threads(2, nothing)
    machine = crew.machine(1)
    crew.machine = lambda worker: replace(machine, version="9.9") if worker else machine
    with pytest.raises(UsageError, match=r"worker 2 on .* has bmx 9\.9"):
        fleet._open(crew)
    crew.machine, call = (lambda _: machine), crew.call
    crew.call = lambda worker, *a: replace(call(worker, *a), files="other") if worker else call(worker, *a)
    with pytest.raises(UsageError, match=r"worker 2 on .* has another model"):
        fleet._open(crew)


def test_few_rows_are_spread_over_all_workers():
    book = RowBook()
    for request in rows(9):
        book.add(request)
    shares = [len(book.share(worker, 100, [other for other in range(3) if other != worker])) for worker in range(3)]
    assert all(1 <= share <= 3 for share in shares)


def test_rows_that_share_their_text_go_to_one_worker():
    book = RowBook()
    documents = [f"document {i} " + f"says {i} " * 500 for i in range(6)]
    order = [(question, document) for question in range(8) for document in documents]
    for name, (question, document) in enumerate(order):
        book.add(Request(id=name, prompt=f"{document} question {question}"))
    homes: dict[str, set[int]] = {}
    worker = 0
    while taken := book.share(worker, 2, [1 - worker]):
        for request in taken:
            homes.setdefault(request.prompt[:10], set()).add(worker)
            book.answered(worker, Result(id=request.id))
        worker = 1 - worker
    assert len(homes) == 6
    assert all(len(workers) == 1 for workers in homes.values())
    assert book.held == 0


def test_what_the_driver_holds_is_bounded():
    book, read = RowBook(), 0
    endless = (Request(id=i, prompt="x") for i in range(10**9))
    fed = True
    while fed:
        while not book.full:
            book.add(next(endless))
            read += 1
        shares = [book.share(worker, 64, [1 - worker]) for worker in range(2)]
        fed = any(shares)
    assert read == book.held <= 2048 + 2 * (target(64) + 32)
