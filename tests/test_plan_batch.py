"""``bmx plan-batch``: what fits, here and elsewhere, without weights; and the record that a run leaves behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from conftest import random_prompts, words

from bmx import hardware
from bmx.engine import open as opening
from bmx.hardware import Gpu, GpuProcess

ROWS = random_prompts((5, 30, 60, 23, 9))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Measured rates are kept for this file's tests alone; a tiny model runs in less than a megabyte."""
    monkeypatch.setattr("bmx.units.LEAST_MEMORY", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": words(p)}) + "\n" for i, p in enumerate(ROWS)))
    return path


@pytest.fixture
def large(tmp_path):
    """A folder with the config of an 8 B Llama, and nothing else."""
    folder = tmp_path / "large"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def plan(bmx, model):
    """``bmx plan-batch`` of the tiny model, on this machine, as JSON."""

    def call(*args):
        ended = bmx("plan-batch", "--model", model, "--dtype", "float32", "--device", "cpu", "--json", *args)
        return ended.code, json.loads(ended.out)

    return call


def items(option):
    return {name: size for name, size in option["memory"].items() if name != "total"}


def test_an_input_is_planned_for_each_budget_the_full_cache_and_decode_only(plan, prompts):
    code, answer = plan(prompts, "--kv-budget", "40,64", "--max-tokens", "8")
    assert code == 0
    assert [(o["cache"], o["kv_budget"]) for o in answer["options"]] == [
        ("batch-max", 40), ("batch-max", 64), ("decode-only", 40), ("full cache", None),
    ]  # fmt: skip
    assert answer["rows"] == answer["measured_rows"] == 5
    assert answer["prompt_tokens"] == sum(map(len, ROWS))
    for option in answer["options"]:
        assert option["fits"]
        assert option["slots"] == 5 == sum(group["slots"] for group in option["groups"])
        assert option["memory"]["total"] == sum(items(option).values())
        assert option["forecast"]["seconds"] > 0
    by_cache = [option["memory"]["kv"] for option in answer["options"]]
    assert by_cache[0] < by_cache[1] < by_cache[3]


def test_a_run_uses_the_plan_that_plan_batch_predicted(bmx, model, plan, prompts):
    """Slots, groups, step and every item but those that only a loaded process can tell."""
    settings = ("--kv-budget", "40", "--max-tokens", "8")
    _, answer = plan(prompts, *settings)
    assert bmx("run", prompts, "--model", model, "--dtype", "float32", "--device", "cpu", *settings).code == 0
    ran = json.loads((prompts.parent / "in.out.jsonl.run.json").read_text())
    told = answer["options"][0]
    for name in ("slots", "groups", "chunk_size", "max_num_batched_tokens", "fill"):
        assert told[name] == ran["plan"][name]
    for item in ("weights", "activations", "logits", "kv", "scores"):
        assert told["memory"][item] == ran["plan"]["memory"][item]


def test_a_run_records_what_it_planned_and_what_it_took(bmx, model, prompts):
    ended = bmx("run", prompts, "--model", model, "--device", "cpu", "--system-prompt", "w1", "--no-chat-template")
    assert ended.code == 2  # no template to carry a system prompt: nothing ran, so nothing is recorded
    manifest = prompts.parent / "in.out.jsonl.run.json"
    assert not manifest.exists()
    ended = bmx("run", prompts, "--model", model, "--device", "cpu", "--prompt-template", "w1 secret {prompt}")
    assert ended.code == 0
    text = manifest.read_text()
    assert "secret" not in text
    assert not any(words(prompt)[:20] in text for prompt in ROWS)
    found = json.loads(text)
    assert found["state"] == "finished"
    assert found["rows"] == {"total": 5, "answered": 5, "failed": 0, "skipped": 0, "before": 0}
    assert found["model"]["architecture"] == "LlamaForCausalLM"
    assert found["memory"]["predicted_bytes"] == found["plan"]["memory"]["total"]
    assert found["memory"]["measured_bytes"] > 0
    assert found["plan"]["limit"]["source"]
    assert "memory planned" in ended.err
    assert ", peak " in ended.err


def test_nothing_is_recorded_beside_standard_output(bmx, model, prompts):
    assert bmx("run", prompts, "--model", model, "--device", "cpu", "-o", "-").code == 0
    assert list(prompts.parent.glob("*.run.json")) == []


def test_a_manifest_that_cannot_be_written_is_said_before_any_row_is_answered(bmx, model, prompts):
    (prompts.parent / "in.out.jsonl.run.json").mkdir()
    ended = bmx("run", prompts, "--model", model, "--device", "cpu")
    assert ended.code == 2
    assert "in.out.jsonl.run.json is a folder" in ended.err
    assert not (prompts.parent / "in.out.jsonl").exists()
    assert list(prompts.parent.glob(".in*")) == []


def test_a_card_that_is_not_here_needs_neither_weights_nor_torch(large):
    """From the config alone, in a fresh process."""
    code = (
        "import sys; from bmx.cli.commands import app\n"
        f"app(['plan-batch', '--model', {str(large)!r}, '--max-input', '4k', '--gpu', 'H100', '--json'],"
        " standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    small, _, full = answer["options"]
    assert small["memory"]["weights"] > 16e9
    assert small["slots"] > 3 * full["slots"]
    assert small["forecast"]["seconds"] < full["forecast"]["seconds"]
    assert answer["machine"]["name"] == "H100"


def test_a_size_of_gpu_memory_gives_slots_but_no_times(bmx, large):
    ended = bmx("plan-batch", "--model", large, "--max-input", "4k", "--gpu-memory", "24G")
    assert ended.code == 0
    assert "24.0 GB free" in ended.out
    assert "tok/s (" not in ended.out
    row = next(line for line in ended.out.splitlines() if line.startswith("batch-max"))
    assert row.split()[-1] == "-"


def test_check_says_what_is_missing_and_what_would_make_it_fit(bmx, large):
    limit = ("--gpu-memory", "24G", "--memory-limit", "17.3G", "--kv-budget", "8k", "--max-input", "16k", "--json")
    ended = bmx("plan-batch", "--model", large, "--check", *limit)
    answer = json.loads(ended.out)
    assert ended.code == 4
    assert not answer["fits"]
    assert "MB are missing" in answer["options"][0]["problem"]
    assert len(answer["remedies"]) == 3
    settings = [remedy for remedy in answer["remedies"] if remedy.startswith("--")]
    assert settings
    for remedy in settings:  # each is true
        assert bmx("plan-batch", "--model", large, "--check", *limit, *remedy.split()).code == 0
    assert bmx("plan-batch", "--model", large, *limit).code == 0  # without --check it is an answer like any other


def test_a_row_that_does_not_fit_fails_the_check_though_others_do(plan, prompts):
    code, answer = plan(prompts, "--kv-policy", "none", "--max-tokens", "4", "--kv-cache-memory", "12K", "--check")
    assert code == 4
    full = next(option for option in answer["options"] if option["cache"] == "full cache")
    assert 0 < full["too_large"] < 5
    assert "for the KV cache" in full["problem"]


def test_measure_runs_the_largest_step(plan, prompts):
    code, answer = plan(prompts, "--measure")
    assert code == 0
    assert set(answer["measured"]) == {"before_loading_bytes", "predicted_bytes", "measured_bytes"}
    assert all(size > 0 for size in answer["measured"].values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "INPUT or --max-input"),
        (("--max-input", "4k", "nowhere.jsonl"), "INPUT or --max-input"),
        (("nowhere.jsonl",), "nowhere.jsonl"),
        (("--max-input", "many"), "max_input"),
        (("--max-input", ""), "max_input"),
        (("--max-input", "4k", "--gpu", "H1000"), "H1000"),
        (("--max-input", "4k", "--gpu-memory", "much"), "gpu_memory"),
        (("--max-input", "4k", "--gpu-memory", ""), "gpu_memory"),
        (("--max-input", "4k", "--kv-budget", "512,"), "kv_budget"),
        (("--max-input", "4k", "--kv-budget", "20"), "kv_budget"),
        (("--max-input", "200k"), "leaves no room"),
        (("--max-input", "4k", "--gpu", "H100", "--measure"), "--measure"),
        (("--max-input", "4k", "--device", "cuda"), "no GPU"),
    ],
    ids=str,
)
def test_a_wrong_request_for_a_plan_is_one_line_and_a_hint(bmx, large, monkeypatch, arguments, said):
    monkeypatch.setattr(hardware, "gpus", list)
    ended = bmx("plan-batch", "--model", large, *arguments)
    assert ended.code in (2, 5)
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_an_input_without_rows_has_no_plan(bmx, model, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n")
    ended = bmx("plan-batch", tmp_path / "in.jsonl", "--model", model)
    assert ended.code == 2
    assert "no rows" in ended.err


def test_a_plan_for_this_machines_gpu_leaves_out_memory_that_others_hold(bmx, large, monkeypatch):
    gpu = Gpu(
        name="Card", free=30 * 10**9, total=80 * 10**9, uuid="GPU-1", pci="0000:01:00.0",
        processes=(GpuProcess(pid=1, used=50 * 10**9),),
    )  # fmt: skip
    monkeypatch.setattr(hardware, "gpus", lambda: [gpu])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    ended = bmx("plan-batch", "--model", large, "--max-input", "4k", "--memory-limit", "20G")
    assert "Card" in ended.out
    assert "20.0 GB may be used (memory_limit)" in ended.out
    ended = bmx("plan-batch", "--model", large, "--max-input", "4k", "--kv-cache-memory", "1G")
    assert "pid 1 holds 50,000 MB" in ended.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": -1}, "hidden_size"),
    ],
    ids=str,
)
def test_a_config_with_impossible_heads_is_named(bmx, large, change, said):
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | change))
    ended = bmx("plan-batch", "--model", large, "--max-input", "4k", "--gpu", "H100")
    assert ended.code == 1
    assert said in ended.err


@pytest.mark.parametrize("command", ["run", "plan-batch"])
def test_a_config_that_contradicts_its_weights_is_named(bmx, model, prompts, tmp_path, command):
    folder = tmp_path / "liar"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": config["num_attention_heads"]}))
    ended = bmx(command, prompts, "--model", folder, "--device", "cpu", "--dtype", "float32")
    assert ended.code == 1
    assert f"{config['num_attention_heads']}" in ended.err
    assert f"{config['num_key_value_heads']}" in ended.err


def test_a_limit_below_the_weights_is_refused_before_they_are_loaded(bmx, model, prompts, monkeypatch):

    monkeypatch.setattr(opening, "load_model", lambda *_: pytest.fail("weights were loaded"))
    ended = bmx("run", prompts, "--model", model, "--device", "cpu", "--memory-limit", "50K")
    assert ended.code == 4
    needed = next(word for word in ended.err.split() if word.endswith("M") and word[:-1].isdigit())
    monkeypatch.undo()
    assert f"--memory-limit {needed}" in ended.err
