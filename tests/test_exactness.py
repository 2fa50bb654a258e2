"""While nothing is evicted, bmx answers as transformers' generate does, token for token, for every family it serves."""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine, words
from families import FAMILIES, on_turn, tiny_model

from bmx import Request, SamplingParams
from bmx.errors import UsageError

LENGTHS = (5, 23, 16, 9)
CROWDED = {"chunk_size": 7, "max_num_seqs": 3, "max_num_batched_tokens": 20}
PROMPTS = random_prompts(LENGTHS)
NEW_TOKENS = 4
KINDS = ("llama", "mistral", "gemma2", "gemma3n_text", "gpt_oss", "deepseek_v3", "mimo_v2_flash", "opt")
# Those, one key-value head for all queries, heads whose number differs by layer, and a scale of the config's own.
SHAPES = (*KINDS, "gpt_bigcode", "gemma4_k_eq_v", "granite")
# Each kind of state: delta nets, Mamba-2 and Mamba-1, convolutions; alone, beside attention and in shared layers.
STATES = ("qwen3_5_moe_text", "kimi_linear", "nemotron_h", "falcon_h1", "zamba2", "jamba", "lfm3")
COMPARED = on_turn(os.environ["TEST_FAMILIES"], always=(*SHAPES, *STATES))


@cache
def generated(family):
    """What transformers answers to the prompts."""
    return reference_answers(tiny_model(family), PROMPTS, NEW_TOKENS)


@pytest.mark.parametrize(
    ("family", "kernels"),
    [*((family, "cpu") for family in COMPARED), *((family, "reference") for family in SHAPES)],
)
def test_same_greedy_tokens_as_generate(family, kernels, cpu_kernels):
    """Unequal prompts, chunks smaller than prompts, more prompts than slots; full cache."""
    cpu_kernels(kernels)
    engine = tiny_engine(family, kv_policy="none", **CROWDED)
    assert answers(engine, as_requests(PROMPTS, max_tokens=NEW_TOKENS)) == generated(family)
    assert engine.stats.peak_active_slots == 3


@pytest.mark.parametrize("family", KINDS)
def test_a_budget_that_holds_everything_changes_nothing(family):
    engine = tiny_engine(family, kv_budget=max(LENGTHS) + NEW_TOKENS, kv_recent=4, **CROWDED)
    results = list(engine.stream(as_requests(PROMPTS, max_tokens=NEW_TOKENS)))
    assert {r.id: r.token_ids for r in results} == generated(family)
    assert all(r.kv.evicted == 0 for r in results)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("policy", ["none", "average-attention"])
def test_a_row_alone_answers_as_it_does_in_any_company(family, policy):
    """Order, slot count, step size and neighbours change nothing; nor does chunking while nothing is evicted."""
    prompts = random_prompts((31, 11, 44, 8))
    requests = as_requests(prompts, max_tokens=4)
    engine = tiny_engine(family, kv_policy=policy, kv_budget=24, kv_recent=6, chunk_size=10, max_num_seqs=5)
    alone, plan = {}, engine.plan(engine.measure(requests))
    for request in requests:
        alone |= answers(engine, [request], plan=plan)
    assert answers(engine, requests) == alone
    for slots, tokens in ((1, 10), (3, 23)):
        crowd = tiny_engine(
            family,
            kv_policy=policy,
            kv_budget=24,
            kv_recent=6,
            chunk_size=10,
            max_num_seqs=slots,
            max_num_batched_tokens=tokens,
        )
        assert answers(crowd, requests[::-1]) == alone
    if policy == "none":
        assert answers(tiny_engine(family, kv_policy="none", chunk_size=64), requests) == alone


@pytest.mark.parametrize("window_over_budget", [False, True])
def test_a_sliding_window_larger_than_the_budget_is_compressed_too(window_over_budget):
    """A window that fits its slot loses nothing; a larger one keeps to the budget."""
    prompts = random_prompts((60, 45))
    model = tiny_model("mistral")
    model.config.sliding_window = 30 if window_over_budget else 8
    engine = tiny_engine(model, kv_budget=20, kv_recent=6, chunk_size=16)
    layer = engine.policy.layout(engine.spec, 20).layers[0]
    assert (layer.capacity, layer.by_age) == ((20, False) if window_over_budget else (8, True))
    answered = answers(engine, as_requests(prompts, max_tokens=8))
    assert (answered == reference_answers(model, prompts, 8)) is not window_over_budget


