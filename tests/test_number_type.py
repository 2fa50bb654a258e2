"""The type that a model is computed in, on processors with and without bfloat16: what is slow is told or avoided."""

from __future__ import annotations

import json

import pytest
from conftest import word_tokenizer
from families import tiny_model
from transformers import AutoConfig

from bmx import Engine, EngineConfig, hardware, kernels
from bmx.model.config_spec import known_keys
from bmx.model.number_type import dtype_name

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}  # fmt: skip


@pytest.fixture
def on(monkeypatch):
    """Puts the process on a processor with some flags, where kernels of a name are the best."""

    def on(name, *flags):
        monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(flags))
        monkeypatch.setattr(kernels, "choose", lambda _: kernels.Kernels(name, ""))

    return on


@pytest.mark.parametrize(
    ("name", "flags", "changes", "expected"),
    [
        ("avx512bf16", ["avx512_bf16"], {"vocab_size": 97}, "bfloat16"),
        ("cpu", ["avx512_bf16"], {}, "bfloat16"),
        ("cpu", ["avx2"], {}, "float32"),
        ("avx2", ["avx2"], {}, "bfloat16"),
        ("avx2", ["avx2"], {"head_dim": 96}, "bfloat16"),
        ("avx2", ["avx2"], {"head_dim": 80}, "float32"),
        ("avx2", ["avx2"], {"num_attention_heads": 4}, "float32"),
        ("avx2", ["avx2"], {"vocab_size": 97}, "float32"),
        ("avx2", ["avx2"], {"intermediate_size": 100}, "float32"),
        ("avx2", ["avx2"], {"intermediate_size": None}, "float32"),
        ("avx2", ["avx2"], {"num_local_experts": 4}, "float32"),
        ("avx2", ["avx2"], {"attn_logit_softcapping": 50.0}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_this_model_is_computed_fast_in_it(on, name, flags, changes, expected):
    on(name, *flags)
    keys = SIZES | changes
    assert dtype_name(EngineConfig(), "cpu", keys) == expected
    assert dtype_name(EngineConfig(), "cpu", {"text_config": keys}) == expected
    assert dtype_name(EngineConfig(), "cuda", keys) == "bfloat16"
    assert dtype_name(EngineConfig(dtype="float16"), "cpu", keys) == "float16"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "smollm3", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("changes", [{}, {"vocab_size": 97}, {"num_attention_heads": 4}])
def test_a_plan_without_the_model_takes_the_type_that_loading_takes(on, tmp_path, model_type, changes):
    on("avx2", "avx2")
    config = {"model_type": model_type, "pad_token_id": None} | SIZES | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(tmp_path).to_dict()
    planned, taken = (dtype_name(EngineConfig(), "cpu", keys) for keys in (known_keys(tmp_path), loaded))
    assert planned == taken


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_type_that_the_user_wants_and_the_processor_lacks_is_taken_with_a_warning(on, tmp_path, caplog, dtype):
    tiny_model("llama").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    on("cpu", "sse2")
    engine = Engine.open(EngineConfig(model=str(tmp_path), device="cpu", dtype=dtype))
    assert engine.backend.describe()["dtype"] == dtype
    told = f"--dtype {dtype} is slow here: the processor has no {dtype} in hardware; float32 is faster"
    assert caplog.messages.count(told) == 1
