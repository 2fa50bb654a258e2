"""What the job around the model costs: rows per second and memory with a model that takes no time.

    taskset -c 0 python benchmarks/job.py [--rows 10000 2000000]

First the job layer alone, in this process: ids and keys of all rows into the ledger, then each row parsed, its
template filled, an invented result turned into a record, written and synced. Then ``bmx run`` in a process of its own:
the same, and the start of Python, measuring, tokenising twice and answering by the fake model under the real
scheduler, one token each. Rows are small. Prints rows per second and peak resident memory, then the ratio of the peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from bmx.job.input_rows import Reader
from bmx.job.journal import ExistingRecords, Journal, Ledger
from bmx.job.result_writer import ResultWriter
from bmx.request import KVUsage, Result, Usage
from bmx.stats import Stats

USAGE, KV = Usage(prompt_tokens=17, completion_tokens=1), KVUsage(budget=1024, kept=17, evicted=0)
LAYER_ROWS = 200_000
COMMAND = ["-m", "fake", "--prompt-template", "Summarize:{document}", "--max-num-seqs", "256", "-q"]
TEXT = "The ferry crossed the sound without a drop of fuel, and nobody on board had noticed."


def write_rows(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for i in range(rows):
            file.write(json.dumps({"id": f"row-{i}", "document": f"{i} {TEXT}", "max_tokens": 1}) + "\n")


def run(rows: int) -> tuple[float, int]:
    """Seconds and peak bytes of a job of ``rows`` rows."""
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


def layer(rows: int) -> float:
    """Seconds that the job layer takes for ``rows`` rows, without a model."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        write_rows(source, rows)
        before = time.monotonic()
        reader = Reader(paths=(source,), template="Summarize:{document}", hash_key=b"seed")
        with closing(Ledger()) as ledger:
            ledger.read(reader)
            todo = ledger.todo()
        stats = Stats()
        with closing(Journal(output, Path(folder, "errors.jsonl"), ExistingRecords())) as journal:
            writer = ResultWriter(add_record=journal.add, stats=stats)
            for row in reader.rows(todo.skip):
                writer.expect(row)
                writer.put(Result(id=row.id, text="w1", finish_reason="length", usage=USAGE, kv=KV))
        seconds = time.monotonic() - before
        if stats.rows_done != rows or stats.rows_failed:
            sys.exit(f"{stats.rows_done} of {rows} rows were written")
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 2_000_000])
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    seconds = layer(LAYER_ROWS)
    print(f"cores: {cores}")
    print(f"the job layer alone: {LAYER_ROWS:,} rows in {seconds:.2f} s, {LAYER_ROWS / seconds:,.0f} rows/s")
    print(f"bmx run IN {' '.join(COMMAND)}")
    peaks = []
    for rows in args.rows:
        for _ in range(args.repeat):
            seconds, peak = run(rows)
            print(f"{rows:>10,} rows: {seconds:8.2f} s, {rows / seconds:9,.0f} rows/s, peak {peak / 1e6:6.1f} MB")
        peaks.append(peak)
    print(f"peak memory of the last over the first: {peaks[-1] / peaks[0]:.2f}")


if __name__ == "__main__":
    main()
