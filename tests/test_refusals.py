"""A model that bmx would run wrong, or not at all, is refused by name and with a reason, before any row is read."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any, ClassVar

import pytest
import torch
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine, word_tokenizer
from families import tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM

from bmx import Engine, EngineConfig
from bmx.errors import ModelError, PreviewError
from bmx.model.loader import prepare
from bmx.model.preview import preview_spec
from bmx.model.spec import check_config

S, F = "sliding_attention", "full_attention"
IDS = {"vocab_size": 128, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SIZES = IDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def build(model_type, auto=AutoModelForCausalLM, **config):
    """A model of random weights, with its architecture in its config as every saved model has."""
    config = AutoConfig.for_model(model_type, **config)
    config.eos_token_id = None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.35)
    model.config.architectures = [type(model).__name__]
    return model.eval()


def assert_refused(model, name, reason):
    with pytest.raises(ModelError, match=reason) as caught:
        prepare(model)
    assert name in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


NO_HOOK = {
    "FalconForCausalLM": dict(model_type="falcon", **SIZES),
    "GPTJForCausalLM": dict(model_type="gptj", **IDS, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "BloomForCausalLM": dict(model_type="bloom", **IDS, hidden_size=32, n_layer=2, n_head=4),
    "GPTNeoForCausalLM": dict(
        model_type="gpt_neo",
        **IDS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
    ),
    "MptForCausalLM": dict(model_type="mpt", **IDS, d_model=32, n_heads=4, n_layers=2),
    "CodeGenForCausalLM": dict(model_type="codegen", **IDS, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "RwkvForCausalLM": dict(model_type="rwkv", **IDS, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
}


@pytest.mark.parametrize("name", NO_HOOK)
def test_a_model_whose_layers_compute_attention_themselves(name):
    assert_refused(build(**NO_HOOK[name]), name, "do not call transformers' attention function")


OWN_STATE = {
    "MambaForCausalLM": dict(model_type="mamba", **IDS, hidden_size=32, num_hidden_layers=2, state_size=4),
    "RecurrentGemmaForCausalLM": dict(model_type="recurrent_gemma", **TEXT, lru_width=32),
    "MiniMaxForCausalLM": dict(model_type="minimax", **TEXT, **LOCAL_EXPERTS, layer_types=["linear_attention", F]),
}


@pytest.mark.parametrize("name", OWN_STATE)
def test_a_model_that_keeps_a_state_as_no_other_does_or_has_no_attention(name):
    assert_refused(
        build(**OWN_STATE[name]), name, "state in a way of its own|tokens would mix|none of its layers is attention"
    )


def test_chunked_attention():
    model = build("llama4_text", **TEXT, **LOCAL_EXPERTS, intermediate_size_mlp=64)
    assert_refused(model, "Llama4ForCausalLM", "outside the attention function")


def test_an_encoder_decoder_model():
    model = build("t5", AutoModelForSeq2SeqLM, **IDS, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
    assert_refused(model, "T5ForConditionalGeneration", "encoder-decoder")


def test_a_model_that_masks_its_attention_itself():
    assert_refused(build("doge", **TEXT), "DogeForCausalLM", "mask or bias of its own")


BIDIRECTIONAL = {
    "BertLMHeadModel": dict(model_type="bert", **SIZES),
    "RobertaForCausalLM": dict(model_type="roberta", **SIZES | {"pad_token_id": 1}),
    "ElectraForCausalLM": dict(model_type="electra", **SIZES),
    "Gemma3ForCausalLM": dict(
        model_type="gemma3_text", **TEXT, layer_types=[S, F], sliding_window=8, use_bidirectional_attention=True
    ),
}


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_model_that_sees_what_comes_after(name):
    """Such a model has no cache to keep: each new token changes all keys before it."""
    assert_refused(build(**BIDIRECTIONAL[name]), name, "causal|after|both directions|bidirectional")


PECULIAR = {
    "sliding window kept from the attention function (qwen2_moe)": dict(
        model_type="qwen2_moe",
        **TEXT,
        **EXPERTS,
        shared_expert_intermediate_size=16,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=[S, F],
    ),
    "sliding window kept from the attention function (phimoe)": dict(
        model_type="phimoe", **TEXT, **LOCAL_EXPERTS, sliding_window=8
    ),
    "the same keys with other values (diffllama)": dict(model_type="diffllama", **TEXT),
    "layers without positions": dict(model_type="smollm3", **TEXT, no_rope_layers=[0, 1]),
    "scores divided by the layer's number": dict(
        model_type="gpt2", **IDS, n_embd=32, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True
    ),
    "a decoder of an encoder's kind": dict(model_type="bert", **SIZES, is_decoder=True),
}


@pytest.mark.parametrize("config", PECULIAR.values(), ids=PECULIAR)
def test_a_peculiar_model_is_refused_or_answers_as_generate_does(config):
    model = build(**config)
    prompts = random_prompts((5, 30, 17))
    expected = reference_answers(model, prompts, 8)
    try:
        engine = tiny_engine(model, kv_policy="none", chunk_size=7, max_num_batched_tokens=20)
    except ModelError:
        return
    assert answers(engine, as_requests(prompts, max_tokens=8)) == expected


def test_a_hybrid_family_is_served_where_all_its_layers_are_attention():
    """Granite 4.0 Micro and 1B are such: their config has room for Mamba layers, and they have none."""
    sizes = TEXT | MAMBA | {"num_local_experts": 0, "shared_intermediate_size": 16}
    model = build("granitemoehybrid", **sizes, layer_types=["attention", "attention"], position_embedding_type="rope")
    prompts = random_prompts((5, 30, 17))
    engine = tiny_engine(model, kv_policy="none", chunk_size=7)
    assert answers(engine, as_requests(prompts, max_tokens=8)) == reference_answers(model, prompts, 8)


VALUES_DECIDE = {
    "granitemoehybrid": TEXT | MAMBA | {"num_local_experts": 0, "shared_intermediate_size": 16, "layer_types": [F, F]},
    "jetmoe": TEXT | LOCAL_EXPERTS | {"num_key_value_heads": 4, "kv_channels": 8},
}


@pytest.mark.parametrize("model_type", VALUES_DECIDE)
def test_a_model_whose_memory_cannot_be_foretold_is_loaded_all_the_same(model_type, tmp_path, monkeypatch):
    """On tensors without contents JetMoE fails, which sorts its tokens by their values; Granite does not."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = build(model_type, **VALUES_DECIDE[model_type])
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    config = EngineConfig(model=str(tmp_path), dtype="float32", device="cpu")
    if model_type == "jetmoe":
        with pytest.raises(PreviewError, match="its code reads the values of tensors"):
            preview_spec(config, "cpu")
    else:
        assert len(preview_spec(config, "cpu").layers) == 2
    found = answers(Engine.open(config), as_requests([[5, 6, 7]], max_tokens=4))
    assert found == reference_answers(model, [[5, 6, 7]], 4)


