"""With the kernels that GPUs run, interpreted where there is none: the same answers, alone, in company, or drawn.

What single kernels compute is tested beside this, in ``test_triton_prefill`` and ``test_triton_slots``.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine, words
from families import FAMILIES, tiny_model
from test_exactness import LONGROPE
from test_kernels import normal

pytest.importorskip("triton")

from bmx import Request, SamplingParams, kernels
from bmx.engine import graphs
from bmx.engine.attention import SlotAttention
from bmx.kernels import reference, triton_pointwise
from bmx.kernels.ranking import RANKS
from bmx.kernels.registry import CAPABILITIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CROWDED = {"chunk_size": 16, "max_num_seqs": 3, "max_num_batched_tokens": 40}
TIGHT = {"kv_budget": 20, "kv_sink": 2, "kv_recent": 5, **CROWDED}
PROMPTS = random_prompts((5, 30, 17))
LONG = random_prompts((40, 11, 33))


@pytest.fixture(autouse=True)
def chosen(cpu_kernels, monkeypatch):
    cpu_kernels("triton")
    small = FAMILIES["llama"]()
    small.num_hidden_layers = 1
    monkeypatch.setitem(FAMILIES, "small", lambda: small)


@contextmanager
def fused_alone():
    """Nothing is left to policy and pool."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("_prefill_chunk", "_decode_group"):
            patched.setattr(SlotAttention, name, None)
        yield


def engine_of(family, **settings):
    return tiny_engine(tiny_model(family).to(DEVICE), **settings)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_same_greedy_tokens_as_generate(family):
    engine, prompts = engine_of(family, kv_policy="none", **CROWDED), PROMPTS[:2]
    assert answers(engine, as_requests(prompts, max_tokens=4)) == reference_answers(tiny_model(family), prompts, 4)
    assert engine.backend.kernels.name == "triton"
    assert engine.stats.eager == ""


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("llama", "far-attention"),
        ("small", "average-attention"),
        ("small", "decay"),
        ("small", "tova"),
        ("small", "streaming"),
    ],
)
def test_the_same_tokens_survive_as_in_plain_torch(family, policy, cpu_kernels):
    requests = as_requests(LONG[:2], max_tokens=5)
    with fused_alone():
        answered = answers(engine_of(family, kv_policy=policy, **TIGHT), requests)
    cpu_kernels("reference")
    assert answered == answers(tiny_engine(family, kv_policy=policy, **TIGHT), requests)


def ranked_requests(prompts=(LONG[2], PROMPTS[2])):
    """A slot whose ranking gets old while it answers, and one that becomes full."""
    drawn = SamplingParams(max_tokens=6, temperature=0.8)
    return [*as_requests(prompts[:1], max_tokens=6), Request(id="drawn", prompt=words(prompts[1]), params=drawn)]


@pytest.mark.parametrize("policy", ["window", "r-kv", "keydiff"])
def test_pairs_that_are_ranked_now_and_then_survive_as_in_plain_torch(policy, cpu_kernels):
    with fused_alone():
        answered = answers(engine_of("small", kv_policy=policy, **TIGHT), ranked_requests())
    cpu_kernels("reference")
    assert answered == answers(tiny_engine("small", kv_policy=policy, **TIGHT), ranked_requests())


def test_of_pairs_that_are_ranked_alike_those_survive_that_the_specification_says(cpu_kernels, monkeypatch):
    """Neighbours share the greatest attention among them. Alone, in company, and in few bits."""
    with fused_alone():
        settings = {"kv_policy": "rocketkv", "kv_format": "int8/int4", **TIGHT}
        answered = answers(engine_of("small", **settings), ranked_requests())
        assert answers(engine_of("small", **settings), ranked_requests()[1:]).items() <= answered.items()
        fuses = replace(CAPABILITIES["reference"], orders=RANKS)
        monkeypatch.setitem(CAPABILITIES, "reference", fuses)
        cpu_kernels("reference")
        assert answered == answers(tiny_engine("small", **settings), ranked_requests())


