"""The config of a GGUF file's model: what transformers reads of it, and what it leaves out.

transformers knows the sizes of a model. It drops scaled rotary embeddings, end tokens and more without a word, and the
model would compute something else. Here each key of the file is read, is known to change nothing, or refuses the file.
"""

from __future__ import annotations

import math
from typing import Any

from bmx.model.gguf_file import GgufFile
from bmx.model.gguf_rope import head_dim, rope_parameters

# Keys that transformers reads, or that the shapes of the tensors prove
SIZES = (
    *("vocab_size", "embedding_length", "block_count", "feed_forward_length", "tensor_data_layout"),
    *("attention.head_count", "attention.head_count_kv"),
)
# Keys that are read here, with the attributes of a config that may hold the value: the first that the config has
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
}
NOTHING: tuple[Any, ...] = (0, "", "none", [])  # values that ask for nothing, for every key; False is 0
# Further values that ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (1,),
    "expert_group_used_count": (1,),
    "expert_weights_scale": (1.0,),
    "embedding_scale": (1.0,),
    "logit_scale": (1.0,),
    "residual_scale": (1.0,),
    "moe_every_n_layers": (1,),
}
ALL_ATTENTION = ("mistral", "phi3", "starcoder2")  # these have a window only if the file says so
LARGEST = {"gemma2": 46, "gemma3_text": 62}  # layers of the 27B models, whose scores are scaled by the model's width


def complete_config(file: GgufFile, config: Any) -> None:
    """Set in a config that transformers read what it left out.

    Args:
        file: the file.
        config: the config that transformers read from it.

    Raises:
        ModelError: the file asks for something that the model's code in transformers cannot do.
    """
    keys = dict(file.keys())
    config.eos_token_id = file.end_token_ids or None
    config.bos_token_id = file.metadata.get("tokenizer.ggml.bos_token_id")
    config.pad_token_id = None
    config.tie_word_embeddings = "output.weight" not in file.sizes
    if config.model_type in ALL_ATTENTION and "attention.sliding_window" not in keys:
        config.sliding_window = None
    for key, value in keys.items():
        if key not in SIZES and not key.startswith(("rope.", "ssm.", "shortconv.")):
            _set(file, config, key, value)
    if config.model_type in LARGEST:
        largest = config.num_hidden_layers == LARGEST[config.model_type]
        width = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = width if largest else config.head_dim
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = rope_parameters(file, config, keys)


def _set(file: GgufFile, config: Any, key: str, value: Any) -> None:
    """Set what one key says.

    Raises:
        ModelError: it asks for something that the config cannot say.
    """
    names = [name for name in ATTRIBUTES.get(key, ()) if hasattr(config, name)]
    if names:
        asks = value if value not in NOTHING else None
        if names[0] == "intermediate_size" and asks not in (None, config.intermediate_size):
            raise file.refusal(f"{key} = {value} is not its feed_forward_length")
        if asks is not None or key == "attention.sliding_window":
            setattr(config, names[0], float(f"{asks:.7g}") if isinstance(asks, float) else asks)  # of 32 bits
    elif key == "attention.sliding_window_pattern" and getattr(config, "layer_types", None):
        config.layer_types = _layer_types(value, config.num_hidden_layers)
    elif value not in NOTHING and not _changes_nothing(config, key, value):
        raise file.refusal(f"it asks for {key} = {value}, which {config.model_type} in transformers cannot do")


def _layer_types(pattern: int | list[bool], layers: int) -> list[str]:
    """Kinds of the layers: the last of each ``pattern`` layers sees everything, or each says whether it slides."""
    slides = [(i + 1) % pattern != 0 for i in range(layers)] if isinstance(pattern, int) else pattern[:layers]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _changes_nothing(config: Any, key: str, value: Any) -> bool:
    """Whether a key that no attribute holds says what the model's code does anyway."""
    if value in NEUTRAL.get(key, ()) or (hasattr(config, key) and getattr(config, key) == value):
        return True
    if key == "expert_gating_func":
        return hasattr(config, "scoring_func")  # transformers reads it
    head = head_dim(config)
    if key == "attention.scale":
        return math.isclose(value, getattr(config, "query_pre_attn_scalar", head) ** -0.5, rel_tol=1e-4)
    if key.startswith(("attention.key_length", "attention.value_length")):
        return bool(value == head)
    return key == "attention.sliding_window" and value >= config.max_position_embeddings
