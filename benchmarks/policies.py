"""The speed of each policy: prefill and decode tokens a second, against the full cache.

python benchmarks/policies.py [--rounds 2] [--only archive]

Prompts of random tokens on the demo model. Policies take turns, round after round, and the best round of each counts.
The full cache reads chunks of the same size. Prints tokens a second, and their ratios to the full cache's.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace

from bmx import Engine, EngineConfig, Request, SamplingParams
from bmx.policies import POLICIES

DEFAULT = EngineConfig().kv_policy
CONFIGS = {name: {"kv_policy": name} for name in ("none", *(p for p in POLICIES if p != "none"))} | {
    f"{DEFAULT}, value norm": {"kv_value_norm": True},
    f"{DEFAULT}, probe of 12 tokens": {"kv_probe": "Now write a short summary of all the passages above."},
    **{f"{DEFAULT}, {stored}": {"kv_format": stored} for stored in ("int8", "int8/int4", "int4")},
    **{f"archive, {stored}": {"kv_archive": stored} for stored in ("model", "int8/int4", "int4")},
    **{f"none, {stored}": {"kv_policy": "none", "kv_format": stored} for stored in ("int8", "int8/int4", "int4")},
}


def measure(engine: Engine, requests: list[Request], answer: int) -> tuple[float, float]:
    """Prompt tokens and decoded tokens a second."""
    requests = [replace(r, params=SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)) for r in requests]
    plan = engine.plan(engine.measure(requests))
    for result in engine.run(requests, plan):
        if result.error:
            raise result.error
    return engine.stats.prefill_rate, engine.stats.decode_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--answer", type=int, default=33)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--only", default="", help="caches whose names begin so, beside the full cache: archive,none")
    args = parser.parse_args()
    begins = tuple(args.only.split(","))
    configs = {name: settings for name, settings in CONFIGS.items() if name == "none" or name.startswith(begins)}
    base = EngineConfig(kv_budget=args.budget, kv_format="model", chunk_size=512, prefix_reuse=False)
    engine = Engine.open(base)
    draw = random.Random(0)
    words = [engine.tokenizer.decode([i]) for i in range(1000, 9000)]
    texts = ["".join(draw.choices(words, k=args.tokens)) for _ in range(args.prompts)]
    requests = [Request(id=i, prompt=text) for i, text in enumerate(texts)]
    lengths = engine.measure(requests)
    print(f"{args.prompts} prompts of {lengths[0].prompt_tokens} tokens, budget {args.budget}, chunks of 512")
    best = dict.fromkeys(configs, (0.0, 0.0))
    for _ in range(args.rounds):
        for name, settings in configs.items():
            configured = engine.with_config(replace(base, **settings))
            best[name] = tuple(map(max, best[name], measure(configured, requests, args.answer)))
    full = best["none"]
    print(f"{'cache':40} {'prefill tok/s':>13} {'of full':>8} {'decode tok/s':>13} {'of full':>8}")
    for name, (prefill, decode) in best.items():
        print(f"{name:40} {prefill:13,.0f} {prefill / full[0]:8.2f} {decode:13,.1f} {decode / full[1]:8.2f}")


if __name__ == "__main__":
    main()
