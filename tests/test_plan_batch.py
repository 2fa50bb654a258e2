"""``bmx plan-batch``: what fits, here and elsewhere, without weights; and the record that a run leaves behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import random_prompts, words

from bmx import hardware
from bmx.cluster_config import ClusterConfig
from bmx.config import MAX_SLOTS, EngineConfig
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
    code, answer = plan(prompts, "--kv-budget", "40,64", "--kv-recent", "16", "--max-tokens", "8")
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
    settings = ("--kv-budget", "40", "--kv-recent", "16", "--max-tokens", "8")
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


def test_a_hybrids_states_have_a_column_and_a_line_that_compares_them(bmx, tmp_path):
    """The sizes of a Qwen 3.5 of 9 B, by its composite config.json alone; two layers in place of 32."""
    text = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "vocab_size": 1000}
    config = {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", **text}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    asked = ("plan-batch", "-m", tmp_path, "--max-input", "1000", "--limit", "9", "--gpu-memory", "24G")
    shown, told = bmx(*asked).out, json.loads(bmx(*asked, "--json", "--state-format", "bfloat16").out)
    recurrent, window = 32 * 128 * 128, 3 * (2 * 16 * 128 + 32 * 128) * 2
    of_token = 2 * 4 * 256 * 2
    tokens = (4 * recurrent + window) // of_token
    assert (
        f"each row holds 2 MB of states beside its KV cache, whatever its length: as much as {tokens:,} tokens" in shown
    )
    assert re.search(r"^cache +budget +slots +KV cache +states +weights", shown, re.MULTILINE)
    option = told["options"][0]
    assert option["states"] == {"slot_bytes": 2 * recurrent + window, "format": "bfloat16"}
    assert option["memory"]["states"] == 10 * option["states"]["slot_bytes"]  # of nine slots and idle rows


def test_without_states_nothing_is_said_of_them(bmx, large):
    shown = bmx("plan-batch", "-m", large, "--max-input", "1000", "--gpu-memory", "80G").out
    assert "states" not in shown


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
        (("--max-input", "4k", "--shape", "qwen3-8b"), "it cannot be combined with --model"),
    ],
    ids=str,
)
def test_a_wrong_request_for_a_plan_is_one_line_and_a_hint(bmx, large, monkeypatch, arguments, said):
    monkeypatch.setattr(hardware, "gpus", list)
    ended = bmx("plan-batch", "--model", large, *arguments)
    assert ended.code in (2, 5)
    assert said in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(("text", "flags"), [("\n\n", ()), ('{"prompt": "w1"}\n', ("--shard", "2/2"))])
def test_an_input_without_rows_has_no_plan(bmx, model, tmp_path, text, flags):
    (tmp_path / "in.jsonl").write_text(text)
    ended = bmx("plan-batch", tmp_path / "in.jsonl", "--model", model, *flags)
    assert ended.code == 5
    assert "no rows" in ended.err


LONG = 300  # tokens: more than the 256 positions of the tiny model


@pytest.fixture
def rows_of(tmp_path):
    """Writes an input of rows with these numbers of tokens; a text in place of a number is a line as it is."""

    def write(*lengths):
        path = tmp_path / "in.jsonl"
        rows = [
            length if isinstance(length, str) else json.dumps({"id": f"r{i}", "prompt": words([5] * length)})
            for i, length in enumerate(lengths)
        ]
        path.write_text("".join(f"{row}\n" for row in rows))
        return path

    return write


def test_f_rows_that_the_model_does_not_take_are_counted_and_named_and_fail_the_check(bmx, model, plan, rows_of):
    path = rows_of(20, LONG, LONG)
    code, answer = plan(path, "--check")
    assert (code, answer["fits"]) == (4, False)
    assert [option["fits"] for option in answer["options"]] == [False] * 3
    assert (answer["rows"], answer["measured_rows"], answer["prompt_tokens"]) == (3, 3, 20)
    [failed] = answer["unanswerable"]
    assert (failed["code"], failed["rows"]) == ("context_length_exceeded", 2)
    assert [example["id"] for example in failed["examples"]] == ["r1", "r2"]
    assert answer["remedies"] == ["--on-too-long truncate-middle"]
    assert plan(path, "--check", "--on-too-long", "truncate-middle")[0] == 0
    assert plan(path, "--check", "--on-too-long", "skip")[0] == 0
    assert plan(path)[0] == 0  # without --check it is an answer like any other
    shown = bmx("plan-batch", path, "--model", model, "--device", "cpu", "--dtype", "float32", "--check")
    assert "2 of 3 rows cannot be answered (context_length_exceeded): 'r1', 'r2'; 'r1': the prompt has 300" in shown.out
    assert "3 prompts, 20 tokens in those that can be answered" in shown.out


def test_f_where_all_rows_are_too_long_there_is_no_table_but_an_answer(bmx, model, plan, rows_of):
    path = rows_of(LONG, LONG)
    code, answer = plan(path, "--check")
    assert (code, answer["fits"], answer["options"], answer["prompt_tokens"]) == (4, False, [], 0)
    shown = bmx("plan-batch", path, "--model", model, "--device", "cpu", "--dtype", "float32")
    assert shown.code == 0
    assert "2 of 2 rows cannot be answered (context_length_exceeded)" in shown.out


def test_f_a_file_of_which_no_row_can_be_read_cannot_be_used(bmx, model, rows_of):
    ended = bmx("plan-batch", rows_of("nonsense", "[1]", '{"id": 1}'), "--model", model, "--check")
    assert ended.code == 5
    assert "2 of 3 rows cannot be answered (invalid_json): 'line-1', 'line-2'" in ended.err
    assert "1 of 3 rows cannot be answered (invalid_request)" in ended.err


def test_f_rows_that_cannot_be_read_are_named_and_do_not_fail_the_check(plan, rows_of):
    """They are errors of a run, but not for lack of memory or of positions."""
    code, answer = plan(rows_of("nonsense", 20), "--check")
    assert (code, answer["fits"]) == (0, True)
    assert [(failed["code"], failed["rows"]) for failed in answer["unanswerable"]] == [("invalid_json", 1)]


def test_f_the_full_cache_alone_is_planned_where_nothing_is_to_be_evicted(plan, prompts):
    _, answer = plan(prompts, "--kv-policy", "none", "--kv-format", "int8")
    assert [option["cache"] for option in answer["options"]] == ["full cache"]


def test_f_limit_and_share_act_on_rows_of_an_input_and_on_imagined_ones(plan, large, prompts, bmx):
    assert plan(prompts, "--limit", 3)[1]["prompt_tokens"] == sum(map(len, ROWS[:3]))
    assert plan(prompts, "--limit", 4, "--shard", "2/2")[1]["prompt_tokens"] == len(ROWS[1]) + len(ROWS[3])
    for flags, rows in (
        ((), 1000),
        (("--limit", 7), 7),
        (("--limit", 7, "--shard", "2/2"), 3),
        (("--limit", "2k"), 2000),
    ):
        ended = bmx("plan-batch", "--model", large, "--max-input", 100, "--gpu", "H100", "--json", *flags)
        assert json.loads(ended.out)["rows"] == rows


def test_f_rows_that_do_not_fit_in_memory_are_named(bmx, model, plan, prompts):
    flags = ("--kv-policy", "none", "--max-tokens", "4", "--kv-cache-memory", "12K")
    [full] = plan(prompts, *flags)[1]["options"]
    longest = sorted(range(5), key=lambda i: -len(ROWS[i]))[: full["too_large"]]
    assert full["too_large_ids"] == [str(i) for i in sorted(longest)]
    shown = bmx("plan-batch", prompts, "--model", model, "--device", "cpu", "--dtype", "float32", *flags)
    names = ", ".join(repr(name) for name in full["too_large_ids"])
    assert f"full cache: no slot for {names}\n" in shown.out


def test_f_counts_are_counted(bmx, model, rows_of):
    shown = bmx("plan-batch", rows_of(1), "--model", model, "--device", "cpu", "--dtype", "float32")
    assert "1 prompt, 1 token in all" in shown.out


def test_f_a_shape_stands_for_a_model_without_its_files(bmx):
    asked = ("--max-input", "4k", "--gpu", "L4", "--json")
    answer = json.loads(bmx("plan-batch", "--shape", "smollm2-135m", *asked).out)
    assert (answer["model"], answer["architecture"]) == ("smollm2-135m", "LlamaForCausalLM")
    assert answer["options"][0]["memory"]["weights"] == pytest.approx(269e6, rel=0.01)


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shape", "llama-9", "--max-input", "4k"), "no shape is called llama-9"),
        (("--shape", "qwen3-8b", "in.jsonl"), "no tokenizer"),
        (("--shape", "qwen3-8b", "--max-input", "4k", "--limit", 3, "--shard", "5/7"), "share 5/7 of 3 rows"),
        (("--shape", "qwen3-8b", "--max-input", "4k", "--measure"), "--measure"),
    ],
    ids=str,
)
def test_f_a_wrong_request_for_a_shape_is_one_line_and_a_hint(bmx, arguments, said):
    ended = bmx("plan-batch", *arguments)
    assert ended.code == 2
    assert said in ended.complaint[0]


def test_each_of_two_workers_on_a_cpu_has_half_of_its_memory_and_of_the_rows(bmx, model, plan, prompts):
    _, one = plan(prompts)
    _, two = plan(prompts, "--workers", 2)
    assert two["workers"] == 2
    assert two["machine"]["total_bytes"] == one["machine"]["total_bytes"] // 2
    assert [option["slots"] for option in two["options"]] == [3, 3, 3]
    text = bmx("plan-batch", prompts, "--model", model, "--device", "cpu", "--workers", 2).out
    assert "each of 2 workers on " in text
    assert "batch-max 2,048, 2 workers: 6 slots, " in text


def test_workers_on_a_named_gpu_have_one_each_and_answer_in_a_share_of_the_time(plan, large):
    imagined = (
        "--model",
        large,
        "--device",
        "auto",
        "--dtype",
        "auto",
        "--max-input",
        "8k",
        "--limit",
        1600,
        "--max-num-seqs",
        64,
    )
    _, one = plan(*imagined, "--gpu", "H100")
    _, eight = plan(*imagined, "--gpu", "H100", "--workers", 8)
    assert eight["machine"]["free_bytes"] == one["machine"]["free_bytes"]
    for alone, together in zip(one["options"], eight["options"], strict=True):
        assert together["slots"] == alone["slots"]
        assert together["forecast"]["seconds"] == pytest.approx(alone["forecast"]["seconds"] / 8)


def test_more_workers_than_gpus_are_refused(bmx, large, monkeypatch):
    gpu = Gpu(name="Card", free=8 * 10**9, total=9 * 10**9, uuid="GPU-1", pci="0000:01:00.0", processes=())
    monkeypatch.setattr(hardware, "gpus", lambda: [gpu])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    ended = bmx("plan-batch", "--model", large, "--max-input", "4k", "--workers", 2)
    assert ended.code == 2
    assert "2 workers need a GPU each, and this machine has 1" in ended.err


def test_a_worker_has_no_more_slots_than_one_engine_would():
    of_each = ClusterConfig(workers=2).of_each_worker
    assert [of_each(EngineConfig(), rows).max_num_seqs for rows in (3, 10**6)] == [2, MAX_SLOTS]
    assert of_each(EngineConfig(max_num_seqs=64), 10**6).max_num_seqs == 64