def test_a_window_that_some_slots_hold_and_others_do_not(cpu_kernels):
    """Its layer evicts by age in the one and by attention in the others."""
    model = tiny_model("mistral")
    model.config.sliding_window = 18
    requests = as_requests(LONG[:2], max_tokens=5)
    answered = answers(tiny_engine(model.to(DEVICE), **TIGHT | {"max_num_seqs": 4}), requests)
    cpu_kernels("reference")
    assert answered == answers(tiny_engine(model.to("cpu"), **TIGHT | {"max_num_seqs": 4}), requests)


def drawn(temperature, seed=None, **settings):
    params = SamplingParams(max_tokens=5, temperature=temperature, **settings)
    return [Request(id=str(i), prompt=words(prompt), params=params) for i, prompt in enumerate(LONG)]


def test_a_row_alone_is_the_row_in_a_batch_and_draws_what_it_draws_elsewhere(cpu_kernels):
    """Tokens are read late, several at a time, in any company, greedy or drawn; on a CPU one by one."""
    requests = [drawn(0.9)[0], drawn(0.0)[1], drawn(0.9)[2]]
    together = answers(engine_of("small", **TIGHT), requests)
    alone = {}
    engine = engine_of("small", **TIGHT)
    for request in requests[:2]:
        alone |= answers(engine, [request])
    assert alone.items() <= together.items()
    cpu_kernels("cpu")
    assert answers(tiny_engine("small", **TIGHT), requests) == together


def test_greedy_and_drawn_rows_and_penalties_share_steps(cpu_kernels):
    requests = [*drawn(0.0)[:1], *drawn(0.8)[1:2], *drawn(0.0, repetition_penalty=1.4)[2:]]
    assert len({request.id for request in requests}) == len(requests)
    answered = answers(engine_of("small", **TIGHT), requests)
    cpu_kernels("cpu")
    assert answered == answers(tiny_engine("small", **TIGHT), requests)


def test_answers_that_end_early_end_there():
    """The device checks the first eight end tokens of an answer; the host checks the ninth."""
    prompts = PROMPTS[1:]
    free = reference_answers(tiny_model("small"), prompts, 10)
    never = [token for token in range(100, 140) if all(token not in ids for ids in free.values())][:8]
    for ends in ((free["1"][4],), (*never, free["1"][4])):
        params = SamplingParams(max_tokens=10, stop_token_ids=ends)
        requests = [Request(id=str(i), prompt=words(prompt), params=params) for i, prompt in enumerate(prompts)]
        expected = {
            name: ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), 10)] for name, ids in free.items()
        }
        assert answers(engine_of("small", kv_policy="none", **CROWDED), requests) == expected


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's arithmetic
def test_a_row_of_broken_numbers_is_an_error_and_leaves_nothing_behind():
    poisoned, healthy = random_prompts((20, 8))
    model = tiny_model("small")
    expected = reference_answers(model, [healthy], 6)["0"]
    poison = next(token for token in poisoned if token > 5 and token not in {*healthy, *expected})
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = float("nan")
    engine = tiny_engine(model.to(DEVICE), kv_policy="none", chunk_size=16, max_num_seqs=1)
    results = {r.id: r for r in engine.stream(as_requests([poisoned, healthy], max_tokens=6))}
    assert results["0"].error.code == "nan_logits"
    assert results["1"].token_ids == expected


def test_two_sets_of_frequencies_in_the_same_round(monkeypatch, cpu_kernels):
    config = FAMILIES["phi3"]()
    config.update(LONGROPE)
    monkeypatch.setitem(FAMILIES, "phi3", lambda: config)
    requests = as_requests(random_prompts((10, 60)), max_tokens=4)
    answered = answers(engine_of("phi3", kv_policy="none", **CROWDED), requests)
    cpu_kernels("cpu")
    assert answered == answers(tiny_engine(tiny_model("phi3"), kv_policy="none", **CROWDED), requests)


