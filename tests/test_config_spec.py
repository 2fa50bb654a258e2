"""A spec from config.json equals the one that the model itself gives, and wrong files are named."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import save_file
from test_structure import heavy_after
from transformers import AutoConfig, AutoModelForCausalLM

from bmx.errors import ModelError
from bmx.model.checkpoint import TensorHeader, read_headers, weight_bytes
from bmx.model.config_spec import spec_from_config
from bmx.model.cost_trace import trace_costs
from bmx.model.loader import prepare

TYPES = ["llama", "mistral", "smollm3", "qwen2", "qwen3", "phi3"]
DTYPES = [torch.bfloat16, torch.float32]
TINY = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=None,
)
# Older releases compute the rotary table with a product, so that costs differ by a hair.
COSTS_AS_FITTED = tuple(map(int, version("transformers").split(".")[:2])) >= (5, 23)
LONG = [1.0] * 4


def write(folder, model_type, *without, **keys):
    """A folder with a config.json of these keys beside the tiny ones."""
    config = {key: value for key, value in (dict(model_type=model_type) | TINY | keys).items() if key not in without}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def build(folder, dtype, device="cpu"):
    """The folder's model as transformers builds it, with random weights or none."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def check_equal(folder, dtype):
    """The spec from config.json equals the one that forwards of the real model give."""
    spec, real = spec_from_config(folder, dtype.itemsize), prepare(build(folder, dtype)).spec
    if not COSTS_AS_FITTED:
        spec = dataclasses.replace(spec, costs=real.costs)
    assert spec == real


def random_keys(rng, model_type):
    """Sizes and options that a config of this type may have, small enough for a forward."""
    kv_heads, group, head_dim = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([2, 4, 8, 16, 34])
    heads, layers = kv_heads * group, rng.choice([1, 1, 2, 3, 4])
    divides = rng.random() < 0.3 or model_type == "phi3"
    keys = dict(
        hidden_size=heads * (head_dim if divides else rng.choice([1, 2, 8, 16, 50])),
        intermediate_size=rng.choice([1, 3, 40, 64, 200]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=rng.choice([50, 96]),
        tie_word_embeddings=rng.random() < 0.5,
    )
    keys |= {} if divides and model_type != "qwen3" else dict(head_dim=head_dim)
    if model_type in {"llama", "smollm3", "qwen3"}:
        keys |= dict(attention_bias=rng.random() < 0.5)
    if model_type in {"llama", "smollm3"}:
        keys |= dict(mlp_bias=rng.random() < 0.5)
    if model_type in {"mistral", "phi3"}:
        keys |= dict(sliding_window=rng.choice([None, 3, 8]))
    if model_type in {"qwen2", "qwen3", "smollm3"}:
        keys |= dict(use_sliding_window=rng.random() < 0.5, sliding_window=5, max_window_layers=rng.choice([0, 1, 2]))
    if model_type == "smollm3":
        rotates = [rng.choice([0, 1]) for _ in range(layers)]
        keys |= dict(no_rope_layers=rng.choice([rotates, None]), no_rope_layer_interval=rng.choice([1, 2, 4]))
    if model_type == "phi3" and head_dim == 16:
        keys |= dict(partial_rotary_factor=rng.choice([0.25, 0.5, 0.75, 1.0]))
    return keys


@pytest.mark.parametrize("model_type", TYPES)
def test_a_spec_from_config_json_is_that_of_the_model(tmp_path, model_type):
    rng = random.Random(model_type)
    for i in range(6):
        check_equal(write(tmp_path / str(i), model_type, **random_keys(rng, model_type)), DTYPES[i % 2])


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONGROPE = dict(short_factor=LONG, long_factor=LONG)
SLIDING = ["sliding_attention", "full_attention"]
OPTIONS = [
    ("llama", dict(rope_scaling=dict(type="linear", factor=2.0))),
    ("llama", dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=64, rope_theta=5e5))),
    ("llama", dict(torch_dtype="float16", rope_theta=5e5, rope_scaling=None, head_dim=None, pretraining_tp=1)),
    ("llama", dict(rope_scaling=LLAMA3, rope_parameters=YARN, num_key_value_heads=None)),
    ("llama", dict(rope_scaling=LONGROPE | dict(type="longrope", factor=2.0))),
    ("llama", dict(partial_rotary_factor=1.0, architectures=["LlamaForCausalLM"])),
    ("llama", dict(rope_scaling=dict(type="dynamic", factor=2.5))),
    ("mistral", dict(hidden_size=256, rope_parameters=dict(rope_type="dynamic", factor=2))),
    ("mistral", dict(head_dim=None)),
    ("qwen2", dict(rope_parameters=YARN, layer_types=SLIDING, use_sliding_window=True)),
    ("qwen3", dict(layer_types=SLIDING, use_sliding_window=True, sliding_window=7)),
    ("smollm3", dict(layer_types=SLIDING, use_sliding_window=True, sliding_window=7)),
    ("smollm3", dict(no_rope_layers=[1, 0, 1, 0])),
    ("phi3", dict(rope_scaling=LONGROPE | dict(type="longrope"), original_max_position_embeddings=128)),
    (
        "phi3",
        dict(hidden_size=256, rope_scaling=dict(type="longrope", short_factor=[1.0] * 32, long_factor=[2.0] * 32)),
    ),
    ("phi3", dict(hidden_size=64, rope_scaling=LONGROPE | dict(type="yarn", partial_rotary_factor=0.5))),
    ("phi3", dict(num_key_value_heads=None, attention_bias=True)),
]


