"""Steps are launched ahead of what is known: nothing in one waits for the device, and late tokens change no answer."""

from __future__ import annotations

import ast
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import tiny_engine, word_tokenizer
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exactness import LONGROPE
from transformers import AutoModelForCausalLM

import bmx
from bmx import Engine, EngineConfig, PromptConfig, Request, SamplingParams
from bmx.compress.policy import CompressionPolicy
from bmx.engine.fake import FakeBackend, FakeRunner, FakeTokenizer, next_token
from bmx.engine.runner import ModelRunner
from bmx.engine.scheduler import Scheduler
from bmx.engine.sequence import Sequence
from bmx.kernels import Kernels, transfer
from bmx.model.loader import prepare
from bmx.plan.memory import Limits, Memory, SlotGroup, StepSize
from bmx.plan.planner import Plan

triton = pytest.importorskip("triton")

TOKENIZER = word_tokenizer()


@dataclass(frozen=True)
class Absent:
    """A model on a device that has no contents, so that any read of a number raises; and its runs."""

    family: str
    settings: dict

    def runner(self, scaling=None) -> tuple[ModelRunner, Scheduler]:
        config = FAMILIES[self.family]()
        config.update(scaling or {})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        loaded = prepare(model.eval())
        policy = CompressionPolicy.from_config(EngineConfig(kv_sink=2, kv_recent=4, chunk_size=16, **self.settings))
        groups, size = (SlotGroup(24, 2), SlotGroup(40, 3)), StepSize(chunk_size=16, max_num_batched_tokens=48)
        layouts = tuple(policy.layout(loaded.spec, group.capacity) for group in groups)
        plan = Plan(groups=groups, layouts=layouts, step=size, memory=Memory(), limits=Limits(total=0))
        probe = (7, 8, 9) if policy.probe else ()
        kernels = Kernels("triton", "")
        return ModelRunner(loaded, policy, plan, kernels, probe, refused=pytest.fail), Scheduler(groups, size)


@pytest.fixture
def launches(monkeypatch):
    """What is launched by name, in place of launching it; and no numbers may travel but by ``upload``."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names = []
    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "__getitem__", lambda self, grid: lambda *a, **k: names.append(self.fn.__name__))
    made, allowed = torch.tensor, []

    def tensor(*args, **details):
        assert allowed, "numbers travel to the device, and the host waits for them"
        return made(*args, **details)

    def upload(numbers, device, dtype=torch.long):
        allowed.append(True)
        sent = made(numbers, dtype=dtype).to(device)
        allowed.pop()
        return sent

    parts = ("engine.runner", "engine.packed", "engine.attention", "engine.sampler", "engine.graphs", "engine.ranking")
    for module in (*parts, "kernels.triton_prefill", "model.rope"):
        monkeypatch.setattr(f"bmx.{module}.upload", upload, raising=False)
    return names, lambda: monkeypatch.setattr(torch, "tensor", tensor)


def sequences(policy, lengths, new):
    """Prompts of these lengths; the second one's temperature is not zero."""
    for number, tokens in enumerate(lengths):
        params = SamplingParams(max_tokens=new, temperature=0.7 if number == 1 else 0.0)
        yield Sequence(
            request=Request(id=number, params=params),
            prompt=[5 + (number + place) % 50 for place in range(tokens)],
            max_tokens=new,
            rows_needed=policy.rows_needed(tokens, new),
            end_token_ids=frozenset({2}),
            tokenizer=TOKENIZER,
        )


