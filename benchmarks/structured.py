"""What formats of answers cost: the same rows with a JSON schema and without, and the parts of that cost.

    python benchmarks/structured.py [--rows 1 8 32] [--new-tokens 128] [--repeat 3]

On the demo model, on the CPU. Rows of about 100 tokens answer with the same number of tokens on both sides: without a
format past the model's end token, with one inside an array that is too long to end. Prints for each number of rows
the seconds of each side (median of the repetitions, in turn), the share of rows with a format, and the ratio. Then the
time to read the tokenizer, to compile schemas, and to find the tokens of one row, beside the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from bmx import Engine, EngineConfig, Request, SamplingParams
from bmx.engine.grammar import Grammars

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["person", "place", "thing"]},
        "year": {"type": "integer", "minimum": 0, "maximum": 2100},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 5},
    },
    "required": ["name", "kind", "year", "tags"],
    "additionalProperties": False,
}
LONG = {"type": "array", "items": RECORD, "minItems": 1000}
TEXT = "Once there was a lighthouse keeper who kept a list of all the ships that passed. " * 4


def rows(count: int, with_format: int, new_tokens: int) -> list[Request]:
    """Requests of which the first ``with_format`` have a format."""
    free = SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0.7)
    bound = SamplingParams(max_tokens=new_tokens, temperature=0.7, stop_repetition=False, json_schema=json.dumps(LONG))
    return [
        Request(id=str(i), prompt=f"{TEXT}List ship number {i} as JSON.", params=bound if i < with_format else free)
        for i in range(count)
    ]


def seconds_of(engine: Engine, requests: list[Request], new_tokens: int) -> float:
    """Seconds that the run takes without planning."""
    plan = engine.plan(engine.measure(requests))
    before = time.perf_counter()
    results = list(engine.run(requests, plan))
    seconds = time.perf_counter() - before
    if any(result.error or len(result.token_ids) != new_tokens for result in results):
        raise SystemExit("the sides do not answer with the same number of tokens")
    return seconds


def parts(engine: Engine) -> None:
    """The time of each part of a format."""
    grammars = Grammars(engine.tokenizer, engine.spec.vocab, engine.backend.end_token_ids)
    before = time.perf_counter()
    matcher = grammars.of(SamplingParams(guided_regex="a")).begin()
    print(f"tokenizer read once: {time.perf_counter() - before:.2f} s, {grammars.host_bytes / 1e6:.0f} MB")
    for fields in (5, 50, 500):
        schema = {"type": "object", "properties": {f"field{i}": RECORD for i in range(fields)}}
        text = json.dumps(schema)
        before = time.perf_counter()
        grammars.of(SamplingParams(json_schema=text))
        print(f"schema of {len(text):,} characters compiled: {1e3 * (time.perf_counter() - before):.1f} ms")
    matcher = grammars.of(SamplingParams(json_schema=json.dumps(LONG))).begin()
    answer = json.dumps([{"name": "Aurora", "kind": "thing", "year": 1887, "tags": ["ship", "tall"]}] * 20)[:-1]
    times = []
    for token in engine.tokenizer(answer, add_special_tokens=False)["input_ids"]:
        before = time.perf_counter()
        matcher.state.compute_bitmask()
        times.append(1e6 * (time.perf_counter() - before))
        matcher.accept(token)
    times.sort()
    half, most = times[len(times) // 2], times[int(0.99 * len(times))]
    print(f"tokens of one row found: {half:.0f} us (median of {len(times)}), 99 % within {most:.0f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    engine = Engine.open(EngineConfig(device="cpu"))
    parts(engine)
    for count in args.rows:
        seconds_of(engine, rows(count, count, args.new_tokens), args.new_tokens)  # warm up
        measured: dict[int, list[float]] = {share: [] for share in sorted({0, -(-count // 2), count})}
        for _ in range(args.repeat):
            for share, seconds in measured.items():
                seconds.append(seconds_of(engine, rows(count, share, args.new_tokens), args.new_tokens))
        free = statistics.median(measured[0])
        for share, seconds in measured.items():
            median = statistics.median(seconds)
            print(
                f"{count} rows of {args.new_tokens} tokens, {share} with a schema: {median:.2f} s "
                f"({min(seconds):.2f} to {max(seconds):.2f}), {median / free:.3f} x of none",
                flush=True,
            )


if __name__ == "__main__":
    main()
