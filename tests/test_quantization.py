"""Linear layers in bytes: near what they were, counted as what they are, and refused where they would be slower."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import answers, as_requests, random_prompts, word_tokenizer
from families import VOCAB, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from bmx import Engine, EngineConfig, PromptConfig, hardware
from bmx.engine.backend import ModelBackend
from bmx.errors import ModelError, UsageError
from bmx.kernels import Kernels, fbgemm, int8
from bmx.model.int8_modules import Int8Linear, LibraryInt8Linear, quantise
from bmx.model.loader import load_model, prepare, quantize
from bmx.model.preview import preview_spec

AMX = frozenset({"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
SIZES = LlamaConfig(
    vocab_size=VOCAB, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
OWN_PROCESS = "TEST_IN_ITS_OWN_PROCESS"  # set where a test runs in a process of its own
by_library = pytest.mark.skipif(bool(int8.why_no_library("float32")), reason="torch has no FBGEMM here")


@pytest.fixture
def flags(monkeypatch):
    """A function that says which instruction sets the processor has."""
    return lambda names: monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(names))


@pytest.fixture
def plain(cpu_kernels, flags):
    """No compiled kernels, and no AMX: torch's library multiplies."""
    cpu_kernels("cpu")
    flags(hardware.cpu_flags() - {"amx_bf16", "amx_fp16"})


@pytest.fixture
def every_layer(monkeypatch):
    """The library multiplies small layers too."""
    monkeypatch.setattr(int8, "LEAST_WEIGHTS", 0)


def linear(inputs, outputs, bias=True):
    """A linear layer of random numbers."""
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias)


def logits_of(loaded, **config):
    """The logits that follow a prompt of 60 tokens."""
    engine = Engine(EngineConfig(kv_policy="none", **config), PromptConfig(), word_tokenizer(), ModelBackend(loaded))
    logits = []
    requests = as_requests(random_prompts([60]), max_tokens=1)
    answers(engine, requests, watch=lambda request, place, row: logits.append(row.float()))
    return logits[0]


@by_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_logits_in_bytes_are_near_those_without(family, dtype, plain, every_layer):
    """Weights and inputs with seven or eight bits each, through every layer."""
    model = tiny_model(family).to(dtype)
    before = logits_of(prepare(model))
    after = logits_of(quantize(prepare(model), "int8"))
    assert any(isinstance(module, LibraryInt8Linear) for module in model.modules())
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    distance = (after - before).norm() / before.norm()
    assert 1e-4 < distance < 0.2


@by_library
@by_library
@pytest.mark.parametrize("family", ["qwen3_5_text", "granitemoehybrid_nope", "jamba", "lfm2"])
def test_mixers_run_in_bytes(family, plain, every_layer):
    """Some of them read a weight themselves, which then stays as it is."""
    loaded = prepare(tiny_model(family))
    expected = logits_of(loaded)
    assert torch.nn.functional.cosine_similarity(logits_of(quantize(loaded, "int8")), expected, dim=0) > 0.95


@pytest.mark.parametrize("most", [fbgemm.MOST, fbgemm.MOST_HALVED])
def test_products_of_the_largest_numbers_are_exact(most, monkeypatch):
    """Processors without VNNI saturate products of large numbers: what bmx does there is right on every processor."""
    if most < fbgemm.most_code():
        monkeypatch.setattr(fbgemm, "most_code", lambda: most)
    layer = torch.nn.Linear(64, 32, bias=False)
    layer.weight.data.fill_(1.0)
    x = torch.full((3, 64), 2.0)
    x[1] = -2.0
    x[2, ::2] = 0.5
    for module in (Int8Linear(layer), LibraryInt8Linear(layer)):
        torch.testing.assert_close(module(x), layer(x), atol=0.6, rtol=0)


@by_library
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(576, 96, True), (100, 33, False), (2048, 16, False)])
def test_the_library_multiplies_what_the_specification_says(inputs, outputs, bias):
    """In float64 from rounded numbers; the specification has 256 levels, the library perhaps 128."""
    layer = linear(inputs, outputs, bias)
    x = torch.randn(9, inputs) * torch.logspace(-3, 3, 9).unsqueeze(1) + 0.5
    x[4] = x[4].abs()
    small = LibraryInt8Linear(layer)(x)
    steps, zeros = fbgemm.row_scales(x, fbgemm.most_code())
    given = ((x / steps).round() + zeros).clamp(0, fbgemm.most_code()).double() - zeros
    codes = Int8Linear(layer)
    expected = given @ (codes.codes.double() * codes.scales.double().unsqueeze(1)).t() * steps
    expected = expected if layer.bias is None else expected + layer.bias
    near = x.abs().amax(1, keepdim=True) * layer.weight.abs().amax() / 64  # a tie may be rounded to the other side
    assert ((small - expected).abs() <= near).all()
    if fbgemm.most_code() == fbgemm.MOST:
        assert ((small - codes(x)).abs() <= near).all()


@by_library
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_alone_is_the_row_among_others_to_the_last_bit(threads):
    module = LibraryInt8Linear(linear(576, 200))
    x = torch.randn(130, 576) * torch.logspace(-2, 2, 130).unsqueeze(1)
    x[7, 3], x[8, 3] = float("nan"), float("inf")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = module(x)
        for rows in (slice(1), slice(40, 41), slice(3, 100)):
            assert torch.equal(module(x[rows]).nan_to_num(9), together[rows].nan_to_num(9))
    finally:
        torch.set_num_threads(before)
    assert not together[7:9].isfinite().any()
    assert together[:7].isfinite().all()
    assert together[9:].isfinite().all()


