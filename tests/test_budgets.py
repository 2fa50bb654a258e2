"""`--kv-budget` in bytes: how many pairs it becomes, what counts, and where it is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import as_requests, random_prompts, tiny_engine, words
from test_planner import SPEC

from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.errors import UsageError
from bmx.run_config import given_settings

PROMPT, ANSWER = 4000, 100
UNEVEN = tuple(
    replace(layer, kv_heads=1 + i % 2, key_dim=64 + 32 * (i % 3), owner=i) for i, layer in enumerate(SPEC.layers)
)


def bytes_of_full_cache(spec, tokens):
    """Keys and values of a prompt in the model's own type, layer by layer."""
    return sum(tokens * layer.kv_heads * (layer.key_dim + layer.value_dim) * spec.itemsize for layer in spec.layers)


@pytest.mark.parametrize("kv_format", ["model", "fp8", "int8", "int4", "int8/int4"])
@pytest.mark.parametrize("policy", ["average-attention", "roco", "streaming"])
@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, layers=UNEVEN), replace(SPEC, itemsize=4)])
def test_a_share_of_the_bytes_is_used_to_the_last_pair_and_never_passed(kv_format, policy, spec):
    """Codes, scales, positions and scores count, as they are planned and allocated."""
    config = EngineConfig(kv_budget="10%bytes", kv_policy=policy, kv_format=kv_format)
    chosen = CompressionPolicy.from_config(config, spec)
    rows = chosen.rows_needed(PROMPT, ANSWER)
    allowed = 0.1 * bytes_of_full_cache(spec, PROMPT)
    assert chosen.layout(spec, rows).nbytes <= allowed < chosen.layout(spec, rows + 1).nbytes


def test_bytes_that_hold_more_than_the_prompt_hold_the_answer_too():
    config = EngineConfig(kv_budget="60%bytes", kv_format="int4")
    chosen = CompressionPolicy.from_config(config, SPEC)
    assert chosen.rows_needed(PROMPT, ANSWER) == PROMPT + ANSWER
    assert not chosen.evicts(PROMPT, ANSWER)


def test_a_short_prompt_keeps_what_is_protected_and_as_many_more():
    chosen = CompressionPolicy.from_config(EngineConfig(kv_budget="10%bytes", kv_sink=4, kv_recent=32), SPEC)
    assert chosen.rows_needed(100, ANSWER) == 2 * (4 + 32)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("25%bytes", "25%bytes"),
        (" 12.50% bytes ", "12.5%bytes"),
        (".5%bytes", "0.5%bytes"),
        ("25%", 0.25),
        ("2k", 2000),
    ],
)
def test_notations(text, means):
    assert given_settings({"kv_budget": text}) == {"kv_budget": means}


@pytest.mark.parametrize("text", ["0%bytes", "100%bytes", "-5%bytes", "25bytes", "x%bytes", "25%byte", "1e1%bytes"])
def test_wrong_notations_are_refused_in_one_line(text):
    with pytest.raises(UsageError, match="kv_budget cannot be") as refused:
        given_settings({"kv_budget": text})
    assert "25%bytes" in refused.value.hint
    with pytest.raises(UsageError, match="kv_budget must be"):
        EngineConfig(kv_budget=text)


def test_an_engine_keeps_within_the_bytes_and_says_what_was_asked():
    engine = tiny_engine("llama", kv_budget="40%bytes", kv_sink=2, kv_recent=4, chunk_size=16)
    prompts = random_prompts((60, 80), seed=1)
    for result in engine.stream(as_requests(prompts, max_tokens=3)):
        spec, prompt = engine.spec, result.usage.prompt_tokens
        assert result.kv.asked == "40%bytes"
        held = engine.policy.layout(spec, result.kv.budget).nbytes
        assert held <= 0.4 * bytes_of_full_cache(spec, prompt)
        assert result.kv.kept == result.kv.budget < prompt


def test_plan_manifest_fingerprint_and_rows_say_what_was_asked_and_what_became_of_it(bmx):
    Path("in.jsonl").write_text(json.dumps({"id": "a", "prompt": words(random_prompts((600,), seed=1)[0])}) + "\n")
    ran = bmx("run", "in.jsonl", "-m", "fake", "--kv-budget", "30% bytes", "--max-tokens", 4)
    assert ran.code == 0
    manifest = json.loads(Path("in.out.jsonl.run.json").read_text())
    [record] = [json.loads(line) for line in Path("in.out.jsonl").read_text().splitlines()]
    assert manifest["fingerprint"]["kv_budget"] == manifest["settings"]["kv_budget"] == "30%bytes"
    budget = manifest["plan"]["kv_budget"]
    assert (budget["asked"], budget["pairs"]) == ("30%bytes", None)
    assert f"30% of the full cache's bytes hold {budget['share_of_pairs']:.1%} of each prompt's KV pairs" in ran.err
    assert record["kv"]["asked"] == "30%bytes"
    assert record["kv"]["budget"] == int(budget["share_of_pairs"] * record["usage"]["prompt_tokens"])
    again = bmx("run", "in.jsonl", "-m", "fake", "--kv-budget", "30%", "--max-tokens", 4)
    assert again.code == 2
    assert 'kv_budget was "30%bytes", is 0.3' in again.complaint[0]


def test_budgets_in_bytes_are_planned_without_a_model(bmx):
    planned = bmx(
        "plan-batch", "--shape", "smollm2-135m", "--max-input", "4k", "--kv-budget", "25%bytes,50%bytes", "--json"
    )
    options = json.loads(planned.out)["options"]
    held = [option["memory"]["kv"] / option["slots"] for option in options if option["cache"] == "batch-max"]
    [full] = [option["memory"]["kv"] / option["slots"] for option in options if option["cache"] == "full cache"]
    assert [option["kv_budget"] for option in options][:2] == ["25%bytes", "50%bytes"]
    assert 0.2 * full < held[0] < 0.25 * full < held[1] < 0.5 * full
