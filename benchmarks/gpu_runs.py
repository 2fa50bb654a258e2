"""What ``gpu.py`` asks of whole runs: tokens a second, graphs against launching anew, planned against seen memory.

Random weights in the shapes of ``bmx.model.random_models``, random token ids, answers to their full length past any end
token. Where decoding alone is measured, slots are filled with made-up pairs, and no prompt is read.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from gpu_cells import Cell, Context, Place, share, synchronize

from bmx import Engine, EngineConfig, PromptConfig, Request, SamplingParams
from bmx.engine.backend import ModelBackend
from bmx.engine.runner import ModelRunner
from bmx.engine.scheduler import Scheduler
from bmx.measure.bench_sides import plan_lengths
from bmx.measure.decode_bound import decode_step, run_step, sequence_of, timed_seconds
from bmx.model.random_models import SHAPES, IdTokenizer, make_random_model
from bmx.plan.memory import SlotGroup
from bmx.plan.planner import Length, Plan
from bmx.plan.roofline import prefill_flops, weights_read
from bmx.shutdown import Stop
from bmx.stats import Stats

LLAMA = "llama-3.1-8b"
HYBRID = "qwen3.5-2b"  # three layers of gated delta nets to one of attention
SHAPES[HYBRID] = SHAPES["qwen3.5-0.8b"] | {"hidden_size": 2048, "intermediate_size": 6144}
BUDGET = 1024
MORE = 1.25  # times as many rows as slots
ENDING = 12  # seconds of its limit that a job leaves for its beginning and its end
LONGEST = 22_016  # tokens of a sequence
TIMED_ROUNDS = 64
SLOTS = {"64": 64, "256": 256, "all": None}  # that decode together; None for as many as fit
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": None,
}
TINY_HYBRID = TINY | {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
TINY_CACHE = {"kv_budget": 24, "kv_recent": 6, "max_num_seqs": 2, "chunk_size": 16, "max_num_batched_tokens": 32}


class Until(Stop):
    """Ends a run at a moment of the monotonic clock, whatever is in flight."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    @property
    def requested(self) -> bool:
        return time.monotonic() >= self.at

    @property
    def overdue(self) -> bool:
        return self.requested


