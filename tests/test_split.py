"""Models over several processes (--tensor-parallel-size): the answers of one, and what happens when a process fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair

import pytest
from conftest import answers, as_requests, random_prompts
from families import FAMILIES, tiny_model, word_tokenizer
from no_room import NoRoomOnce
from test_policies import Found

from bmx import Engine, EngineConfig, policies
from bmx.errors import DeviceError, ModelError, UsageError
from bmx.model.preview import preview_spec
from bmx.model.split_modules import split
from bmx.model.text_side import find_text_side

SETTINGS = {"dtype": "float32", "kv_sink": 4, "kv_recent": 8, "kv_format": "model", "kv_budget": 40}
WAYS = {
    "eviction": {},
    "few bits": {"kv_format": "int8/int4", "kv_policy": "keydiff"},
    "full cache": {"kv_policy": "none", "kv_format": "int4", "chunk_size": 24},
    "archive": {"kv_archive": "int4"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function that gives a folder with a family's tiny model and its tokenizer."""
    at = tmp_path_factory.mktemp("models")

    def saved(family: str) -> str:
        if not (at / family).exists():
            tiny_model(family).save_pretrained(at / family)
            word_tokenizer().save_pretrained(at / family)
        return str(at / family)

    return saved


def requests(**params):
    shared = random_prompts([128])[0]
    prompts = [*random_prompts([30, 100, 77]), *(shared + more for more in random_prompts([9, 30], seed=1))]
    return as_requests(prompts, **{"max_tokens": 12} | params)


def config(model, **settings):
    return EngineConfig(model=model, **SETTINGS | settings)