@pytest.mark.parametrize(("model_type", "keys"), OPTIONS, ids=str)
def test_options_are_read_as_transformers_does(tmp_path, model_type, keys):
    for dtype in DTYPES:
        check_equal(write(tmp_path, model_type, **keys), dtype)


# Published sizes with three layers; the models are built on the meta device.
REAL = {
    "llama": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8),
    "mistral": dict(hidden_size=5120, intermediate_size=14336, num_attention_heads=32, head_dim=128),
    "smollm3": dict(vocab_size=128256, intermediate_size=11008, num_hidden_layers=4, no_rope_layer_interval=4),
    "qwen2": dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2),
    "qwen3": dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8),
    "phi3": dict(hidden_size=3072, intermediate_size=8192, num_attention_heads=24, partial_rotary_factor=0.75),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_missing_keys_of_real_sizes_are_taken_as_transformers_does(tmp_path, model_type, dtype):
    keys = dict(num_hidden_layers=3) | REAL[model_type]
    folder = write(tmp_path, model_type, *(TINY.keys() - keys.keys()), **keys)
    spec, model = spec_from_config(folder, dtype.itemsize), build(folder, dtype, "meta")
    assert spec.weight_bytes == sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    assert (spec.vocab, spec.max_length) == (model.config.vocab_size, model.config.max_position_embeddings)
    assert spec.head_bytes == model.lm_head.weight.nbytes
    assert spec.layers[0].kv_heads == model.config.num_key_value_heads
    if COSTS_AS_FITTED:
        assert spec.costs == trace_costs(model)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_config_of_defaults_alone_means_what_transformers_means(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type=model_type)), encoding="utf-8")
    spec, config = spec_from_config(tmp_path, 2), AutoConfig.from_pretrained(tmp_path)
    first = spec.layers[0]
    assert len(spec.layers) == config.num_hidden_layers
    assert (first.query_heads, first.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert first.key_dim == getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    assert (spec.vocab, spec.max_length) == (config.vocab_size, config.max_position_embeddings)
    assert spec.head_bytes == config.vocab_size * config.hidden_size * 2
    assert first.window == (config.sliding_window if model_type in {"mistral", "phi3"} else None)


NOT_COVERED = [
    ("gemma2", {}),
    ("llama", dict(architectures=["LlamaForSequenceClassification"])),
    ("llama", dict(architectures="LlamaForCausalLM")),
    ("llama", dict(hidden_act="gelu")),
    ("llama", dict(some_new_option=3)),
    ("llama", dict(sliding_window=8)),
    ("llama", dict(attention_bias=None)),
    ("llama", dict(head_dim=7)),
    ("llama", dict(hidden_size=33, head_dim=8)),
    ("llama", dict(pad_token_id=96)),
    ("llama", dict(partial_rotary_factor=0.5)),
    ("llama", dict(rope_scaling=dict(type="linear"))),
    ("llama", dict(rope_scaling=LONGROPE | dict(type="longrope", short_factor=[1.0]))),
    ("mistral", dict(num_key_value_heads=None)),
    ("llama", dict(rope_scaling=["linear"])),
    ("llama", dict(rope_scaling=dict(type="dynamic", factor="2"))),
    ("llama", dict(rope_scaling=dict(type="dynamic", factor=float("inf")))),
    ("llama", dict(rope_scaling=LONGROPE | dict(type="longrope", long_factor=4))),
    ("llama", dict(rope_scaling=dict(rope_type="proportional", rope_theta=1e4))),
    ("llama", dict(quantization_config=dict(quant_method="awq"))),
    ("mistral", dict(sliding_window=0)),
    ("qwen2", dict(layer_types=SLIDING)),
    ("qwen2", dict(layer_types=SLIDING * 2, use_sliding_window=True)),
    ("qwen2", dict(use_sliding_window=True, max_window_layers=None)),
    ("qwen2", dict(layer_types=["chunked_attention", {}])),
    ("qwen3", dict(head_dim=None)),
    ("smollm3", dict(no_rope_layers=[1])),
    ("smollm3", dict(no_rope_layer_interval=0)),
    ("phi3", dict(rope_scaling=dict(type="linear", factor=2.0))),
    ("phi3", dict(head_dim=16)),
]


@pytest.mark.parametrize(("model_type", "keys"), NOT_COVERED, ids=str)
def test_configs_that_are_not_covered_are_left_to_transformers(tmp_path, model_type, keys):
    assert spec_from_config(write(tmp_path, model_type, **keys), 2) is None


def test_activations_of_other_sizes_are_left_to_transformers(tmp_path):
    assert spec_from_config(write(tmp_path, "llama"), 8) is None


CONTRADICTIONS = [
    (dict(num_attention_heads=4, num_key_value_heads=3), ["num_attention_heads = 4", "num_key_value_heads = 3"]),
    (dict(hidden_size=33), ["hidden_size = 33", "num_attention_heads = 4"]),
    (dict(num_hidden_layers=0), ["num_hidden_layers = 0"]),
    (dict(intermediate_size=-64), ["intermediate_size = -64"]),
    (dict(vocab_size="96"), ['vocab_size = "96"']),
    (dict(max_position_embeddings=None), ["max_position_embeddings = null"]),
    (dict(num_key_value_heads=2.0), ["num_key_value_heads = 2.0"]),
    (dict(num_attention_heads=True), ["num_attention_heads = true"]),
    (dict(head_dim=0), ["head_dim = 0"]),
]


@pytest.mark.parametrize(("keys", "named"), CONTRADICTIONS, ids=str)
def test_a_config_that_contradicts_itself_is_refused(tmp_path, keys, named):
    with pytest.raises(ModelError) as caught:
        spec_from_config(write(tmp_path, "llama", **keys), 2)
    assert all(words in caught.value.message for words in [*named, str(tmp_path)])
    assert "config.json" in caught.value.hint


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 100_000, None])
def test_a_broken_config_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=f"cannot load model {tmp_path}: config.json"):
        spec_from_config(tmp_path, 2)