class Steps(Stats):
    """Counters that remember each step."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[dict[str, Any]] = []

    def count_step(self, **told: Any) -> None:
        super().count_step(**told)
        self.log.append({"ended": time.monotonic(), **told})

    def decoding(self) -> list[dict[str, Any]]:
        """Steps that did nothing else, and with most rows; not the first, which may have waited for a graph."""
        pure = [step for step in self.log if step["decode_tokens"] and not step["prompt_tokens"]]
        most = max((step["active"] for step in pure), default=0)
        return [step for step in pure if step["active"] == most and step["decode_tokens"] == most * step["rounds"]][1:]

    def seconds_of_round(self) -> float | None:
        """Of a decoding step with most rows, the median."""
        taken = [step["seconds"] / step["rounds"] for step in self.decoding()]
        return statistics.median(taken) if taken else None


@dataclass
class Ran:
    """A run: what it took and gave.

    Attributes:
        answers: token ids by request.
        cut_short: whether time ran out.
        seen: most bytes held, by torch and beside it.
    """

    plan: Plan
    stats: Steps
    seconds: float
    rows: int
    cut_short: bool
    seen: int
    answers: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """For JSON, what every run has."""
        taken = [step["seconds"] for step in self.stats.log]
        return {
            "rows": self.rows,
            "rows_finished": len(self.answers),
            "cut_short": self.cut_short,
            "slots": self.plan.slots,
            "capacities": [group.capacity for group in self.plan.groups],
            "step_tokens": self.plan.step.max_num_batched_tokens,
            "seconds": self.seconds,
            "steps": len(taken),
            "longest_step_seconds": max(taken, default=None),
            "prompt_tokens": self.stats.prompt_tokens,
            "generated_tokens": self.stats.generated_tokens,
            "planned_bytes": self.plan.memory.total,
            "seen_bytes": self.seen,
            "seen_of_planned": self.seen / self.plan.memory.total,
            "went_on_with_fewer_slots": self.stats.shrunk_to,
            "refused_graphs": self.stats.eager,
        }


def engine_of(name: str, place: Place, longest: int, **told: Any) -> Engine:
    """An engine around random weights of that shape."""
    dtype = str(place.dtype).removeprefix("torch.")
    told = {"prefix_reuse": False, "device": place.device, "dtype": dtype, "model": name} | told
    config = EngineConfig(**told)
    return Engine(config, PromptConfig(), IdTokenizer(), ModelBackend(make_random_model(name, longest, config)))


def shape_of(name: str, place: Place, layers: int | None, **changes: Any) -> str:
    """A known shape with fewer layers, or a tiny one for a CPU, under a name of its own."""
    cut = f"{name}, {layers or 'all'} layers"
    tiny = TINY_HYBRID if name == HYBRID else TINY
    small = tiny if place.tried else {}
    SHAPES[cut] = SHAPES[name] | ({"num_hidden_layers": layers} if layers else {}) | changes | small
    return cut


def requests_of(lengths: list[int], answer: int, vocab: int) -> Iterator[Request]:
    """Random token ids, each prompt another piece of them."""
    draw = torch.Generator().manual_seed(0)
    words = list(map(str, torch.randint(vocab, (max(lengths) + 4099,), generator=draw).tolist()))
    params = SamplingParams(max_tokens=answer, ignore_eos=True)
    for i, tokens in enumerate(lengths):
        at = i * 37 % 4099
        yield Request(id=i, prompt=" ".join(words[at : at + tokens]), raw=True, params=params)


def beside_torch(place: Place) -> int:
    """Bytes of the card that are taken, and not by torch's allocator: the context, and whoever else is there."""
    if place.tried:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def run_rows(engine: Engine, plan: Plan, lengths: list[int], answer: int, place: Place, seconds: float = 1e9) -> Ran:
    """Answer random prompts of these lengths under a plan, for so many seconds at most."""
    stats = Steps()
    stop, asked = Until(time.monotonic() + seconds), requests_of(lengths, answer, engine.spec.vocab)
    started, answers = time.monotonic(), {}
    for result in engine.run(asked, plan, stats=stats, stop=stop):
        if result.error:
            raise RuntimeError(f"row {result.id}: {result.error.message}")
        answers[result.id] = result.token_ids
    synchronize(place)
    taken, peak = time.monotonic() - started, engine.backend.meter.peak
    seen = peak if place.tried else torch.cuda.max_memory_reserved() + beside_torch(place)
    return Ran(plan, stats, taken, len(lengths), len(answers) < len(lengths), seen, answers)


def plan_of(engine: Engine, lengths: list[int], answer: int) -> Plan:
    return plan_lengths(engine, [Length.of(engine.policy, tokens, answer) for tokens in lengths])


# Graphs.


def graphs(name: str, context: Context) -> dict[str, Any]:
    """A family cut to 4 layers; phi's frequencies differ for long sequences, of which there are some."""
    changes: dict[str, Any] = {}
    if name.startswith("phi"):
        half, trained = (8, 32) if context.place.tried else (48, 256)
        rope = SHAPES[name]["rope_parameters"] | {
            "short_factor": [1.0 + 0.01 * i for i in range(half)],
            "long_factor": [1.0 + 0.5 * i for i in range(half)],
            "original_max_position_embeddings": trained,
        }
        changes = {"rope_parameters": rope, "original_max_position_embeddings": trained}
    return with_and_without(shape_of(name, context.place, 4, **changes), context.place)


