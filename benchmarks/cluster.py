"""Workers by Ray on this machine: against one engine, and how much their driver can do.

    python benchmarks/cluster.py [--rows 48] [--fake-rows 100000] [--fake-workers 8]

1. Two workers of one thread each against one engine of two threads, on the same rows with the demo model: seconds of
   answering, loading and planning left out, and their ratio. The sides alternate.
2. The driver with workers whose model takes no time: rows per second of wall time and of the driver's own processor
   time. The workers share this machine's cores, so that wall time is theirs where there are few cores.
3. The most rows that the driver held at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from bmx import Engine
from bmx.cluster.fleet import Fleet
from bmx.request import Request, SamplingParams
from bmx.run_config import RunConfig
from bmx.shutdown import Stop
from bmx.stats import Stats

WORKERS = 2
TEXT = "The ferry crossed the sound without a drop of fuel, and nobody on board had noticed. "
ALONE = "one engine"


def demo_rows(count: int) -> list[Request]:
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    return [Request(id=i, prompt=f"{i}: " + TEXT * (2 + i % 6), params=params) for i in range(count)]


def fake_rows(count: int) -> Iterator[Request]:
    return (Request(id=i, prompt=f"{i} {TEXT}", params=SamplingParams(max_tokens=1)) for i in range(count))


def engine_seconds(rows: list[Request], threads: int) -> float:
    """Seconds that one engine takes, in a process of its own with this number of threads."""
    command = [sys.executable, __file__, "--side", ALONE, "--rows", str(len(rows))]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def alone(rows: list[Request]) -> float:
    engine = Engine.open("demo", device="cpu")
    plan = engine.plan(engine.measure(rows))
    began = time.perf_counter()
    for _ in engine.run(iter(rows), plan):
        pass
    return time.perf_counter() - began


def fleet_seconds(rows: list[Request], workers: int) -> float:
    os.environ["OMP_NUM_THREADS"] = "1"  # of each worker
    with Fleet.open(RunConfig.of(("-",), {"model": "demo", "device": "cpu", "workers": workers}), print) as fleet:
        fleet.plan(fleet.measure(rows))
        began = time.perf_counter()
        for _ in fleet.run(iter(rows), stats=Stats(rows_total=len(rows)), stop=Stop()):
            pass
        return time.perf_counter() - began


def driver(count: int, workers: int) -> None:
    config = RunConfig.of(("-",), {"model": "fake", "workers": workers, "max_num_seqs": 256})
    with Fleet.open(config, print) as fleet:
        fleet.plan(fleet.measure(fake_rows(1000)))
        wall, own = time.perf_counter(), time.process_time()
        results = sum(1 for _ in fleet.run(fake_rows(count), stats=Stats(rows_total=count), stop=Stop()))
        wall, own = time.perf_counter() - wall, time.process_time() - own
        print(f"driver with {workers} fake workers: {results:,} rows in {wall:.1f} s of wall time ({count / wall:,.0f}")
        print(
            f"rows/s), {own:.2f} s of its processor time ({count / own:,.0f} rows/s); held {fleet.most_held:,} at most"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fake-rows", type=int, default=100_000)
    parser.add_argument("--fake-workers", type=int, default=8)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = demo_rows(args.rows)
    if args.side:
        print(json.dumps(alone(rows)))
        return
    driver(args.fake_rows, args.fake_workers)
    for _ in range(args.rounds):
        one, several = engine_seconds(rows, WORKERS), fleet_seconds(rows, WORKERS)
        print(
            f"{args.rows} rows: one engine of {WORKERS} threads {one:.2f} s, {WORKERS} workers of one {several:.2f} s,"
        )
        print(f"ratio {one / several:.3f}")


if __name__ == "__main__":
    main()