def test_a_config_that_knows_no_end_token_is_no_reason_to_fail():
    model = build(
        "roc_bert", **SIZES, is_decoder=True, intermediate_size=64, shape_vocab_size=8, pronunciation_vocab_size=8
    )
    del model.config.eos_token_id
    model.generation_config = None
    assert prepare(model).end_token_ids == frozenset()


# ---- models of nobody's ----


class Mixing(nn.Module):
    """Embeddings in which each token's neighbours take part."""

    def __init__(self, embedding, mix, strength):
        super().__init__()
        self.embedding, self.mix, self.strength = embedding, mix, strength

    def forward(self, input_ids):
        own = self.embedding(input_ids)
        return own + self.strength * self.mix(own)


class OwnLlama(LlamaForCausalLM):
    """A Llama to change: the tiny one's weights under another name."""

    @classmethod
    def tiny(cls):
        original = tiny_model("llama")
        model = cls(original.config)
        model.load_state_dict(original.state_dict())
        return model.eval()

    @classmethod
    def mixing(cls, mix, strength):
        model = cls.tiny()
        model.model.embed_tokens = Mixing(model.model.embed_tokens, mix, strength)
        return model


MIXES = {
    "causal convolution": lambda x: nn.functional.pad(x, (0, 0, 1, 0))[:, :-1],
    "looking ahead": lambda x: nn.functional.pad(x, (0, 0, 0, 1))[:, 1:],
    "running mean": lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(1, -1, 1),
}


