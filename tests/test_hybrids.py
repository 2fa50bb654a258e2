"""Hybrids: models with layers that keep a state for each sequence beside layers of attention.

Each state belongs to one sequence, whoever else is in the step, wherever chunks end, and whatever goes wrong.
"""

from __future__ import annotations

import pytest
import torch
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine, tiny_loaded, watched
from families import FAMILIES, random_model, tiny_model
from test_refusals import assert_refused
from transformers import AutoModelForCausalLM
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.qwen3_5 import modeling_qwen3_5

# A gated delta net, Mamba-2 and a short convolution, each beside attention
HYBRIDS = ["qwen3_5_text", "granitemoehybrid", "lfm2"]
PROMPTS = random_prompts((5, 60, 17, 33, 9))
CROWD = {"chunk_size": 7, "max_num_seqs": 3, "max_num_batched_tokens": 20}
FEW = ["qwen3_5_text"]


def expected(family, prompts=PROMPTS, new_tokens=7):
    return reference_answers(tiny_model(family), prompts, new_tokens)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("family", HYBRIDS)
def test_rows_in_company_equal_generate_wherever_chunks_end(family, chunk):
    engine = tiny_engine(family, kv_policy="none", **CROWD | {"chunk_size": chunk, "max_num_batched_tokens": 3 * chunk})
    assert answers(engine, as_requests(PROMPTS, max_tokens=7)) == expected(family)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_row_alone_equals_the_row_in_company_in_any_order(family):
    engine = tiny_engine(family, kv_budget=24, kv_recent=6, **CROWD)
    requests = as_requests(PROMPTS, max_tokens=7)
    together = answers(engine, requests)
    assert answers(engine, requests[::-1]) == together
    assert {i: text for request in requests for i, text in answers(engine, [request]).items()} == together


@pytest.mark.parametrize("family", ["nemotron_h", "zamba2"])
def test_the_steps_of_a_state_space_are_limited_in_prompts_alone(family):
    """As transformers does it: the limit is none of the function with which it decodes."""
    config = FAMILIES[family]()
    config.time_step_min = 0.5
    model = random_model(AutoModelForCausalLM, config)
    engine = tiny_engine(model, kv_policy="none", **CROWD)
    assert answers(engine, as_requests(PROMPTS, max_tokens=7)) == reference_answers(model, PROMPTS, 7)


@pytest.mark.parametrize("family", HYBRIDS)
def test_shared_text_brings_its_states_along(family):
    shared = random_prompts((96,), seed=5)[0]
    rows = [shared + question for question in random_prompts((12, 9, 30), seed=1)]
    engine = tiny_engine(family, kv_policy="none", **CROWD | {"chunk_size": 24, "max_num_batched_tokens": 80})
    assert answers(engine, as_requests(rows, max_tokens=5)) == expected(family, rows, 5)
    assert engine.stats.reused_prompt_tokens >= len(shared)


@pytest.mark.parametrize("family", HYBRIDS)
def test_rows_that_begin_again_begin_without_a_state(family):
    """Memory runs out when prompts are half read and answers half written."""
    steps = []

    def fails_once(_runner, step):
        steps.append(step)
        if len(steps) == 6:
            raise torch.OutOfMemoryError

    engine = watched(tiny_engine(family, kv_policy="none", **CROWD), before=fails_once)
    assert answers(engine, as_requests(PROMPTS, max_tokens=7)) == expected(family)
    assert engine.stats.shrunk_to


@pytest.mark.parametrize("family", FEW)
def test_prompts_that_are_archived_while_they_are_read_keep_one_state(family):
    """Prompts are read in other slots than those on which answers are written, and their last tokens on the archive."""
    engine = tiny_engine(family, kv_budget=40, kv_recent=6, kv_archive="model", kv_recall="attention", **CROWD)
    short = random_prompts((20, 31, 9))  # nothing of them is evicted
    assert answers(engine, as_requests(short, max_tokens=5)) == expected(family, short, 5)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_probe_leaves_no_trace_in_the_states(family):
    """Nothing is evicted before the second chunk, so that only the probe could change the states of the first."""
    states = {}
    for probe in (None, "w5 w6 w7"):
        engine = tiny_engine(family, kv_budget=16, kv_recent=4, kv_probe=probe, chunk_size=30, max_num_seqs=1)

        def first_chunk(runner, step, probe=probe):
            if step.chunks[0].start == 0:
                states[probe] = [state.clone() for state in runner._states.tensors]

        answers(watched(engine, after=first_chunk), as_requests(PROMPTS[1:2], max_tokens=2))
    assert any(state.any() for state in states[None])
    torch.testing.assert_close(states["w5 w6 w7"], states[None])


