"""GGUF files: what they say is what the model computes, or the file is refused by name."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from gguf_files import CHATML, END, MESSAGE_END, START, TURN_END, model_that_says, random_model, write_gguf
from transformers import AutoModelForCausalLM

from bmx import Engine, EngineConfig
from bmx.errors import ModelError
from bmx.model.file_hash import model_files
from bmx.model.gguf_cache import unpacked_folder
from bmx.model.gguf_file import find_parts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def logits(model, tokens=400):
    ids = torch.randint(0, 250, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(ids).logits


def unpacked(file):
    return AutoModelForCausalLM.from_pretrained(unpacked_folder(find_parts(file, file.name)), dtype=torch.float32)


def llama3(rotated, theta, factor, low=1.0, high=4.0, original=8192):
    """The factors that a converter writes for Llama 3's rule."""
    turns = original * theta ** (-torch.arange(0, rotated, 2) / rotated) / (2 * torch.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).tolist()


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
YARN_KEYS = {".rope.scaling.type": "yarn", ".rope.scaling.factor": 8.0, ".rope.scaling.original_context_length": 64}
SHORT, LONG = [1.0, 1.5, 2.0, 2.0, 2.5, 3.0, 4.0, 4.0], [1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED = {
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        {".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0},
        {},
    ),
    "old linear": ({"rope_type": "linear", "factor": 4.0}, {".rope.scale_linear": 4.0}, {}),
    "yarn": (YARN, YARN_KEYS, {}),
    "yarn, its betas": (
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
        YARN_KEYS | {".rope.scaling.yarn_beta_fast": 16.0, ".rope.scaling.yarn_beta_slow": 2.0},
        {},
    ),
    "Llama 3.1": (
        LLAMA3 | {"original_max_position_embeddings": 8192},
        {},
        {"rope_freqs.weight": llama3(16, 500000.0, 8.0)},
    ),
    "Llama 3's rule with other numbers": (
        LLAMA3 | {"original_max_position_embeddings": 128, "factor": 5.0},
        {},
        {"rope_freqs.weight": llama3(16, 500000.0, 5.0, original=128)},
    ),
    "unscaled": ({"rope_type": "default"}, {".rope.scaling.type": "none", ".rope.scaling.factor": 0.0}, {}),
}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("name", SCALED)
def test_c1_a_scaled_rotary_embedding_is_that_of_the_same_model_in_a_folder(tmp_path, name, model_type):
    rope, keys, extra = SCALED[name]
    model = random_model(model_type, head_dim=16, rope_parameters=rope | {"rope_theta": 500000.0})
    plain = random_model(model_type, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    write_gguf(tmp_path / "tiny.gguf", model, keys=keys | {".attention.key_length": 16}, extra=extra)
    expected = logits(model)
    assert torch.allclose(logits(unpacked(tmp_path / "tiny.gguf")), expected, atol=2e-3, rtol=0)
    assert name == "unscaled" or not torch.allclose(logits(plain), expected, atol=2e-1, rtol=0)


def test_c1_longrope_on_a_part_of_each_head_is_that_of_the_folder(tmp_path):
    """As in Phi 4 mini: both lists of factors, three quarters of a head, a window."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "factor": 4.0}
    rope |= {"short_factor": SHORT[:6], "long_factor": LONG[:6], "original_max_position_embeddings": 128}
    model = random_model(
        "phi3", rope_parameters=rope, original_max_position_embeddings=128, sliding_window=300, hidden_size=32
    )
    keys = {".rope.dimension_count": 12, ".rope.scaling.original_context_length": 128}
    keys |= {".rope.scaling.attn_factor": (1 + math.log(4) / math.log(128)) ** 0.5, ".attention.sliding_window": 300}
    extra = {"rope_factors_short.weight": SHORT[:6], "rope_factors_long.weight": LONG[:6]}
    write_gguf(tmp_path / "tiny.gguf", model, keys=keys, extra=extra)
    found = unpacked(tmp_path / "tiny.gguf")
    for tokens in (60, 400):
        assert torch.allclose(logits(found, tokens), logits(model, tokens), atol=1e-3, rtol=0)


def test_c1_layers_with_a_window_keep_their_own_rotary_embedding(tmp_path):
    """As in Gemma 3: only the layers that see everything are stretched; scores are scaled by the size of a head."""
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
    model = random_model(
        "gemma3_text",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=32,
        tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )
    keys = {".rope.scaling.type": "linear", ".rope.scaling.factor": 8.0, ".attention.sliding_window": 32}
    keys |= {".attention.key_length": 16, ".attention.value_length": 16, ".attention.sliding_window_pattern": 2}
    write_gguf(tmp_path / "tiny.gguf", model, keys=keys)
    assert torch.allclose(logits(unpacked(tmp_path / "tiny.gguf")), logits(model), atol=1e-3, rtol=0)


def test_c1_bmx_answers_long_prompts_as_from_the_folder(tmp_path):
    model = random_model(rope_parameters=YARN | {"rope_theta": 10000.0})
    write_gguf(tmp_path / "tiny.gguf", model, keys=YARN_KEYS, template=None)
    folder = unpacked_folder([tmp_path / "tiny.gguf"])
    model.save_pretrained(tmp_path / "folder")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "folder")
    texts = ["the heat " * 20, "he " * 90]
    found = []
    for source in (tmp_path / "tiny.gguf", tmp_path / "folder"):
        config = EngineConfig(model=str(source), dtype="float32", device="cpu", kv_policy="none")
        with Engine.open(config) as engine:
            found.append([(r.token_ids, r.usage) for r in engine.generate(texts, max_tokens=5)])
    assert found[0] == found[1]


REFUSED = {
    "attention.scale = 0.5": {".attention.scale": 0.5},
    "logit_scale = 8": {".logit_scale": 8.0},
    "residual_scale": {".residual_scale": 0.22},
    "embedding_scale = 12": {".embedding_scale": 12.0},
    "final_logit_softcapping = 30": {".final_logit_softcapping": 30.0},
    "expert_count = 8": {".expert_count": 8},
    "attention.sliding_window = 64": {".attention.sliding_window": 64},
    "max_alibi_bias": {".attention.max_alibi_bias": 8.0},
    "rotates 8 of the 16 dimensions": {".rope.dimension_count": 8, ".attention.key_length": 16},
    "dimension_sections": {".rope.dimension_sections": [4, 2, 2, 0]},
    "yarn_ext_factor = 0.5": YARN_KEYS | {".rope.scaling.yarn_ext_factor": 0.5},
    "attn_factor = 0.7": YARN_KEYS | {".rope.scaling.attn_factor": 0.7},
    "yarn_log_multiplier": YARN_KEYS | {".rope.scaling.yarn_log_multiplier": 0.1},
    "rope.scaling.type = longrope": {".rope.scaling.type": "longrope", ".rope.scaling.factor": 4.0},
    "attention.telepathy = 3": {".attention.telepathy": 3},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_c1_what_transformers_would_drop_refuses_the_file(tmp_path, reason):
    write_gguf(tmp_path / "tiny.gguf", random_model(), keys=REFUSED[reason])
    with pytest.raises(ModelError, match=rf"tiny\.gguf faithfully: .*{reason}"):
        unpacked_folder([tmp_path / "tiny.gguf"])
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_c1_an_architecture_that_transformers_cannot_read_is_named(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", random_model(), keys={"general.architecture": "telepath"})
    with pytest.raises(ModelError, match=r"tiny\.gguf .*telepath"):
        unpacked_folder([tmp_path / "tiny.gguf"])


def test_c1_an_architecture_that_bmx_cannot_run_is_refused_before_it_is_unpacked(tmp_path):
    [file] = write_gguf(tmp_path / "tiny.gguf", random_model(), architecture="t5")
    with pytest.raises(ModelError, match="bmx cannot run T5Config: it is an encoder-decoder model"):
        unpacked(file)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_c1_tensors_that_the_model_has_no_place_for_refuse_the_file(tmp_path):
    extra = {f"blk.{i}.attn_q.bias": [1.0] * 32 for i in range(2)}
    write_gguf(tmp_path / "tiny.gguf", random_model(), extra=extra)
    with pytest.raises(ModelError, match="numbers"):
        unpacked_folder([tmp_path / "tiny.gguf"])


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_c1_a_gguf_file_that_is_no_model_is_named_so(tmp_path, kind):
    write_gguf(tmp_path / "tiny.gguf", random_model(), keys={"general.type": kind})
    with pytest.raises(ModelError, match=f"not a model: it says that it is of the type {kind}"):
        unpacked_folder([tmp_path / "tiny.gguf"])


# ---- the end of an answer ----


def ends(source):
    """Finish reasons of two answers."""
    config = EngineConfig(model=str(source), dtype="float32", device="cpu", kv_policy="none")
    with Engine.open(config) as engine:
        return {result.finish_reason for result in engine.generate(["he", "heat"], max_tokens=3)}


@pytest.mark.parametrize(
    ("token", "keys", "template"),
    [
        (END, {}, None),
        (TURN_END, {"tokenizer.ggml.eot_token_id": TURN_END}, None),
        (MESSAGE_END, {"tokenizer.ggml.eom_token_id": MESSAGE_END}, None),
        (TURN_END, {}, CHATML),
        (END, {"tokenizer.ggml.eot_token_id": TURN_END}, CHATML),
    ],
)
def test_c2_each_token_that_ends_a_text_a_turn_or_a_message_ends_the_answer(tmp_path, token, keys, template):
    write_gguf(tmp_path / "tiny.gguf", model_that_says(token), keys=keys, template=template)
    assert ends(tmp_path / "tiny.gguf") == {"stop"}


def test_c2_a_token_that_begins_a_turn_ends_nothing(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", model_that_says(START))
    assert ends(tmp_path / "tiny.gguf") == {"length"}


# ---- split files ----


@pytest.mark.parametrize("given", [1, 2, 3])
def test_c3_any_part_of_a_split_model_stands_for_all(tmp_path, given):
    model = random_model()
    files = write_gguf(tmp_path / "tiny", model, parts=3)
    found = unpacked(files[given - 1])
    assert torch.equal(logits(found), logits(model))
    [folder] = (tmp_path / "cache").rglob("config.json")
    assert not list(folder.parent.glob("*.gguf"))


def test_c3_a_split_model_is_known_by_all_of_its_parts(tmp_path):
    files = write_gguf(tmp_path / "tiny", random_model(), parts=2)
    before = {model_files(str(file)) for file in files}
    write_gguf(tmp_path / "tiny", model_that_says(END), parts=2)
    assert len(before | {model_files(str(file)) for file in files}) == 2


def test_c3_missing_parts_are_named(tmp_path):
    files = write_gguf(tmp_path / "tiny", random_model(), parts=3)
    files[0].unlink()
    with pytest.raises(ModelError, match=r"1 of 3 parts are missing \(tiny-00001-of-00003.gguf\)") as refused:
        find_parts(files[1], "tiny-00002-of-00003.gguf")
    assert str(tmp_path) in refused.value.hint


def test_c3_a_part_under_another_name_is_refused_with_the_command_that_merges(tmp_path):
    [first, *_] = write_gguf(tmp_path / "tiny", random_model(), parts=2)
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="one of 2 parts") as refused:
        unpacked_folder([renamed])
    assert "llama-gguf-split --merge" in refused.value.hint
