"""Writes tiny GGUF files of models that the tests make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTROL = ("<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|eom|>")
TOKENS = (*bytes_to_unicode().values(), "he", "at", *CONTROL)
END, START, TURN_END, MESSAGE_END = range(len(TOKENS) - len(CONTROL), len(TOKENS))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": None,
}


def random_model(model_type: str = "llama", **changes: Any) -> Any:
    """A model of random weights that depend on positions: its rotary embedding matters."""
    config = AutoConfig.for_model(model_type, **SIZES | changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.35 if parameter.ndim > 1 else 1 + parameter * 0)
            parameter.copy_(parameter.bfloat16().float())
    return model.eval()


def model_that_says(token: int) -> Any:
    """A model whose every next token is this one."""
    model = random_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[token] = 1.0
    return model


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a Llama's queries or keys in the order of GGUF files, where rotated pairs are neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


PARTS = {
    "input_layernorm": "attn_norm",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.v_proj": "attn_v",
}
GEMMA_PARTS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm": "ffn_norm",
}
WHOLE = {"lm_head": "output", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a dense model by their names in GGUF files, in the form that these have there."""
    config = model.config
    gemma = config.model_type.startswith("gemma")
    named = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        value = tensor + 1 if gemma and module.endswith("norm") else tensor
        if module in WHOLE:
            named[f"{WHOLE[module]}.{kind}"] = value
            continue
        _, _, layer, part = module.split(".", 3)
        if config.model_type == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            queries = part == "self_attn.q_proj"
            value = _interleaved(tensor, config.num_attention_heads if queries else config.num_key_value_heads)
        named[f"blk.{layer}.{(PARTS | (GEMMA_PARTS if gemma else {}))[part]}.{kind}"] = value
    if config.tie_word_embeddings:
        del named["output.weight"]
    return named


def write_gguf(
    path: Path,
    model: Any,
    *,
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, Sequence[float]] | None = None,
    template: str | None = CHATML,
    parts: int = 1,
    architecture: str | None = None,
) -> list[Path]:
    """Write a model as a GGUF file.

    Args:
        path: the file; of a split one, its name without number and ending.
        model: from ``random_model``.
        keys: further metadata; a key without a dot of its own architecture begins with a dot. None leaves one out.
        extra: further tensors.
        template: the chat template.
        parts: number of files.
        architecture: what the file calls the model's architecture, if not by its type.

    Returns:
        The files.
    """
    config, arch = model.config, architecture or model.config.model_type.removesuffix("_text")
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    metadata: dict[str, Any] = {
        ".context_length": config.max_position_embeddings,
        ".block_count": config.num_hidden_layers,
        ".embedding_length": config.hidden_size,
        ".feed_forward_length": config.intermediate_size,
        ".attention.head_count": config.num_attention_heads,
        ".vocab_size": config.vocab_size,
        ".attention.head_count_kv": config.num_key_value_heads,
        ".rope.freq_base": float(rope["rope_theta"]),
        ".attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.merges": ["h e", "a t"],
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.token_type": [int(TokenType.NORMAL)] * 258 + [int(TokenType.CONTROL)] * len(CONTROL),
        "tokenizer.ggml.scores": [0.0] * len(TOKENS),
        "tokenizer.ggml.bos_token_id": END,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.padding_token_id": END,
        "tokenizer.ggml.unknown_token_id": END,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": template,
        **(keys or {}),
    }
    weights = tensors(model) | {name: torch.tensor(values) for name, values in (extra or {}).items()}
    files = (
        [path.with_name(f"{path.name}-{i + 1:05}-of-{parts:05}.gguf") for i in range(parts)] if parts > 1 else [path]
    )
    for i, file in enumerate(files):
        writer = GGUFWriter(file, arch)
        for key, value in metadata.items() if i == 0 else ():
            if value is not None:
                _add(writer, arch + key if key.startswith(".") else key, value)
        if parts > 1:
            writer.add_uint16("split.no", i)
            writer.add_uint16("split.count", parts)
        for name in list(weights)[i::parts]:
            writer.add_tensor(name, weights[name].float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)
