"""Models that are missing, broken, hostile or peculiar, end to end: one line and a hint, or an answer that is right."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import word_tokenizer
from safetensors.torch import load_file, save_file

from bmx import PromptConfig, Request, render_limits
from bmx.errors import RowError
from bmx.model.prompt_encoder import PromptEncoder


@pytest.fixture
def folder(model, tmp_path):
    """A copy of the tiny model that may be spoilt."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture
def run(bmx, folder):
    """``bmx run`` on two short rows with that model."""

    def call(*args: Any, model: Any = folder, rows: int = 2):
        lines = [json.dumps({"id": i, "prompt": f"w{i + 3} w4", "max_tokens": 4}) for i in range(rows)]
        Path("in.jsonl").write_text("\n".join(lines) + "\n")
        return bmx("run", "in.jsonl", "--model", model, *args)

    return call


def change(path: Path, **values: Any) -> None:
    """Set fields of a JSON file; None takes one away."""
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def answers() -> dict[Any, dict[str, Any]]:
    return {record["id"]: record for record in map(json.loads, Path("in.out.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./missing", "missing.gguf"])
def test_m1_a_model_that_is_nowhere_ends_the_run_before_a_row_is_read(run, name):
    ended = run(model=name)
    assert ended.code == 1
    assert name.removeprefix("./") in ended.complaint[0]
    assert not Path("in.out.jsonl").exists()


def test_m2_pickled_weights_are_never_read(run, folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    ended = run()
    assert ended.code == 1
    assert "safetensors" in " ".join(ended.complaint)


def test_m3_code_that_comes_with_a_model_is_not_run_unless_asked_for(run, folder):
    (folder / "configuration_own.py").write_text("open('owned', 'w').close()\n")
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    ended = run()
    assert ended.code == 1
    assert "--trust-remote-code" in " ".join(ended.complaint)
    assert not Path("owned").exists()


def test_m3_code_of_a_hub_model_without_a_pinned_revision_is_warned_of(run):
    ended = run("--trust-remote-code", model="nobody/no-such-model")
    assert any(line.startswith("warning: ") and "--revision" in line for line in ended.log)
    ended = run("--trust-remote-code", "--revision", "abc", model="nobody/no-such-model")
    assert not any(line.startswith("warning: ") for line in ended.log)


@pytest.mark.parametrize("kept", [0, 10, -100])
def test_m4_a_torn_weights_file_is_refused(run, folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    ended = run()
    assert ended.code == 1
    assert ended.complaint
    assert not Path("in.out.jsonl").exists()


def test_m4_a_missing_shard_is_refused(run, folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({name: weights[name] for name in list(weights)[:2]}, folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "model-00002-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ended = run()
    assert ended.code == 1
    assert ended.complaint


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for x in range(10) %}{{ x.__init__.__globals__ }}{% endfor %}",
        "{{ raise_exception('no such conversation') }}",
        "{% if %}",
    ],
)
def test_m5_a_chat_template_cannot_leave_its_sandbox_nor_stop_the_run(run, folder, template):
    change(folder / "tokenizer_config.json", chat_template=template)
    ended = run()
    assert ended.code == 3
    failed = [json.loads(line) for line in Path("in.out.jsonl.errors.jsonl").read_text().splitlines()]
    assert {row["error"]["code"] for row in failed} == {"invalid_request"}
    assert not any("subprocess" in row["error"]["message"] for row in failed)


@pytest.mark.parametrize(
    "template",
    [
        "{{ '%0999999999d' % 1 }}",
        "{{ messages[0]['content'].ljust(10 ** 10) }}",
        "{{ 'x' * 10 ** 8 }}",
        "{% set all = namespace(x='x') %}{% for i in range(60) %}{% set all.x = all.x ~ all.x %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro twice(n) %}{% if n %}{{ twice(n - 1) ~ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(99) }}",
    ],
)
def test_b4_a_chat_template_computes_and_prints_no_more_than_it_may(template, monkeypatch):
    monkeypatch.setattr(render_limits, "SECONDS", 0.2)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    encoder = PromptEncoder(tokenizer, PromptConfig())
    with pytest.raises(RowError, match=r"it (needs|computes|prints)") as refused:
        encoder.encode(Request(id="a", prompt="w5"))
    assert refused.value.code == "invalid_request"
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == before
    tokenizer.chat_template = "{{ messages[0]['content'] }} w7"
    assert PromptEncoder(tokenizer, PromptConfig()).encode(Request(id="a", prompt="w5")) == [5, 7]


def test_b4_a_chat_template_without_end_refuses_the_model_before_a_row_is_read(run, folder, monkeypatch):
    monkeypatch.setattr(render_limits, "SECONDS", 0.2)
    endless = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    word_tokenizer().save_pretrained(folder)
    change(folder / "tokenizer_config.json", chat_template=endless)
    ended = run()
    assert ended.code == 1
    assert "chat template" in ended.complaint[0]
    assert not Path("in.out.jsonl").exists()


def test_m5_a_tokenizer_without_pad_token_and_chat_template_is_enough(run, folder):
    assert "pad_token" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert run().code == 0
    assert all(record["usage"]["prompt_tokens"] == 2 for record in answers().values())


def test_m6_a_model_that_would_be_run_wrong_is_refused_by_name(run, folder):
    change(folder / "config.json", model_type="mamba", architectures=["MambaForCausalLM"])
    ended = run()
    assert ended.code == 1
    assert "Mamba" in ended.complaint[0]


def test_m7_logits_that_are_no_numbers_are_errors_and_not_tokens(run, folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    save_file(weights | {name: weights[name] * 1e30}, folder / "model.safetensors", metadata={"format": "pt"})
    ended = run("--dtype", "float16")
    assert ended.code == 1  # rows of a model that fails only on some are `nan_logits` errors: see test_exactness
    assert "it computes NaN or infinity" in ended.err
    assert not Path("in.out.jsonl").exists()


def test_m8_a_model_without_an_end_token_ends_at_max_tokens_and_one_with_several_at_each(run, folder):
    assert run().code == 0
    first = {name: record["text"].split() for name, record in answers().items()}
    assert {record["usage"]["completion_tokens"] for record in answers().values()} == {4}
    ends = [int(words[1].removeprefix("w")) for words in first.values()]
    change(folder / "generation_config.json", eos_token_id=ends)
    change(folder / "config.json", eos_token_id=ends)
    assert run("--overwrite").code == 0
    for name, record in answers().items():
        assert record["finish_reason"] == "stop"
        assert record["text"].split() == first[name][: len(record["text"].split())]


def test_c2_the_token_that_the_chat_template_writes_after_an_answer_ends_answers(run, folder):
    assert run().code == 0
    end = answers()[0]["text"].split()[1]
    word_tokenizer(additional_special_tokens=[end, "w1", "w2"]).save_pretrained(folder)
    template = (
        "{%% for m in messages %%}{{ m.content }}{%% if m.role == 'assistant' %%} %s w2{%% endif %%}{%% endfor %%}"
    )
    for after, reason in {"w1": "length", end: "stop"}.items():
        change(folder / "tokenizer_config.json", chat_template=template % after)
        assert run("--overwrite").code == 0
        assert answers()[0]["finish_reason"] == reason


@pytest.mark.parametrize(
    "text", ["{torn", "[1]", "", '{"eos_token_id": "w5"}', '{"eos_token_id": [[5]]}', '{"eos_token_id": 5.5}']
)
def test_e_a_generation_config_that_cannot_be_read_is_refused_by_its_name(run, folder, text):
    (folder / "generation_config.json").write_text(text)
    ended = run()
    assert ended.code == 1
    assert "generation_config.json" in ended.complaint[0]
    assert not Path("in.out.jsonl").exists()


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("token", [-1, 128])
def test_e_an_end_token_outside_of_the_vocabulary_is_warned_of(run, folder, token, file):
    change(folder / "generation_config.json", eos_token_id=[token] if file == "generation_config.json" else None)
    change(folder / "config.json", eos_token_id=token)
    ended = run()
    assert ended.code == 0
    [warning] = [line for line in ended.log if line.startswith("warning: ")]
    assert f"{file} of model" in warning
    assert f"({token})" in warning


def test_c8_tokens_that_the_model_does_not_have_fail_their_rows_alone(bmx, folder):
    word_tokenizer(131).save_pretrained(folder)
    lines = [
        {"id": "good", "prompt": "w3 w4"},
        {"id": "beyond", "prompt": "w3 w130 w4"},
        {"id": "stop", "prompt": "w3 w4", "stop_token_ids": [128]},
        {"id": "negative", "prompt": "w3 w4", "stop_token_ids": [-1]},
        {"id": "last", "prompt": "w127 w4", "stop_token_ids": [127]},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(line | {"max_tokens": 3}) + "\n" for line in lines))
    ended = bmx("run", "rows.jsonl", "--model", folder)
    assert ended.code == 3
    assert any("tokens up to 130" in line for line in ended.log if line.startswith("warning: "))
    assert {json.loads(line)["id"] for line in Path("rows.out.jsonl").read_text().splitlines()} == {"good", "last"}
    failed = [json.loads(line) for line in Path("rows.out.jsonl.errors.jsonl").read_text().splitlines()]
    assert {record["id"]: record["error"]["code"] for record in failed} == dict.fromkeys(
        ("beyond", "stop", "negative"), "invalid_request"
    )
    assert all("0 to 127" in record["error"]["message"] for record in failed)


def test_m9_a_run_is_not_gone_on_with_by_another_commit_of_its_model(run):
    assert run("--limit", "1").code == 0
    manifest = Path("in.out.jsonl.run.json")
    record = json.loads(manifest.read_text())
    assert record["model"]["commit"] is None
    manifest.write_text(json.dumps(record | {"model": record["model"] | {"commit": "abc123"}}))
    before = Path("in.out.jsonl").read_bytes()
    ended = run()
    assert ended.code == 2
    assert "abc123" in ended.complaint[0]
    assert "--revision abc123" in ended.complaint[1]
    assert Path("in.out.jsonl").read_bytes() == before
