"""The type of numbers that a model is computed in, known from its config before it is loaded.

Knows what processors and the chosen kernels compute fast; knows nothing of weights. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bmx import hardware, kernels
from bmx.config import EngineConfig

MULTIPLES = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 16}  # sizes that the compiled kernels take
HEAD_MULTIPLE = 32


def dtype_name(config: EngineConfig, device: str, model_config: Mapping[str, Any]) -> str:
    """torch's name of the type: the configured one, or bfloat16 where the device computes this model fast in it.

    Args:
        config: the settings.
        device: ``cpu`` or ``cuda``; a GPU is taken for Ampere or later.
        model_config: the keys of the model's config.json, with the values that keys left out stand for.
    """
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if device == "cuda" or not slow_on_cpu("bfloat16", model_config) else "float32"


def slow_on_cpu(dtype: str, model_config: Mapping[str, Any]) -> str:
    """Why this machine's CPU computes a model slowly in a type; empty where it does not.

    Without hardware for it, torch multiplies 16-bit numbers up to a hundred times as slowly as float32.

    Args:
        dtype: torch's name of the type.
        model_config: as in ``dtype_name``.
    """
    if dtype == "float32" or hardware.multiplies(dtype):
        return ""
    lack = f"the processor has no {dtype} in hardware"
    if dtype not in kernels.choose("cpu").capabilities.model_dtypes:
        return lack
    part = _left_to_torch(model_config)
    return f"{lack}, and bmx's kernels do not compute {part}" if part else ""


def _left_to_torch(model_config: Mapping[str, Any]) -> str:
    """What the compiled kernels do not compute of a model, for people; empty if they compute all that takes long."""
    text = model_config.get("text_config")
    keys = text if isinstance(text, Mapping) else model_config
    if any("expert" in key and keys[key] for key in keys):
        return "experts"
    if keys.get("attn_logit_softcapping"):
        return "capped attention scores"
    for key, multiple in MULTIPLES.items():
        size = keys.get(key)
        if not isinstance(size, int) or size % multiple:
            return f"a {key} of {size}" if isinstance(size, int) else f"a model without {key}"
    heads = keys.get("num_attention_heads")
    dim = keys.get("head_dim") or (keys["hidden_size"] // heads if isinstance(heads, int) and heads > 0 else None)
    return "" if isinstance(dim, int) and dim % HEAD_MULTIPLE == 0 else f"heads of {dim} numbers"
