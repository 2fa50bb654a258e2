"""The spec of a common architecture from its config.json alone: milliseconds, no torch, no weights.

For the architectures in ``ARCHITECTURES``, closed formulas give the numbers that ``read_spec`` and ``trace_costs``
measure on the real model (transformers 5.23, torch 2.13). A config that they do not cover gives None. Of the weights,
only the headers of safetensors files are read. A new architecture is one entry in ``ARCHITECTURES``.

Sizes: h hidden, i intermediate, q and k the widths of queries and keys (heads x head_dim), b bytes of an activation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from bmx.errors import ModelError
from bmx.model.checkpoint import read_config, read_headers, sizes_in_headers, weight_bytes
from bmx.model.spec import Costs, LayerSpec, ModelSpec

HINT = "correct config.json, or download the model again"
ITEMSIZES = {2, 4}  # bfloat16 or float16, and float32
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
# Keys whose values change no number here. Any key that is neither listed here nor read makes a config NotCovered.
HARMLESS = """
    _attn_implementation_autoset _commit_hash _model_name_or_path _name_or_path architectures attention_bias
    attention_dropout auto_map unk_token_id sep_token_id cls_token_id mask_token_id
    bos_token_id dtype embd_pdrop eos_token_id head_dim id2label initializer_range is_llama_config label2id mlp_bias
    max_window_layers model_type name_or_path original_max_position_embeddings partial_rotary_factor pretraining_tp
    quantization_config resid_pdrop return_dict rms_norm_eps rope_interleaved rope_parameters rope_scaling rope_theta
    torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache use_mrope
"""
# Types of rotary embedding: the parameters that each must have.
ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeRule:
    """Rotary embeddings of an architecture that the closed formulas cover.

    Attributes:
        types: values of ``rope_type``.
        renamed: values of ``rope_type`` that the architecture's code reads as another one.
        partial: whether only a part of each head may be rotated.
    """

    types: tuple[str, ...] = tuple(ROPE_PARAMETERS)
    renamed: Mapping[str, str] = field(default_factory=dict)
    partial: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureDefaults:
    """An architecture: the values that keys missing from a config take, and how its layers differ from Llama's.

    Attributes:
        name: its class in transformers.
        sizes: defaults in the order of ``SIZES``; `-` for as many key-value heads as query heads.
        others: defaults of the other keys that its code reads.
        rope: rotary embeddings that are covered.
        fused_products: one product makes queries, keys and values, and one makes gate and up.
        free_head_dim: a config may set ``head_dim``; otherwise one that does is not covered.
        qk_norm: queries and keys are normalised head by head.
        qkv_bias: the products of queries, keys and values always have a bias; otherwise ``attention_bias`` decides.
    """

    name: str
    sizes: str
    others: Mapping[str, Any]
    rope: RopeRule = RopeRule()
    fused_products: bool = False
    free_head_dim: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False

    def with_defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys that the architecture's code reads, each with the config's value or else its default."""
        sizes = [None if word == "-" else int(word) for word in self.sizes.split()]
        common = {"hidden_act": "silu", "tie_word_embeddings": False, "pad_token_id": None}
        defaults = {**dict(zip(SIZES, sizes, strict=True)), **common, **self.others}
        return {key: config.get(key, default) for key, default in defaults.items()}


_LLAMA = {"head_dim": None, "attention_bias": False, "mlp_bias": False}
_MISTRAL = {"head_dim": None, "sliding_window": 4096}
_QWEN2 = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_QWEN3 = {"head_dim": 128, "attention_bias": False, **_QWEN2}
_NO_ROPE = {"no_rope_layers": None, "no_rope_layer_interval": 4, "tie_word_embeddings": True, "pad_token_id": 128004}
_SMOLLM3 = {"attention_bias": False, "mlp_bias": False, **_QWEN2, "sliding_window": None, **_NO_ROPE}
_PHI3 = {"sliding_window": None, "pad_token_id": 32000}
_QWEN_SIZES = "151936 4096 22016 32 32 32 32768"
_PHI3_ROPE = RopeRule(types=("default", "longrope"), renamed={"yarn": "longrope"}, partial=True)
ARCHITECTURES = {
    "llama": ArchitectureDefaults(name="LlamaForCausalLM", sizes="32000 4096 11008 32 32 - 2048", others=_LLAMA),
    "mistral": ArchitectureDefaults(
        name="MistralForCausalLM", sizes="32000 4096 14336 32 32 8 131072", others=_MISTRAL
    ),
    "smollm3": ArchitectureDefaults(
        name="SmolLM3ForCausalLM", sizes="128256 2048 11008 36 16 4 32768", others=_SMOLLM3
    ),
    "qwen2": ArchitectureDefaults(name="Qwen2ForCausalLM", sizes=_QWEN_SIZES, others=_QWEN2, qkv_bias=True),
    "qwen3": ArchitectureDefaults(name="Qwen3ForCausalLM", sizes=_QWEN_SIZES, others=_QWEN3, qk_norm=True),
    "phi3": ArchitectureDefaults(
        name="Phi3ForCausalLM",
        sizes="32064 3072 8192 32 32 - 4096",
        others=_PHI3,
        rope=_PHI3_ROPE,
        fused_products=True,
        free_head_dim=False,
    ),
}