@pytest.fixture(params=["llama", "phi3"])
def saved(tmp_path, request):
    """A folder with a tiny model and its weights: vocabulary 96, hidden 64, 4 layers, 8 heads and 4 kv heads of 8."""
    sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
    folder = write(tmp_path, request.param, **sizes)
    build(folder, torch.bfloat16).save_pretrained(folder)
    return folder


def change(folder, **keys):
    """Other values for some keys of config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | keys), encoding="utf-8")


def test_weights_that_fit_the_config_change_nothing(saved):
    with_weights = spec_from_config(saved, 2)
    (saved / "model.safetensors").unlink()
    assert with_weights == spec_from_config(saved, 2) is not None


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("num_key_value_heads", 8, 4),
        ("num_key_value_heads", 1, 4),
        ("num_hidden_layers", 5, 4),
        ("num_hidden_layers", 3, 4),
        ("vocab_size", 100, 96),
        ("intermediate_size", 65, 64),
        ("hidden_size", 80, 64),
    ],
)
def test_weights_that_contradict_the_config_are_named(saved, key, value, right):
    change(saved, **{key: value})
    with pytest.raises(ModelError, match=rf"config.json says {key} = {value}, and the weights have {right}") as caught:
        spec_from_config(saved, 2)
    assert caught.value.hint


def test_a_wrong_head_dim_is_named(tmp_path):
    folder = write(tmp_path, "qwen3", head_dim=16)
    build(folder, torch.bfloat16).save_pretrained(folder)
    change(folder, head_dim=32)
    with pytest.raises(ModelError, match="head_dim = 32, and the weights have 16"):
        spec_from_config(folder, 2)
    change(folder, head_dim=16, num_attention_heads=8)
    with pytest.raises(ModelError, match="num_attention_heads = 8, and the weights have 4"):
        spec_from_config(folder, 2)


@pytest.mark.parametrize("tied", [False, True])
def test_quantised_weights_count_as_they_are_stored(tmp_path, tied):
    folder = write(tmp_path, "llama", quantization_config=dict(quant_method="fp8"), tie_word_embeddings=tied)
    tensors = {
        "model.embed_tokens.weight": torch.zeros(96, 32, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(96, 32, dtype=torch.bfloat16),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn),
        "model.layers.1.mlp.down_proj.weight_packed": torch.zeros(32, 8, dtype=torch.int32),
        "model.layers.1.mlp.down_proj.weight_scale": torch.zeros(32),
    }
    save_file(tensors, folder / "model.safetensors")
    spec = spec_from_config(folder, 2)
    assert spec.weight_bytes == (1 if tied else 2) * 96 * 32 * 2 + 32 * 32 + 32 * 8 * 4 + 32 * 2 + 4 * 8
    assert spec.costs == spec_from_config(write(tmp_path / "plain", "llama"), 2).costs


def shard(path, header, data=b"", length=None):
    """A safetensors file, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


