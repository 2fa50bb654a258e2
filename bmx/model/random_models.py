"""Models with random weights in the shapes of well-known ones, made on the device: nothing is downloaded.

Knows the public configs of a few models, and a tokenizer without files; knows nothing of caches or measurements.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bmx import hardware
from bmx.config import EngineConfig
from bmx.model.loader import (
    RUNTIME_BYTES,
    LoadedModel,
    check_quantization,
    choose_device,
    choose_dtype,
    loading_errors,
    prepare,
    quantize,
    silence_transformers,
)
from bmx.model.spec import ModelSpec

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_PHI_ROPE = {  # the real factors differ from 1, which changes results but not the work
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 48,
    "long_factor": [1.0] * 48,
    "original_max_position_embeddings": 4096,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA
    | {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rope_parameters": _LLAMA_3_ROPE,
        "tie_word_embeddings": False,
    },
    "llama-2-13b": _LLAMA
    | {
        "vocab_size": 32_000,
        "hidden_size": 5120,
        "intermediate_size": 13_824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
    },
    "phi-3.5-mini": {
        "model_type": "phi3",
        "rms_norm_eps": 1e-5,
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131_072,
        "original_max_position_embeddings": 4096,
        "sliding_window": 262_144,
        "rope_parameters": _PHI_ROPE,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": False,
    },
    "qwen3.5-0.8b": {
        "model_type": "qwen3_5_text",
        "rms_norm_eps": 1e-6,
        "vocab_size": 248_320,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": _LLAMA
    | {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
    },
}


class IdTokenizer:
    """A tokenizer whose texts are token ids in decimal, separated by blanks."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Token ids of a text."""
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        """The text of token ids."""
        return " ".join(map(str, ids))


def random_model_config(name: str, longest: int) -> Any:
    """The transformers config of a random model.

    Args:
        name: its shape, one of ``SHAPES``.
        longest: tokens of the longest sequence; a shape with fewer positions is given that many, which changes no
            work.
    """
    from transformers import AutoConfig

    silence_transformers()
    sizes = dict(SHAPES[name])
    sizes["max_position_embeddings"] = max(sizes["max_position_embeddings"], longest)
    return AutoConfig.for_model(**sizes)


def preview_random_model(name: str, longest: int, dtype: str) -> ModelSpec:
    """The spec that a random model will have, from a model on the meta device.

    Args:
        name: its shape, one of ``SHAPES``.
        longest: tokens of the longest sequence.
        dtype: torch's name of the type of its weights.
    """
    return prepare(_build(name, longest, "meta", dtype)).spec


def make_random_model(name: str, longest: int, config: EngineConfig) -> LoadedModel:
    """A random model on its device, its weights drawn at transformers' own small scale, the same ones each time.

    Args:
        name: its shape, one of ``SHAPES``.
        longest: tokens of the longest sequence.
        config: chooses the device, the type and the quantization.

    Raises:
        MemoryLimitError: the device has no room for it.
        ModelError: there is no such device.
        UsageError: quantised weights would be slower on it.
    """
    import torch

    device = choose_device(config)
    dtype = str(choose_dtype(config, device, SHAPES[name])).removeprefix("torch.")
    check_quantization(config.quantization, dtype, device.type)
    hardware.trim_heap()
    runtime = hardware.resident_bytes() if device.type == "cpu" else RUNTIME_BYTES["cuda"]
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), loading_errors(name):
        torch.manual_seed(0)
        model = _build(name, longest, device, dtype)
    loaded = prepare(model, runtime)
    return loaded if config.quantization == "none" else quantize(loaded, config.quantization)


def _build(name: str, longest: int, device: Any, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(random_model_config(name, longest), dtype=getattr(torch, dtype)).eval()
