"""What the job around the model costs: rows per second and memory with a model that takes no time.

    taskset -c 0 python benchmarks/job.py [--rows 10000 2000000]

Each run is ``bmx run`` in a process of its own, on small rows with a prompt template and one-token answers: reading,
checking ids, measuring, answering by the fake model under the real scheduler, writing, syncing. Prints rows per second
of the whole process, its start included, and its peak resident memory; then the ratio of the peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

COMMAND = ["-m", "fake", "--prompt-template", "Summarize:{document}", "--max-num-seqs", "256", "-q"]
TEXT = "The ferry crossed the sound without a drop of fuel, and nobody on board had noticed."


def write_rows(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for i in range(rows):
            file.write(json.dumps({"id": f"row-{i}", "document": f"{i} {TEXT}", "max_tokens": 1}) + "\n")


def run(rows: int) -> tuple[float, int]:
    """Seconds and peak bytes of a job of so many rows."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl")
        write_rows(source, rows)
        before = time.monotonic()
        child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-m", "bmx", "run", str(source), *COMMAND])
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - before
        with Path(folder, "in.out.jsonl").open("rb") as output:
            written = sum(1 for _ in output)
        if status or written != rows:
            sys.exit(f"the run of {rows} rows failed: status {status}")
        return seconds, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 2_000_000])
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    print(f"cores: {len(os.sched_getaffinity(0))}; bmx run IN {' '.join(COMMAND)}")
    peaks = []
    for rows in args.rows:
        for _ in range(args.repeat):
            seconds, peak = run(rows)
            print(f"{rows:>10,} rows: {seconds:8.2f} s, {rows / seconds:9,.0f} rows/s, peak {peak / 1e6:6.1f} MB")
        peaks.append(peak)
    print(f"peak memory of the last over the first: {peaks[-1] / peaks[0]:.2f}")


if __name__ == "__main__":
    main()
