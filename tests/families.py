"""Tiny random-weight models of the causal-LM families that the tests run, and a tokenizer of words for them.

What it knows: for each family the smallest configuration in which all its kinds of layers occur (sliding and
full, dense and sparse, KV owner and KV sharer, attention and a state), and how to fill a model with weights whose
greedy output depends on attention: at the library's own initial scale every score is near zero and the mask hardly
matters.

Every window is `WINDOW` tokens, shorter than a usual test prompt. No configuration has an end-of-sequence
token, so `generate` runs to the length asked for. The reference is eager attention, the one implementation
that all families have (soft-capping and attention sinks included).

A test of a model type that the installed transformers lacks is skipped when its row is built.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 128
WINDOW = 8

S, F, L = "sliding_attention", "full_attention", "linear_attention"

_TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    tie_word_embeddings=False,  # a tied head makes greedy output echo its last token
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
_GQA = _TEXT | dict(num_key_value_heads=2)
_MLA = _TEXT | dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=16,
)
_SLIDING: dict[str, Any] = dict(sliding_window=WINDOW, layer_types=[S, F])
_GEMMA = _GQA | _SLIDING | dict(head_dim=16, query_pre_attn_scalar=16)
_PER_LAYER = dict(vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8)
_SHARED_KV = dict(num_hidden_layers=6, layer_types=[S, F, S, F, S, F], num_kv_shared_layers=3)
_ROUTED = dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
_DENSE_THEN_ROUTED = _ROUTED | dict(first_k_dense_replace=1)
_GEMMA4 = dict(global_head_dim=32, hidden_size_per_layer_input=0)
_EXPERTS = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
_LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_SHARED_EXPERT = _EXPERTS | dict(shared_expert_intermediate_size=16)
_DELTA_NET: dict[str, Any] = dict(
    layer_types=[L, F],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=16,
)
_MROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1], partial_rotary_factor=0.5)
_QWEN35: dict[str, Any] = _DELTA_NET | dict(head_dim=16, layer_types=[L, L, F], num_hidden_layers=3)
_KIMI: dict[str, Any] = dict(
    num_hidden_layers=3,
    layer_types=[L, F, L],
    mlp_layer_types=["dense", "sparse", "sparse"],
    moe_intermediate_size=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
)
_MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=8)
_GRANITE4: dict[str, Any] = dict(shared_intermediate_size=16, attention_multiplier=0.25, layer_types=[L, F])
_ZAMBA: dict[str, Any] = dict(
    num_key_value_heads=4,
    num_hidden_layers=4,
    layers_block_type=[L, "hybrid", L, "hybrid"],
    mamba_d_state=8,
    n_mamba_heads=4,
    use_mamba_kernels=False,
)
_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
_VISION: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
_TOP = {name: _TEXT[name] for name in ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")}


def _config(model_type: str, base: dict[str, Any], **changes: Any) -> PreTrainedConfig:
    if model_type not in CONFIG_MAPPING:
        import pytest

        pytest.skip(f"this transformers has no {model_type}")
    config = AutoConfig.for_model(model_type, **base | changes)
    config.eos_token_id = None  # again: glm4's constructor replaces None with its own tokens
    return config


def _gqa(model_type: str, **changes: Any) -> Callable[[], PreTrainedConfig]:
    return partial(_config, model_type, _GQA, **changes)


def _mha(model_type: str, **changes: Any) -> Callable[[], PreTrainedConfig]:
    """For the families whose configuration has no number of key-value heads."""
    return partial(_config, model_type, _TEXT, **changes)


def _mla(model_type: str, **changes: Any) -> Callable[[], PreTrainedConfig]:
    return partial(_config, model_type, _MLA, **changes)


def _gemma(model_type: str, **changes: Any) -> Callable[[], PreTrainedConfig]:
    return partial(_config, model_type, _GEMMA, **changes)


def _gemma3_vlm() -> PreTrainedConfig:
    text = _GEMMA | dict(model_type="gemma3_text")
    tokens = dict(image_token_index=VOCAB - 1, boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3)
    vision = _VISION | dict(model_type="siglip_vision_model")
    return _config("gemma3", _TOP, text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)


def _mistral3_vlm() -> PreTrainedConfig:
    text = _GQA | dict(model_type="mistral", head_dim=16, sliding_window=None)
    vision = _VISION | dict(model_type="pixtral", head_dim=8)
    return _config("mistral3", _TOP, text_config=text, vision_config=vision, image_token_index=VOCAB - 1)


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _gqa("llama"),
    "mistral": _gqa("mistral", sliding_window=WINDOW),
    "ministral": _gqa("ministral", head_dim=8, **_SLIDING),
    "ministral3": _gqa("ministral3", head_dim=8, rope_parameters=_YARN | dict(llama_4_scaling_beta=0.1)),
    "mixtral": _gqa("mixtral", **_LOCAL_EXPERTS),
    "qwen2": _gqa("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen2_moe": _gqa("qwen2_moe", shared_expert_intermediate_size=16, **_EXPERTS),
    "qwen3": _gqa("qwen3", head_dim=16),
    "qwen3_moe": _gqa("qwen3_moe", head_dim=16, **_EXPERTS),
    "phi": _gqa("phi"),
    "phi3": _gqa("phi3", sliding_window=None),
    "phi3_sliding": _gqa("phi3", sliding_window=WINDOW),
    "phimoe": _gqa("phimoe", sliding_window=None, **_LOCAL_EXPERTS),
    "gemma": _gqa("gemma", head_dim=16),
    "gemma2": _gemma("gemma2", attn_logit_softcapping=5.0, final_logit_softcapping=30.0),
    "gemma3_text": _gemma("gemma3_text"),
    "vaultgemma": _gemma("vaultgemma", attn_logit_softcapping=5.0),
    "gemma3n_text": _gemma("gemma3n_text", laurel_rank=8, **_PER_LAYER, **_SHARED_KV),
    "gemma4_text": _gemma("gemma4_text", global_head_dim=32, **_PER_LAYER, **_SHARED_KV),
    "gemma4_k_eq_v": _gemma("gemma4_text", attention_k_eq_v=True, num_global_key_value_heads=1, **_GEMMA4),
    "gemma4_moe": _gemma(
        "gemma4_text",
        enable_moe_block=True,
        moe_intermediate_size=16,
        num_experts=4,
        top_k_experts=2,
        **_GEMMA4,
    ),
    "gpt_oss": _gqa("gpt_oss", head_dim=16, rope_parameters=_YARN, **_SLIDING, **_LOCAL_EXPERTS),
    # Sinks in sliding layers only, values narrower than keys, twice the key-value heads in sliding layers.
    "mimo_v2_flash": _gqa("mimo_v2_flash", head_dim=16, v_head_dim=8, **_SLIDING, **_ROUTED),
    "olmo": _gqa("olmo"),
    "olmo2": _gqa("olmo2", num_hidden_layers=3),
    "olmo3": _gqa("olmo3", num_hidden_layers=4, sliding_window=WINDOW, layer_types=[S, S, S, F]),
    "olmoe": _gqa("olmoe", num_experts=4, num_experts_per_tok=2),
    "flex_olmo": _gqa("flex_olmo", num_experts=4, num_experts_per_tok=2),
    "cohere": _gqa("cohere", logit_scale=1.0),
    "cohere2": _gqa("cohere2", logit_scale=1.0, **_SLIDING),
    "granite": _gqa("granite", attention_multiplier=0.25, residual_multiplier=0.5, logits_scaling=2.0),
    "granitemoe": _gqa("granitemoe", attention_multiplier=0.25, **_LOCAL_EXPERTS),
    "smollm3": _gqa("smollm3", no_rope_layers=[1, 0]),
    "afmoe": _gqa("afmoe", head_dim=8, num_dense_layers=1, num_shared_experts=1, **_SLIDING, **_EXPERTS),
    "gpt2": _mha("gpt2"),
    "gpt_bigcode": _mha("gpt_bigcode"),  # one key-value head
    "gpt_neox": _mha("gpt_neox"),
    "opt": _mha("opt", ffn_dim=64, word_embed_proj_dim=32),
    "biogpt": _mha("biogpt"),
    "starcoder2": _gqa("starcoder2", sliding_window=WINDOW),
    "stablelm": _gqa("stablelm"),
    "persimmon": _mha("persimmon"),
    "helium": _gqa("helium", head_dim=8),
    "arcee": _gqa("arcee"),
    "deepseek_v2": _mla("deepseek_v2", **_DENSE_THEN_ROUTED),
    "deepseek_v3": _mla("deepseek_v3", **_DENSE_THEN_ROUTED),
    "youtu": _mla("youtu"),
    "glm4_moe_lite": _mla("glm4_moe_lite", **_DENSE_THEN_ROUTED),
    "minicpm3": _mla("minicpm3"),
    "exaone4": _gqa("exaone4", **_SLIDING),
    "exaone_moe": _gqa("exaone_moe", **_SLIDING, **_EXPERTS),
    "glm": _gqa("glm", head_dim=8),
    "glm4": _gqa("glm4", head_dim=8),
    "glm4_moe": _gqa("glm4_moe", head_dim=8, use_qk_norm=True, **_DENSE_THEN_ROUTED),
    "dots1": _gqa("dots1", n_shared_experts=1, **_DENSE_THEN_ROUTED),
    "solar_open": _gqa("solar_open", head_dim=8, n_shared_experts=1, **_DENSE_THEN_ROUTED),
    "bitnet": _gqa("bitnet"),
    "nanochat": _gqa("nanochat"),
    "jais2": _gqa("jais2"),
    "nemotron": _gqa("nemotron"),
    "ernie4_5": _gqa("ernie4_5", head_dim=8),
    "ernie4_5_moe": _gqa(
        "ernie4_5_moe", moe_intermediate_size=16, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1
    ),
    "hunyuan_v1_dense": _gqa("hunyuan_v1_dense", head_dim=8),
    "hunyuan_v1_moe": _gqa("hunyuan_v1_moe", head_dim=8, num_experts=4, moe_topk=2),
    "seed_oss": _gqa("seed_oss", head_dim=8),
    "apertus": _gqa("apertus"),
    "cwm": _gqa("cwm", head_dim=8, bos_token_id=1, **_SLIDING),
    "diffllama": _gqa("diffllama"),
    "hy_v3": _gqa("hy_v3", head_dim=8, mlp_layer_types=["dense", "sparse"], **_EXPERTS),
    "hyperclovax": _gqa("hyperclovax", attention_multiplier=0.25),
    "internlm3": _gqa("internlm3", head_dim=8),
    "iquestcoder": _gqa("iquestcoder", head_dim=8),
    "minimax_m2": _gqa("minimax_m2", head_dim=8, **_LOCAL_EXPERTS),
    "granitemoeshared": _gqa("granitemoeshared", shared_intermediate_size=16, **_LOCAL_EXPERTS),
    "granite_swa": _gqa("granite_swa", attention_multiplier=0.25, **_SLIDING),
    "granitemoe_swa": _gqa("granitemoe_swa", shared_intermediate_size=16, **_SLIDING, **_LOCAL_EXPERTS),
    "cohere2_moe": _gqa(
        "cohere2_moe",
        head_dim=8,
        logit_scale=1.0,
        mlp_layer_types=["dense", "sparse"],
        prefix_dense_intermediate_size=64,
        num_shared_experts=1,
        **_SLIDING,
        **_EXPERTS,
    ),
    # Query heads whose number differs by layer, and a gate for each.
    "laguna": _gqa(
        "laguna",
        head_dim=8,
        num_attention_heads_per_layer=[4, 8],
        mlp_layer_types=["dense", "sparse"],
        **_SLIDING,
        **_SHARED_EXPERT,
    ),
    "mellum": _gqa("mellum", head_dim=8, mlp_layer_types=["dense", "sparse"], **_SLIDING, **_EXPERTS),
    "kolibri1": _gqa("kolibri1", head_dim=8, **_SLIDING, **_SHARED_EXPERT),
    "flint": _gqa("flint", head_dim=8, **_SLIDING, **_SHARED_EXPERT),
    "beam": _gqa(
        "beam", head_dim=8, mlp_layer_types=["dense", "sparse"], n_group=1, topk_group=1, **_SLIDING, **_EXPERTS
    ),
    "axk1": _mla("axk1", mlp_layer_types=["dense", "sparse"], **_ROUTED),
    # Two blocks of attention in a layer, and experts that compute nothing.
    "longcat_flash": _mla(
        "longcat_flash",
        num_layers=2,
        head_dim=4,
        ffn_hidden_size=64,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        expert_ffn_hidden_size=16,
    ),
    # A mixture of query heads.
    "jetmoe": _gqa("jetmoe", kv_channels=8, **_LOCAL_EXPERTS),
    "aria_text": _gqa("aria_text", moe_num_experts=4, moe_topk=2),
    "modernbert-decoder": _mha(
        "modernbert-decoder",
        pad_token_id=0,
        bos_token_id=1,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=2 * WINDOW,
        layer_types=[S, F],
    ),
    "ctrl": _mha("ctrl", n_positions=256, dff=64),
    "gemma3_vlm": _gemma3_vlm,
    "mistral3_vlm": _mistral3_vlm,
}
# Layers that keep a state beside layers of attention.
HYBRIDS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_5_text": _gqa("qwen3_5_text", rope_parameters=_MROPE, **_QWEN35),
    "qwen3_5_moe_text": _gqa("qwen3_5_moe_text", rope_parameters=_MROPE, **_QWEN35, **_SHARED_EXPERT),
    "qwen3_next": _gqa("qwen3_next", head_dim=16, **_DELTA_NET, **_SHARED_EXPERT),
    "olmo_hybrid": _gqa("olmo_hybrid", **_DELTA_NET | dict(linear_num_key_heads=4)),
    "kimi_linear": _mla("kimi_linear", linear_head_dim=8, linear_num_heads=4, **_KIMI | dict(q_lora_rank=None)),
    "bailing_hybrid": _mla("bailing_hybrid", head_dim=8, num_mtp_layers=0, kda_lower_bound=-0.5, **_KIMI),
    "granitemoehybrid": _gqa(
        "granitemoehybrid", position_embedding_type="rope", **_GRANITE4, **_MAMBA, **_LOCAL_EXPERTS
    ),
    "granitemoehybrid_nope": _gqa("granitemoehybrid", num_local_experts=0, **_GRANITE4, **_MAMBA),
    "granitemoehybrid_attention": _gqa(
        "granitemoehybrid",
        position_embedding_type="rope",
        num_local_experts=0,
        **_GRANITE4 | _MAMBA | dict(layer_types=[F, F]),
    ),
    "nemotron_h": _gqa(
        "nemotron_h",
        head_dim=8,
        layers_block_type=[L, "moe", F, "mlp", L],
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=8,
        moe_shared_expert_intermediate_size=16,
        **_ROUTED,
    ),
    "falcon_h1": _gqa("falcon_h1", mamba_d_ssm=64, **_MAMBA),
    "bamba": _gqa("bamba", attn_layer_indices=[1], **_MAMBA),
    "zamba2": _mha("zamba2", mamba_ngroups=2, chunk_size=8, num_mem_blocks=2, adapter_rank=8, **_ZAMBA),
    "zamba": _mha("zamba", mamba_dt_rank=4, **_ZAMBA),
    "jamba": _gqa(
        "jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "lfm2": _gqa("lfm2", layer_types=["conv", F], block_auto_adjust_ff_dim=False),
    "lfm2_moe": _gqa("lfm2_moe", num_dense_layers=1, layer_types=["conv", F], **_EXPERTS),
    "lfm3": _gqa("lfm3", head_dim=8, num_hidden_layers=3, layer_types=["conv", F, S], sliding_window=WINDOW),
}
FAMILIES |= HYBRIDS
_WRAPPERS = {"gemma3_vlm", "mistral3_vlm"}
# Weight scales where the usual one makes greedy output tie or repeat itself.
_STD = {"dots1": 0.2, "glm4_moe": 0.2, "phimoe": 0.25}

TURNS = 6


def on_turn(turn: str, always: Collection[str]) -> list[str]:
    """The families that one run of the tests compares with `generate`.

    Args:
        turn: a number, of which the remainder counts: each family has one of `TURNS` turns; or ``all``.
        always: those that have all turns.
    """
    if turn == "all":
        return list(FAMILIES)
    others = [name for name in FAMILIES if name not in always]
    return [*always, *others[int(turn) % TURNS :: TURNS]]


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The family's tiny model on the CPU, float32, in eval mode, its weights drawn from `seed`."""
    auto = AutoModelForImageTextToText if name in _WRAPPERS else AutoModelForCausalLM
    return random_model(auto, FAMILIES[name](), seed, _STD.get(name, 0.35))


def random_model(auto: Any, config: PreTrainedConfig, seed: int = 0, std: float = 0.35) -> PreTrainedModel:
    """A model of transformers' auto class on the CPU, float32, in eval mode.

    Args:
        auto: the class, such as AutoModelForCausalLM.
        config: its sizes.
        seed: its weights are drawn from it.
        std: standard deviation of the weights.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for path, parameter in model.named_parameters():
            if path.endswith("A_log"):  # states that remember a whole test prompt
                parameter.uniform_(-5, -1)
            elif parameter.ndim >= 2:
                parameter.normal_(0, std)
            else:  # norms, biases, sinks: stay near where their own initialisation put them
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def word_tokenizer(vocab: int = VOCAB, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, separated by spaces: token i is the word ``w<i>``."""
    words = models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(ids: Sequence[int]) -> str:
    """The text of these token ids."""
    return " ".join(f"w{i}" for i in ids)
