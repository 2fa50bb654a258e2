"""bmx against transformers' generate on the demo model: the same prompts, tokens, type and KV memory, in one process.

    python benchmarks/vs_generate.py                      # 24 prompts of about 3,000 tokens, 64 new each, 300 MB of KV
    python benchmarks/vs_generate.py --input mine.jsonl   # prompts of your own
    python benchmarks/vs_generate.py --shape qwen3.5-0.8b --tokens 2000 --batches 1   # random weights and prompts

Both sides ignore the end token, so that both generate exactly the same number of tokens. ``generate`` runs static
batches, longest prompts first, each of as many rows as fit the KV memory when padded. With ``--batches N`` it runs the
first N batches alone, and its rate is that of the prompts in them. The states of mixers count as KV memory on both
sides. Both are warmed up; the time of bmx includes tokenising and detokenising, that of ``generate`` does not. On the
CPU. Prints a line a side, then the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bmx import Engine, EngineConfig, PromptConfig, Request, SamplingParams
from bmx.engine.backend import ModelBackend
from bmx.model.random_models import SHAPES, IdTokenizer, make_random_model
from bmx.plan.roofline import weights_read
from bmx.units import parse_bytes

SAMPLES = Path(__file__).parent.parent / "sample_inputs" / "long_documents.jsonl"
INSTRUCTION = "Summarize the following text in three sentences.\n\n"


@dataclass
class Timing:
    """Seconds of one side, and CPU seconds that other processes took meanwhile (0 on a quiet machine)."""

    seconds: float = 0.0
    others: float = 0.0


@contextmanager
def timed():
    timing, wall, own, busy = Timing(), time.perf_counter(), time.process_time(), machine_busy()
    yield timing
    timing.seconds = time.perf_counter() - wall
    timing.others = max(0.0, machine_busy() - busy - (time.process_time() - own))


def machine_busy() -> float:
    """CPU seconds of the whole machine since it started."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def matmul_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of the best of some square products."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def read_rate(size: int = 300_000_000) -> float:
    """Bytes/s of the best of some passes that read memory and write none."""
    block = torch.randint(100, (size // 4,), dtype=torch.int32)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        block.max()
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best


def sample_prompts(tokenizer, count: int, tokens: int) -> list[str]:
    """``count`` summarisation prompts of about ``tokens`` tokens, each from another place in the sample documents."""
    lines = SAMPLES.read_text(encoding="utf-8").strip().split("\n")
    text = "\n\n".join(json.loads(line)["prompt"].split("\n\n", 1)[1] for line in lines)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spread = [tokens - 100 + (i * 37) % 200 for i in range(count)]
    starts = [i * (len(ids) - tokens - 200) // max(1, count - 1) for i in range(count)]
    return [INSTRUCTION + tokenizer.decode(ids[at : at + n - 50]) for at, n in zip(starts, spread, strict=True)]


def linear_flops(model) -> int:
    """FLOPs per token of the layers' linear modules (the output head is left out: one token a prompt)."""
    head = model.get_output_embeddings()
    return sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)


def attention_flops(spec, length: int, chunk: int, budget: int) -> int:
    """FLOPs of attention for one prompt read in chunks against a cache of ``budget`` pairs."""
    chunks = -(-length // chunk)
    ends = [(i + 1) * length // chunks for i in range(chunks)]
    keys = 0
    for start, stop in zip([0, *ends], ends, strict=False):
        n = stop - start
        keys += n * min(start, budget) + n * (n + 1) // 2
    return sum(2 * keys * layer.query_heads * (layer.key_dim + layer.value_dim) for layer in spec.layers)


def random_engine(shape: str, config: EngineConfig, longest: int) -> Engine:
    """An engine with a random model of a well-known shape."""
    loaded = make_random_model(shape, longest, config)
    return Engine(config, PromptConfig(), IdTokenizer(), ModelBackend(loaded))


def random_prompts(count: int, tokens: int) -> list[str]:
    """Texts of random token ids, of about as many tokens."""
    random = torch.Generator().manual_seed(0)
    lengths = [tokens - 100 + (i * 37) % 200 for i in range(count)]
    return [" ".join(map(str, torch.randint(3, 30_000, (n,), generator=random).tolist())) for n in lengths]


def run_generate(
    engine: Engine, prompts: list[list[int]], new: int, kv_bytes: int, most: int | None
) -> tuple[Timing, list[int]]:
    """Time the batches, or the first ``most`` of them; also returns their numbers of rows."""
    model = engine.backend.model
    per_token = engine.policy.layout(engine.spec, 1).kv_bytes
    todo = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = []
    while todo:
        fit = max(1, int(kv_bytes // (per_token * (len(prompts[todo[0]]) + new) + engine.spec.state_bytes)))
        batches.append(todo[:fit])
        todo = todo[fit:]
    batches = batches[:most]
    if not engine.backend.shares_prefixes:
        raise SystemExit("generate cannot be the judge here: bmx has pinned this model's rotary embedding")
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    first = torch.tensor([prompts[0]])
    model.generate(first, attention_mask=torch.ones_like(first), do_sample=False, max_new_tokens=2, pad_token_id=0)
    with timed() as timing, torch.inference_mode():
        for batch in batches:
            width = max(len(prompts[i]) for i in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)
    return timing, [len(batch) for batch in batches]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="demo")
    ask.add_argument("--shape", choices=sorted(SHAPES), help="a random model of this shape instead")
    ask.add_argument("--dtype", default="bfloat16")
    ask.add_argument("--input", type=Path, help="JSONL with a 'prompt' in each line; default: the sample documents")
    ask.add_argument("--prompts", type=int, default=24)
    ask.add_argument("--tokens", type=int, default=3000)
    ask.add_argument("--new", type=int, default=64)
    ask.add_argument("--kv", type=parse_bytes, default=300_000_000)
    ask.add_argument("--budget", type=int, default=512)
    ask.add_argument("--policy", default="average-attention")
    ask.add_argument("--batches", type=int, help="number of batches that generate runs; default: all")
    ask.add_argument("--skip-generate", action="store_true", help="time bmx alone")
    args = ask.parse_args()

    config = EngineConfig(
        model=args.model,
        device="cpu",
        dtype=args.dtype,
        kv_policy=args.policy,
        kv_budget=args.budget,
        kv_cache_memory=args.kv,
    )
    engine = random_engine(args.shape, config, args.tokens + 200) if args.shape else Engine.open(config)
    if args.shape:
        texts = random_prompts(args.prompts, args.tokens)
    elif args.input:
        texts = [json.loads(line)["prompt"] for line in args.input.open(encoding="utf-8")][: args.prompts]
    else:
        texts = sample_prompts(engine.tokenizer, args.prompts, args.tokens)
    params = SamplingParams(max_tokens=args.new, ignore_eos=True)
    requests = [Request(id=str(i), prompt=text, params=params) for i, text in enumerate(texts)]
    prompts = [engine.encode(request) for request in requests]
    total = sum(map(len, prompts))
    print(f"{engine.spec.name} {args.dtype}, {torch.get_num_threads()} threads, {len(prompts)} prompts, "
          f"{total:,} prompt tokens, {args.new} new each, {args.kv / 1e6:.0f} MB of KV")  # fmt: skip

    list(engine.stream(requests[:2]))  # warm up
    before, bandwidth = matmul_rate(getattr(torch, args.dtype)), read_rate()
    plan = engine.plan(engine.measure(requests))
    with timed() as ours:
        results = list(engine.run(requests, plan))
    if any(r.error or r.usage.completion_tokens != args.new for r in results):
        raise SystemExit("bmx did not answer every prompt in full")
    stats = engine.stats
    rate = (before + matmul_rate(getattr(torch, args.dtype))) / 2
    flops = total * linear_flops(engine.backend.model)
    budget = args.budget if args.policy != "none" else 1 << 40
    flops += sum(attention_flops(engine.spec, len(p), plan.step.chunk_size, budget) for p in prompts)
    bound = total * rate / flops
    print(f"matmul {rate / 1e9:.0f} GFLOP/s allows {bound:,.0f} prompt tok/s")
    mine = 60 * len(prompts) / ours.seconds
    print(f"bmx       {ours.seconds:6.1f} s  {mine:5.2f} prompts/min  {plan.slots} slots, "
          f"KV {stats.kv_bytes / 1e6:.0f} MB  (other processes {ours.others:.1f} CPU s)")  # fmt: skip
    print(f"  prefill {stats.prefill_rate:,.0f} tok/s = {stats.prefill_rate / bound:.0%} of the bound, "
          f"decode {stats.decode_rate:,.0f} tok/s")  # fmt: skip
    if stats.decode_steps:  # in which nothing but decoding was done
        active = stats.decode_tokens / stats.decode_steps
        held = sum(min(budget, len(p) + args.new // 2) for p in prompts) / len(prompts)
        pairs = engine.policy.layout(engine.spec, 1).kv_bytes * held + 2 * engine.spec.state_bytes
        read = weights_read(engine.spec, engine.backend.model, round(active)) + active * pairs
        flops = active * (linear_flops(engine.backend.model) + 2 * engine.spec.head_bytes / 2)
        step = stats.decode_seconds / stats.decode_steps
        print(f"  steps that only decode: {active:.1f} tokens in {1e3 * step:.1f} ms; {bandwidth / 1e9:.1f} GB/s allow "
              f"{1e3 * read / bandwidth:.1f} ms ({read / bandwidth / step:.0%} of the bandwidth bound), products alone "
              f"{1e3 * flops / rate:.1f} ms")  # fmt: skip
    if args.skip_generate:
        return
    theirs, batches = run_generate(engine, prompts, args.new, args.kv, args.batches)
    other = 60 * sum(batches) / theirs.seconds
    print(f"generate  {theirs.seconds:6.1f} s  {other:5.2f} prompts/min  {sum(batches)} prompts, "
          f"batches of {batches[0]}  (other processes {theirs.others:.1f} CPU s)")  # fmt: skip
    print(f"ratio: bmx answers {mine / other:.2f} x the prompts per minute of generate")


if __name__ == "__main__":
    main()