SIMPLE = [
    *({"kv_budget": 24, "kv_policy": name} for name in ("far-attention", "decay", "streaming")),
    *({"kv_budget": 24, "kv_format": name} for name in ("int8/int4", "fp8")),
    *({"kv_budget": 24, "kv_policy": name} for name in ("tova", "window", "r-kv", "keydiff")),
]
DEAR = [{"kv_budget": 24, "kv_policy": name} for name in ("lagkv", "roco", "expected-attention")]
MORE = [
    {"kv_budget": 24, "kv_value_norm": True},
    {"kv_budget": 24, "kv_probe": "w7 w8 w9"},
    {"kv_budget": "50%", "kv_policy": "average-attention"},
]


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *(("llama", config) for config in (*SIMPLE, *DEAR, *MORE)),
        *((family, SIMPLE[0]) for family in ("qwen3", "phi3", "mistral", "gemma2", "gpt_oss")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_no_step_waits_for_the_device(family, config, launches):
    """On a device without contents, whatever asks for a number of a tensor's raises."""
    config = dict(config) | ({"kv_budget": 0.5} if config["kv_budget"] == "50%" else {})
    names, watch = launches
    runner, scheduler = Absent(family, config).runner(LONGROPE if family == "phi3" else None)
    with runner:
        drained(runner, scheduler, (9, 45), 2)  # tables of frequencies are made once
        names.clear()
        watch()
        kinds = drained(runner, scheduler, (12, 45, 37, 51, 9), 6)
    assert kinds == {(True, False), (False, True), (True, True)}
    alone = config in SIMPLE or config["kv_budget"] == 0.5
    assert ("_decode" in names) == alone
    assert (runner.rounds > 1) == alone


def drained(runner, scheduler, lengths, new) -> set[tuple[bool, bool]]:
    """Run all steps; returns which of them decoded, and which read prompts."""
    for row in sequences(runner.policy, lengths, new):
        assert row.rows_needed <= scheduler.largest
        scheduler.enqueue(row)
    kinds = set()
    while True:
        scheduler.admit_waiting()
        step = scheduler.schedule(runner.rounds)
        if step is None:
            break
        assert runner.run(step) is not None
        scheduler.launched(step)
        kinds.add((any(c.decodes for c in step.chunks), any(not c.decodes for c in step.chunks)))
    assert not scheduler.in_slots
    assert not scheduler.waiting
    return kinds


ASKS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "masked_select", "unique"}
MAY_ASK = {
    "engine/layers.py",  # of calibration, as is the teacher
    "engine/teacher.py",
}
MODULES = sorted(
    path
    for folder in ("engine", "kv", "compress")
    for path in (Path(bmx.__file__).parent / folder).glob("*.py")
    if f"{folder}/{path.name}" not in MAY_ASK
) + sorted((Path(bmx.__file__).parent / "kernels").glob("triton*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_what_computes_a_step_never_asks_for_numbers(path):
    """Copies to the host do not raise everywhere: no code of a step may spell one."""
    called = {
        node.func.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert not called & ASKS


def test_numbers_travel_and_come_back():
    sent = transfer.upload([[1, 2], [3, 4]], torch.device("cpu"))
    coming = transfer.Download(sent)
    sent.zero_()
    assert coming.read() == [[1, 2], [3, 4]]


class Late(FakeRunner):
    """The fake model, whose tokens may be read after later steps were launched."""

    def __init__(self, ahead: int, rounds: int) -> None:
        self.ahead, self.rounds = ahead, rounds
        self.unread = deque()
        self.most_unread = 0

    def run(self, step):
        given = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            place = len(sequence.answer) + sequence.promised
            given += [next_token(sequence.prompt, place + i) for i in range(chunk.samples)]
        self.unread.append(given)
        self.most_unread = max(self.most_unread, len(self.unread))
        return Given(self, given)


@dataclass(frozen=True)
class Given:
    runner: Late
    tokens: list

    def read(self):
        assert self.runner.unread.popleft() is self.tokens, "steps are read in the order in which they were launched"
        return self.tokens


class LateBackend(FakeBackend):
    """The fake model with late tokens."""

    def __init__(self, ahead, rounds):
        super().__init__()
        self.late, self.last_runner = (ahead, rounds), None

    def runner(self, *_, **__):
        self.last_runner = Late(*self.late)
        return self.last_runner


def late_engine(ahead, rounds, **config):
    return Engine(EngineConfig(model="fake", **config), PromptConfig(), FakeTokenizer(), LateBackend(ahead, rounds))


def late_answers(requests, ahead, rounds, **config):
    engine = late_engine(ahead, rounds, chunk_size=8, max_num_batched_tokens=16, **config)
    results = sorted(engine.stream(requests), key=lambda result: result.id)
    return results, engine


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.booleans()), min_size=1, max_size=9),
    ahead=st.integers(0, 3),
    rounds=st.integers(1, 9),
    slots=st.integers(1, 4),
)
def test_late_tokens_change_no_answer(sizes, ahead, rounds, slots):
    """Nor how many are counted; some answers end early, some at a word, some may not look ahead."""
    requests = []
    for number, (tokens, answer, needs_host_tokens) in enumerate(sizes):
        params = SamplingParams(
            max_tokens=answer,
            repetition_penalty=1.5 if needs_host_tokens else 1.0,
            stop=("w1",) if number % 3 == 1 else (),
        )
        words = " ".join(f"{number}x{place}" for place in range(tokens))
        requests.append(Request(id=number, prompt=words, params=params))
    expected, plain = late_answers(requests, 0, 1, max_num_seqs=slots)
    answered, late = late_answers(requests, ahead, rounds, max_num_seqs=slots)
    assert answered == expected
    assert late.backend.last_runner.most_unread <= ahead + 1
    for name in ("prompt_tokens", "generated_tokens", "ended_work", "ended_tokens"):
        assert getattr(late.stats, name) == getattr(plain.stats, name), name


def test_the_next_step_is_launched_before_the_last_one_is_read():
    requests = [Request(id=i, prompt="a b c", params=SamplingParams(max_tokens=9)) for i in range(4)]
    _, engine = late_answers(requests, 1, 1)
    assert engine.backend.last_runner.most_unread == 2
    assert not engine.backend.last_runner.unread


def test_prompts_are_read_and_answers_handed_out_while_the_device_works():
    """A step is on its way whenever the file is asked for another row, but for the first ones, and at every answer."""
    rows = [Request(id=i, prompt=f"a b {i}", params=SamplingParams(max_tokens=6, ignore_eos=True)) for i in range(300)]
    engine = late_engine(1, 1, max_num_seqs=4)
    at_work = []

    def requests():
        for row in rows:
            at_work.append(len(engine.backend.last_runner.unread))
            yield row

    answers = [
        len(engine.backend.last_runner.unread) for _ in engine.run(requests(), engine.plan(engine.measure(rows)))
    ]
    assert set(at_work[64:]) == {1}
    assert len(answers) == 300
    assert set(answers[:-4]) == {1}


def test_a_repetition_penalty_makes_the_host_wait():
    """What it counts against must be known."""
    params = SamplingParams(max_tokens=9, repetition_penalty=1.3)
    _, engine = late_answers([Request(id=0, prompt="a b c", params=params)], 2, 8)
    assert engine.backend.last_runner.most_unread == 1


def test_nothing_is_launched_ahead_on_a_cpu():
    engine = tiny_engine("llama", kv_policy="none")
    plan = engine.plan([])
    with engine.backend.runner(plan, engine.policy) as runner:
        assert (runner.ahead, runner.rounds) == (0, 1)
