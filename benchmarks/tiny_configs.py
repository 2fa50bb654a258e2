"""A tiny configuration of any model type of transformers: the type's own defaults with every size made small.

Sizes are recognised by their names, kinds of layers all occur in the first few layers, and no token ends an answer.
Types whose sizes depend on each other have lines of their own. For what the tests run, `tests/families.py` says each
configuration by hand: it is smaller and reaches more.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCAB, LAYERS, HIDDEN, HEADS, HEAD_DIM = 128, 4, 32, 4, 8
Keys = dict[str, Any]

# The first pattern that is found in a name gives its size.
SIZES = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (r"vocab_size", VOCAB),
        (r"image_size|^input_size", 16),
        (r"^patch_size|^window_size|sliding_window|attention_window|attention_chunk|local_attention", 8),
        (r"max_position|n_positions|n_ctx|max_seq_len|model_max_length|context_length|max_target", 256),
        (r"layers$|^n_layers?$|^depth$|^num_blocks$|^num_layer$", LAYERS),
        (r"(key_value|kv|k_v|query_group|linear_num_key)_(heads|num)|num_kv_heads|swa_num_key", 2),
        (r"heads$|^n_heads?$|_num_heads$", HEADS),
        (r"qk_rope_head_dim|rotary_dim|dt_rank", 4),
        (r"head_dim|dim_head|kv_channels|^d_kv$|v_head_dim", HEAD_DIM),
        (r"lora_rank|adapter_rank|state_size|d_state|_rank$|chunk_size", 8),
        (r"(num|n)_(local_|routed_)?experts$|moe_num_experts|num_experts$", 4),
        (r"shared_experts$|first_k_dense|dense_layers$|n_group$|_group$|n_groups$|ngroups$", 1),
        (r"per_tok|moe_k$|top_?k", 2),
        (r"expert.*(intermediate|hidden)_size|moe.*intermediate_size|shared.*intermediate_size", 16),
        (r"intermediate_size|ffn|^d_ff$|^dff$|^dim_ff$|n_inner|feed_forward|^mlp_dim$|^d_inner$", 64),
        (r"hidden_size|hidden_dim|n_embd|^d_model$|^dim$|embed(ding)?_(dim|size)|emb_dim|proj.*_dim|lru_width", HIDDEN),
    )
)
NO_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")
BASE = {field.name for field in dataclasses.fields(PreTrainedConfig)}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The type's tiny configuration; raises whatever its class raises if the sizes do not go together."""
    special = dict(SPECIAL.get(model_type, {}))
    config = _built(CONFIG_MAPPING[model_type], special)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if getattr(part, "eos_token_id", None) is not None:
            part.eos_token_id = None
    return config


def _built(cls: type[PreTrainedConfig], special: Keys) -> PreTrainedConfig:
    """A configuration of this class; ``special`` keys win, and those of ``text`` are for the language model in it."""
    text = special.pop("text", {})
    keys = _small(cls, text) | special
    while True:
        try:
            return cls(**keys)
        except Exception as error:
            name = re.search(r"field '(\w+)'", str(error))  # of a type that takes no None
            if name is None or keys.get(name[1], 0) is not None:
                raise
            keys[name[1]] = 0


def _small(cls: type[PreTrainedConfig], text: Keys) -> Keys:
    try:
        default = cls()
    except Exception:
        default = None
    keys: Keys = {}
    for field in dataclasses.fields(cls):
        name, given = field.name, field.default
        if name in cls.sub_configs:
            part = getattr(default, name, None)
            if isinstance(part, PreTrainedConfig):
                keys[name] = _built(type(part), dict(text) if _is_text(name) else {})
        elif name in NO_TOKENS:
            keys[name] = None
        elif name == "tie_word_embeddings":
            keys[name] = False
        elif name.endswith(("token_id", "token_index")) and isinstance(given, int):
            keys[name] = VOCAB - 1 - len(keys) % 8
        elif name in BASE:
            continue
        elif name.endswith(("layer_types", "block_type")) and isinstance(getattr(default, name, None), list):
            keys[name] = _layers(getattr(default, name))
        elif (size := _size(name)) is not None and isinstance(given, int) and not isinstance(given, bool):
            keys[name] = min(size, given) if given > 0 else given
    if "kv_lora_rank" in keys:  # latent attention: as many key heads as query heads, `head_dim` is the rotated part
        keys |= {"num_key_value_heads": HEADS} | ({"head_dim": 4} if "head_dim" in keys else {})
    if "mrope_section" in (getattr(default, "rope_parameters", None) or ()):
        keys["rope_parameters"] = dict(_MROPE)
    return keys


def _is_text(name: str) -> bool:
    return "vision" not in name and re.search("text|llm|language|decoder|thinker", name) is not None


def _size(name: str) -> int | None:
    return next((size for pattern, size in SIZES if pattern.search(name)), None)


def _layers(kinds: list[str]) -> list[str]:
    """Every kind of layer in the order of its first, again and again."""
    distinct = list(dict.fromkeys(kinds))
    return [distinct[i % len(distinct)] for i in range(max(LAYERS, len(distinct)))]


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPES = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_MROPE_TEXT = {"text": {"rope_parameters": _MROPE}}
_PAD = {"text": {"pad_token_id": 0}}
SPECIAL: dict[str, Keys] = {
    "bailing_hybrid": {"num_mtp_layers": 0},
    "cohere_compass": {"text": _ROPES},
    "cohere_compass_text": _ROPES,
    "emu3": {"text": {"pad_token_id": 0, "bos_token_id": 1}},
    "gemma4": _PAD,
    "gemma4_unified": _PAD,
    "diffusion_gemma": _PAD,
    "glm4v": _MROPE_TEXT,
    "glm46v": _MROPE_TEXT,
    "glm_ocr": _MROPE_TEXT,
    "glmga": _MROPE_TEXT,
    "glm4v_moe": {"text": {"rope_parameters": _MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "longcat_flash": {"num_layers": 2, "qk_head_dim": None},
    "mamba2": {"head_dim": 16},
    "moshi": {"sliding_window": 256},  # as many as positions, as published: only `generate`'s cache heeds the window
    "paddleocr_vl": _MROPE_TEXT,
    "qwen2_vl": _MROPE_TEXT,
    "qwen2_5_omni_thinker": _MROPE_TEXT | {"vision_start_token_id": 120},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
    "step3p7": {"text": {"sliding_window": 8}},
    "qwen2_5_vl": _MROPE_TEXT,
    "reformer": {"is_decoder": True},
}
SPECIAL |= {  # decoders only if their configuration says so
    name: {"is_decoder": True, "pad_token_id": 1}
    for name in (
        "bert",
        "bert-generation",
        "roberta",
        "electra",
        "camembert",
        "data2vec-text",
        "ernie",
        "megatron-bert",
        "rembert",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
        "big_bird",
    )
}
