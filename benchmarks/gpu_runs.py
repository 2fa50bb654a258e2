"""What ``gpu.py`` asks of whole runs: graphs against launching anew, planned against seen memory, and tokens a second.

Random weights in the shapes of ``bmx.model.random_models``, random
token ids, answers to their full length past any end token.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gpu_kernels import Note, Place, share, synchronize

from bmx import Engine, EngineConfig, PromptConfig, Request, SamplingParams
from bmx.engine.backend import ModelBackend
from bmx.measure.bench_sides import plan_lengths
from bmx.model.random_models import SHAPES, IdTokenizer, make_random_model
from bmx.plan.planner import Length, Plan
from bmx.plan.roofline import held_rows, weights_read
from bmx.shutdown import Stop
from bmx.stats import Stats

LLAMA = "llama-3.1-8b"
BUDGET = 1024
MORE = 1.25  # times as many rows as slots
SHARE_OF_LONG, SHARE_OF_SHORT = 0.6, 0.9  # of the time that is left, for 5,000/500 and then for 2,000/200
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
    small = TINY if place.tried else {}
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


def forget(place: Place) -> None:
    """Give back what a model or a run held."""
    gc.collect()
    if not place.tried:
        torch.cuda.empty_cache()


def attempted(note: Note, name: str, work: Callable[[], dict[str, Any]], place: Place) -> dict[str, Any]:
    """What comes of it, noted; a problem is noted in its place."""
    started = time.monotonic()
    try:
        found = work()
    except Exception as problem:
        found = {"failed": f"{type(problem).__name__}: {problem}"[:600]}
        found["traceback"] = traceback.format_exc(limit=-4)[-2500:]
    found["in_all_seconds"] = time.monotonic() - started
    note(name, found)
    forget(place)
    return found


# Graphs.


def graphs(note: Note, place: Place) -> None:
    """Three families cut to 4 layers; phi's frequencies differ for long sequences, of which there are some."""
    half = 8 if place.tried else 48
    trained = 32 if place.tried else 256
    phi = SHAPES["phi-3.5-mini"]
    rope = phi["rope_parameters"] | {
        "short_factor": [1.0 + 0.01 * i for i in range(half)],
        "long_factor": [1.0 + 0.5 * i for i in range(half)],
        "original_max_position_embeddings": trained,
    }
    changes: dict[str, dict[str, Any]] = {
        LLAMA: {},
        "qwen3-8b": {},
        "phi-3.5-mini": {"rope_parameters": rope, "original_max_position_embeddings": trained},
    }
    for name, changed in changes.items():
        attempted(note, name, lambda: with_and_without(shape_of(name, place, 4, **changed), place), place)  # noqa: B023


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


def memory(note: Note, place: Place) -> None:
    """A model of Llama-3.1-8B's width under a limit, with more rows than slots; and one with its own limit."""
    limit = 700 * 10**6 if place.tried else 12 * 10**9
    tokens, answer = (30, 4) if place.tried else (2000, 48)
    told = TINY_CACHE if place.tried else {"kv_budget": BUDGET}

    def work() -> dict[str, Any]:
        engine = engine_of(shape_of(LLAMA, place, 4), place, tokens + answer, memory_limit=limit, **told)
        plan = plan_of(engine, [tokens] * (4 if place.tried else 1024), answer)
        profiled = plan.profiled
        rows = math.ceil(MORE * plan.slots)
        ran = run_rows(engine, plan, [tokens] * rows, answer, place)
        items = {name: getattr(plan.memory, name) for name in plan.memory.__dataclass_fields__}
        return {
            "limit": limit,
            "ratio": ran.seen / plan.memory.total,
            "held": ran.seen <= plan.memory.total,
            "items": items,
            "profiled_step_planned_and_measured": profiled and [profiled.predicted, profiled.measured],
            "beside_torch_bytes": beside_torch(place),
            "beside_torch_planned": engine.backend.runtime_bytes,
            "reserved_bytes": 0 if place.tried else torch.cuda.max_memory_reserved(),
            "allocated_bytes": 0 if place.tried else torch.cuda.max_memory_allocated(),
            **ran.record,
        }

    attempted(note, "4 layers", work, place)


# Throughput.


@dataclass(frozen=True, kw_only=True)
class Job:
    """So many tokens in and out."""

    prompt: int
    answer: int


