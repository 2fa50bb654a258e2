"""The same promises on a CUDA GPU. Run with ``pytest -m gpu``; skipped, and said so, where there is none."""

from __future__ import annotations

import pytest
import torch
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine
from families import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
KINDS = ("llama", "mistral", "qwen3", "phi3", "gemma2", "gemma3n_text", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("family", KINDS)
def test_same_greedy_tokens_as_generate_on_the_cpu(family):
    prompts = random_prompts((5, 30, 17, 23, 9))
    expected = reference_answers(tiny_model(family), prompts, 8)
    engine = tiny_engine(tiny_model(family).cuda(), kv_policy="none", chunk_size=7, max_num_seqs=3)
    assert answers(engine, as_requests(prompts, max_tokens=8)) == expected


@pytest.mark.parametrize("family", KINDS)
def test_the_same_tokens_survive_as_on_the_cpu(family):
    prompts = random_prompts((40, 11, 64, 25, 33, 8))
    requests = as_requests(prompts, max_tokens=12)
    settings = {"kv_budget": 24, "kv_recent": 6, "chunk_size": 10}
    expected = answers(tiny_engine(family, **settings), requests)
    assert answers(tiny_engine(tiny_model(family).cuda(), **settings), requests) == expected


def test_the_plan_holds_on_the_device():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine = tiny_engine(tiny_model("llama").cuda(), kv_policy="none", kv_cache_memory=50_000_000)
    plan = engine.plan(engine.measure(as_requests(random_prompts([200] * 8), max_tokens=8)))
    before = torch.cuda.memory_allocated()
    list(engine.generate(as_requests(random_prompts([200] * 8), max_tokens=8), plan))
    assert torch.cuda.max_memory_allocated() - before <= plan.memory.total