def test_a_finished_run_leaves_no_slots_behind():
    """Not even until garbage is collected: a GPU has no room for them beside those of the next run."""
    engine = engine_of("small", **TIGHT)
    plan = engine.plan([])
    gc.collect()
    gc.disable()
    try:
        with engine.backend.runner(plan, engine.policy, refused=pytest.fail) as runner:
            assert runner.rounds > 1
            slots = weakref.ref(runner.pool)
        del runner
        assert slots() is None
    finally:
        gc.enable()


def test_what_cannot_be_captured_is_launched_anew_and_said(monkeypatch):
    class Capturing(graphs.DecodeGraphs):
        def __init__(self, *args):
            super().__init__(*args)
            self.captures = True

    def capture(self, pool, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    requests = as_requests(LONG[1:2], max_tokens=4)
    expected = answers(engine_of("small", **TIGHT), requests)
    monkeypatch.setattr("bmx.engine.runner.DecodeGraphs", Capturing)
    monkeypatch.setattr(graphs.Round, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    engine = engine_of("small", **TIGHT)
    assert answers(engine, requests) == expected
    assert engine.stats.eager.startswith("operation not permitted when stream is capturing (")


def test_launched_anew_each_time_the_answers_are_the_same():
    requests = as_requests(LONG[2:], max_tokens=4)
    assert answers(engine_of("small", enforce_eager=True, **TIGHT), requests) == answers(
        engine_of("small", **TIGHT), requests
    )


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 96), (1, 2048), (4, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_gates_and_rotations_are_those_of_plain_torch(shape, dtype):
    close = {"atol": 2e-6, "rtol": 2e-6} if dtype == torch.float32 else {"atol": 4e-3, "rtol": 4e-3}
    x, other = (normal(*shape, seed=seed, dtype=dtype).to(DEVICE) for seed in (1, 2))
    weight = normal(shape[-1], seed=3, dtype=dtype).to(DEVICE)
    for name, operands in {"rms_norm": (x,), "offset_norm": (x,), "gated_norm": (x, other)}.items():
        output, expected = (getattr(module, name)(*operands, weight, 1e-5) for module in (triton_pointwise, reference))
        torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(triton_pointwise.gate(x, other), reference.gate(x, other), **close)
    halves = torch.cat([x, other], dim=-1).chunk(2, dim=-1)
    torch.testing.assert_close(triton_pointwise.gate(*halves), reference.gate(*halves), **close)
    heads = normal(1, 5, 3, shape[-1], seed=4, dtype=dtype).to(DEVICE).transpose(1, 2)
    cos, sin = (normal(1, 5, shape[-1], seed=seed, dtype=dtype).to(DEVICE) for seed in (5, 6))
    columns = normal(1, 5, 4 * shape[-1], seed=7, dtype=dtype).to(DEVICE)[..., shape[-1] :].unflatten(-1, (3, -1))
    normed = triton_pointwise.rms_norm(columns, weight, 1e-5)
    torch.testing.assert_close(normed, reference.rms_norm(columns, weight, 1e-5), **close)
    turned = triton_pointwise.rotate(heads, cos, sin)
    torch.testing.assert_close(turned, reference.rotate(heads, cos, sin), **close)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_a_model_whose_parts_are_taken_over_answers_as_before(family, monkeypatch):
    changed = {**CAPABILITIES, "triton": replace(CAPABILITIES["triton"], model_dtypes=("float32",))}
    monkeypatch.setattr(kernels, "CAPABILITIES", changed)
    expected = reference_answers(tiny_model(family), PROMPTS[:1], 2)
    assert answers(engine_of(family, kv_policy="none"), as_requests(PROMPTS[:1], max_tokens=2)) == expected


def test_a_gpu_gets_them_and_a_cpu_does_not(monkeypatch):
    monkeypatch.delenv("BMX_KERNELS")
    assert kernels.choose("cuda").name == "triton"
    assert kernels.choose("cpu").name != "triton"
    monkeypatch.setenv("BMX_KERNELS", "reference")
    assert kernels.choose("cuda").name == "reference"