LONGROPE = {
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0, 5.0, 8.0, 12.0],
        "original_max_position_embeddings": 32,
        "factor": 4.0,
    },
}
DYNAMIC = {
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}


@pytest.mark.parametrize(("family", "scaling"), [("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_frequencies_that_depend_on_length_are_each_sequences_own(family, scaling, monkeypatch):
    """Short and long sequences share steps, and long prompts are read in chunks; each keeps to its own table.

    The judge is one uncached forward over the prompt and one token more, the length that bmx fixes the table for.
    """
    config = FAMILIES[family]()
    config.update(scaling)
    monkeypatch.setitem(FAMILIES, family, lambda: config)
    model = tiny_model(family)
    prompts = random_prompts((10, 90, 20, 50, 31, 110))
    expected = {}
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, 0]]), use_cache=False).logits[0, -2]
        expected[str(i)] = (int(logits.argmax()),)
    engine = tiny_engine(model, kv_policy="none", chunk_size=16, max_num_batched_tokens=40)
    assert answers(engine, as_requests(prompts, max_tokens=1)) == expected


def test_models_with_several_end_tokens_stop_at_any_of_them():
    model = tiny_model("llama")
    prompt = random_prompts((20,))[0]
    free = reference_answers(model, [prompt], 12)["0"]
    model.generation_config.eos_token_id = [free[3], free[6]]
    engine = tiny_engine(model, kv_policy="none")
    result = next(engine.stream([Request(id="a", prompt=words(prompt), params=SamplingParams(max_tokens=12))]))
    assert result.token_ids == free[: 1 + min(free.index(free[3]), free.index(free[6]))]
    assert result.finish_reason == "stop"


def test_a_prompt_longer_than_the_model_is_an_error_and_a_long_answer_is_cut():
    engine = tiny_engine("llama", kv_policy="none")
    too_long, almost = random_prompts((256, 250))
    results = {r.id: r for r in engine.stream(as_requests([too_long, almost], max_tokens=50))}
    assert results["0"].error.code == "context_length_exceeded"
    assert results["1"].usage.completion_tokens == 6
    assert results["1"].finish_reason == "length"


def test_a_row_of_broken_numbers_leaves_nothing_behind_in_its_slot():
    """An overflow in one row must not reach the next row that lives in the same slot."""
    poisoned, healthy = random_prompts((20, 8))
    model = tiny_model("llama")
    expected = reference_answers(model, [healthy], 6)["0"]
    poison = next(token for token in poisoned if token > 5 and token not in {*healthy, *expected})
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = float("nan")
    engine = tiny_engine(model, kv_policy="none", max_num_seqs=1)
    results = {r.id: r for r in engine.stream(as_requests([poisoned, healthy], max_tokens=6))}
    assert results["0"].error.code == "nan_logits"
    assert results["1"].token_ids == expected


def test_an_engine_answers_one_run_at_a_time_and_many_after_each_other():
    prompts = random_prompts((9, 14))
    engine = tiny_engine("llama", kv_policy="none")
    first = engine.stream(as_requests(prompts, max_tokens=4))
    one = next(first)
    with pytest.raises(UsageError):
        next(engine.stream(as_requests(prompts, max_tokens=4)))
    first.close()
    again = answers(engine, as_requests(prompts, max_tokens=4))
    assert again[one.id] == one.token_ids


def test_a_row_that_would_not_fit_even_alone_is_an_error_and_the_others_are_answered():
    prompts = random_prompts((200, 12, 15))
    engine = tiny_engine("llama", kv_policy="none", kv_cache_memory=30_000)
    results = {r.id: r for r in engine.stream(as_requests(prompts, max_tokens=4))}
    assert results["0"].error.code == "out_of_memory"
    assert (results["1"].token_ids, results["2"].token_ids) == tuple(
        reference_answers(tiny_model("llama"), prompts[1:], 4).values()
    )