@pytest.mark.parametrize("strength", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_model_that_mixes_neighbouring_tokens_outside_its_attention(mix, strength):
    assert_refused(OwnLlama.mixing(mix, strength), "OwnLlama", "mix outside its attention")


def test_nothing_mixed_in_is_a_model_like_any_other():
    assert len(prepare(OwnLlama.mixing(torch.zeros_like, 1.0)).spec.layers) == 2


class CausalMean(nn.Module):
    """A layer's attention that asks nobody: a plain causal mean of the values."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, hidden_states, **_):
        values = self.values(hidden_states).repeat(1, 1, 2)
        return values.cumsum(1) / torch.arange(1, values.shape[1] + 1).view(1, -1, 1), None


def test_a_model_with_one_layer_of_its_own_attention():
    model = OwnLlama.tiny()
    layer = model.model.layers[1]
    layer.self_attn = CausalMean(layer.self_attn.v_proj)
    assert_refused(model, "OwnLlama", "mix outside its attention")


class CountingLlama(OwnLlama):
    """A Llama that numbers its tokens itself, whatever positions it is given."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        return super().forward(input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)


def test_a_model_whose_rotary_embedding_takes_no_positions():
    assert_refused(CountingLlama.tiny(), "CountingLlama", "position")


def test_a_model_whose_learned_positions_are_counted():
    def count(x):
        return torch.arange(x.shape[1], dtype=torch.float32).view(1, -1, 1).expand_as(x)

    assert_refused(OwnLlama.mixing(count, 1.0), "OwnLlama", "position|mix outside its attention")


class FailingLlama(OwnLlama):
    """A Llama that fails when it is run."""

    error: Exception

    def forward(self, *_, **__):
        raise self.error


class AskingLlama(OwnLlama):
    """A Llama that asks its attention for more than queries, keys and values."""

    keywords: ClassVar[dict[str, Any]] = {}

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs, **self.keywords)


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("indices", torch.zeros(1, 3, 1, dtype=torch.long), "an indexer of its own selects the keys"),
        ("block_indices", torch.zeros(1, 3, 1, dtype=torch.long), "an indexer of its own selects the keys"),
        ("position_bias", torch.zeros(1, 4, 3, 3), "bias of its own"),
        ("sinks", torch.zeros(4), r"something that bmx does not know \(sinks\)"),
        ("is_causal", False, "not causal"),
    ],
)
def test_a_model_that_asks_its_attention_for_what_bmx_does_not_do(keyword, value, reason):
    model = AskingLlama.tiny()
    model.keywords = {keyword: value}
    assert_refused(model, "AskingLlama", reason)


def test_keywords_that_ask_for_nothing_change_nothing():
    model = AskingLlama.tiny()
    model.keywords = {"indices": None, "sinks": None, "deterministic": True, "output_router_logits": False}
    assert len(prepare(model).spec.layers) == 2


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text", "deepseek_v4"])
def test_sparse_attention_is_no_state_of_its_own(model_type):
    config = AutoConfig.for_model(model_type)
    if model_type == "minimax_m3_vl_text":
        config.layer_types = ["minimax_m3_sparse"] * config.num_hidden_layers
    with pytest.raises(ModelError, match="sparse: an indexer of its own selects the keys"):
        check_config(config)


@pytest.mark.parametrize(
    "error", [RuntimeError("no\nluck"), TypeError("x"), KeyError("x"), AssertionError("x")], ids=repr
)
def test_a_model_that_fails_on_packed_tokens(error):
    model = FailingLlama.tiny()
    model.error = error
    assert_refused(model, "FailingLlama", "fails on packed tokens")


def test_a_refused_model_is_left_as_it_was():
    model = OwnLlama.mixing(MIXES["causal convolution"], 1.0)
    ids = torch.tensor([[1, 2, 3, 4]])
    before = model(ids).logits
    with pytest.raises(ModelError):
        prepare(model)
    assert torch.equal(model(ids).logits, before)


# ---- folders and files ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a good tiny model."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A copy of it to break."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # leaves the threads of the test process alone
    return shutil.copytree(saved, tmp_path / "broken-model")


def open_engine(model):
    return Engine.open(EngineConfig(model=str(model), dtype="float32", device="cpu"))