def others() -> list[int]:
    """The processes that this one has started for parts of models."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            words = (status.parent / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if parent == os.getpid() and b"bmx.engine.follower" in words:
            found.append(int(status.parent.name))
    return found


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "phi3"])  # the last one's attention is whole in each process
def test_other_families_over_two_processes_answer_as_one_and_are_planned_as_they_are(family, folder):
    with Engine.open(config(folder(family))) as one:
        expected = answers(one, requests())
    split = config(folder(family), tensor_parallel_size=2)
    with Engine.open(split) as two:
        assert answers(two, requests()) == expected
        planned = preview_spec(split, "cpu")
        assert (planned.layers, planned.costs) == (two.spec.layers, two.spec.costs)


@pytest.fixture(scope="module")
def llamas(folder):
    """The same model on one device and on two."""
    split = config(folder("llama"), tensor_parallel_size=2)
    with Engine.open(config(folder("llama"))) as one, Engine.open(split) as two:
        yield one, two
    del two
    assert others() == []


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_answer_as_one(llamas, way):
    one, two = (engine.with_config(replace(engine.config, **WAYS[way])) for engine in llamas)
    assert answers(two, requests()) == answers(one, requests())
    assert two.stats.reused_prompt_tokens == one.stats.reused_prompt_tokens
    assert two.stats.reused_prompt_tokens or way != "full cache"


def test_two_processes_read_shared_text_in_place_as_one(llamas):
    text = random_prompts([130])[0]
    rows = as_requests([text + own for own in random_prompts([5] * 12, seed=1)], max_tokens=3)
    one, two = (engine.with_config(replace(engine.config, kv_policy="none")) for engine in llamas)
    slot = two.policy.layout(two.spec, 138).nbytes
    two = two.with_config(replace(two.config, kv_cache_memory=4 * slot))
    plan = two.plan(two.measure(rows))
    assert plan.shared_slots
    assert answers(two, rows, plan=plan) == answers(one, rows)


def test_two_processes_draw_the_same_tokens_as_one(llamas):
    one, two = llamas
    drawn = requests(temperature=1.0, repetition_penalty=1.2)
    assert answers(two, drawn) == answers(one, drawn)


def test_each_of_two_has_half_of_the_heads_and_weights(llamas):
    one, two = (engine.spec for engine in llamas)
    assert [(layer.query_heads, layer.kv_heads) for layer in two.layers] == [
        (layer.query_heads / 2, layer.kv_heads / 2) for layer in one.layers
    ]
    assert (two.vocab, two.pair_bytes, two.head_bytes) == (one.vocab, one.pair_bytes / 2, one.head_bytes / 2)
    assert two.costs.flops == one.costs.flops / 2
    assert 0.5 < two.weight_bytes / one.weight_bytes < 0.51  # norms are whole
    assert preview_spec(llamas[1].config, "cpu") == two


def test_g20_a_process_that_is_killed_ends_the_run_with_an_error_and_the_next_run_has_a_new_one(llamas):
    one, two = (engine.with_config(replace(engine.config, max_num_seqs=1)) for engine in llamas)
    stream = two.stream(requests())
    next(stream)
    [pid] = others()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DeviceError, match=r"part 2 of 2 of the model ended \(signal 9\)"):
        list(stream)
    assert answers(two, requests()) == answers(one, requests())


def test_g21_memory_that_runs_out_in_another_process_makes_a_smaller_plan(llamas, tmp_path, monkeypatch):
    mark = tmp_path / "ran-out"
    monkeypatch.setattr(policies, "entry_points", lambda **_: [Found(NoRoomOnce(mark=str(mark)))])
    one, two = (engine.with_config(replace(engine.config, kv_policy="no-room")) for engine in llamas)
    plan = two.plan(two.measure(requests()))
    expected = answers(one, requests())
    assert answers(two, requests(), plan=plan) == expected
    assert mark.exists()


def test_g22_a_process_with_a_part_of_a_model_ends_when_its_leader_does():
    ours, theirs = socketpair()
    with theirs:
        command = [sys.executable, "-m", "bmx.engine.follower", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
    with Connection(ours.detach()) as leader:
        assert leader.recv() == "started"
        process.send_signal(signal.SIGINT)  # Ctrl-C reaches all; the leader's run ends in order
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("family", "devices", "error", "says"),
    [
        ("llama", 4, UsageError, "--tensor-parallel-size 4 does not divide the heads of LlamaForCausalLM"),
        ("gpt2", 2, ModelError, "GPT2LMHeadModel cannot be split over devices: transformers has no plan for that"),
        ("lfm2", 2, ModelError, "it has layers that keep a state"),
    ],
)
def test_what_cannot_be_split_is_refused_before_it_is_loaded(family, devices, error, says, folder):
    with pytest.raises(error, match=says):
        Engine.open(config(folder(family), tensor_parallel_size=devices))


def test_a_plan_with_parts_of_an_unknown_kind_is_refused_by_their_name():
    model = find_text_side(FAMILIES["longcat_flash"](), trust_remote_code=False).on_meta("bfloat16", False)
    with pytest.raises(ModelError, match=r"parts of a kind that bmx does not know \(moe_identity_expert\)"):
        split(model, 2)


@pytest.mark.parametrize(
    "setting", [{"quantization": "int8"}, {"kv_policy": "random"}, {"kv_layer_budgets": ((0.5, 1.5), 1.0)}], ids=str
)
def test_settings_that_need_all_heads_or_whole_weights_are_refused_over_devices(setting):
    with pytest.raises(UsageError, match="tensor_parallel_size: "):
        config("demo", tensor_parallel_size=2, **setting)


def test_plan_batch_plans_one_of_the_devices(bmx, folder):
    flags = ["--model", folder("llama"), "--max-input", "100", "--max-tokens", "10", "--json", "--dtype", "float32"]
    one, two = (
        json.loads(bmx("plan-batch", *flags, "--gpu", "H100", "--tensor-parallel-size", size).out) for size in (1, 2)
    )
    assert "each of 2 devices on" in bmx("plan-batch", *flags[:-3], "--tensor-parallel-size", 2, "--gpu", "H100").out
    weights = [answer["options"][0]["memory"]["weights"] for answer in (one, two)]
    assert 0.5 < weights[1] / weights[0] < 0.51