TENSOR = dict(dtype="BF16", shape=[2, 3], data_offsets=[0, 12])


def test_headers_of_shards_come_together(tmp_path):
    shard(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, "x": TENSOR}, bytes(12))
    shard(tmp_path / "b.safetensors", {"y": TENSOR | dict(dtype="I8", shape=[12])}, bytes(12))
    shard(tmp_path / "old.safetensors", {"z": TENSOR}, bytes(12))
    x, y = TensorHeader(dtype="BF16", shape=(2, 3)), TensorHeader(dtype="I8", shape=(12,))
    assert set(read_headers(tmp_path)) == {"x", "y", "z"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=dict(x="a.safetensors", y="b.safetensors"))), encoding="utf-8")
    assert read_headers(tmp_path) == {"x": x, "y": y}
    shard(tmp_path / "model.safetensors", {"x": TENSOR}, bytes(12))
    assert read_headers(tmp_path) == {"x": x}


def test_a_folder_without_weights_has_no_headers(tmp_path):
    assert read_headers(tmp_path) == {}


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("F64", 4), ("F32", 4), ("F16", 4), ("BF16", 4), ("F8_E5M2", 1), ("U8", 1), ("I64", 8), ("BOOL", 1), ("F4", 0.5)],
)
def test_floating_tensors_take_the_type_of_the_activations(dtype, size):
    assert weight_bytes({"x": TensorHeader(dtype=dtype, shape=(3, 4))}, 4) == 12 * size


def test_a_shard_that_is_missing_is_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=dict(x="a.safetensors", y="b.safetensors"))), encoding="utf-8")
    shard(tmp_path / "a.safetensors", {"x": TENSOR}, bytes(12))
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing \(b.safetensors\)") as caught:
        read_headers(tmp_path)
    assert "download" in caught.value.hint


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}'])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match="names no shards"):
        read_headers(tmp_path)


BROKEN = [
    (dict(header=b""), "corrupt"),
    (dict(header=b"{"), "corrupt"),
    (dict(header=b"[]"), "corrupt"),
    (dict(header=b"\xff\xfe"), "corrupt"),
    (dict(header=b"[" * 100_000), "corrupt"),
    (dict(header={"x": 3}), "corrupt"),
    (dict(header={"x": dict(dtype="BF16", shape=[2])}), "corrupt"),
    (dict(header={"x": TENSOR | dict(shape=[-2, 3])}), "corrupt"),
    (dict(header={"x": TENSOR | dict(shape=["2", 3])}), "corrupt"),
    (dict(header={"x": TENSOR | dict(dtype=16)}), "corrupt"),
    (dict(header={"x": TENSOR | dict(data_offsets=[12, 0])}), "corrupt"),
    (dict(header={"x": TENSOR}, data=bytes(11)), "header promises"),
    (dict(header=b"{}", length=3), "ends within its header"),
    (dict(header=b"version https://git-lfs", length=200_000_000), "200,000,000 bytes long"),
]


@pytest.mark.parametrize(("file", "message"), BROKEN, ids=str)
def test_a_broken_weight_file_is_refused(tmp_path, file, message):
    shard(tmp_path / "model.safetensors", **file)
    with pytest.raises(ModelError, match=message) as caught:
        read_headers(tmp_path)
    assert "model.safetensors" in caught.value.message
    assert "download it again" in caught.value.hint


def test_a_weight_file_too_short_for_a_length_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(ModelError, match="ends within its header"):
        read_headers(tmp_path)


def test_a_spec_from_config_json_loads_neither_torch_nor_transformers(tmp_path):
    folder = str(write(tmp_path, "llama"))
    imports = "from pathlib import Path; from bmx.model.config_spec import spec_from_config"
    code = f"{imports}; spec_from_config(Path({folder!r}), 2).layers[0]"
    assert heavy_after(code) == ""