@by_library
def test_kernels_take_the_layers_that_fit_and_the_library_the_others(flags, every_layer):
    """With AMX, torch multiplies bfloat16 faster than its library multiplies bytes: there the others stay."""
    for names, other in ((hardware.cpu_flags() - AMX | {"avx2"}, LibraryInt8Linear), (AMX, torch.nn.Linear)):
        flags(names)
        model = tiny_model("llama").to(torch.bfloat16)
        inner = model.model.layers[0].mlp
        inner.up_proj, inner.gate_proj = torch.nn.Linear(32, 40), torch.nn.Linear(24, 64)
        quantise(model, Kernels("avx512", ""))
        assert [type(part) for part in (inner.up_proj, inner.gate_proj)] == [other, other]
        assert type(inner.down_proj) is Int8Linear


@by_library
def test_weights_are_counted_as_the_bytes_they_are(request, plain):
    """What the process holds more by a set of packed weights is what is counted, less pages that are never touched.

    In a process of its own: what other tests have freed would be taken again, or given back meanwhile.
    """
    if OWN_PROCESS not in os.environ:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", request.node.nodeid]
        environment, root = os.environ | {OWN_PROCESS: "1"}, request.config.rootpath
        ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout
        assert "1 passed" in ended.stdout
        return
    layers = [linear(inputs, outputs) for inputs, outputs in ((576, 1536), (1536, 576), (896, 512))]
    LibraryInt8Linear(layers[0])  # loads what FBGEMM needs
    gc.collect()
    hardware.trim_heap()
    before = hardware.resident_bytes()
    packed = [LibraryInt8Linear(layer) for layer in layers for _ in range(24)]
    hardware.trim_heap()
    counted = sum(module.packed_bytes for module in packed)
    assert 0.9 * counted < hardware.resident_bytes() - before < 1.05 * counted
    model = LlamaForCausalLM(SIZES)
    loaded = prepare(model)
    before = hardware.resident_bytes()
    small = quantize(loaded, "int8")
    saved = loaded.spec.weight_bytes - small.spec.weight_bytes
    assert 0.75 * saved < before - hardware.resident_bytes() < 1.1 * saved  # if codes were held twice, 0.67
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    modules = [module for module in model.modules() if isinstance(module, LibraryInt8Linear)]
    assert small.spec.weight_bytes == sum(tensors.values()) + sum(module.packed_bytes for module in modules)


@by_library
@pytest.mark.parametrize("names", [{"avx2"}, AMX])
def test_what_is_foreseen_is_what_is_loaded(names, tmp_path, cpu_kernels, flags):
    cpu_kernels("cpu")
    flags(names)
    LlamaForCausalLM(SIZES).save_pretrained(tmp_path)
    bytes_held = {}
    for quantization in ("none", "int8"):
        config = EngineConfig(model=str(tmp_path), quantization=quantization, device="cpu", dtype="float32")
        seen, loaded = preview_spec(config, "cpu"), load_model(str(tmp_path), config).spec
        assert seen.quantization == loaded.quantization == quantization
        assert seen.weight_bytes == pytest.approx(loaded.weight_bytes, rel=0.02)
        bytes_held[quantization] = seen.weight_bytes
    assert bytes_held["int8"] < 0.4 * bytes_held["none"]


def test_bytes_that_would_make_a_run_slower_are_refused_before_weights_are_read(
    model, bmx, cpu_kernels, flags, tmp_path
):
    """The folder has no weights, and that is not what is said."""
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "in.jsonl").write_text('{"prompt": "w5"}\n')
    cpu_kernels("cpu")
    for names, dtype, reason in (
        (AMX, "bfloat16", "AMX"),
        ({"avx2", "amx_fp16"}, "float16", "AMX"),
        ({"asimd"}, "float32", "AVX2"),
    ):
        flags(names)
        for command in ("run", "plan-batch"):
            ended = bmx(command, "in.jsonl", "--model", folder, "--quantization", "int8", "--dtype", dtype)
            assert ended.code == 2
            assert "slower" in ended.err
            assert reason in ended.err
            assert "BMX_KERNELS=cpu" in ended.err


def test_a_gpu_and_a_model_without_linear_layers_are_refused(model, plain):
    with pytest.raises(UsageError, match="CPU"):
        preview_spec(EngineConfig(model=model, quantization="int8"), "cuda")
    for family in ("gpt2", "llama"):  # the latter's are too small for the library to be faster
        with pytest.raises(ModelError, match="no linear layers"):
            quantize(prepare(tiny_model(family)), "int8")


@by_library
def test_a_run_in_bytes_is_another_job(bmx, model, tmp_path, every_layer):
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "w5 w6 w7 w8"}\n')
    same = ("run", "in.jsonl", "--model", model, "--dtype", "float32", "--max-tokens", 3, "-o", "out.jsonl")
    assert bmx(*same, "--quantization", "int8").code == 0
    manifest = json.loads((tmp_path / "out.jsonl.run.json").read_text())
    assert manifest["settings"]["quantization"] == "int8"
    assert bmx(*same, "--quantization", "int8").code == 0
    refused = bmx(*same)
    assert refused.code == 2
    assert "quantization" in refused.err


@by_library
def test_calibrate_holds_bytes_against_the_cache_and_weights_without(bmx, model, tmp_path, every_layer):
    """The full cache of the model as it is teaches; with bytes, even a full cache may say something else."""
    rows = [json.dumps({"prompt": " ".join(f"w{(7 * i + j) % 90 + 5}" for j in range(40))}) for i in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n")
    asked = (
        "calibrate",
        "in.jsonl",
        "--model",
        model,
        "--dtype",
        "float32",
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
