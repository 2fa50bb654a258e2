"""Kills workers at random moments, and compares the answers with those of one engine that nobody disturbs.

The test does it a few times. ``python tests/kill_workers.py`` kills 50 workers of three with the fake model, and 5 with
the demo model; ``python tests/kill_workers.py fake 200`` says which model and how many.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from threading import Thread

from bmx import Engine
from bmx.cluster.fleet import Fleet
from bmx.request import Request, Result, SamplingParams
from bmx.run_config import RunConfig
from bmx.shutdown import Stop
from bmx.stats import Stats

MEASURED = 300  # rows that the plans are made for


def row(number: int) -> Request:
    """A row by its number, with a prompt and a length of its own. None is longer than the first, which are measured."""
    prompt = f"row {number:06}: " + "word " * (number % 13)
    return Request(id=number, prompt=prompt, params=SamplingParams(max_tokens=4 + number % 23, temperature=number % 2))


class Killer(Thread):
    """Kills random workers, each some time after the last, until there were enough.

    Args:
        fleet: has the workers.
        kills: how many times.
        within: most seconds between a worker's being seen at work and its end.
        random_numbers: choose workers and moments.
    """

    def __init__(self, fleet: Fleet, kills: int, within: float, random_numbers: random.Random) -> None:
        super().__init__(daemon=True)
        self._fleet, self._kills, self._within, self._random = fleet, kills, within, random_numbers
        self.killed: Counter[int] = Counter()

    def run(self) -> None:
        """Kill; a worker counts when the system says that its process was there."""
        while self.killed.total() < self._kills:
            time.sleep(self._random.uniform(0, self._within))
            state = self._random.choice(self._fleet.workers)
            try:
                os.kill(state.machine.pid, signal.SIGKILL)
            except OSError:
                continue
            self.killed[state.number] += 1

    @property
    def is_done(self) -> bool:
        """Whether it has killed enough."""
        return self.killed.total() >= self._kills


def disturbed(fleet: Fleet, killer: Killer, least: int) -> tuple[list[Result], int]:
    """The results of a run in which the killer kills, and how many rows it had."""
    asked = 0

    def endless() -> Iterator[Request]:
        nonlocal asked
        while asked < least or not killer.is_done:
            asked += 1
            yield row(asked)

    killer.start()
    return list(fleet.run(endless(), stats=Stats(), stop=Stop())), asked


def compare(model: str, kills: int, within: float, least: int) -> str:
    """Run with kills, and say what was compared.

    Raises:
        SystemExit: the answers are not those of one engine.
    """
    config = RunConfig.of(("-",), {"model": model, "workers": 3, "device": "cpu"})
    seed = random.SystemRandom().randrange(1 << 30)
    notes: list[str] = []
    with Fleet.open(config, notes.append) as fleet:
        fleet.plan(fleet.measure(map(row, range(MEASURED))))
        killer = Killer(fleet, kills, within, random.Random(seed))
        found, asked = disturbed(fleet, killer, least)
        killer.join()
    line = f"{model}, seed {seed}: kills of workers {dict(sorted(killer.killed.items()))}, {asked:,} rows"
    if wrong := compared(model, found, asked):
        sys.exit(f"{line}: {wrong}\n" + "\n".join(notes))
    return f"{line}: all answered once, as by one engine"


def compared(model: str, found: list[Result], asked: int) -> str:
    """What is wrong with the results of the first rows, compared with those of one engine; empty if nothing is."""
    alone = Engine.open(model, device="cpu").run(map(row, range(1, asked + 1)))
    expected = {result.id: said(result) for result in alone}
    ids = Counter(result.id for result in found)
    twice = [name for name, count in ids.items() if count > 1]
    lost = sorted(expected.keys() - ids.keys())
    other = [(expected.get(result.id), said(result)) for result in found if expected.get(result.id) != said(result)]
    wrong = {"twice": twice, "lost": lost, "other answers": other}
    return ", ".join(f"{len(rows)} {name}: {rows[:3]}" for name, rows in wrong.items() if rows)


def said(result: Result) -> tuple[str, str | None]:
    """What is compared of a result: its text, and its error."""
    return result.text, result.error and f"{result.error.code}: {result.error.message}"


if __name__ == "__main__":
    if len(sys.argv) > 2:
        lines = [compare(sys.argv[1], int(sys.argv[2]), within=2.0, least=1)]
    else:
        lines = [compare("fake", 50, within=1.5, least=1), compare("demo", 5, within=20.0, least=400)]
    sys.stdout.write("\n".join(lines) + "\n")
