"""A prompt is read under a budget, and its answer is written on all of its pairs."""

from __future__ import annotations

import json

import pytest
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine, tiny_loaded, words
from families import tiny_model

from bmx import Engine, UsageError
from bmx.policies import POLICIES

PROMPTS = random_prompts((70, 9, 41, 64, 23), seed=3)
BUDGET = {"kv_budget": 16, "kv_sink": 2, "kv_recent": 5}
EVICTING = [policy for policy in POLICIES if policy != "none"]


def archiving(family="llama", archive="model", **config):
    """An engine whose prompts are read in chunks of 24 tokens, three of them in a step."""
    config = {"chunk_size": 24, "max_num_batched_tokens": 72, "max_num_seqs": 3} | BUDGET | config
    return tiny_engine(family, kv_archive=archive, **config)


def requests(new_tokens=8, prompts=PROMPTS, **params):
    return as_requests(prompts, max_tokens=new_tokens, **params)


# ---- answers ----


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "mistral", "gemma2", "gemma3n_text", "gpt_oss", "deepseek_v3", "phi3"]
)
def test_with_room_for_the_whole_prompt_the_answer_is_that_of_generate(family):
    engine = archiving(family, kv_budget=100)
    assert answers(engine, requests()) == reference_answers(tiny_loaded(family).model, PROMPTS, 8)


@pytest.mark.parametrize("policy", EVICTING)
def test_a_prompt_of_one_chunk_is_answered_as_by_the_full_cache_whatever_the_budget(policy):
    """Its end, which is a chunk of its own, attends to all that came before."""
    engine = archiving(kv_policy=policy, chunk_size=70)
    assert answers(engine, requests()) == reference_answers(tiny_loaded("llama").model, PROMPTS, 8)