def assert_not_opened(model, reason=None, name="broken-model"):
    with pytest.raises(ModelError, match=reason) as caught:
        open_engine(model)
    assert name in caught.value.message
    assert "\n" not in caught.value.message


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_good_folder_is_opened(folder):
    found = answers(open_engine(folder), as_requests([[5, 6, 7]], max_tokens=4))
    assert found == reference_answers(tiny_model("llama"), [[5, 6, 7]], 4)


FROM_CONFIG = {
    "T5ForConditionalGeneration": {"model_type": "t5", "is_encoder_decoder": True},
    "Llama4ForCausalLM": {"model_type": "llama4_text"},
}


@pytest.mark.parametrize("name", FROM_CONFIG)
def test_what_the_config_shows_is_refused_before_weights_are_read(folder, name):
    (folder / "model.safetensors").unlink()
    edit(folder, architectures=[name], **FROM_CONFIG[name])
    assert_not_opened(folder, "bmx cannot run", name)


def test_a_config_object_is_enough_to_refuse():
    with pytest.raises(ModelError, match="encoder-decoder"):
        check_config(AutoConfig.for_model("t5"))


CONFIGS = {
    "no model type": {"model_type": None},
    "unknown model type": {"model_type": "nobodys"},
    "code of its own": {"model_type": "mine", "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}},
    "a number that is a word": {"hidden_size": "big"},
    "heads that do not divide": {"num_attention_heads": 3},
    "no heads": {"num_attention_heads": 0},
    "layer types that are no list": {"layer_types": 5},
    "unknown dtype": {"dtype": "float7"},
    "unknown activation": {"hidden_act": "none such"},
    "another width than the weights": {"hidden_size": 64},
    "packed weights without their library": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_is_wrong(folder, changes):
    edit(folder, **changes)
    assert_not_opened(folder)


@pytest.mark.parametrize("text", ["", "{half", "[1]", "null"])
def test_a_config_that_is_no_config(folder, text):
    (folder / "config.json").write_text(text)
    assert_not_opened(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -1000])
def test_a_weights_file_that_is_cut_short(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert_not_opened(folder)


def test_weights_that_are_missing(folder):
    (folder / "model.safetensors").unlink()
    assert_not_opened(folder, "safetensors")


def test_weights_as_pickle_alone(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    assert_not_opened(folder, "pickled")


def test_a_shard_that_is_missing(folder):
    (folder / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(folder, max_shard_size="40KB")
    next(iter(sorted(folder.glob("*-of-*.safetensors")))).unlink()
    assert_not_opened(folder)


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_checkpoint_in_which_a_tensor_is_missing(folder):
    """transformers would fill it with random numbers and answer."""
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    assert_not_opened(folder, "missing|q_proj")


def test_a_checkpoint_with_fewer_layers_than_its_config(folder):
    edit(folder, num_hidden_layers=3)
    assert_not_opened(folder, "num_hidden_layers = 3, and the weights have 2")


def test_a_checkpoint_in_which_a_tensor_has_another_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))
    assert_not_opened(folder, r"model.norm.weight is \[5\], and its config.json asks for \[32\]")


@pytest.mark.parametrize("text", [None, "", "{}", "[1]"])
def test_a_tokenizer_that_is_missing_or_broken(folder, text):
    path = folder / "tokenizer.json"
    path.unlink() if text is None else path.write_text(text)
    assert_not_opened(folder)


@pytest.mark.parametrize("name", ["nobody/nothing", "./nowhere", "/no/where", "nowhere.gguf", "a b c?"])
def test_a_model_that_is_nowhere(folder, name):
    assert_not_opened(name, name=name)


def test_a_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    assert_not_opened(folder, "config.json")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(60), b"no such thing" * 10], ids=len)
def test_a_gguf_file_that_is_broken(folder, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "tiny.gguf").write_bytes(content)
    assert_not_opened(folder / "tiny.gguf", name="tiny.gguf")
    assert not list((folder / "cache").rglob("config.json"))


def test_a_gpu_where_there_is_none(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="no CUDA GPU"):
        Engine.open(EngineConfig(model=str(folder), device="cuda"))


def test_a_model_of_broken_numbers_is_refused_for_what_it_is(folder):
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(math.nan))
    assert_not_opened(folder, "NaN", "LlamaForCausalLM")
