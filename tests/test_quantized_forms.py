"""Quantised checkpoints: what nobody would unpack is refused by name; what transformers unpacks answers rightly."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import answers, as_requests, random_prompts, reference_answers, word_tokenizer
from families import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bmx import Engine, EngineConfig
from bmx.errors import ModelError
from bmx.model.load_problems import cause_and_hint
from bmx.model.loader import load_model
from bmx.model.preview import preview_spec
from bmx.model.quantized_forms import check_unpacked

BLOCK = 16  # rows and columns that share a scale
LARGEST = 448.0  # of float8_e4m3fn
FINE = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with good tiny models, by family."""
    folders = {}
    for family in ("llama", "deepseek_v3", "mixtral", "gpt_oss"):
        folders[family] = tmp_path_factory.mktemp(family)
        tiny_model(family).save_pretrained(folders[family])
        word_tokenizer().save_pretrained(folders[family])
    return folders


@pytest.fixture
def copy(saved, tmp_path, monkeypatch):
    """Makes a copy of one in which each matrix of a layer is replaced, and its config changed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # leaves the threads of the test process alone

    def make(change, family="llama", name="quantised-model", **config):
        folder = Path(shutil.copytree(saved[family], tmp_path / name))
        tensors = {}
        for key, tensor in load_file(folder / "model.safetensors").items():
            matrix = key.endswith(("_proj.weight", "_proj")) and not any(size % BLOCK for size in tensor.shape)
            tensors |= change(key, tensor) if matrix else {key: tensor}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return make


def one_scale(weight):
    """A matrix in float8, and its scale."""
    scale = weight.abs().max() / LARGEST
    return (weight / scale).to(torch.float8_e4m3fn), scale


def block_scales(weight):
    """A matrix in float8, and the scales of its blocks."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3), keepdim=True) / LARGEST
    return (blocks / scales).to(torch.float8_e4m3fn).reshape(rows, columns), scales[:, 0, :, 0].contiguous()


def beside(key, name):
    return f"{key.removesuffix('weight')}{name}"


def modelopt(key, weight):
    packed, scale = one_scale(weight)
    return {key: packed, beside(key, "weight_scale"): scale, beside(key, "input_scale"): torch.tensor(0.01)}


def static(key, weight):
    packed, scale = one_scale(weight)
    return {key: packed, beside(key, "weight_scale_inv"): scale, beside(key, "activation_scale"): torch.tensor(0.01)}


def fine(key, weight, scale_type=torch.float32):
    packed, scales = block_scales(weight)
    return {key: packed, f"{key}_scale_inv": scales.to(scale_type)}


def fine_unpacked(key, weight, scale_type=torch.float32):
    packed, scales = block_scales(weight)
    scales = scales.to(scale_type).float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return {key: packed.float() * scales}


def unpacked(key, weight):
    packed, scale = one_scale(weight)
    return {key: packed.float() * scale}