@pytest.mark.parametrize("archive", ["int8", "int8/int4", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_archive_of_fewer_bits_answers_as_the_full_cache_in_them(family, archive):
    """A prompt of one chunk attends to itself alone, whatever is stored afterwards."""
    full = tiny_engine(family, kv_policy="none", kv_format=archive, chunk_size=70)
    expected = answers(full, requests(40))
    assert answers(archiving(family, archive, kv_budget=100, chunk_size=70), requests(40)) == expected


def test_what_is_read_under_a_budget_differs_from_what_is_read_whole():
    """A long prompt's later chunks see the pairs that were left, so the archive is not the full cache."""
    answered, whole = (answers(archiving(kv_budget=budget), requests(30)) for budget in (16, 100))
    assert answered != whole
    assert answered["1"] == whole["1"]  # its prompt fits


@pytest.mark.parametrize("config", [{}, {"kv_policy": "h2o"}, {"kv_budget": 0.3}, {"kv_probe": "w9 w8"}])
@pytest.mark.parametrize("archive", ["model", "int4"])
def test_an_answer_does_not_depend_on_the_rows_beside_it(archive, config):
    together = answers(archiving(archive=archive, **config), requests())
    for i, request in enumerate(requests()):
        alone = archiving(archive=archive, max_num_seqs=1, **config)
        assert answers(alone, [request]) == {str(i): together[str(i)]}


@pytest.mark.parametrize("archive", ["model", "int4"])
@pytest.mark.parametrize("budget", [16, 80])
def test_text_that_prompts_share_is_read_once(archive, budget):
    document = random_prompts((168,), seed=8)[0]
    rows = [document + question for question in random_prompts((12, 9, 14, 7), seed=9)]
    engine = archiving(archive=archive, kv_budget=budget)
    answered = answers(engine, requests(prompts=rows))
    assert engine.stats.reused_prompt_tokens >= 3 * 64
    assert answered == answers(archiving(archive=archive, kv_budget=budget, prefix_reuse=False), requests(prompts=rows))


def test_a_prompt_begins_again_when_memory_has_run_out():
    engine = archiving(archive="int4")
    plan = engine.plan(engine.measure(requests()))
    smaller = engine._planner.shrunk(plan)
    assert smaller.reading.slots <= smaller.slots < plan.slots
    assert answers(engine, requests(), plan=smaller) == answers(engine, requests(), plan=plan)


@pytest.mark.parametrize("policy", ["average-attention", "streaming"])
def test_in_a_model_of_one_layer_nothing_is_lost(policy):
    """Keys and values of the first layer do not depend on attention, so the archive is the full cache.

    The end of the prompt is read on the archive too, so every token of the answer is that of ``generate``.
    """
    model = tiny_model("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    prompts = random_prompts((220, 90, 131), seed=4)
    engine = archiving(model, kv_policy=policy)
    assert answers(engine, requests(prompts=prompts)) == reference_answers(model, prompts, 8)


# ---- memory ----


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("archive", ["model", "int8", "int4"])
def test_what_is_planned_is_what_is_allocated(family, archive):
    engine = archiving(family, archive)
    plan = engine.plan(engine.measure(requests()))
    with engine.backend.runner(plan, engine.policy) as runner:
        assert runner.kv_bytes == plan.memory.pool
        assert len(runner.pool.layer(0, 0)[0].positions) == plan.reading.slots


def test_few_slots_read_for_many_that_answer():
    prompts = random_prompts([60] * 20)
    engine = archiving(max_num_seqs=20, max_num_batched_tokens=48)
    plan = engine.plan(engine.measure(requests(prompts=prompts)))
    assert (plan.slots, plan.reading.slots) == (20, 3)  # two chunks a step, and one more
    assert plan.reading.layout.capacity == BUDGET["kv_budget"]
    held = answers(engine, requests(prompts=prompts))
    assert len(held) == 20


def test_an_answer_says_that_nothing_was_evicted():
    engine = archiving(archive="int4")
    [result] = list(engine.run(requests()[:1]))
    assert (result.kv.kept, result.kv.evicted, result.kv.format) == (77, 0, "int4")


# ---- settings and commands ----


@pytest.mark.parametrize(
    ("settings", "says", "hint"),
    [
        ({"kv_archive": "int4", "kv_policy": "none"}, "nothing to archive", "--kv-format int4"),
        ({"kv_recall": "clusters"}, "kv_recall clusters needs an archive", "--kv-archive"),
        ({"kv_archive": "int4", "kv_recall": "pages", "kv_recall_every": 33}, "from 1 to kv_recent", None),
        ({"kv_archive": "int4", "kv_recall": "pages", "kv_recall_pairs": 30}, "leaves no room", None),
        ({"kv_archive": "int3"}, "kv_archive cannot be 'int3'", "int4"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, says, hint):
    with pytest.raises(UsageError) as raised:
        Engine.open("fake", **settings)
    assert says in raised.value.message
    assert hint is None or hint in raised.value.hint


def test_prompts_are_read_in_the_models_own_type_unless_told_otherwise():
    assert Engine.open("fake", kv_archive="int4").config.kv_format == "model"
    assert Engine.open("fake", kv_archive="int4", kv_format="int8").config.kv_format == "int8"


def test_a_run_and_its_plan_name_the_archive(bmx, model, tmp_path):
    lines = [json.dumps({"id": i, "prompt": words(prompt)}) for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    settings = ("-m", model, "--kv-archive", "int4", "--kv-budget", 64, "--max-tokens", 5, "--no-chat-template")
    ended = bmx("run", "in.jsonl", *settings)
    assert ended.code == 0, ended.err
    slots = next(line for line in ended.log if line.startswith("slots:"))
    assert "archived in int4" in slots
    record = json.loads((tmp_path / "in.out.jsonl").read_text().splitlines()[0])
    assert record["kv"]["evicted"] == 0
    assert record["kv"]["format"] == "int4"
    planned = bmx("plan-batch", "in.jsonl", *settings)
    assert planned.code == 0, planned.err
    assert "archive int4" in planned.out
