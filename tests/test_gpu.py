"""The same promises on a CUDA GPU. Run with ``pytest -m gpu``; skipped, and said so, where there is none."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine, word_tokenizer, words
from families import FAMILIES, tiny_model
from test_exactness import LONGROPE

from bmx import EngineConfig, Request, SamplingParams
from bmx.compress.policy import CompressionPolicy
from bmx.engine.runner import ModelRunner
from bmx.engine.scheduler import Scheduler
from bmx.engine.sequence import Sequence
from bmx.kernels import choose, drawing, fp8, fp8_products, trial
from bmx.kernels.ranking import EvictionOrder
from bmx.model.fp8_modules import Fp8Linear, quantise
from bmx.model.joined_weights import join_weights
from bmx.model.loader import prepare
from bmx.plan.memory import Limits, Memory, SlotGroup, StepSize
from bmx.plan.planner import Plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE = "cuda"
KINDS = ("llama", "mistral", "qwen3", "phi3", "gemma2", "gemma3n_text", "gpt_oss", "deepseek_v3")
CAPTURED = ("llama", "qwen3", "phi3", "mistral")  # whose decoding must be replayed from graphs
BOTH_WAYS = pytest.mark.parametrize("eager", [False, True], ids=["graphs", "launched anew"])
TIGHT = {"kv_budget": 24, "kv_recent": 6, "chunk_size": 10, "max_num_seqs": 3}
PROMPTS = random_prompts((40, 11, 64, 25, 33, 8))


@pytest.fixture(autouse=True)
def exact_products():
    """No product of float32 may be rounded to fewer bits."""
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def two_sets(monkeypatch):
    """Phi with other frequencies for sequences of more than 32 tokens."""
    config = FAMILIES["phi3"]()
    config.update(LONGROPE)
    monkeypatch.setitem(FAMILIES, "phi3", lambda: config)


@pytest.fixture
def replays(monkeypatch):
    """How often a graph was replayed."""
    replayed, replay = [], torch.cuda.CUDAGraph.replay

    def counted(graph):
        replayed.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return replayed


@cache
def on_the_device(family):
    """One model a family, for tests that change nothing of it."""
    return tiny_model(family).to(DEVICE)


def engine_of(family, **settings):
    return tiny_engine(on_the_device(family), **settings)


def drawn(temperature, **settings):
    """Requests of which each draws its own numbers."""
    params = SamplingParams(max_tokens=20, temperature=temperature, **settings)
    return [Request(id=str(i), prompt=words(prompt), params=params) for i, prompt in enumerate(PROMPTS)]


@BOTH_WAYS
@pytest.mark.parametrize("family", KINDS)
def test_same_greedy_tokens_as_generate_on_the_cpu(family, eager):
    """Rows of unequal lengths share rounds, of which some end in the middle."""
    prompts = random_prompts((5, 30, 17, 23, 9))
    expected = reference_answers(tiny_model(family), prompts, 19)
    engine = engine_of(family, kv_policy="none", chunk_size=7, max_num_seqs=3, enforce_eager=eager)
    assert answers(engine, as_requests(prompts, max_tokens=19)) == expected


@BOTH_WAYS
@pytest.mark.parametrize("family", KINDS)
def test_the_same_tokens_survive_as_on_the_cpu(family, eager):
    requests = as_requests(PROMPTS, max_tokens=20)
    expected = answers(tiny_engine(family, **TIGHT), requests)
    assert answers(engine_of(family, enforce_eager=eager, **TIGHT), requests) == expected


@BOTH_WAYS
@pytest.mark.parametrize("policy", ["far-attention", "h2o", "decay", "tova", "streaming", "window", "keydiff"])
def test_every_way_to_rank_keeps_what_it_keeps_on_the_cpu(policy, eager):
    """Some are simple enough for the kernels, others are ranked by torch."""
    requests = as_requests(PROMPTS, max_tokens=20)
    expected = answers(tiny_engine("llama", kv_policy=policy, **TIGHT), requests)
    assert answers(engine_of("llama", kv_policy=policy, enforce_eager=eager, **TIGHT), requests) == expected


def assert_alike(found, expected):
    """All answers but one, at most: where a number lies between two codes, rounding chooses one of them."""
    assert found.keys() == expected.keys()
    assert sum(found[name] != expected[name] for name in found) <= 1


@BOTH_WAYS
@pytest.mark.parametrize(
    ("policy", "form"),
    [
        ("far-attention", "int8/int4"),
        ("average-attention", "int8"),
        ("h2o", "fp8"),
        ("window", "int4"),
        ("r-kv", "model"),
        ("knorm", "fp8/int4"),
        ("keydiff", "int8/int4"),
    ],
)
def test_coded_and_ranked_pairs_are_those_of_the_cpu_and_run_in_graphs(policy, form, eager, replays):
    settings, requests = TIGHT | {"kv_policy": policy, "kv_format": form}, as_requests(PROMPTS, max_tokens=20)
    engine = engine_of("llama", enforce_eager=eager, **settings)
    assert_alike(answers(engine, requests), answers(tiny_engine("llama", **settings), requests))
    assert (engine.stats.eager, bool(replays)) == ("", not eager)


@BOTH_WAYS
@pytest.mark.parametrize(
    "settings",
    [
        TIGHT | {"kv_archive": "int4"},
        TIGHT | {"kv_archive": "int8/int4", "kv_policy": "streaming", "kv_format": "int8"},
        TIGHT | {"kv_archive": "model"},
        {"kv_policy": "none", "kv_format": "int4", "chunk_size": 10, "max_num_seqs": 3},
        {"kv_policy": "none", "kv_format": "fp8", "chunk_size": 10, "max_num_seqs": 3},
    ],
    ids=lambda settings: ", ".join(f"{name[3:]} {each}" for name, each in settings.items() if isinstance(each, str)),
)
def test_archives_and_whole_caches_in_fewer_bits_answer_as_on_the_cpu(settings, eager):
    """Keys of most of them are scaled by channel."""
    requests = as_requests(PROMPTS, max_tokens=20)
    expected = answers(tiny_engine("llama", **settings), requests)
    assert_alike(answers(engine_of("llama", enforce_eager=eager, **settings), requests), expected)


@BOTH_WAYS
@pytest.mark.parametrize("settings", [TIGHT, {"kv_policy": "none", "chunk_size": 10, "max_num_seqs": 3}], ids=str)
def test_slots_read_in_splits_answer_as_on_the_cpu(settings, eager, monkeypatch):
    from bmx.kernels import triton_decode

    requests = as_requests(PROMPTS, max_tokens=20)
    expected = answers(tiny_engine("llama", **settings), requests)
    monkeypatch.setattr(triton_decode, "SPLITS", triton_decode.Splits(8, 16))
    assert answers(engine_of("llama", enforce_eager=eager, **settings), requests) == expected


def attention_of(by="average", formats=("model", "model"), **told):
    """A layer of the trials, under an order of eviction."""
    far = {"distance": 4, "power": 2} if by == "average" else {}
    order = EvictionOrder(by=by, sink=2, recent=4, window=told.pop("window", None), **far)
    sizes = {"heads": 8, "kv_heads": 2, "key_dim": 64, "value_dim": 64, "mass": by in ("average", "mass")}
    return trial.Attention(order=order, formats=formats, **sizes | told)


LAYERS = {
    "far": attention_of(),
    "coded": attention_of(formats=("int8", "int4")),
    "float8": attention_of("mass", ("fp8", "fp8"), decays=True, key_dim=96, value_dim=96),
    "ranked": attention_of("rank", ("int4", "int8"), mass=True),
    "by age, many heads": attention_of("age", heads=48, kv_heads=2, key_dim=128, value_dim=128, window=24),
    "capped, sinks": attention_of("mass", softcap=30.0, sinks=True, window=24),
    "of two sizes": attention_of(heads=4, kv_heads=4, key_dim=192, value_dim=128),
    "by itself": attention_of(fused=False),
    "by channel": attention_of("age", fused=False, channel_formats=("int4", "int4")),
    "by channel, in bytes": attention_of("age", fused=False, channel_formats=("int8", "model"), key_dim=128),
}


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        *((layer, torch.bfloat16) for layer in LAYERS),
        *((layer, torch.float32) for layer in ("far", "coded", "by channel")),
        ("far", torch.float16),
    ],
    ids=str,
)
def test_every_kernel_computes_what_plain_torch_does(layer, dtype):
    assert trial._failures(choose(DEVICE), LAYERS[layer], dtype, torch.device(DEVICE)) == ()


@pytest.mark.parametrize("layer", ["far", "coded", "float8", "ranked", "by channel"])
def test_nothing_depends_on_how_many_programs_share_a_slot_or_on_which_is_first(layer, monkeypatch):
    """Programs that wrote what others read would differ once in a while."""
    from bmx.kernels import triton_channel_decode, triton_decode

    module, by_channel = choose(DEVICE).module, LAYERS[layer].channel_formats is not None
    inputs, seen = trial.Inputs(LAYERS[layer], torch.bfloat16, torch.device(DEVICE)), []
    for programs in (1, 2, 5, 5, 5, 5):
        for file in (triton_decode, triton_channel_decode):
            monkeypatch.setattr(file, "programs", lambda _, splits, __, most=programs: min(splits, most))
        found = (trial._channels_long if by_channel else trial._decode_long)(module, inputs)
        seen.append({**found.numbers, **found.pairs})
    assert all(torch.equal(one[name], seen[0][name]) for one in seen for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_of_a_large_vocabulary_is_drawn_what_is_drawn_from_a_sorted_one(dtype):
    """But where a draw falls between two tokens."""
    cuts = [(1.0, 0, 1.0, 0.0), (1.7, 50, 1.0, 0.0), (1.2, 0, 0.8, 0.0), (0.8, 0, 1.0, 0.05), (1.5, 200, 0.95, 0.01)]
    chance = torch.Generator().manual_seed(0)
    sampling = torch.tensor([(*cut, u) for cut in cuts for u in torch.rand(8, generator=chance).tolist()])
    sampling = sampling.double().t().contiguous().to(DEVICE)
    logits = (3 * torch.randn(sampling.shape[1], 128_256, generator=chance)).to(DEVICE, dtype)
    rows = torch.arange(len(logits), device=DEVICE)
    ids = choose(DEVICE).module.draw(logits, rows, sampling)
    assert int((ids != drawing.draw(logits, rows, sampling)).sum()) <= 1
    assert torch.equal(ids[7:9], choose(DEVICE).module.draw(logits, rows[7:9], sampling[:, 7:9].contiguous()))


def float8_refused():
    """Why layers cannot be multiplied in float8 here."""
    return fp8.why_refused("bfloat16")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 300])
def test_float8_layers_multiply_what_was_rounded_joined_or_not(rows, bias):
    if reason := float8_refused():
        pytest.skip(reason)
    torch.manual_seed(0)
    model = tiny_model("llama").to(torch.bfloat16)
    names = ("q_proj", "k_proj", "v_proj")
    attention = model.model.layers[0].self_attn
    for name, outputs in zip(names, (64, 32, 32), strict=True):
        setattr(attention, name, Fp8Linear(torch.nn.Linear(48, outputs, bias=bias, dtype=torch.bfloat16)))
    model.to(DEVICE)
    x = torch.randn(rows, 48).to(DEVICE, torch.bfloat16)
    codes, scales = fp8_products.round_rows(x)
    for _ in range(2):
        layers = [getattr(attention, name).layer for name in names]
        with torch.inference_mode():
            outputs = choose(DEVICE).module.product(tuple(layers))(x)
        for layer, y in zip(layers, outputs, strict=True):
            weight = layer.weight.double() * layer.scales.double().unsqueeze(1)
            expected = (codes.double() * scales.double().unsqueeze(1)) @ weight.t()
            expected += 0 if layer.bias is None else layer.bias.detach().double()
            assert (y.double() - expected).norm() <= 0.02 * expected.norm()
        join_weights(model)
    assert layers[1].weight.storage_offset() > 0


def test_float8_layers_run_in_graphs(replays):
    if reason := float8_refused():
        pytest.skip(reason)
    model = tiny_model("llama").to(DEVICE, torch.bfloat16)
    assert quantise(model)
    engine = tiny_engine(model, **TIGHT)
    answers(engine, [*drawn(0.0)[:3], *drawn(0.9)[3:]])
    assert engine.stats.eager == ""
    assert replays
    assert [count for count in engine.stats.modules.values() if "why" in count] == []


@BOTH_WAYS
def test_a_budget_that_holds_everything_changes_nothing(eager):
    expected = reference_answers(tiny_model("llama"), PROMPTS, 8)
    engine = engine_of("llama", kv_budget=64 + 8, kv_recent=6, chunk_size=10, max_num_seqs=3, enforce_eager=eager)
    assert answers(engine, as_requests(PROMPTS, max_tokens=8)) == expected


@BOTH_WAYS
def test_each_sequence_keeps_to_its_own_frequencies(two_sets, eager):
    requests = as_requests(PROMPTS, max_tokens=20)
    for settings in ({"kv_policy": "none", "chunk_size": 10, "max_num_seqs": 3}, TIGHT):
        expected = answers(tiny_engine(tiny_model("phi3"), **settings), requests)
        engine = tiny_engine(tiny_model("phi3").to(DEVICE), enforce_eager=eager, **settings)
        assert answers(engine, requests) == expected


@pytest.mark.parametrize("family", CAPTURED)
def test_decoding_is_captured_and_replayed(family, request, replays):
    if family == "phi3":
        request.getfixturevalue("two_sets")
    engine = tiny_engine(tiny_model(family).to(DEVICE), **TIGHT)
    answers(engine, [*drawn(0.0)[:3], *drawn(0.9)[3:]])
    assert engine.backend.kernels.name == "triton"
    assert engine.stats.eager == ""
    assert replays
    replays.clear()
    answers(engine.with_config(EngineConfig(enforce_eager=True, **TIGHT)), drawn(0.0)[:2])
    assert not replays


@BOTH_WAYS
def test_what_is_drawn_depends_on_seeds_and_on_nothing_else(eager):
    """On the CPU the same is drawn, token by token."""
    for temperature, settings in ((0.9, {"seed": 3}), (1.5, {"top_k": 20, "top_p": 0.9, "seed": 4})):
        requests = drawn(temperature, **settings)
        seeded = answers(engine_of("llama", enforce_eager=eager, **TIGHT), requests)
        assert seeded == answers(tiny_engine("llama", **TIGHT), requests)
    other = answers(engine_of("llama", enforce_eager=eager, **TIGHT), drawn(1.5, top_k=20, top_p=0.9, seed=5))
    assert other != seeded


@BOTH_WAYS
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_alone_is_the_row_in_a_batch(temperature, eager):
    """In float32, which leaves no room for products of another size to end otherwise."""
    requests = drawn(temperature)
    engine, alone = engine_of("llama", enforce_eager=eager, **TIGHT), {}
    for one in requests:
        alone |= answers(engine, [one])
    assert answers(engine, requests) == alone
    for slots in (1, 2, 6):
        crowd = engine_of("llama", enforce_eager=eager, **TIGHT | {"max_num_seqs": slots})
        assert answers(crowd, requests[::-1]) == alone


def test_greedy_and_drawn_rows_and_penalties_share_steps():
    requests = [*drawn(0.0)[:2], *drawn(0.8)[2:4], *drawn(0.0, repetition_penalty=1.4)[4:]]
    assert answers(engine_of("llama", **TIGHT), requests) == answers(tiny_engine("llama", **TIGHT), requests)


def test_repeated_runs_are_equal_to_the_last_bit():
    seen = []
    engine = engine_of("llama", **TIGHT)
    for _ in range(2):
        answers(engine, drawn(0.9), watch=lambda request, place, row: seen.append((request.id, place, row.clone())))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == 20 * len(PROMPTS)
    assert [one[:2] for one in first] == [one[:2] for one in second]
    assert all(torch.equal(one[2], other[2]) for one, other in zip(first, second, strict=True))
    replayed = engine_of("llama", **TIGHT)
    assert answers(replayed, drawn(0.9)) == answers(replayed, drawn(0.9))


def test_answers_end_where_they_end():
    """The device knows the ends, and the host does not look before a round is over."""
    free = reference_answers(tiny_model("llama"), PROMPTS, 20)
    end = free["1"][4]
    params = SamplingParams(max_tokens=20, stop_token_ids=(end,))
    requests = [Request(id=str(i), prompt=words(prompt), params=params) for i, prompt in enumerate(PROMPTS)]
    expected = {name: ids[: ids.index(end) + 1 if end in ids else 20] for name, ids in free.items()}
    assert answers(engine_of("llama", kv_policy="none", chunk_size=10, max_num_seqs=3), requests) == expected


def test_a_row_of_broken_numbers_is_an_error_and_leaves_nothing_behind():
    poisoned, healthy = random_prompts((20, 8))
    model = tiny_model("llama")
    expected = reference_answers(model, [healthy], 12)["0"]
    poison = next(token for token in poisoned if token > 5 and token not in {*healthy, *expected})
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = float("nan")
    engine = tiny_engine(model.to(DEVICE), kv_policy="none", chunk_size=10, max_num_seqs=1)
    results = {r.id: r for r in engine.stream(as_requests([poisoned, healthy], max_tokens=12))}
    assert results["0"].error.code == "nan_logits"
    assert results["1"].token_ids == expected


@BOTH_WAYS
def test_the_plan_holds_on_the_device(eager):
    """Of what torch reserves, graphs and all; the context is not torch's."""
    prompts = random_prompts([200] * 40)
    engine = tiny_engine(
        tiny_model("llama").to(DEVICE), kv_policy="none", kv_cache_memory=50_000_000, enforce_eager=eager
    )
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    plan = engine.plan(engine.measure(as_requests(prompts, max_tokens=20)))
    requests = [*as_requests(prompts[:20], max_tokens=20), *hot(prompts[20:])]
    assert [result.error for result in engine.run(requests, plan) if result.error] == []
    assert engine.stats.shrunk_to == []
    reserved = torch.cuda.max_memory_reserved()  # counted from the run's beginning
    assert before <= reserved <= before + plan.memory.total - plan.memory.runtime
    assert engine.stats.peak_memory_bytes <= before + plan.memory.total