def with_and_without(name: str, place: Place) -> dict[str, Any]:
    """The same tokens, row by row: all prompts are read in one step, so that products have the same sizes both ways."""
    rows, answer, budget = (3, 19, 16) if place.tried else (32, 97, 128)
    shortest, apart = (5, 9) if place.tried else (100, 5)
    lengths = [shortest + apart * i for i in range(rows)]
    told = {"kv_budget": budget, "kv_recent": budget // 4, "kv_sink": 2, "max_num_seqs": rows}
    told |= {"gpu_memory_utilization": 0.5, "chunk_size": 512, "max_num_batched_tokens": 8192}
    replayed = engine_of(name, place, max(lengths) + answer, **told)
    anew = replayed.with_config(replace(replayed.config, enforce_eager=True))
    runs = {}
    for label, engine in (("graphs", replayed), ("eager", anew)):
        plan = plan_of(engine, lengths, answer)
        run_rows(engine, plan, lengths, 3, place)  # what is compiled is compiled
        runs[label] = run_rows(engine, plan, lengths, answer, place)
    one, other = runs["graphs"], runs["eager"]
    per_second = {label: decode_rate(ran) for label, ran in runs.items()}
    pairs = [(a, b) for i in one.answers for a, b in zip(one.answers[i], other.answers[i], strict=True)]
    return {
        "equal": one.answers == other.answers,
        "tokens": len(pairs),
        "tokens_that_differ": sum(a != b for a, b in pairs),
        "distinct_tokens": len({a for a, _ in pairs}),
        "refused_graphs": replayed.stats.eager,
        "nothing_refused": replayed.stats.eager == "",
        "decode_tokens_per_second": per_second,
        "ratio": per_second["graphs"] / per_second["eager"] if all(per_second.values()) else None,
        "graphs": one.record,
        "eager": other.record,
    }


def decode_rate(ran: Ran) -> float | None:
    seconds = ran.stats.seconds_of_round()
    return ran.stats.decoding()[0]["active"] / seconds if seconds else None


# Memory.


def memory(context: Context) -> dict[str, Any]:
    """A model of Llama-3.1-8B's width under a limit, with more rows than slots."""
    place = context.place
    limit = 700 * 10**6 if place.tried else 12 * 10**9
    tokens, answer = (30, 4) if place.tried else (2000, 48)
    told = TINY_CACHE if place.tried else {"kv_budget": BUDGET}
    engine = engine_of(shape_of(LLAMA, place, 4), place, tokens + answer, memory_limit=limit, **told)
    plan = plan_of(engine, [tokens] * (4 if place.tried else 1024), answer)
    profiled = plan.profiled
    rows = math.ceil(MORE * plan.slots)
    ran = run_rows(engine, plan, [tokens] * rows, answer, place)
    return {
        "limit": limit,
        "ratio": ran.seen / plan.memory.total,
        "items": {name: getattr(plan.memory, name) for name in plan.memory.__dataclass_fields__},
        "profiled_step_planned_and_measured": profiled and [profiled.predicted, profiled.measured],
        "beside_torch_bytes": beside_torch(place),
        "beside_torch_planned": engine.backend.runtime_bytes,
        "reserved_bytes": 0 if place.tried else torch.cuda.max_memory_reserved(),
        "allocated_bytes": 0 if place.tried else torch.cuda.max_memory_allocated(),
        **ran.record,
    }


# Throughput.


def warm(context: Context, shape: str = LLAMA, **told: Any) -> Engine:
    """An engine around Llama-3.1-8B or another shape, tiny on a CPU; what a step compiles is compiled."""
    place = context.place
    cache = TINY_CACHE | {name: told[name] for name in told if name not in ("kv_budget", "quantization")}
    told = cache if place.tried else {"kv_budget": BUDGET, **told}
    engine = engine_of(shape_of(shape, place, None), place, 200 if place.tried else LONGEST, **told)
    lengths, answer = ([20, 20], 2) if place.tried else ([5000, 2000, 8000], 10)
    began = time.monotonic()
    run_rows(engine, plan_of(engine, lengths, answer), lengths, answer, place)
    context.note("warm_up_seconds", time.monotonic() - began)
    return engine


def prefill(context: Context, **told: Any) -> dict[str, Any]:
    """Prompts alone: one token each. MFU counts linear layers and attention."""
    began = time.monotonic()
    place, engine = context.place, warm(context, **told)
    tokens, rows = (33, 3) if place.tried else (8000, 48)
    plan = plan_of(engine, [tokens] * rows, 1)
    left = context.seconds - ENDING - (time.monotonic() - began)
    ran = run_rows(engine, plan, [tokens] * rows, 1, place, left)
    log, rate = ran.stats.log, ran.stats.prompt_tokens / ran.seconds
    steps = [(b["prompt_tokens"], b["ended"] - a["ended"]) for a, b in itertools.pairwise(log)]
    full = [n / s for n, s in steps[1:-1] if n > 0.9 * plan.step.max_num_batched_tokens] or [rate]
    chunk, slot = plan.step.chunk_size, plan.groups[-1].capacity
    flops = prefill_flops(engine.spec, engine.policy, tokens, slot, chunk) / tokens  # of a token
    return {
        "prompt": tokens,
        "prompt_tokens_per_second": rate,
        "flops_of_a_token": flops,
        "mfu": share(flops * rate, 1.0, context.rates.get("flops")),
        "mfu_of_the_median_full_step": share(flops * statistics.median(full), 1.0, context.rates.get("flops")),
        "mfu_of_linear_layers_alone": share(engine.spec.costs.flops * rate, 1.0, context.rates.get("flops")),
        **ran.record,
    }


@dataclass
class Decoding:
    """Slots that decode, filled with made-up pairs.

    Attributes:
        engine: of the model.
        runner: of the plan, entered.
        scheduler: whose sequences have had their prompts.
    """

    engine: Engine
    runner: ModelRunner
    scheduler: Scheduler

    @classmethod
    def of(cls, engine: Engine, plan: Plan, slots: int, tokens: int, answer: int) -> Decoding:
        """Slots that have seen so many tokens, for answers of so many; the runner is yet to be entered."""
        length = Length.of(engine.policy, tokens, answer)
        group = SlotGroup(length.rows_needed, slots)
        layouts = (engine.policy.answering.layout(engine.spec, group.capacity),)
        plan = replace(plan, groups=(group,), layouts=layouts, prefix_slots=(), shared_slots=(), reading=None)
        scheduler = Scheduler(plan.groups, plan.step)
        for number in range(slots):
            sequence = sequence_of(engine, number, tokens, answer, rows=length.rows_needed)
            scheduler.admit(sequence)
            sequence.computed = tokens
        runner = engine.backend.runner(plan, engine.policy.answering, refused=engine.stats.note_eager)
        return cls(engine, runner, scheduler)

    @torch.inference_mode()
    def fill(self, tokens: int) -> None:
        """Made-up pairs in all rows: the newest tokens, some attention received, codes and scales of usual size."""
        for parts in {parts for group in self.runner.answering.groups for parts in group}:
            for part in parts:
                of_newest = (part.newest.keys, part.newest.values) if part.newest else ()
                for tensor in (*part.keys.parts, *part.values.parts, *of_newest):
                    _make_up(tensor)
                first = max(0, tokens - part.layout.capacity)
                rows = torch.arange(first, first + part.layout.capacity, device=part.positions.device)
                if part.newest:
                    count = part.newest.rows.shape[-1]
                    newest = torch.arange(tokens - count, tokens, device=rows.device)
                    part.newest.rows[..., newest % count] = newest.to(part.newest.rows.dtype)
                else:
                    part.positions.copy_(torch.where(rows < tokens, rows, -1))
                for stat in part.row_stats.values():
                    stat.uniform_(0.5, 1.0)


def _make_up(tensor: torch.Tensor) -> None:
    """Codes of any value, float16 scales of a hundredth, numbers of a normal distribution."""
    if tensor.dtype == torch.uint8:
        tensor.random_(0, 256)
    elif tensor.dtype == torch.float16:
        tensor.fill_(0.01)
    elif tensor.is_floating_point():
        tensor.normal_()


def decode(context: Context, slots: int | None = None, tokens: int = 3 * BUDGET, **told: Any) -> dict[str, Any]:
    """Slots that are full and decode, and the least that the card's rates allow: the sum of floors.

    Floors: KV bytes at the rate of copies; and weight bytes at that rate, or FLOPs at that of products, what is more.
    """
    place, engine = context.place, warm(context, **told)
    tokens, rounds = (40, 8) if place.tried else (tokens, TIMED_ROUNDS)
    plan = plan_of(engine, [tokens] * (4 if place.tried else 2048), 2 * rounds)
    slots = min(slots or plan.slots, plan.slots)
    decoding = Decoding.of(engine, plan, slots, tokens, rounds + 2)
    with decoding.runner as runner:
        decoding.fill(tokens)
        seconds = timed_seconds(decoding.scheduler, runner, rounds)
        pairs = runner.kv_bytes
    spec, rates = engine.spec, context.rates
    weights, flops = (
        weights_read(spec, engine.backend.model, slots),
        slots * (spec.costs.flops + 2 * spec.head_bytes // spec.itemsize),
    )
    floors = [pairs / rates["copy"], max(weights / rates["copy"], flops / rates["flops"])] if rates else []
    return {
        "slots": slots,
        "tokens_seen": tokens,
        "tokens_per_second": slots / seconds,
        "round_seconds": seconds,
        "floor_seconds": floors,
        "share_of_floors": sum(floors) / seconds if floors else None,
        "weight_bytes": weights,
        "pair_bytes": pairs,
        "formats": engine.policy.answering.format,
        "refused_graphs": engine.stats.eager,
    }


def traces(context: Context, **told: Any) -> dict[str, Any]:
    """What one step of reading and one round of decoding launch, by torch's profiler; traces beside the record."""
    place, engine = context.place, warm(context, **told)
    tokens, slots = (33, 2) if place.tried else (8000, 256)
    plan = plan_of(engine, [tokens] * (3 if place.tried else 64), 20)
    reading = Scheduler(plan.groups, plan.step)
    for number in range(min(plan.slots, 32)):
        reading.admit(sequence_of(engine, number, tokens, 20, rows=plan.groups[-1].capacity))
    with engine.backend.runner(plan, engine.policy) as runner:
        for _ in range(3):
            run_step(reading, runner, reading.schedule())
        step = reading.schedule()
        context.note("prefill", profiled(context, "prefill", lambda: run_step(reading, runner, step)))
    decoding = Decoding.of(engine, plan, min(slots, plan.slots), tokens, 20)
    with decoding.runner as runner:
        decoding.fill(tokens)
        run_step(decoding.scheduler, runner, decode_step(decoding.scheduler, 1))
        step = decode_step(decoding.scheduler, 1)
        return {"round": profiled(context, "round", lambda: run_step(decoding.scheduler, runner, step))}


def profiled(context: Context, name: str, work: Any) -> dict[str, Any]:
    """The work's kernels by the time that they take, and its launches; the whole trace goes to a file."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([] if context.place.tried else [ProfilerActivity.CUDA])]
    with profile(activities=kinds) as seen:
        work()
        synchronize(context.place)
    file = f"{context.beside}.{name}.json.gz"
    seen.export_chrome_trace(file)
    key = "self_cpu_time_total" if context.place.tried else "self_device_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, key))
    kernels = [{"name": row.key[:90], "calls": row.count, "microseconds": getattr(row, key)} for row in rows[:40]]
    launches = sum(row.count for row in rows if "LaunchKernel" in row.key or "GraphLaunch" in row.key)
    return {"file": file, "launches": launches, "by_time": kernels}


def mixed(context: Context, prompt: int, answer: int, **told: Any) -> dict[str, Any]:
    """Somewhat more rows than slots; fewer slots if that would take too long at the rates that were seen before."""
    began = time.monotonic()
    place, engine = context.place, warm(context, **told)
    seconds = context.seconds - ENDING - (time.monotonic() - began)
    many = 3 if place.tried else 4096
    plan = plan_of(engine, [prompt] * many, answer)
    slots = allowed = plan.slots
    before, kind = context.found.get("throughput", {}), " fp8" if "quantization" in told else ""
    read = before.get(f"prefill{kind}", {}).get("found", {}).get("prompt_tokens_per_second")
    decoded = before.get(f"decode 256{kind}", {}).get("found", {}).get("tokens_per_second")
    if read and decoded and not place.tried:
        row = 1.1 * (prompt / read + answer / decoded)
        allowed = max(1, min(slots, int(seconds / row / MORE)))
    if allowed < slots:
        plan = plan_of(engine.with_config(replace(engine.config, max_num_seqs=allowed)), [prompt] * many, answer)
    rows = math.ceil(MORE * plan.slots)
    ran = run_rows(engine, plan, [prompt] * rows, answer, place, seconds)
    return {
        "prompt": prompt,
        "answer": answer,
        "slots_that_fit": slots,
        "slots_cut_to_save_time": plan.slots < slots,
        "seconds_allowed": seconds,
        "generated_tokens_per_second": ran.stats.generated_tokens / ran.seconds,
        "prompt_tokens_per_second": ran.stats.prompt_tokens / ran.seconds,
        **ran.record,
    }


def cells(place: Place) -> list[Cell]:
    """All of them; what decides comes first."""
    fp8, plain = {"quantization": "fp8"}, {"kv_format": "model"}
    by_ten = 100 if place.tried else 1  # by how much the jobs are shorter on a CPU
    long, short = (5000 // by_ten, 500 // by_ten), (2000 // by_ten, 200 // by_ten)
    throughput = {
        "prefill": (80, prefill, True),
        "decode 256": (60, partial(decode, slots=256), True),
        "traces": (60, traces, True),
        "prefill fp8": (60, partial(prefill, **fp8), True),
        "5000/500": (110, partial(mixed, prompt=long[0], answer=long[1]), True),
        "decode 256 model": (60, partial(decode, slots=256, **plain), False),
        "decode 64": (60, partial(decode, slots=64), False),
        "decode all": (60, partial(decode), False),
        "decode 256 fp8": (60, partial(decode, slots=256, **fp8), False),
        "5000/500 fp8": (80, partial(mixed, prompt=long[0], answer=long[1], **fp8), False),
        "2000/200": (60, partial(mixed, prompt=short[0], answer=short[1]), False),
        "decode 256 keydiff": (60, partial(decode, slots=256, kv_policy="keydiff"), False),
        "decode 64 archive": (60, partial(decode, slots=64, tokens=8000, kv_archive="int4"), False),
        "hybrid prefill": (60, partial(prefill, shape=HYBRID), False),
        "hybrid decode 256": (60, partial(decode, slots=256, shape=HYBRID), False),
        "decode 8 full": (60, partial(decode, slots=8, tokens=16_000, kv_policy="none", **plain), False),
    }
    return [
        *(
            Cell(part="throughput", name=name, seconds=s, work=work, decisive=d)
            for name, (s, work, d) in throughput.items()
        ),
        *(
            Cell(part="graphs", name=name, seconds=45, work=partial(graphs, name))
            for name in (LLAMA, "qwen3-8b", "phi-3.5-mini", HYBRID)
        ),
        Cell(part="memory", name="4 layers", seconds=45, work=memory),
    ]
