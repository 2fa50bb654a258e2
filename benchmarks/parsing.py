"""Hostile input through ``bmx run``: the outcome of each line, and that no line is lost.

    python benchmarks/parsing.py --json-suite JSONTestSuite/test_parsing --naughty blns.json

The files of nst/JSONTestSuite (y_ must parse, n_ must not, i_ may) go in as values inside rows and as lines of their
own; the strings of minimaxir/big-list-of-naughty-strings as prompts, ids and fields of a template. The fake model
answers. Counts what was answered and what is an error, and fails if a line has no record or two, if anything written is
not strict JSON, or if a control character reaches the log.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def run(lines: list[bytes], *flags: str) -> tuple[dict[Any, str], Counter[str]]:
    """Each row's outcome, ``ok`` or an error code, by id; and how many of each."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "in.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        command = [sys.executable, "-m", "bmx", "run", "in.jsonl", "-m", "fake", "--max-tokens", "4", "-v", *flags]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        log = done.stderr.decode()
        if done.returncode not in (0, 3) or not all(line.isprintable() for line in log.splitlines()):
            sys.exit(f"the run ended with {done.returncode}:\n{log[-2000:]}")
        outcomes: dict[Any, str] = {}
        for path in Path(folder).glob("in.out.jsonl*"):
            if path.name.endswith(".run.json"):
                continue
            for line in path.read_bytes().split(b"\n")[:-1]:
                record = json.loads(line.decode(), parse_constant=no_constant)
                if record["id"] in outcomes:
                    sys.exit(f"{record['id']!r} has two records")
                outcomes[record["id"]] = record.get("error", {}).get("code", "ok")
    expected = sum(line.strip(b" \t\r\n") not in (b"", b"\xef\xbb\xbf") for text in lines for line in text.split(b"\n"))
    if len(outcomes) != expected:
        sys.exit(f"{expected} lines gave {len(outcomes)} records")
    return outcomes, Counter(outcomes.values())


def json_suite(folder: Path) -> None:
    files = sorted(folder.glob("*.json"))
    rows = {
        path.name: b'{"id": "%s", "prompt": "x", "data": %s}' % (path.name.encode(), path.read_bytes())
        for path in files
    }
    whole = {name: row for name, row in rows.items() if b"\n" not in row}
    outcomes, _ = run(list(whole.values()))
    for kind, meaning in (("y", "must parse"), ("n", "must not"), ("i", "may")):
        names = [name for name in whole if name.startswith(f"{kind}_")]
        good = [name for name in names if outcomes.get(name) == "ok"]
        errors = len(names) - len(good)
        print(f"{kind}_ ({meaning}): {len(names)} values inside rows, {len(good)} answered, {errors} errors")
        odd = set(names) - set(good) if kind == "y" else set(good) if kind == "n" else ()
        for name in sorted(odd):
            print(f"  {name}: {outcomes.get(name, 'an error under its line number')}")
    _, counts = run([row for name, row in rows.items() if name not in whole])
    print(f"{len(rows) - len(whole)} values with line breaks: {dict(counts)}")
    _, counts = run([path.read_bytes() for path in files])
    print(f"{len(files)} files as lines of their own: {dict(counts)}")


def naughty(path: Path) -> None:
    texts = json.loads(path.read_bytes())
    _, counts = run([json.dumps({"prompt": text}, ensure_ascii=False).encode() for text in texts])
    print(f"{len(texts)} strings as prompts: {dict(counts)}")
    distinct = list(dict.fromkeys(texts))
    outcomes, counts = run([json.dumps({"id": text, "prompt": "x"}).encode() for text in distinct])
    if set(outcomes) != set(distinct):
        sys.exit("an id has changed on its way")
    print(f"{len(distinct)} distinct ones as ids: {dict(counts)}")
    rows = [json.dumps({text: 1, "document": text, "extra": text}).encode() for text in texts]
    _, counts = run(rows, "--prompt-template", "Read: {document}")
    print(f"{len(texts)} as fields of a template and names of fields: {dict(counts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json-suite", type=Path)
    parser.add_argument("--naughty", type=Path)
    args = parser.parse_args()
    if args.json_suite:
        json_suite(args.json_suite)
    if args.naughty:
        naughty(args.naughty)


if __name__ == "__main__":
    main()