def hot(prompts):
    """Rows that draw, whose graphs are others."""
    params = SamplingParams(max_tokens=20, temperature=0.9)
    return [Request(id=f"drawn {i}", prompt=words(prompt), params=params) for i, prompt in enumerate(prompts)]


@contextmanager
def no_waiting():
    """Whoever makes the host wait for the device fails."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def sequences(policy, largest, temperature):
    """Prompts that evict, of unequal lengths; every other one draws."""
    for number, tokens in enumerate((12, 60, 33, 50, 9)):
        params = SamplingParams(max_tokens=20, temperature=temperature if number % 2 else 0.0)
        yield Sequence(
            request=Request(id=number, params=params),
            prompt=[5 + (number + place) % 50 for place in range(tokens)],
            max_tokens=20,
            rows_needed=min(largest, policy.rows_needed(tokens, 20)),
            end_token_ids=frozenset({2}),
            tokenizer=word_tokenizer(),
        )


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # is a prototype, says torch
@BOTH_WAYS
@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("llama", "far-attention"),
        ("llama", "average-attention"),
        ("llama", "decay"),
        ("llama", "streaming"),
        ("llama", "window"),
        ("llama", "r-kv"),
        ("llama", "keydiff"),
        ("qwen3", "h2o"),
        ("phi3", "h2o"),
    ],
)
def test_no_step_waits_for_the_device(family, policy, eager, two_sets):
    """The second time, when everything is compiled and captured."""
    loaded = prepare(tiny_model(family).to(DEVICE))
    chosen = CompressionPolicy.from_config(EngineConfig(kv_policy=policy, kv_budget=24, kv_sink=2, kv_recent=4))
    groups, size = (SlotGroup(24, 5),), StepSize(chunk_size=16, max_num_batched_tokens=48)
    layouts = tuple(chosen.layout(loaded.spec, group.capacity) for group in groups)
    plan = Plan(groups=groups, layouts=layouts, step=size, memory=Memory(), limits=Limits(total=0))
    refused = None if eager else pytest.fail
    with ModelRunner(loaded, chosen, plan, choose(DEVICE), refused=refused) as runner:
        assert (runner.ahead, runner.rounds > 1) == (1, not eager)
        for watched in (False, True):
            for temperature in (0.0, 0.9):
                steps = launched(runner, Scheduler(groups, size), sequences(chosen, 24, temperature), watched)
                assert steps > 5


def launched(runner, scheduler, rows, watched):
    """Launch all steps that rows take, one after another, and read none; returns how many."""
    for row in rows:
        scheduler.enqueue(row)
    for count in range(100):
        scheduler.admit_waiting()
        step = scheduler.schedule(runner.rounds)
        if step is None:
            assert not scheduler.in_slots
            assert not scheduler.waiting
            return count
        if watched:
            with no_waiting():
                runner.run(step)
        else:
            runner.run(step)
        scheduler.launched(step)
    raise AssertionError("there is no end to it")