POLICIES = [
    {"kv_policy": "streaming", "kv_budget": 24, "kv_recent": 6},
    {"kv_policy": "h2o", "kv_budget": 24, "kv_recent": 6},
    {"kv_policy": "tova", "kv_budget": 0.5, "kv_recent": 4},
    {"kv_budget": 24, "kv_recent": 6, "kv_format": "int8"},
    {"kv_budget": 24, "kv_recent": 6, "kv_format": "int8/int4"},
]


@pytest.mark.parametrize("settings", POLICIES, ids=str)
def test_attention_is_compressed_beside_states(settings):
    engine = tiny_engine("qwen3_5_text", **CROWD | settings)
    results = list(engine.run(as_requests(PROMPTS, max_tokens=7)))
    assert not any(result.error for result in results)
    evicted = {result.id: result.kv.evicted for result in results if result.kv}
    assert evicted["1"]  # the longest prompt


@pytest.mark.parametrize("family", ["qwen3_5_text", "granitemoehybrid"])
def test_states_in_bfloat16_take_half_and_are_the_same_in_any_company(family):
    """They are rounded where chunks end and after each token, and neither depends on other rows."""
    engine = tiny_engine(family, kv_budget=24, kv_recent=6, state_format="bfloat16", **CROWD)
    seen = set()
    watching = watched(engine, after=lambda runner, _: seen.update(t.dtype for t in runner._states.tensors))
    requests = as_requests(PROMPTS, max_tokens=7)
    together = answers(watching, requests)
    assert seen == {torch.float32, torch.bfloat16}  # windows have the model's type
    assert {i: text for request in requests for i, text in answers(engine, [request]).items()} == together


def test_where_states_are_rounded_shared_text_is_reused_up_to_the_end_of_a_chunk():
    """An end anywhere else would round the states once more than in a prompt that is read alone."""
    shared = random_prompts((127,), seed=5)[0]
    rows = [shared + question for question in random_prompts((40, 36, 45), seed=1)]
    settings = {"kv_policy": "none", "state_format": "bfloat16", **CROWD}
    settings |= {"chunk_size": 80, "max_num_batched_tokens": 240}
    engine = tiny_engine("qwen3_5_text", **settings)
    found = answers(engine, as_requests(rows, max_tokens=5))
    assert engine.stats.reused_prompt_tokens == 2 * 80
    alone = tiny_engine("qwen3_5_text", **settings, prefix_reuse=False)
    assert answers(alone, as_requests(rows, max_tokens=5)) == found


def test_states_cost_a_slot_their_bytes():
    states = tiny_loaded("qwen3_5_text").spec.states
    config = tiny_model("qwen3_5_text").config
    windows, memories = states[0::2], states[1::2]
    assert len(states) == 2 * config.layer_types.count("linear_attention")
    heads, key, value = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    assert {state.shape for state in memories} == {(heads, key, value)}
    channels = 2 * config.linear_num_key_heads * key + heads * value
    assert {state.shape for state in windows} == {(config.linear_conv_kernel_dim - 1, channels)}


# ---- what cannot be right is refused ----

CHANGED = {
    "qwen3_5_text": (modeling_qwen3_5, "torch_chunk_gated_delta_rule"),
    "granitemoehybrid": (modeling_granitemoehybrid, "mamba2_chunk_scan"),
    "lfm2": (modeling_lfm2, "causal_conv1d_fn"),
}


@pytest.mark.parametrize("family", CHANGED)
def test_a_mixer_whose_function_computes_something_else(family, monkeypatch):
    """As a later release of transformers may."""
    module, name = CHANGED[family]
    function = getattr(module, name)

    def rolled(*args, **kwargs):
        output = function(*args, **kwargs)
        return (output[0].roll(1, -1), *output[1:]) if isinstance(output, tuple) else output.roll(1, -1)

    model = tiny_model(family)
    monkeypatch.setattr(module, name, rolled)
    assert_refused(model, type(model).__name__, "computes its state in a way of its own")


def test_the_model_has_its_own_forwards_back_after_a_run():
    loaded = tiny_loaded("qwen3_5_text")
    list(tiny_engine("qwen3_5_text").run(as_requests(PROMPTS[:1], max_tokens=2)))
    assert not [name for name, module in loaded.model.named_modules() if "forward" in vars(module)]
    assert reference_answers(loaded.model, PROMPTS[:1], 2)["0"] == expected("qwen3_5_text", PROMPTS[:1], 2)["0"]


def test_every_family_named_here_is_known():
    assert {*HYBRIDS, *CHANGED} <= set(FAMILIES)
