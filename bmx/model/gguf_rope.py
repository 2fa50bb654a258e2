"""Rotary embeddings of GGUF files in the words of a transformers config. Knows numbers; reads no file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from bmx.model.gguf_file import FREQS, LONG, SHORT, GgufFile

THETA = 10000.0  # where a file names none
PARTIAL = ("phi3", "stablelm", "nemotron", "minimax_m2")  # may rotate a part of each head
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
READ = (
    *("rope.dimension_count", "rope.dimension_count_swa", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
    *("rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
)


def rope_parameters(file: GgufFile, config: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding that the file describes, as the config's ``rope_parameters``.

    Args:
        file: for its factors and refusals.
        config: the config, its sizes set.
        keys: the file's keys without the architecture's name.

    Raises:
        ModelError: the model's code in transformers has no such rotary embedding.
    """
    unknown = {key: value for key, value in keys.items() if key.startswith("rope.") and key not in READ and value}
    if unknown:
        raise file.refusal(f"it asks for {', '.join(f'{key} = {value}' for key, value in unknown.items())}")
    head = head_dim(config)
    rotated = int(keys.get("rope.dimension_count") or head)
    if rotated != head and config.model_type not in PARTIAL:
        raise file.refusal(f"it rotates {rotated} of the {head} dimensions of a head")
    theta = float(keys.get("rope.freq_base") or THETA)
    rope = {"rope_theta": theta} | ({"partial_rotary_factor": rotated / head} if rotated != head else {})
    rope |= _scaling(file, config, keys, theta, rotated)
    window_theta = float(keys.get("rope.freq_base_swa") or THETA)
    if set(config.rope_parameters) == {"sliding_attention", "full_attention"}:
        return {
            "sliding_attention": {"rope_type": "default", "rope_theta": window_theta},
            "full_attention": rope,
        }
    if keys.get("rope.freq_base_swa") and window_theta != theta:
        raise file.refusal(f"its layers rotate differently: rope.freq_base_swa = {window_theta:g}")
    return rope


def head_dim(config: Any) -> int:
    """Dimensions of a query or a key of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _scaling(file: GgufFile, config: Any, keys: Mapping[str, Any], theta: float, rotated: int) -> dict[str, Any]:
    """What stretches the rotary embedding, if anything does."""
    factor = float(keys.get("rope.scaling.factor") or keys.get("rope.scale_linear") or 1.0)
    kind = keys.get("rope.scaling.type") or "linear"
    if {LONG, SHORT} <= file.factors.keys():
        return _longrope(config, keys, file.factors[SHORT], file.factors[LONG])
    if FREQS in file.factors and any(value != 1 for value in file.factors[FREQS]):
        if factor != 1 and kind != "none":
            raise file.refusal(f"it stretches its rotary embedding twice: {FREQS} and rope.scaling.type = {kind}")
        return _by_factors(file, config, theta, rotated)
    if kind == "yarn" and factor != 1:
        return _yarn(file, config, keys, factor)
    if kind == "linear" and factor != 1:
        return {"rope_type": "linear", "factor": factor}
    if kind not in ("none", "linear", "yarn"):
        raise file.refusal(f"its rope.scaling.type = {kind} has no factors in the file")
    return {"rope_type": "default"}


def _longrope(config: Any, keys: Mapping[str, Any], short: list[float], long: list[float]) -> dict[str, Any]:
    original = int(keys.get("rope.scaling.original_context_length") or config.max_position_embeddings)
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = original
    rope: dict[str, Any] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    rope |= {"original_max_position_embeddings": original, "factor": config.max_position_embeddings / original}
    attention = keys.get("rope.scaling.attn_factor")
    return rope | ({"attention_factor": float(attention)} if attention else {})


def _by_factors(file: GgufFile, config: Any, theta: float, rotated: int) -> dict[str, Any]:
    """Frequencies that are each divided by a factor: Llama 3's rule if that gives the same ones, else a list."""
    factors = file.factors[FREQS]
    if len(factors) != rotated // 2:
        raise file.refusal(f"{FREQS} has {len(factors)} values for {rotated} rotated dimensions")
    llama3 = LLAMA3 | {"rope_type": "llama3", "factor": max(factors)}
    if all(
        math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, _llama3_factors(llama3, theta, rotated), strict=True)
    ):
        return llama3
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    return rope | {"original_max_position_embeddings": config.max_position_embeddings, "factor": 1.0}


def _llama3_factors(rope: Mapping[str, Any], theta: float, rotated: int) -> Iterator[float]:
    """By how much Llama 3's rule divides each frequency: short waves by 1, long ones by the factor."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    for i in range(rotated // 2):
        turns = rope["original_max_position_embeddings"] * theta ** (-2 * i / rotated) / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        yield 1 / ((1 - smooth) / rope["factor"] + smooth)


def _yarn(file: GgufFile, config: Any, keys: Mapping[str, Any], factor: float) -> dict[str, Any]:
    original = int(keys.get("rope.scaling.original_context_length") or config.max_position_embeddings)
    rope: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for key, name in {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}.items():
        if f"rope.scaling.{key}" in keys:
            rope[name] = float(keys[f"rope.scaling.{key}"])
    attention = 0.1 * math.log(factor) + 1  # some writers mean the whole scale, some what comes on top of this one
    usual = {"yarn_ext_factor": 1.0, "yarn_attn_factor": attention, "attn_factor": attention}
    for key, value in usual.items():
        found = keys.get(f"rope.scaling.{key}")
        if found and not math.isclose(found, value, rel_tol=1e-3):
            raise file.refusal(f"it asks for rope.scaling.{key} = {found:g}, which is not read alike everywhere")
    return rope | ({"truncate": False} if config.model_type == "gpt_oss" else {})
