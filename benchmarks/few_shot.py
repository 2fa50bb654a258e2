"""What it saves to read shared text in place: a few-shot job with it, with copies of that text, and without reuse.

    python benchmarks/few_shot.py [--rows 160] [--slots 9]

Rows of 100 tokens of their own behind 1,500 that all share, with 20 new tokens each, on the demo model and the CPU,
with the full cache. All three sides have the same --kv-cache-memory: that of ``--slots`` slots, each for a whole row.
Prints for each side the slots, the prompt tokens that were computed, the tokens a second of the steps that only decode,
and the seconds of the job; then the ratios. Answers in bfloat16 are the same to the last bit on all sides.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace

from prefix import sample_ids

from bmx import Engine, EngineConfig, Request, SamplingParams

SHARED, OWN, NEW = 1500, 100, 20  # tokens


def job(tokenizer, count) -> list[Request]:
    """Rows of words in random order behind a text that is the same in all."""
    ids, draw = sample_ids(tokenizer), random.Random(0)
    first, words = tokenizer.decode(ids[:SHARED]), ids[SHARED:]
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    ends = [tokenizer.decode(draw.sample(words, OWN - 20)) for _ in range(count)]
    return [Request(id=str(i), prompt=f"{first}\n\nItem {i}: {end}", params=params) for i, end in enumerate(ends)]


def answered(name, engine, requests, in_place):
    """Slots, tokens a second and seconds of one side, and the answers' token ids."""
    lengths = engine.measure(requests)
    plan = engine.plan(lengths if in_place else [replace(length, in_place=0) for length in lengths])
    before = time.perf_counter()
    token_ids = {result.id: result.token_ids for result in engine.run(requests, plan)}
    seconds, stats = time.perf_counter() - before, engine.stats
    print(
        f"  {name}: {plan.slots} slots, {sum(group.slots for group in plan.shared_slots)} shared; "
        f"{stats.prompt_tokens:,} prompt tokens computed; {stats.decode_rate:.0f} tokens/s decoding; {seconds:.1f} s",
        flush=True,
    )
    return plan.slots, stats.decode_rate, seconds, token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--slots", type=int, default=9)
    args = parser.parse_args()
    engine = Engine.open(EngineConfig(device="cpu", kv_policy="none"))
    requests = job(engine.tokenizer, args.rows)
    largest = max(length.rows_needed for length in engine.measure(requests))
    memory = args.slots * engine.policy.layout(engine.spec, largest).nbytes
    config = replace(engine.config, kv_cache_memory=memory)
    sides = {
        "in place": (engine.with_config(config), True),
        "copies": (engine.with_config(config), False),
        "no reuse": (engine.with_config(replace(config, prefix_reuse=False)), False),
    }
    print(
        f"{args.rows} rows of up to {largest:,} rows of a slot each, {memory / 1e6:,.0f} MB of KV memory:", flush=True
    )
    list(engine.stream(requests[:2]))  # warm up
    results = {name: answered(name, one, requests, in_place) for name, (one, in_place) in sides.items()}
    slots, rate, seconds, token_ids = results.pop("in place")
    for name, (other_slots, other_rate, other_seconds, others) in results.items():
        same = sum(token_ids[row] == others[row] for row in token_ids)
        print(
            f"  against {name}: {slots / other_slots:.1f} times the slots, {rate / other_rate:.2f} times the tokens/s "
            f"decoding, {other_seconds / seconds:.2f} times as fast; {same} of {len(token_ids)} answers are the same"
        )


if __name__ == "__main__":
    main()
