"""The rows that the driver holds: those that wait, and those that are on board of a worker.

Knows which rows go where, and what becomes of rows whose worker died. Starts nothing and waits for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from bmx.engine.run import LOOKAHEAD
from bmx.engine.window import ROWS, Window, chained_keys
from bmx.errors import RowError
from bmx.request import Request, Result

MOST_CHARACTERS = 32 << 20  # of the prompts that the driver reads ahead
BEGINNINGS = tuple(256 << i for i in range(16))  # characters of a prompt that are compared with those of others
DEATHS_TOGETHER = 2  # deaths of workers with a row on board, from which on it is answered with few others or alone
FEWER = 8  # after such a death, a row is answered with this many times fewer others than before
DEATHS_ALONE = 3  # deaths of workers with nothing but this row on board, after which it is an error
MOST_SHARE = 256  # rows that are handed to a worker at once
MOST_TOGETHER = 32  # rows that follow them because they share their text
MOST_AHEAD = 2048  # waiting rows that keep any engine busy


def target(slots: int) -> int:
    """The number of rows that a worker should have on board: one for each of its slots, and twice as many that wait."""
    return slots + max(LOOKAHEAD, min(2 * slots, MOST_AHEAD))


@dataclass(slots=True)
class Held:
    """A row that the driver holds.

    Attributes:
        request: the row.
        deaths: of workers that had it on board.
        company: most rows that may be on board with it, itself included; None if that does not matter yet.
        died_on: workers that died with it.
        alone: how often one died with nothing else on board.
        keys: of the beginnings of its prompt.
    """

    request: Request
    keys: tuple[int, ...] = ()
    deaths: int = 0
    company: int | None = None
    died_on: set[int] = field(default_factory=set)
    alone: int = 0

    def goes_with(self, other: Held) -> bool:
        """Whether a quarter of its prompt, or more, is the beginning of another's too."""
        place = len(self.keys) - 2
        return 0 <= place < len(other.keys) and self.keys[place] == other.keys[place]


class RowBook:
    """The rows of a run that have no result yet, and that were read already."""

    def __init__(self) -> None:
        self._window: Window[Held] = Window(ROWS, MOST_CHARACTERS)
        self._first: deque[Held] = deque()  # before those in the window
        self._suspects: deque[Held] = deque()  # were on board of several workers that died
        self._on_board: dict[int, dict[str | int, Held]] = {}
        self._testing: set[int] = set()  # workers whose rows are suspects
        self._emptied: int | None = None  # the worker that gets no more rows, so that suspects can be alone on it
        self.most = 0  # rows that were held at once

    @property
    def waiting(self) -> int:
        """Rows that no worker has."""
        return self._fresh + len(self._suspects)

    @property
    def _fresh(self) -> int:
        return len(self._first) + len(self._window)

    @property
    def held(self) -> int:
        """All rows: those that wait, and those on board of workers."""
        return self.waiting + sum(map(len, self._on_board.values()))

    @property
    def full(self) -> bool:
        """Whether no more rows should be read for now."""
        return self._window.full or self.waiting >= ROWS

    def add(self, request: Request) -> None:
        """Take a row that was read."""
        text = _text_of(request)
        keys = chained_keys(text, [end for end in BEGINNINGS if end <= len(text)])
        self._window.add(Held(request, keys), keys, len(text))
        self.most = max(self.most, self.held)

    def tests(self, worker: int) -> bool:
        """Whether a worker has rows on board that may be the reason why others died."""
        return worker in self._testing

    def drop_waiting(self) -> None:
        """Forget the rows that no worker has: the run is to stop."""
        self._first.clear()
        self._window = Window(ROWS, MOST_CHARACTERS)
        self._suspects.clear()

    def on_board(self, worker: int) -> int:
        """Rows that a worker has."""
        return len(self._on_board.get(worker, ()))

    def share(self, worker: int, slots: int, others: Collection[int]) -> list[Request]:
        """Rows for a worker to take on board now; perhaps none.

        Rows that were on board of several workers that died go to one that has no other rows, in ever smaller groups.
        One worker at a time is emptied for them, and those that have nothing to do.

        Args:
            worker: its number.
            slots: of its plan.
            others: numbers of all other workers that answer rows.
        """
        board = self._on_board.setdefault(worker, {})
        if board and worker in self._testing:
            return []
        self._testing.discard(worker)
        if self._suspects and self._may_test(worker, others):
            if board and self._emptied in (None, worker):
                self._emptied = worker
                return []
            if not board:
                self._testing.add(worker)
                return self._taken(board, self._group_for(worker, others))
        self._emptied = None if self._emptied == worker else self._emptied
        room = target(slots) - len(board)
        even = -(-self._fresh // (2 * (1 + len(others))))
        if room < min(even, MOST_SHARE, max(1, slots // 4)):
            return []  # it has enough for now
        count = min(room, even, MOST_SHARE)
        rows = [self._next() for _ in range(count)]
        while rows and self._fresh and len(rows) < count + MOST_TOGETHER:
            following = self._next()
            if not following.goes_with(rows[-1]):
                self._first.appendleft(following)
                break
            rows.append(following)
        return self._taken(board, rows)

    def _next(self) -> Held:
        return self._first.popleft() if self._first else self._window.pop()

    def _may_test(self, worker: int, others: Collection[int]) -> bool:
        """Whether a suspect should go to this worker: where none has seen it die, or all have."""
        return any(self._suits(held, worker, others) for held in self._suspects)

    @staticmethod
    def _suits(held: Held, worker: int, others: Collection[int]) -> bool:
        return worker not in held.died_on or all(other in held.died_on for other in others)

    def _group_for(self, worker: int, others: Collection[int]) -> list[Held]:
        """Suspects that this worker is to answer together."""
        group: list[Held] = []
        for _ in range(len(self._suspects)):
            held = self._suspects.popleft()
            company = min(h.company or 1 for h in (*group, held))
            if len(group) < company and self._suits(held, worker, others):
                group.append(held)
            else:
                self._suspects.append(held)
        return group

    def _taken(self, board: dict[str | int, Held], rows: list[Held]) -> list[Request]:
        board.update((held.request.id, held) for held in rows)
        return [held.request for held in rows]

    def answered(self, worker: int, result: Result) -> bool:
        """Note a result; returns whether it is new. One of a row that the worker does not have is not."""
        return self._on_board.get(worker, {}).pop(result.id, None) is not None

    def died(self, worker: int, why: str) -> list[Result]:
        """A worker died: its rows wait again. Returns errors for rows that killed workers which had nothing else.

        Args:
            worker: its number.
            why: it died, for people.
        """
        rows, failed = list(self._on_board.pop(worker, {}).values()), []
        self._testing.discard(worker)
        self._emptied = None if self._emptied == worker else self._emptied
        for held in reversed(rows):
            held.deaths += 1
            held.died_on.add(worker)
            held.alone += len(rows) == 1
            if held.deaths < DEATHS_TOGETHER:
                self._first.appendleft(held)
            elif held.alone < DEATHS_ALONE:
                held.company = max(1, min(len(rows), held.company or len(rows)) // FEWER)
                self._suspects.append(held)
            else:
                message = f"its worker died each time that it was answered, in the end alone: {why}"
                failed.append(Result(id=held.request.id, error=RowError("worker_died", message)))
        return failed


def _text_of(request: Request) -> str:
    """What a row may share with others."""
    if request.messages is None:
        return request.prompt or ""
    return "\n".join(str(message.get("content")) for message in request.messages)
