"""What prefix reuse saves: the same rows with and without it, where prompts share leading text.

    python benchmarks/prefix.py [--set shuffled] [--rows 8] [--documents 12] [--new-tokens 16] [--kv-budget 1024]

Sets on the demo model, on the CPU; all sides of a set answer the same number of tokens:

- ``system``: rows of 60 tokens behind a system prompt of 400;
- ``document``: eight questions of 20 tokens about a document of 3,000;
- ``shuffled``: eight such questions about each of twelve documents, in any order and as neighbours;
- ``nothing``: rows of 200 tokens that share nothing. Without the window, and with it, which a plan for rows that share
  nothing leaves out: its cost is what a job pays of which few rows share something.

Prints for each side the prompt tokens that were computed and copied, the slots and the seconds, then the ratio of
seconds to the first side and how many answers are equal; answers in bfloat16 may differ by rounding.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

from bmx import Engine, EngineConfig, Request, SamplingParams
from bmx.plan.memory import SlotGroup
from bmx.units import parse_budget

SAMPLES = Path(__file__).parent.parent / "sample_inputs" / "long_documents.jsonl"
SETS = ("system", "document", "shuffled", "nothing")


def sample_ids(tokenizer) -> list[int]:
    """Token ids of the sample documents, one after the other."""
    lines = SAMPLES.read_text(encoding="utf-8").strip().split("\n")
    text = "\n\n".join(json.loads(line)["prompt"].split("\n\n", 1)[1] for line in lines)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rows_of(tokenizer, ids, shared, own, count, new_tokens, name="") -> list[Request]:
    """``count`` rows of ``shared`` tokens that are the same in all and ``own`` that are not."""
    first = tokenizer.decode(ids[:shared])
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    ends = [tokenizer.decode(ids[start : start + own]) for start in range(shared, shared + count * own, own)]
    return [Request(id=f"{name}{i}", prompt=f"{first}\n\n{end}", params=params) for i, end in enumerate(ends)]


def about_documents(tokenizer, ids, args) -> list[Request]:
    """Eight questions of 20 tokens about each document of 3,000, which is the samples' tokens in another order."""
    rows = []
    for i in range(args.documents):
        pieces = [ids[start : start + 50] for start in range(0, 3200, 50)]
        random.Random(i).shuffle(pieces)
        rows += rows_of(tokenizer, [*chain.from_iterable(pieces)], 3000, 20, 8, args.new_tokens, f"{i}/")
    return rows


def alone(tokenizer, ids, args) -> list[Request]:
    """Rows of 200 tokens that share nothing."""
    params = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True)
    parts = [random.Random(i).sample(ids, 200) for i in range(8 * args.rows)]
    return [Request(id=str(i), prompt=tokenizer.decode(part), params=params) for i, part in enumerate(parts)]


def answered(name, engine, requests, plan=None):
    """Seconds that the run takes without planning, and the answers' token ids by request."""
    plan = plan or engine.plan(engine.measure(requests))
    before = time.perf_counter()
    token_ids = {result.id: result.token_ids for result in engine.run(requests, plan)}
    seconds = time.perf_counter() - before
    stats, copies = engine.stats, sum(part.slots for part in plan.prefix_slots)
    print(
        f"  {name}: {stats.prompt_tokens:,} prompt tokens computed, {stats.reused_prompt_tokens:,} copied; "
        f"{plan.slots} slots and {copies} for copies; {seconds:.1f} s",
        flush=True,
    )
    return seconds, token_ids


def compare(first, *others) -> None:
    """Print how fast the others are, beside the first side."""
    for seconds, token_ids in others:
        same = sum(token_ids[name] == first[1][name] for name in token_ids)
        print(f"  {first[0] / seconds:.3f} times as fast; {same} of {len(token_ids)} answers are the same")


def with_spare_slot(plan):
    """The plan with a slot for copies, so that rows pass through the window; one slot of the others makes room."""
    layout = plan.layouts[0]
    return replace(plan, prefix_slots=(SlotGroup(plan.groups[0].capacity, 1),), layouts=(*plan.layouts, layout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, action="append")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--kv-budget", type=parse_budget, default=1024)
    args = parser.parse_args()
    on = Engine.open(EngineConfig(device="cpu", kv_budget=args.kv_budget))
    off = on.with_config(replace(on.config, prefix_reuse=False))
    ids = sample_ids(on.tokenizer)
    list(on.stream(rows_of(on.tokenizer, ids[5000:], 100, 20, 2, 2)))  # warm up
    for name in args.set or SETS:
        print(f"{name}, {args.new_tokens} new tokens each, KV budget {args.kv_budget}:", flush=True)
        if name == "nothing":
            requests = alone(on.tokenizer, ids, args)
            plan = on.plan(on.measure(requests))
            compare(
                *(
                    answered(*side)
                    for side in (
                        ("without the window", off, requests, plan),
                        ("with the window", on, requests, with_spare_slot(plan)),
                        ("without the window", off, requests, plan),
                        ("with the window", on, requests, with_spare_slot(plan)),
                    )
                )
            )
            continue
        if name == "shuffled":
            requests = about_documents(on.tokenizer, ids, args)
            shuffled = random.Random(0).sample(requests, len(requests))
            compare(
                answered("without reuse", off, shuffled),
                answered("with reuse, shuffled", on, shuffled),
                answered("with reuse, neighbours", on, requests),
                answered("with reuse, shuffled", on, shuffled),
                answered("with reuse, neighbours", on, requests),
            )
            continue
        shared, own, count = (400, 60, args.rows) if name == "system" else (3000, 20, 8)
        requests = rows_of(on.tokenizer, ids, shared, own, count, args.new_tokens)
        compare(answered("without reuse", off, requests), answered("with reuse", on, requests))


if __name__ == "__main__":
    main()
