"""What prefix reuse saves: the same rows with and without it, where prompts share leading text.

    python benchmarks/prefix.py [--rows 8] [--new-tokens 16] [--kv-budget 1024]

Two sets on the demo model, on the CPU: rows of 60 tokens behind a system prompt of 400, and eight questions of 20
tokens about a document of 3,000. Both sides answer the same number of tokens. Prints for each side the prompt tokens
that were computed and copied, the slots and the seconds, then the ratio of seconds and how many answers are equal;
answers in bfloat16 may differ by rounding.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from bmx import Engine, EngineConfig, Request, SamplingParams
from bmx.units import parse_budget

SAMPLES = Path(__file__).parent.parent / "sample_inputs" / "long_documents.jsonl"


def sample_ids(tokenizer) -> list[int]:
    """Token ids of the sample documents, one after the other."""
    lines = SAMPLES.read_text(encoding="utf-8").strip().split("\n")
    text = "\n\n".join(json.loads(line)["prompt"].split("\n\n", 1)[1] for line in lines)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rows_of(tokenizer, ids, shared, own, count, new_tokens) -> list[Request]:
    """``count`` rows of ``shared`` tokens that are the same in all and ``own`` that are not."""
    first = tokenizer.decode(ids[:shared])
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    ends = [tokenizer.decode(ids[start : start + own]) for start in range(shared, shared + count * own, own)]
    return [Request(id=str(i), prompt=f"{first}\n\n{end}", params=params) for i, end in enumerate(ends)]


def answered(engine, requests):
    """Seconds that the run takes without planning, and the answers' token ids by request."""
    plan = engine.plan(engine.measure(requests))
    before = time.perf_counter()
    token_ids = {result.id: result.token_ids for result in engine.run(requests, plan)}
    seconds = time.perf_counter() - before
    stats, copies = engine.stats, sum(part.slots for part in plan.prefix_slots)
    print(
        f"  reuse {'on ' if engine.config.prefix_reuse else 'off'}: {stats.prompt_tokens:,} prompt tokens computed, "
        f"{stats.reused_prompt_tokens:,} copied; {plan.slots} slots and {copies} for copies; "
        f"{seconds:.1f} s"
    )
    return seconds, token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--kv-budget", type=parse_budget, default=1024)
    args = parser.parse_args()
    engine = Engine.open(EngineConfig(device="cpu", kv_budget=args.kv_budget))
    ids = sample_ids(engine.tokenizer)
    sets = {
        f"{args.rows} rows of 60 tokens behind a system prompt of 400": (400, 60, args.rows),
        "8 questions of 20 tokens about a document of 3,000": (3000, 20, 8),
    }
    list(engine.stream(rows_of(engine.tokenizer, ids[5000:], 100, 20, 2, 2)))  # warm up
    for name, (shared, own, count) in sets.items():
        requests = rows_of(engine.tokenizer, ids, shared, own, count, args.new_tokens)
        print(f"{name}, {args.new_tokens} new tokens each, KV budget {args.kv_budget}:", flush=True)
        engines = [engine.with_config(replace(engine.config, prefix_reuse=reuse)) for reuse in (False, True)]
        sides = [answered(one, requests) for one in engines]
        (off, plain), (on, reused) = sides
        same = sum(plain[name] == reused[name] for name in plain)
        print(f"  {off / on:.2f} times as fast with reuse; {same} of {len(plain)} answers are the same")


if __name__ == "__main__":
    main()