FOUR_BITS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def mxfp4(key, weight):
    """The weights of experts [X, in, out] in four bits, and an exponent for each 32 inputs of an output."""
    if weight.ndim == 2:
        return {key: weight}
    groups = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponents = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    codes = ((groups / 2**exponents).unsqueeze(-1) - FOUR_BITS).abs().argmin(-1).to(torch.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return {f"{key}_blocks": packed, f"{key}_scales": (exponents[..., 0] + 127).to(torch.uint8)}


def mxfp4_unpacked(key, weight):
    if weight.ndim == 2:
        return {key: weight}
    packed, exponents = mxfp4(key, weight).values()
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(3).long()
    groups = FOUR_BITS[codes] * 2 ** (exponents.float() - 127).unsqueeze(-1)
    return {key: groups.flatten(2).transpose(1, 2).contiguous()}


def mlx(key, weight):
    scales = torch.ones(weight.shape[0], weight.shape[1] // 8)
    packed = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.uint32)
    return {key: packed, beside(key, "scales"): scales, beside(key, "biases"): scales.clone()}


def gptq(key, weight):
    packed = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
    return {beside(key, "qweight"): packed, beside(key, "scales"): torch.ones(1, weight.shape[0])}


def whole(key, weight):
    return {key: weight}


def with_scale(key, weight):
    return {key: weight, beside(key, "weight_scale"): torch.ones(())}


def integers(key, weight):
    return {key: (weight * 100).to(torch.int8)}


def open_engine(folder, dtype="float32"):
    return Engine.open(EngineConfig(model=str(folder), dtype=dtype, device="cpu", kv_policy="none"))


NOBODY_UNPACKS = {  # change of the weights, of config.json, words of the message
    "modelopt": (modelopt, {"quantization_config": MODELOPT}, "NVIDIA ModelOpt"),
    "modelopt in four bits": (whole, {"quantization_config": {"quant_method": "modelopt_fp4"}}, "NVIDIA ModelOpt"),
    "float8 without a word": (modelopt, {}, "type F8_E4M3 .*model.layers.0.mlp.down_proj.weight"),
    "integers without a word": (integers, {}, "type I8"),
    "gptq without a word": (gptq, {}, "type I32 .*qweight"),
    "scales beside whole weights": (with_scale, {}, "nothing reads 14 of its tensors .*weight_scale"),
    "static float8 under other names": (modelopt, {"quantization_config": STATIC}, "nothing reads .*weight_scale"),
    "an unknown form": (whole, {"quantization_config": {"quant_method": "nobodys"}}, "nobodys"),
    "a form of a part": (whole, {"text_config": {"quantization_config": {"quant_method": "nobodys"}}}, "nobodys"),
    "exl2": (whole, {"quantization_config": {"quant_method": "exl2"}}, "ExLlamaV2"),
    "mlx": (mlx, {"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, "MLX"),
}


@pytest.mark.parametrize("form", NOBODY_UNPACKS)
def test_m10_a_form_that_nobody_unpacks_is_refused_by_name(copy, form):
    change, config, reason = NOBODY_UNPACKS[form]
    with pytest.raises(ModelError, match=reason) as caught:
        open_engine(copy(change, **config))
    assert "quantised-model" in caught.value.message
    assert "\n" not in caught.value.message
    assert "the model that it was made from" in caught.value.hint


def test_m10_a_file_of_modelopt_is_enough_and_plan_batch_refuses_too(copy):
    folder = copy(whole)
    (folder / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    with pytest.raises(ModelError, match="NVIDIA ModelOpt"):
        preview_spec(EngineConfig(model=str(folder)), "cpu")


BF16 = torch.bfloat16  # of scales: transformers' weights would be bfloat16 too, whatever was asked for
UNPACKED = {  # change of the weights, the same without a form, config.json, family
    "fine-grained": (fine, fine_unpacked, FINE, "llama"),
    "scales in bfloat16": (partial(fine, scale_type=BF16), partial(fine_unpacked, scale_type=BF16), FINE, "llama"),
    "experts": (partial(fine, scale_type=BF16), partial(fine_unpacked, scale_type=BF16), FINE, "deepseek_v3"),
    "static": (static, unpacked, STATIC, "llama"),
    "mxfp4": (mxfp4, mxfp4_unpacked, {"quant_method": "mxfp4"}, "gpt_oss"),
}


@pytest.mark.parametrize("form", UNPACKED)
def test_m11_packed_weights_on_a_cpu_answer_as_their_unpacked_twin(copy, form):
    change, twin, settings, family = UNPACKED[form]
    prompts = random_prompts((5, 20, 9))
    engine = open_engine(copy(change, family, quantization_config=settings))
    model = AutoModelForCausalLM.from_pretrained(
        copy(twin, family, name="twin"), dtype=torch.float32, attn_implementation="eager"
    )
    assert answers(engine, as_requests(prompts, max_tokens=5)) == reference_answers(model.eval(), prompts, 5)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_m11_whole_weights_are_planned_for_as_they_are_held(copy, family):
    folder = copy(fine, family, quantization_config=FINE)
    config = EngineConfig(model=str(folder), dtype="float32", device="cpu")
    held = load_model(str(folder), config).spec.weight_bytes
    assert preview_spec(config, "cpu").weight_bytes == pytest.approx(held, rel=1e-3)
    assert preview_spec(config, "cuda").weight_bytes < held


def test_m11_the_weights_are_whole_on_a_cpu_beside_a_gpu_too(copy, monkeypatch):
    folder = copy(fine, quantization_config=FINE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded = load_model(str(folder), EngineConfig(model=str(folder), dtype="float32", device="cpu"))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_m11_a_form_that_other_tools_make_of_whole_weights_changes_nothing(copy):
    folder = copy(whole, "mixtral", quantization_config={"quant_method": "experts_int8"})
    found = answers(open_engine(folder), as_requests([[5, 6, 7]], max_tokens=4))
    assert found == reference_answers(tiny_model("mixtral"), [[5, 6, 7]], 4)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.7.mlp.down_proj.weight_scale_inv",  # of a layer that predicts further tokens
        "visual.blocks.0.attn.qkv.weight_scale",
        "model.layers.0.self_attn.k_scale",  # of a KV cache in float8
        "model.layers.0.mlp.down_proj.input_scale",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ],
)
def test_m11_tensors_that_no_weight_needs_refuse_nothing(key):
    check_unpacked("a-model", tiny_model("llama"), [key])


def test_m10_the_scales_of_experts_that_the_model_keeps_in_one_tensor_are_missed():
    model, key = tiny_model("mixtral"), "model.layers.0.mlp.experts.3.w1.weight_scale"
    with pytest.raises(ModelError, match="nothing reads 1 of its tensors"):
        check_unpacked("a-model", model, [key])


@pytest.mark.parametrize(
    ("error", "command"),
    [
        (ModuleNotFoundError("No module named 'torchao'", name="torchao"), "pip install 'torchao'"),
        (ImportError("`x` requires optimum (`pip install optimum`)"), "pip install 'optimum'"),
        (ImportError("requires it: `pip install -U bitsandbytes>=0.46.1`"), "pip install 'bitsandbytes>=0.46.1'"),
        (ImportError("Please install it with `pip install compressed-tensors>=0.15.0`."), "tensors>=0.15.0'"),
        (ImportError("A valid HQQ version is not available"), "pip install 'hqq'"),
        (ImportError("requires a GPU"), "install what it needs"),
        (RuntimeError("GPU is required to run SpQR quantized model."), "the model that it was made from"),
    ],
    ids=str,
)
def test_m12_a_missing_library_is_named_with_the_command_that_installs_it(error, command):
    assert command in cause_and_hint("a-model", error)[1]
