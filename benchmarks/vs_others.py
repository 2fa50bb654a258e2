"""bmx against other tools on rows of rendered prompts, one after the other in one run: prompts a minute, and ratios.

    python benchmarks/vs_others.py long.jsonl --new 64 --rounds 2 \\
        --side int8="--quantization int8" \\
        --other openvino="venv-ov/bin/python run_ov.py --input long.jsonl --output ov.jsonl --kv-bytes 300e6 ..."

A line of the input has a ``prompt`` with all control tokens in it. bmx runs in a process of its own, as each of the
others does: theirs must print, as the last line that begins with {, a JSON object with ``prompts_per_min`` (model
loading left out). All ignore the end token. Rounds take turns, so that a slow phase of the machine meets every side;
the figures are medians, and each round's are printed too.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from vs_generate import timed

from bmx.units import parse_bytes

MANNER = ("chunk_size", "kv_policy", "kv_budget", "kv_format", "quantization", "dtype", "max_num_batched_tokens")


def answer(args: argparse.Namespace, given: dict) -> dict:
    """Answer all rows with bmx in this process."""
    from bmx import Engine, EngineConfig, PromptConfig, Request, SamplingParams

    settings = {"model": args.model, "device": "cpu", "kv_budget": args.budget, "kv_cache_memory": args.kv}
    engine = Engine.open(EngineConfig(**settings | given), PromptConfig(parse_special_tokens=True))
    params = SamplingParams(max_tokens=args.new, ignore_eos=True)
    lines = args.input.read_text(encoding="utf-8").splitlines()
    requests = [
        Request(id=str(i), prompt=json.loads(line)["prompt"], params=params, raw=True) for i, line in enumerate(lines)
    ]
    started = time.perf_counter()
    plan = engine.plan(engine.measure(requests))
    planned = time.perf_counter() - started
    with timed() as timing:
        results = list(engine.run(requests, plan))
    if any(r.error or r.usage.completion_tokens != args.new for r in results):
        raise SystemExit("bmx did not answer every prompt in full")
    stats = engine.stats
    return {
        "prompts_per_min": round(60 * len(results) / timing.seconds, 2),
        "generate_s": round(timing.seconds, 2),
        "plan_s": round(planned, 2),
        "other_cpu_s": round(timing.others, 2),
        "prompt_tokens": sum(r.usage.prompt_tokens for r in results),
        "slots": plan.slots,
        "kv_mb": round(stats.kv_bytes / 1e6),
        "prefill_tok_s": round(stats.prefill_rate),
        "decode_tok_s": round(stats.decode_rate),
        "peak_rss_mb": round(stats.peak_memory_bytes / 1e6),
        "kernels": engine.backend.kernels.name,
    }


def timed_side(command: list[str]) -> dict:
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return json.loads([line for line in lines if line.startswith("{")][-1])


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("input", type=Path)
    ask.add_argument("--model", default="demo")
    ask.add_argument("--new", type=int, default=64)
    ask.add_argument("--kv", type=parse_bytes, default=300_000_000)
    ask.add_argument("--budget", type=int, default=512)
    ask.add_argument("--rounds", type=int, default=1)
    ask.add_argument("--side", action="append", default=[], help="NAME=FLAGS: bmx once more, with these settings too")
    ask.add_argument("--other", action="append", default=[], help="NAME=COMMAND: another tool")
    ask.add_argument("--alone", action="store_true", help="run bmx alone, in this process, and print its JSON line")
    for name in MANNER:
        ask.add_argument(f"--{name.replace('_', '-')}", help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.alone:
        given = {name: getattr(args, name) for name in MANNER if getattr(args, name) is not None}
        given = {name: int(value) if value.isdigit() else value for name, value in given.items()}
        print(json.dumps(answer(args, given)))
        return
    same = ["--model", args.model, "--new", str(args.new), "--kv", str(args.kv), "--budget", str(args.budget)]
    own = [sys.executable, __file__, str(args.input), "--alone", *same]
    sides = {"bmx": own}
    for text in args.side:
        name, flags = text.split("=", 1)
        sides[f"bmx {name}"] = [*own, *shlex.split(flags)]
    others = [text.split("=", 1) for text in args.other]
    sides |= {name: shlex.split(command) for name, command in others}
    rates_by_side: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name, command in sides.items():
            line = timed_side(command)
            rates_by_side[name].append(line["prompts_per_min"])
            print(f"round {number + 1}  {name}: {json.dumps(line)}", flush=True)
    rates = {name: statistics.median(values) for name, values in rates_by_side.items()}
    print(f"\n{args.input.name}, {args.new} new tokens each, {args.kv / 1e6:.0f} MB of KV; medians of {args.rounds}")
    for name, rate in rates.items():
        ratios = ", ".join(f"{rate / rates[other]:.2f} x {other}" for other, _ in others if other != name)
        print(f"{name:20} {rate:6.2f} prompts/min  {ratios}")


if __name__ == "__main__":
    main()