class NotCovered(Exception):  # noqa: N818  (not a failure: the model itself must be looked at)
    """The closed formulas do not hold for this config."""


def _cover(condition: bool) -> None:
    """Raise ``NotCovered`` unless the condition, which the closed formulas assume, holds."""
    if not condition:
        raise NotCovered


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """The numbers of one model, by the letters of the module's docstring.

    Attributes:
        rotated: dimensions of a head that are rotated.
        rotates: of each layer, whether it rotates at all.
        windows: of each layer, its sliding window.
        biased: widths of the products of a layer that have a bias.
    """

    architecture: ArchitectureDefaults
    b: int
    h: int
    i: int
    heads: int
    kv_heads: int
    head_dim: int
    q: int
    k: int
    rotated: int
    rotates: tuple[bool, ...]
    windows: tuple[int | None, ...]
    biased: tuple[int, ...]

    @property
    def products(self) -> int:
        """Parameters of the products of a layer, without biases."""
        return self.h * (2 * self.q + 2 * self.k + 3 * self.i)


def known_keys(folder: Path) -> dict[str, Any] | None:
    """The keys of a folder's config.json, with the defaults of those left out; None for another architecture.

    Raises:
        ModelError: config.json is missing or not a JSON object.
    """
    config = read_config(folder)
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    return config | architecture.with_defaults(config) if architecture else None


def spec_from_config(folder: Path, itemsize: int, whole: bool = False) -> ModelSpec | None:
    """The spec of the model in a folder, equal to what ``read_spec`` finds; None for a config that is not covered.

    Args:
        folder: holds config.json, and the model's safetensors files or none.
        itemsize: bytes of an activation.
        whole: loading makes whole weights of quantised ones.

    Raises:
        ModelError: config.json is missing or not a JSON object, or contradicts itself or the weights.
    """
    config = read_config(folder)
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None or itemsize not in ITEMSIZES:
        return None
    keys = architecture.with_defaults(config)
    sizes = _sizes(folder, config, keys)
    try:
        _check_covered(architecture, config, keys)
        rotated, max_length = _read_rope(architecture.rope, config, sizes)
        shape = _shape(architecture, keys, sizes, itemsize, rotated)
        tied = _flag(keys, "tie_word_embeddings")
    except NotCovered:
        return None
    headers = read_headers(folder)
    for key, size in sizes_in_headers(headers, shape.heads, shape.kv_heads, shape.head_dim).items():
        if sizes[key] != size:
            _refuse(folder, f"config.json says {key} = {sizes[key]}, and the weights have {size:.10g}")
    head = sizes["vocab_size"] * shape.h
    weights = (head if tied else 2 * head) * itemsize + _layer_bytes(shape)
    if config.get("quantization_config") is not None and not whole:
        if not headers:
            return None
        loaded = {name: tensor for name, tensor in headers.items() if not (tied and name == "lm_head.weight")}
        weights = weight_bytes(loaded, itemsize)
    return ModelSpec(
        name=architecture.name,
        layers=_layers(shape),
        costs=Costs(
            activation_bytes=_activation_bytes(shape),
            traffic_bytes=_traffic_bytes(shape),
            flops=2 * shape.products * len(shape.rotates),
            operators=_operators(shape),
        ),
        vocab=sizes["vocab_size"],
        max_length=max_length,
        weight_bytes=weights + 4 * shape.rotated,  # float32 frequencies of half the dimensions, kept twice
        head_bytes=head * itemsize,
        itemsize=itemsize,
    )


def _refuse(folder: Path, reason: str) -> NoReturn:
    raise ModelError(f"cannot load model {folder}: {reason}", hint=HINT) from None