@dataclass
class Throughput:
    """One model and the jobs that it is given.

    Attributes:
        until: when all must be done, by the monotonic clock.
        read, decoded: prompt tokens read a second, and tokens decoded a second in all slots; once they are known.
    """

    place: Place
    rates: dict[str, float]
    until: float
    engine: Engine
    read: float | None = None
    decoded: float | None = None

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    @property
    def parameters(self) -> int:
        """Of the layers: neither the embedding nor the head."""
        model = self.engine.backend.model
        ends = {id(p): p for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
        return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in ends.values())

    def warm(self) -> dict[str, Any]:
        """Compile what a step compiles."""
        lengths, answer = ([20, 20], 2) if self.place.tried else ([5000, 2000, 8000], 10)
        return run_rows(self.engine, plan_of(self.engine, lengths, answer), lengths, answer, self.place).record

    def prefill(self) -> dict[str, Any]:
        """Prompts alone: one token each."""
        tokens, rows = (33, 3) if self.place.tried else (8000, 48)
        plan = plan_of(self.engine, [tokens] * rows, 1)
        ran = run_rows(self.engine, plan, [tokens] * rows, 1, self.place, 0.3 * self.left)
        self.read = ran.stats.prompt_tokens / ran.seconds
        log = ran.stats.log
        steps = [(b["prompt_tokens"], b["ended"] - a["ended"]) for a, b in itertools.pairwise(log)]
        full = [n / s for n, s in steps[1:-1] if n > 0.9 * plan.step.max_num_batched_tokens] or [self.read]
        return {
            "prompt": tokens,
            "prompt_tokens_per_second": self.read,
            "mfu": share(2 * self.parameters * self.read, 1.0, self.rates.get("flops")),
            "mfu_of_the_median_full_step": share(
                2 * self.parameters * statistics.median(full), 1.0, self.rates.get("flops")
            ),
            "parameters": self.parameters,
            **ran.record,
        }

    def decode(self) -> dict[str, Any]:
        """All slots full and decoding, at least 64 tokens after the last prompt was read."""
        tokens, many = (26, 4) if self.place.tried else (BUDGET + 16, 2048)
        plan = plan_of(self.engine, [tokens] * many, 64 + tokens)
        rows = plan.slots
        reading = math.ceil(1.3 * rows * tokens / plan.step.max_num_batched_tokens)
        answer = 20 if self.place.tried else reading + 96
        ran = run_rows(self.engine, plan, [tokens] * rows, answer, self.place, 0.4 * self.left)
        seconds, steps = ran.stats.seconds_of_round(), ran.stats.decoding()
        if not seconds:
            raise RuntimeError(f"no steps in which all slots decode: {ran.record}")
        active = steps[0]["active"]
        self.decoded = active / seconds
        spec, policy = self.engine.spec, self.engine.policy
        weights = weights_read(spec, self.engine.backend.model, active)
        pairs = active * policy.layout(spec, held_rows(policy, tokens, answer)).kv_bytes
        return {
            "prompt": tokens,
            "answer": answer,
            "active": active,
            "rounds": sum(step["rounds"] for step in steps),
            "tokens_per_second": self.decoded,
            "step_seconds": seconds,
            "weight_bytes": weights,
            "pair_bytes": pairs,
            "share_of_copy": share(weights + pairs, seconds, self.rates.get("copy")),
            **ran.record,
        }

    def mixed(self, job: Job, seconds: float) -> dict[str, Any]:
        """Somewhat more rows than slots; fewer slots if that would take too long at the rates seen so far."""
        many = 4096 if not self.place.tried else 3
        plan = plan_of(self.engine, [job.prompt] * many, job.answer)
        slots, allowed = plan.slots, plan.slots
        if self.read and self.decoded and not self.place.tried:
            row = 1.1 * (job.prompt / self.read + job.answer / self.decoded)
            allowed = max(1, min(slots, int((seconds - 15) / row / MORE)))
        if allowed < slots:
            fewer = self.engine.with_config(replace(self.engine.config, max_num_seqs=allowed))
            plan = plan_of(fewer, [job.prompt] * many, job.answer)
        rows = math.ceil(MORE * plan.slots)
        ran = run_rows(self.engine, plan, [job.prompt] * rows, job.answer, self.place, seconds)
        return {
            "prompt": job.prompt,
            "answer": job.answer,
            "slots_that_fit": slots,
            "slots_cut_to_save_time": plan.slots < slots,
            "seconds_allowed": seconds,
            "generated_tokens_per_second": ran.stats.generated_tokens / ran.seconds,
            "prompt_tokens_per_second": ran.stats.prompt_tokens / ran.seconds,
            **ran.record,
        }


def throughput(note: Note, place: Place, rates: dict[str, float], seconds: float, jobs: list[str]) -> None:
    """The whole part; ``jobs`` are those of prefill, decode, 5000/500, 2000/200 and 20000/2000 to be run, or all."""
    until = time.monotonic() + seconds
    longest = 200 if place.tried else 22_016
    told = TINY_CACHE if place.tried else {"kv_budget": BUDGET}
    work: dict[str, Any] = {}

    def opened() -> dict[str, Any]:
        name = shape_of(LLAMA, place, None)
        work["it"] = Throughput(place, rates, until, engine_of(name, place, longest, **told))
        return work["it"].warm()

    if "failed" in attempted(note, "model and warm-up", opened, place):
        return
    it = work["it"]
    sizes = zip((2000, 5000, 20_000), (200, 500, 2000), _cut(place), strict=True)
    small, long, whole = (Job(prompt=prompt // by, answer=answer // by) for prompt, answer, by in sizes)
    todo = {
        "prefill": it.prefill,
        "decode": it.decode,
        "5000/500": lambda: it.mixed(long, SHARE_OF_LONG * it.left),
        "2000/200": lambda: it.mixed(small, SHARE_OF_SHORT * it.left),
    }
    if os.environ.get("FULL") == "1":
        todo["20000/2000"] = lambda: it.mixed(whole, it.left - 5)
    for name, one in todo.items():
        if not jobs or name in jobs:
            attempted(note, name, one, place)


def _cut(place: Place) -> tuple[int, int, int]:
    """By how much the three jobs are shorter on a CPU."""
    return (60, 150, 500) if place.tried else (1, 1, 1)
