"""While nothing is evicted, bmx answers as transformers' generate does, token for token, for every family it serves."""

from __future__ import annotations

import pytest
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine
from families import FAMILIES, tiny_model

LENGTHS = (5, 30, 17, 23, 9)


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_greedy_tokens_as_generate(family, kernels, cpu_kernels):
    """Unequal prompts, chunks smaller than prompts, more prompts than slots; full cache."""
    cpu_kernels(kernels)
    prompts = random_prompts(LENGTHS)
    expected = reference_answers(tiny_model(family), prompts, 8)
    engine = tiny_engine(family, kv_policy="none", chunk_size=7, max_num_seqs=3, max_num_batched_tokens=20)
    assert answers(engine, as_requests(prompts, max_tokens=8)) == expected
    assert engine.stats.peak_active_slots == 3
