"""Rows that share text read it in one slot: they need slots for their own rows alone, and no answer shows it."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import pytest
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine, watched
from families import tiny_model, words
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import HERE
from test_prefix import FULL, SPEC, after, clock, families, known, sequence_of  # noqa: F401 - a fixture

from bmx.engine.prefix_cache import UNIT, PrefixCache, Reuse
from bmx.engine.scheduler import Scheduler
from bmx.engine.shared_slots import SharedSlots
from bmx.kernels.registry import CAPABILITIES
from bmx.kv.layout import SlotIndex
from bmx.plan.device import Device
from bmx.plan.memory import Limits, SlotGroup, StepSize
from bmx.plan.planner import Length, plan, plan_record
from bmx.plan.shared_text import shared_text

EXAMPLES, OTHERS, THIRD, MANY = random_prompts((200, 150, 97, 226), seed=5)
FEW_SHOT = after(EXAMPLES, [9 + i % 8 for i in range(30)], seed=3)
ALONE = random_prompts((120, 30, 215), seed=8)
MIXED = [*FEW_SHOT[:12], ALONE[0], *after(OTHERS, (12, 9, 30, 12, 5)), *ALONE[1:], *after(THIRD, (8, 11, 20))]


def engines(family="llama", rows=FEW_SHOT, slots=8, **config):
    """Engines with reuse and without, both with the KV memory of so many slots that hold the longest of the rows."""
    config = {"chunk_size": 64, "kv_sink": 2, "kv_recent": 5} | config
    plain = tiny_engine(family, prefix_reuse=False, **config)
    requests = as_requests(rows, max_tokens=4)
    layout = plain.plan(plain.measure(requests)).layouts[-1]
    config["kv_cache_memory"] = slots * layout.nbytes
    return tiny_engine(family, **config), tiny_engine(family, prefix_reuse=False, **config)


def in_place(engine, requests):
    """The plan, which must have shared slots, and the answers."""
    made = engine.plan(engine.measure(requests))
    assert made.shared_slots
    with engine.backend.runner(made, engine.policy) as runner:
        assert runner.pool.nbytes == made.memory.pool
    return made, answers(engine, requests, plan=made)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"kv_policy": "none"}),
        ("gpt2", {"kv_policy": "none"}),
        ("gemma2", {"kv_policy": "none", "sliding_window": 500}),
        ("qwen3", {"kv_policy": "average-attention", "kv_budget": 500}),
        ("llama", {"kv_policy": "window", "kv_budget": 500, "kv_format": "int8/int4", "chunk_size": 32}),
        ("llama", {"kv_policy": "keydiff", "kv_budget": 9999, "kv_layer_budgets": "pyramid"}),
    ],
    ids=str,
)
def test_a_few_shot_job_has_eight_times_the_slots_and_the_same_answers(family, config):
    """Pairs in fewer bits are shared at ends of chunks alone, so that those rows gain less."""
    times = 3 if "kv_format" in config else 8
    window = config.pop("sliding_window", None)
    model = tiny_model(family) if window else family
    if window:
        model.config.sliding_window = window
    rows = after(MANY, [3 + i % 4 for i in range(60)], seed=3)
    requests = as_requests(rows, max_tokens=4)
    engine, plain = engines(model, rows, slots=5, **config)
    made, answered = in_place(engine, requests)
    assert made.slots >= times * plain.plan(plain.measure(requests)).slots
    assert answered == answers(plain, requests)
    assert engine.stats.reused_prompt_tokens == 59 * made.shared_slots[0].capacity


def test_answers_are_those_of_generate():
    engine, _ = engines(kv_policy="none", rows=MIXED, slots=6)
    requests = as_requests(MIXED, max_tokens=4)
    _, answered = in_place(engine, requests)
    assert answered == reference_answers(tiny_model("llama"), MIXED, 4)


@pytest.mark.parametrize("slots", [5, 6, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_several_texts_and_rows_that_share_nothing_in_any_order(slots, seed):
    """With stop strings that end some answers early."""
    import random

    requests = as_requests(MIXED, max_tokens=6, stop=("w7", "w2"), ignore_eos=True)
    random.Random(seed).shuffle(requests)
    engine, plain = engines(rows=MIXED, slots=slots, kv_policy="none")
    made, answered = in_place(engine, requests)
    assert made.shared_slots[0].slots == 3
    assert answered == answers(plain, requests)
    assert engine.stats.reused_prompt_tokens > 2000


@pytest.mark.parametrize("name", HERE[:2] or ["cpu"])
def test_in_bfloat16_the_answers_are_those_of_copies(name, cpu_kernels):
    """To the last bit: rows are read in the same order."""
    import torch
    from test_compiled import bfloat16_model, word_tokenizer

    from bmx import Engine, EngineConfig, PromptConfig
    from bmx.engine.backend import ModelBackend
    from bmx.model.loader import prepare

    cpu_kernels(name)
    requests, heard = as_requests(FEW_SHOT, max_tokens=4), []
    backend = ModelBackend(prepare(bfloat16_model()))
    for memory in (None, 1):
        config = EngineConfig(kv_policy="none", chunk_size=64)
        whole = Engine(config, PromptConfig(), word_tokenizer(), backend)
        if memory:
            slot = whole.plan(whole.measure(requests)).layouts[0].nbytes
            whole = whole.with_config(replace(config, kv_cache_memory=6 * slot))
        logits = {}
        watch = lambda request, place, row: logits.update({(request.id, place): row.clone()})  # noqa: B023, E731
        made = whole.plan(whole.measure(requests))
        assert bool(made.shared_slots) is bool(memory)
        answers(whole, requests, plan=made, watch=watch)
        heard.append(logits)
    assert heard[0].keys() == heard[1].keys()
    assert all(torch.equal(heard[0][key], heard[1][key]) for key in heard[0])


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"kv_policy": "none", "kv_format": "int4"}),
        ("llama", {"kv_policy": "average-attention", "kv_budget": 100}),
        ("llama", {"kv_policy": "none", "prefix_reuse": False}),
        ("llama", {"kv_policy": "none", "kv_share_layers": "1:0"}),
        ("llama", {"kv_archive": "int4", "kv_budget": 70}),
        ("mistral", {"kv_policy": "none"}),
        ("qwen3_5_text", {"kv_policy": "none"}),
    ],
    ids=str,
)
def test_where_answers_might_differ_rows_keep_copies(family, config):
    engine = tiny_engine(family, chunk_size=64, kv_sink=2, kv_recent=5, **config)
    lengths = engine.measure(as_requests(FEW_SHOT, max_tokens=4))
    assert {length.in_place for length in lengths} == {0}


def test_a_text_that_is_longer_than_a_shared_slot_is_not_read_in_it():
    """Rows of the same text that evict need a long slot for copies; the few others that share it do not evict."""
    short, long = EXAMPLES[:100], MANY
    many, few = after(short, [6 + i % 4 for i in range(64)]), after(long, (20, 20, 20, 4, 4), seed=2)
    rows = [*many, *few]
    engine, plain = engines(rows=rows, slots=4, kv_policy="average-attention", kv_budget=240, chunk_size=32)
    made, answered = in_place(engine, as_requests(rows, max_tokens=4))
    assert made.prefix_slots[-1].capacity > made.shared_slots[0].capacity
    assert answered == answers(plain, as_requests(rows, max_tokens=4))


# ---- what goes wrong ----


@pytest.mark.parametrize("at", [1, 3, 9])
def test_rows_begin_again_in_fewer_slots_when_memory_runs_out(at):
    requests = as_requests(MIXED, max_tokens=4)
    engine, plain = engines(rows=MIXED, slots=6, kv_policy="none")
    count = iter(range(10**6))

    def run_out(*_):
        if next(count) in (at, at + 4):
            raise MemoryError

    made = engine.plan(engine.measure(requests))
    assert made.shared_slots
    failing = watched(engine, before=run_out)
    assert answers(failing, requests, plan=made) == answers(plain, requests)
    assert len(failing.stats.shrunk_to) == 2
    assert failing.stats.reused_prompt_tokens > 1000


def test_when_a_row_takes_too_long_another_computes_the_text_that_they_share(clock):  # noqa: F811
    requests = as_requests(FEW_SHOT, max_tokens=2)
    engine, plain = engines(slots=3, kv_policy="none", max_num_seqs=5)
    engine = clock.drives(engine, [50.0, 50.0, 1.0])
    made = engine.plan(engine.measure(requests))
    assert made.shared_slots
    found = {r.id: r for r in engine.run(requests, made, row_timeout=60.0)}
    late = [name for name, result in found.items() if result.error]
    assert {found[name].error.code for name in late} == {"timeout"}
    expected = answers(plain, requests)
    assert {name: found[name].token_ids for name in found if name not in late} == {
        name: tokens for name, tokens in expected.items() if name not in late
    }
    assert len(late) == 5


# ---- plans ----


def job(count=64, shared=1472, own=128, answer=20):
    total = shared + own + answer
    return [Length(shared + own, answer, total, shared if i else 0, in_place=shared) for i in range(count)]


def plan_of(lengths, slots, shares=True):
    room = Limits(total=10**12, pool=slots * FULL.layout(SPEC, max(one.rows_needed for one in lengths)).nbytes)
    step = StepSize(chunk_size=512, max_num_batched_tokens=512)
    device = Device.of("cpu", SPEC, 0)
    return plan(SPEC, lambda rows: FULL.layout(SPEC, rows), room, lengths, step, device, shares=shares)


def test_a_plan_with_shared_slots_is_taken_where_it_gives_more():
    made = plan_of(job(300), 12)
    assert made.shared_slots == (SlotGroup(1472, 1),)
    assert made.groups[0] == SlotGroup(160, made.slots - 1, 1472)
    assert made.groups[1] == SlotGroup(1620, 1)
    assert made.slots >= 8 * 12
    assert made.memory.pool <= made.limits.pool
    assert made.fill > 0.9
    assert plan_record(made)["shared"] == [{"capacity": 1472, "slots": 1}]
    for others in (plan_of(job(300), 12, shares=False), plan_of(job(12), 13), plan_of(job(300), 1)):
        assert others.shared_slots == ()
        assert not any(group.shared for group in others.groups)


def test_plan_batch_reads_in_place_where_nothing_is_evicted(bmx, model, tmp_path):
    """Of budgets above and below the length of the rows."""
    rows = [{"id": i, "prompt": words(row)} for i, row in enumerate(FEW_SHOT)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("plan-batch", "in.jsonl", "--model", model, "--device", "cpu", "--dtype", "float32", "--max-tokens", 4)
    args += ("--kv-budget", "5000,100", "--kv-format", "model", "--kv-cache-memory", "1M")
    ended = bmx(*args)
    assert ended.code == 0
    lines = [line for line in ended.out.splitlines() if "shared text" in line]
    assert len(lines) == 1
    assert "of 5,000: shared text: up to 192 of 224 KV pairs of a prompt are read in 1 shared slot" in lines[0]


def test_texts_of_a_few_rows_each_get_no_more_slots_than_rows_can_use():
    """Sixty documents with two questions each: six rows run at once in three shared slots, and twelve with copies."""
    lengths = [Length(1600, 20, 1620, 1472 * (i % 2), in_place=1472) for i in range(120)]
    assert plan_of(lengths, 12).shared_slots == ()
    assert plan_of(lengths, 5).shared_slots == (SlotGroup(1472, 3),)


def test_lengths_that_few_prompts_share_are_left_to_chance():
    text = shared_text([1504, 1504, 1536, *[1504] * 40, 0], [0, 1504, 1504, 1536, *[1504] * 39, 0])
    assert text.tokens == [1504] * 43 + [0]
    assert (text.slots, text.readers) == (1, 44)
    assert shared_text([0, 0], [0, 0]) is None


def test_kernels_say_whether_they_read_shared_rows():
    able = {name for name, capabilities in CAPABILITIES.items() if capabilities.reads_shared_rows}
    assert able == set(CAPABILITIES) - {"triton"}


# ---- any load, without a model ----


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    prompts=families(),
    answer=st.integers(1, 4),
    small=st.integers(1, 5),
    spare=st.integers(0, 1),
    shared=st.integers(1, 3),
    chunk_size=st.integers(1, 70),
    drops=st.sets(st.integers(0, 60)),
)
def test_every_token_is_there_once_and_someone_always_goes_on(prompts, answer, small, spare, shared, chunk_size, drops):
    rows = [sequence_of(i, prompt, answer, FULL) for i, prompt in enumerate(prompts)]
    groups = [SlotGroup(70, small, 90), SlotGroup(max(70, *(row.rows_needed for row in rows)), 1)]
    reuse = Reuse(spec=SPEC, policy=FULL, chunk_size=chunk_size, rows=10**6)
    in_common = SharedSlots(
        [SlotIndex(3, i) for i in range(shared)], groups, lambda row, prefix: reuse.reads_in_place(row, prefix.length)
    )
    scheduler = Scheduler(groups, StepSize(chunk_size=chunk_size, max_num_batched_tokens=80), shared=in_common)
    held = defaultdict(list)

    def copy(source, target, tokens):
        assert len(held[source]) >= tokens
        held[target] = held[source][:tokens]

    prefixes = PrefixCache(reuse, [SlotGroup(10**6, 1)] * spare, 2, copy, shared=in_common)
    spared = computed = finished = moment = 0
    dropped, unread = [], list(rows)
    while unread or scheduler.running or scheduler.waiting:
        moment += 1
        assert moment < 10**5
        while unread and len(scheduler.waiting) < 4:
            scheduler.enqueue(unread.pop(0))
            prefixes.join(scheduler.waiting[-1])
        scheduler.admit_waiting()
        if moment in drops and scheduler.in_slots:
            dropped.append(scheduler.in_slots[0])
            scheduler.drop(dropped[-1:])
        spared += prefixes.arrange(scheduler.in_slots)
        step = scheduler.schedule()
        if step is None:
            assert not scheduler.running, "those that have slots wait for nobody"
            continue
        for chunk in step.chunks:
            own, part = held[chunk.slot_index], chunk.sequence.shared
            if chunk.begins:
                own.clear()
            before = held[part.slot_index][: part.prefix.length] if part and chunk.slot_index != part.slot_index else []
            assert [*before, *own] == known(chunk.sequence)[: chunk.start]
            own.extend(known(chunk.sequence)[chunk.start : chunk.start + chunk.length])
            computed += 0 if chunk.decodes else chunk.length
            assert len(own) <= (10**6 if chunk.slot_index.group == 3 else groups[chunk.slot_index.group].capacity)
        scheduler.launched(step)
        finished += len(scheduler.update(step, [0] * sum(chunk.samples for chunk in step.chunks)))
        prefixes.keep(step, scheduler.unfinished)
    assert finished + len(dropped) == len(rows)
    if not dropped:
        assert computed + spared == sum(map(len, prompts))


def test_a_row_whose_text_finds_no_slot_is_overtaken_only_so_often():
    """Rows that share another text come without end; those that wait for a slot get it when as many have passed."""
    groups = [SlotGroup(60, 2, 64), SlotGroup(200, 1)]
    reuse = Reuse(spec=SPEC, policy=FULL, chunk_size=64, rows=10**6)
    in_common = SharedSlots([SlotIndex(2, 0)], groups, lambda row, prefix: reuse.reads_in_place(row, prefix.length))
    scheduler = Scheduler(groups, StepSize(chunk_size=64, max_num_batched_tokens=200), shared=in_common)
    prefixes = PrefixCache(reuse, (), 3, lambda *_: None, shared=in_common)
    often = [sequence_of(f"a{i}", [*[1] * 64, 5 + i, 6], 3, FULL) for i in range(60)]
    rare = [sequence_of(f"b{i}", [*[2] * 64, 5 + i, 6], 3, FULL) for i in range(4)]
    for sequence in [*often, *rare]:
        prefixes.join(sequence)
    for sequence in [*often[:2], *rare, *often[2:]]:
        scheduler.enqueue(sequence)
    order = []
    while scheduler.running or scheduler.waiting:
        scheduler.admit_waiting()
        prefixes.arrange(scheduler.in_slots)
        step = scheduler.schedule()
        scheduler.launched(step)
        order += [s.request.id for s in scheduler.update(step, [0] * sum(chunk.samples for chunk in step.chunks))]
        prefixes.keep(step, scheduler.unfinished)
    assert len(order) == 64
    assert max(order.index(sequence.request.id) for sequence in rare) < 16
    assert UNIT == 32
