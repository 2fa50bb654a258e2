"""Linear layers in bytes: near what they were, counted as what they are, and said where they cannot be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import answers, as_requests, random_prompts, word_tokenizer
from families import tiny_model

from bmx import Engine, EngineConfig, PromptConfig
from bmx.engine.backend import ModelBackend
from bmx.errors import ModelError
from bmx.kernels import reference
from bmx.model.fused_modules import Int8Linear
from bmx.model.loader import load_model, prepare, quantize_int8
from bmx.model.preview import preview_spec


def logits_of(loaded, **config):
    """The logits that follow a prompt of 60 tokens."""
    engine = Engine(EngineConfig(kv_policy="none", **config), PromptConfig(), word_tokenizer(), ModelBackend(loaded))
    logits = []
    requests = as_requests(random_prompts([60]), max_tokens=1)
    answers(engine, requests, watch=lambda request, place, row: logits.append(row.float()))
    return logits[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_logits_in_bytes_are_near_those_without(family, dtype):
    """Weights and inputs with seven bits each, through every layer."""
    model = tiny_model(family).to(dtype)
    before = logits_of(prepare(model))
    after = logits_of(quantize_int8(prepare(model)))
    assert any(isinstance(module, Int8Linear) for module in model.modules())
    assert not isinstance(model.get_output_embeddings(), Int8Linear)
    distance = (after - before).norm() / before.norm()
    assert 1e-4 < distance < 0.2


@pytest.mark.parametrize("saturates", [False, True])
def test_products_of_the_largest_numbers_are_exact(saturates, monkeypatch):
    """Processors without VNNI saturate products of large numbers: what bmx does there is right on every processor."""
    if saturates:
        monkeypatch.setattr(reference, "_saturates", lambda: True)
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data.fill_(1.0)
    x = torch.full((3, 64), 2.0)
    x[1] = -2.0
    x[2, ::2] = 0.5
    torch.testing.assert_close(Int8Linear(linear)(x), linear(x), atol=0.3, rtol=0)


def test_weights_are_counted_as_the_bytes_they_are():
    model = tiny_model("llama")
    loaded = prepare(model)
    linear = sum(
        module.weight.numel() for module in model.modules()
        if type(module) is torch.nn.Linear and module is not model.get_output_embeddings()
    )  # fmt: skip
    small = quantize_int8(loaded)
    held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert small.spec.weight_bytes == sum(held.values())
    outputs = sum(len(module.scales) for module in model.modules() if isinstance(module, Int8Linear))
    assert loaded.spec.weight_bytes - small.spec.weight_bytes == linear * 3 - 8 * outputs


def test_what_is_foreseen_is_what_is_loaded(model):
    for quantization in ("none", "int8"):
        config = EngineConfig(model=model, quantization=quantization, device="cpu")
        seen, loaded = preview_spec(config, "cpu"), load_model(model, config).spec
        assert seen.int8 == loaded.int8 == (quantization == "int8")
        assert seen.weight_bytes == pytest.approx(loaded.weight_bytes, rel=0.1)
    assert seen.weight_bytes < preview_spec(replace(config, quantization="none"), "cpu").weight_bytes


def test_a_gpu_and_a_model_without_linear_layers_are_refused(model):
    with pytest.raises(ModelError, match="CPU"):
        preview_spec(EngineConfig(model=model, quantization="int8"), "cuda")
    with pytest.raises(ModelError, match="no linear layers"):
        quantize_int8(prepare(tiny_model("gpt2")))


def test_a_run_in_bytes_is_another_job(bmx, model, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "w5 w6 w7 w8"}\n')
    same = ("run", "in.jsonl", "--model", model, "--max-tokens", 3, "-o", "out.jsonl")
    assert bmx(*same, "--quantization", "int8").code == 0
    manifest = json.loads((tmp_path / "out.jsonl.run.json").read_text())
    assert manifest["settings"]["quantization"] == "int8"
    assert bmx(*same, "--quantization", "int8").code == 0
    refused = bmx(*same)
    assert refused.code == 2
    assert "quantization" in refused.err


def test_calibrate_holds_bytes_against_the_cache_and_weights_without(bmx, model, tmp_path):
    """The full cache of the model as it is teaches; with bytes, even a full cache may say something else."""
    rows = [json.dumps({"prompt": " ".join(f"w{(7 * i + j) % 90 + 5}" for j in range(40))}) for i in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n")
    asked = (
        "calibrate",
        "in.jsonl",
        "--model",
        model,
        "--max-tokens",
        6,
        "--kv-policy",
        "none",
        "--kv-format",
        "model",
        "-o",
        "c.json",
    )
    ended = bmx(*asked, "--quantization", "int8", "--min-agreement", "0.01")
    assert ended.code == 0
    assert "none int8 weights" in ended.out
    record = json.loads((tmp_path / "c.json").read_text())
    [one] = record["candidates"]
    assert one["settings"]["quantization"] == "int8"
    assert one["kl_divergence"] > 0
    assert record["recommended"]["quantization"] == "int8"