def _sizes(folder: Path, config: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of ``SIZES`` and head_dim, every one a positive number and in proportion."""
    sizes = {key: keys[key] for key in SIZES}
    if sizes["num_key_value_heads"] is None:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    head_dim = config.get("head_dim", keys.get("head_dim"))
    for key, size in (sizes | ({} if head_dim is None else {"head_dim": head_dim})).items():
        if type(size) is not int or size < 1:
            _refuse(folder, f"config.json says {key} = {json.dumps(size)}, which is not a positive whole number")
    hidden, heads, kv_heads = (sizes[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if heads % kv_heads:
        reason = f"num_attention_heads = {heads}, which is not a multiple of num_key_value_heads = {kv_heads}"
        _refuse(folder, f"config.json says {reason}")
    if hidden % heads and head_dim is None:
        reason = f"hidden_size = {hidden}, which is not a multiple of num_attention_heads = {heads}"
        _refuse(folder, f"config.json says {reason}")
    return sizes | {"head_dim": head_dim or hidden // heads}


def _check_covered(architecture: ArchitectureDefaults, config: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    """Raise ``NotCovered`` where the closed formulas may not hold, or transformers may refuse the model."""
    unknown = [key for key in config.keys() - HARMLESS.split() - keys.keys() if config[key] is not None]
    names = config.get("architectures") or [architecture.name]  # without, transformers goes by model_type
    pad, vocab = keys["pad_token_id"], keys["vocab_size"]
    null_head_dim = config.get("head_dim", 0) is None and architecture.others.get("head_dim", 0) is not None
    _cover(not unknown)
    _cover(names == [architecture.name])
    _cover(keys["hidden_act"] == "silu")
    _cover(pad is None or (type(pad) is int and -vocab <= pad < vocab))
    _cover(not null_head_dim)
    _cover(architecture.free_head_dim or "head_dim" not in config)
    _cover(keys["num_key_value_heads"] is not None or "-" in architecture.sizes)
    _cover(keys["hidden_size"] % keys["num_attention_heads"] == 0)


def _shape(
    architecture: ArchitectureDefaults, keys: Mapping[str, Any], sizes: Mapping[str, int], itemsize: int, rotated: int
) -> _Shape:
    """The numbers that the formulas below need.

    Args:
        architecture: of the model.
        keys: values of the config's keys, defaults filled in.
        sizes: the sizes of ``SIZES`` and head_dim.
        itemsize: bytes of an activation.
        rotated: dimensions of a head that are rotated.
    """
    _, hidden, i, layers, heads, kv_heads, _, head_dim = sizes.values()
    q, k = heads * head_dim, kv_heads * head_dim
    biased = (q, k, k, hidden) if _flag(keys, "attention_bias") else (q, k, k) if architecture.qkv_bias else ()
    rotates = _rotating_layers(keys, layers)
    return _Shape(
        architecture=architecture,
        b=itemsize,
        h=hidden,
        i=i,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q=q,
        k=k,
        rotated=rotated,
        rotates=rotates,
        windows=_windows(keys, rotates),
        biased=biased + ((i, i, hidden) if _flag(keys, "mlp_bias") else ()),
    )


def _flag(keys: Mapping[str, Any], key: str) -> bool:
    value = keys.get(key, False)
    _cover(type(value) is bool)
    return bool(value)


def _read_rope(rule: RopeRule, config: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[int, int]:
    """The dimensions of a head that are rotated, and the positions that the model can tell apart.

    Args:
        rule: what the architecture may have.
        config: config.json.
        sizes: the sizes of ``SIZES`` and head_dim.

    Raises:
        NotCovered: the rule does not allow it, or a parameter of it is missing or out of range.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    _cover(isinstance(rope, dict))
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    kind = rule.renamed.get(kind, kind)
    _cover(kind in rule.types and all(rope.get(name) for name in ROPE_PARAMETERS[kind]))
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    part = 1.0 if part is None else part
    factor: Any = rope["factor"] if "factor" in ROPE_PARAMETERS[kind] else 1.0
    _cover({type(part), type(factor)} <= {int, float} and 0 < part <= 1 <= factor < math.inf)
    rotated = int(sizes["head_dim"] * part)
    _cover(rotated % 2 == 0 and rotated >= (4 if kind == "dynamic" else 2) and (part == 1 or rule.partial))
    if kind == "longrope":
        factors = [rope["short_factor"], rope["long_factor"]]
        _cover(all(isinstance(numbers, list) and len(numbers) == rotated // 2 for numbers in factors))
    stretch = factor if kind == "dynamic" else 1
    return rotated, int(sizes["max_position_embeddings"] * stretch)


def _rotating_layers(keys: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Of each layer, whether it rotates: all do, except in SmolLM3."""
    if "no_rope_layers" not in keys:
        return (True,) * layers
    rotates, every = keys["no_rope_layers"], keys["no_rope_layer_interval"]
    if rotates is None and type(every) is int and every > 0:
        rotates = [(layer + 1) % every != 0 for layer in range(layers)]
    _cover(isinstance(rotates, list) and len(rotates) >= layers and all(flag in (0, 1) for flag in rotates))
    return tuple(bool(flag) for flag in rotates[:layers])


def _windows(keys: Mapping[str, Any], rotates: tuple[bool, ...]) -> tuple[int | None, ...]:
    """The sliding window of each layer: the same for all, or for the layers that ``layer_types`` names."""
    window = keys.get("sliding_window") if _flag({"use_sliding_window": True, **keys}, "use_sliding_window") else None
    _cover(window is None or (type(window) is int and window >= 1))
    if "layer_types" not in keys:
        return (window,) * len(rotates)
    types, start = keys["layer_types"], keys["max_window_layers"]
    _cover(type(start) is int)
    if types is None:
        slides = [not rotate if "no_rope_layers" in keys else i >= start for i, rotate in enumerate(rotates)]
        return tuple(window if slide else None for slide in slides)
    known = ["full_attention"] if window is None else ["full_attention", "sliding_attention"]
    _cover(isinstance(types, list) and len(types) == len(rotates) and all(kind in known for kind in types))
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _layers(s: _Shape) -> tuple[LayerSpec, ...]:
    heads = {"query_heads": s.heads, "kv_heads": s.kv_heads, "key_dim": s.head_dim, "value_dim": s.head_dim}
    return tuple(LayerSpec(**heads, window=window, owner=layer) for layer, window in enumerate(s.windows))


def _layer_bytes(s: _Shape) -> int:
    """Bytes of the layers and the last norm."""
    norms = 2 * s.h + (2 * s.head_dim if s.architecture.qk_norm else 0)
    return s.b * (s.h + len(s.rotates) * (s.products + norms + sum(s.biased)))


def _activation_bytes(s: _Shape) -> int:
    """Bytes of a token that are alive at the widest moment of a step.

    From the second layer on, three tensors of width h stay alive: the embeddings, the layer's input and the
    residual stream. In the first layer the embeddings are its input.
    """
    b, h, q, k, i, fused = s.b, s.h, s.q, s.k, s.i, s.architecture.fused_products
    q_rotated, k_rotated = s.heads * s.rotated, s.kv_heads * s.rotated
    moments = [
        _norm_bytes(b, h, 1),
        b * (h + (3 if fused else 2) * (q + k)),  # the output projection
        b * (h + (4 if fused else 3) * i),  # gate times up
        b * (2 * h + (3 if fused else 1) * i),  # the down projection
    ]
    if s.architecture.qk_norm:
        moments += [b * q + _norm_bytes(b, q, s.heads), b * (q + k) + _norm_bytes(b, k, s.kv_heads)]
    rotations = [b * (q + 2 * k + 3 * q_rotated), b * (2 * (q + k) + 3 * k_rotated)]
    first, later = 2 * b * (h + s.rotated), b * (3 * h + 2 * s.rotated)
    widest = max(moments) + (later if len(s.rotates) > 1 else first)
    if any(s.rotates):
        widest = max(widest, max(rotations) + (later if any(s.rotates[1:]) else first))
    return max(widest, b * h + 18 * s.rotated)  # the rotary table, before the first layer


def _norm_bytes(b: int, width: int, heads: int) -> int:
    """Bytes alive at the widest moment of a normalisation, which computes in float32; its input is not counted."""
    return 8 * width + (4 if b == 4 else 8) * heads


def _traffic_bytes(s: _Shape) -> int:
    b, h, q, k, fused = s.b, s.h, s.q, s.k, s.architecture.fused_products
    norm = _norm_traffic(b, h, 1)
    layer = 2 * norm + b * (10 * h + 9 * s.i + (6 if fused else 4) * (q + k))
    layer -= 2 * b * sum(s.biased)  # a product without a bias leaves one more operator behind
    if s.architecture.qk_norm:
        layer += _norm_traffic(b, q, s.heads) + _norm_traffic(b, k, s.kv_heads)
    rotation = b * s.rotated * (10 * (s.heads + s.kv_heads) + 4)
    once = norm + 2 * b * h + 24 + s.rotated * (42 if b == 4 else 54)
    return len(s.rotates) * layer + sum(s.rotates) * rotation + once


def _norm_traffic(b: int, width: int, heads: int) -> int:
    return (28 if b == 4 else 36) * width + 24 * heads


def _operators(s: _Shape) -> int:
    norm = 6 if s.b == 4 else 8  # with the casts to float32 and back
    layer = (4 if s.architecture.qk_norm else 2) * norm + (15 if s.architecture.fused_products else 19) - len(s.biased)
    once = norm + (12 if s.b == 4 else 14)
    return len(s.rotates) * layer + sum(s.rotates) * 10 + once
