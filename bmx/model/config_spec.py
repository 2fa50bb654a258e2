"""What common models are to bmx, worked out from config.json alone, in milliseconds and without torch.

Knows, for a few architectures, what ``read_spec`` and ``trace`` find for them (transformers 5.23, torch 2.13), and
gives the same numbers or None. Knows nothing of weights but what the headers of their files say.

Sizes: h hidden, i intermediate, q and k the widths of queries and keys (heads x head_dim), b bytes of an activation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
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
# Keys that change no number here, whatever they say. A key that is neither here nor read takes the slow way.
HARMLESS = """
    _attn_implementation_autoset _commit_hash _model_name_or_path _name_or_path architectures attention_bias
    attention_dropout auto_map unk_token_id sep_token_id cls_token_id mask_token_id
    bos_token_id dtype embd_pdrop eos_token_id head_dim id2label initializer_range is_llama_config label2id mlp_bias
    max_window_layers model_type name_or_path original_max_position_embeddings partial_rotary_factor pretraining_tp
    quantization_config resid_pdrop return_dict rms_norm_eps rope_interleaved rope_parameters rope_scaling rope_theta
    torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache use_mrope
"""
# Kinds of rotary embedding, with the keys that each needs.
ROTARY = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureDefaults:
    """An architecture: what its config means by silence, and what sets it apart from Llama.

    Attributes:
        name: its class in transformers.
        sizes: defaults in the order of ``SIZES``; `-` for as many key-value heads as query heads.
        others: defaults of the other keys that its code reads.
        fused: one product makes queries, keys and values, and one makes gate and up.
        qk_norm: queries and keys are normalised head by head.
        qkv_bias: these products always have a bias; else ``attention_bias`` says so.
    """

    name: str
    sizes: str
    others: Mapping[str, Any]
    fused: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys that the architecture reads, with the config's values or else the defaults."""
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
        name="Phi3ForCausalLM", sizes="32064 3072 8192 32 32 - 4096", others=_PHI3, fused=True
    ),
}


class NotCovered(Exception):  # noqa: N818  (no error: it asks for the slow way)
    """The closed forms do not cover this model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """The numbers of one model, by the letters above. ``rotated`` is how much of a head is rotated."""

    form: ArchitectureDefaults
    b: int
    h: int
    i: int
    heads: int
    kv_heads: int
    head_dim: int
    q: int
    k: int
    rotated: int
    rope: str  # a kind in ROTARY
    ropes: tuple[bool, ...]  # of each layer, whether it rotates at all
    windows: tuple[int | None, ...]  # of each layer, its sliding window
    biased: tuple[int, ...]  # widths of the products of a layer that have a bias

    @property
    def products(self) -> int:
        """Parameters of the products of a layer, without biases."""
        return self.h * (2 * self.q + 2 * self.k + 3 * self.i)


def spec_from_config(folder: Path, itemsize: int) -> ModelSpec | None:
    """The spec of the model in a folder, as ``read_spec`` would find it, or None where only that can tell.

    Args:
        folder: with config.json, and the safetensors files that belong to it or none.
        itemsize: bytes of an activation.

    Raises:
        ModelError: config.json is not one, or contradicts itself or the weights.
    """
    config = read_config(folder)
    form = ARCHITECTURES.get(str(config.get("model_type")))
    if form is None or itemsize not in ITEMSIZES:
        return None
    read = form.read(config)
    sizes = _sizes(folder, config, read)
    try:
        _check_covered(form, config, read)
        rope, rotated, max_length = _rotary(form, config, sizes)
        shape = _shape(form, read, sizes, itemsize, rope, rotated)
        tied = _flag(read, "tie_word_embeddings")
    except NotCovered:
        return None
    headers = read_headers(folder)
    found = sizes_in_headers(headers, shape.heads, shape.kv_heads, shape.head_dim)
    for key, size in found.items():
        if sizes[key] != size:
            _refuse(folder, f"config.json says {key} = {sizes[key]}, and the weights have {size:.10g}")
    head = sizes["vocab_size"] * shape.h
    weights = (head if tied else 2 * head) * itemsize + _layer_bytes(shape)
    if config.get("quantization_config") is not None:
        if not headers:
            return None
        loaded = {name: tensor for name, tensor in headers.items() if not (tied and name == "lm_head.weight")}
        weights = weight_bytes(loaded, itemsize)
    return ModelSpec(
        name=form.name,
        layers=_layers(shape),
        costs=Costs(
            activation_bytes=_activation_bytes(shape),
            traffic_bytes=_traffic_bytes(shape),
            flops=2 * shape.products * len(shape.ropes),
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


def _sizes(folder: Path, config: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of ``SIZES`` and head_dim, every one a positive number and in proportion."""
    sizes = {key: read[key] for key in SIZES}
    if sizes["num_key_value_heads"] is None:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    head_dim = config.get("head_dim", read.get("head_dim"))
    for key, size in (sizes | ({} if head_dim is None else {"head_dim": head_dim})).items():
        if type(size) is not int or size < 1:
            _refuse(folder, f"config.json says {key} = {json.dumps(size)}, which is no positive whole number")
    hidden, heads, kv_heads = (sizes[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if heads % kv_heads:
        told = f"num_attention_heads = {heads}, no multiple of num_key_value_heads = {kv_heads}"
        _refuse(folder, f"config.json says {told}")
    if hidden % heads and head_dim is None:
        _refuse(folder, f"config.json says hidden_size = {hidden}, no multiple of num_attention_heads = {heads}")
    return sizes | {"head_dim": head_dim or hidden // heads}


def _check_covered(form: ArchitectureDefaults, config: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Raise ``NotCovered`` where the closed forms may not hold, or transformers may refuse the model."""
    unknown = [key for key in config.keys() - HARMLESS.split() - read.keys() if config[key] is not None]
    named = config.get("architectures") or [form.name]  # without, transformers goes by model_type
    pad, vocab = read["pad_token_id"], read["vocab_size"]
    no_head_dim = config.get("head_dim", 0) is None and form.others.get("head_dim", 0) is not None
    if (
        unknown
        or named != [form.name]
        or read["hidden_act"] != "silu"
        or not (pad is None or (type(pad) is int and -vocab <= pad < vocab))
        or no_head_dim
        or (form.fused and "head_dim" in config)
        or (read["num_key_value_heads"] is None and "-" not in form.sizes)
        or read["hidden_size"] % read["num_attention_heads"]
    ):
        raise NotCovered


def _shape(
    form: ArchitectureDefaults,
    read: Mapping[str, Any],
    sizes: Mapping[str, int],
    itemsize: int,
    rope: str,
    rotated: int,
) -> _Shape:
    _, hidden, i, layers, heads, kv_heads, _, head_dim = sizes.values()
    q, k = heads * head_dim, kv_heads * head_dim
    biased = (q, k, k, hidden) if _flag(read, "attention_bias") else (q, k, k) if form.qkv_bias else ()
    ropes = _ropes(read, layers)
    return _Shape(
        form=form,
        b=itemsize,
        h=hidden,
        i=i,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q=q,
        k=k,
        rotated=rotated,
        rope=rope,
        ropes=ropes,
        windows=_windows(read, ropes),
        biased=biased + ((i, i, hidden) if _flag(read, "mlp_bias") else ()),
    )


def _flag(read: Mapping[str, Any], key: str) -> bool:
    value = read.get(key, False)
    if type(value) is not bool:
        raise NotCovered
    return value


def _rotary(form: ArchitectureDefaults, config: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[str, int, int]:
    """The kind of rotary embedding, how many dimensions of a head it rotates, and how many positions it can tell."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise NotCovered
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    kind = "longrope" if form.fused and kind == "yarn" else kind
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    part = 1.0 if part is None else part
    factor: Any = rope.get("factor") if "factor" in ROTARY.get(kind, ()) else 1.0
    if kind not in (("default", "longrope") if form.fused else ROTARY) or not all(
        rope.get(key) for key in ROTARY[kind]
    ):
        raise NotCovered
    if not {type(part), type(factor)} <= {int, float} or not (0 < part <= 1 <= factor < math.inf):
        raise NotCovered
    rotated = int(sizes["head_dim"] * part)
    if rotated % 2 or rotated < (4 if kind == "dynamic" else 2) or (part != 1 and not form.fused):
        raise NotCovered
    lists = [rope[key] for key in ROTARY[kind]] if kind == "longrope" else []
    if not all(isinstance(numbers, list) and len(numbers) == rotated // 2 for numbers in lists):
        raise NotCovered
    return kind, rotated, int(sizes["max_position_embeddings"] * (factor if kind == "dynamic" else 1))


def _ropes(read: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers rotate: all, but for SmolLM3."""
    if "no_rope_layers" not in read:
        return (True,) * layers
    told, every = read["no_rope_layers"], read["no_rope_layer_interval"]
    if told is None and type(every) is int and every > 0:
        told = [(layer + 1) % every != 0 for layer in range(layers)]
    if not isinstance(told, list) or len(told) < layers or any(rotates not in (0, 1) for rotates in told):
        raise NotCovered
    return tuple(bool(rotates) for rotates in told[:layers])


def _windows(read: Mapping[str, Any], ropes: tuple[bool, ...]) -> tuple[int | None, ...]:
    """The sliding window of each layer: of all, or of those that layer_types says."""
    window = read.get("sliding_window") if _flag({"use_sliding_window": True, **read}, "use_sliding_window") else None
    if window is not None and (type(window) is not int or window < 1):
        raise NotCovered
    if "layer_types" not in read:
        return (window,) * len(ropes)
    types, start = read["layer_types"], read["max_window_layers"]
    if type(start) is not int:
        raise NotCovered
    if types is None:
        slides = [not rotates if "no_rope_layers" in read else i >= start for i, rotates in enumerate(ropes)]
        return tuple(window if slide else None for slide in slides)
    known = ["full_attention"] if window is None else ["full_attention", "sliding_attention"]
    if not isinstance(types, list) or len(types) != len(ropes) or any(kind not in known for kind in types):
        raise NotCovered
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _layers(s: _Shape) -> tuple[LayerSpec, ...]:
    heads = {"query_heads": s.heads, "kv_heads": s.kv_heads, "key_dim": s.head_dim, "value_dim": s.head_dim}
    return tuple(LayerSpec(**heads, window=window, owner=layer) for layer, window in enumerate(s.windows))


def _layer_bytes(s: _Shape) -> int:
    """Bytes of the layers and the last norm."""
    norms = 2 * s.h + (2 * s.head_dim if s.form.qk_norm else 0)
    return s.b * (s.h + len(s.ropes) * (s.products + norms + sum(s.biased)))


def _activation_bytes(s: _Shape) -> int:
    """The widest of the moments that can be the widest.

    From the second layer on, three tensors of width h stay alive: the embeddings, the layer's input and the
    residual stream. In the first layer the embeddings are its input.
    """
    b, h, q, k, i, fused = s.b, s.h, s.q, s.k, s.i, s.form.fused
    q_rotated, k_rotated = s.heads * s.rotated, s.kv_heads * s.rotated
    moments = [
        _norm_bytes(b, h, 1),
        b * (h + (3 if fused else 2) * (q + k)),  # the output projection
        b * (h + (4 if fused else 3) * i),  # gate times up
        b * (2 * h + (3 if fused else 1) * i),  # the down projection
    ]
    if s.form.qk_norm:
        moments += [b * q + _norm_bytes(b, q, s.heads), b * (q + k) + _norm_bytes(b, k, s.kv_heads)]
    rotations = [b * (q + 2 * k + 3 * q_rotated), b * (2 * (q + k) + 3 * k_rotated)]
    first, later = 2 * b * (h + s.rotated), b * (3 * h + 2 * s.rotated)
    widest = max(moments) + (later if len(s.ropes) > 1 else first)
    if any(s.ropes):
        widest = max(widest, max(rotations) + (later if any(s.ropes[1:]) else first))
    return max(widest, b * h + 18 * s.rotated)  # the rotary table, before the first layer


def _norm_bytes(b: int, width: int, heads: int) -> int:
    """Alive at the widest moment of a normalisation, which computes in float32, beside its input."""
    return 8 * width + (4 if b == 4 else 8) * heads


def _traffic_bytes(s: _Shape) -> int:
    b, h, q, k, form = s.b, s.h, s.q, s.k, s.form
    norm = _norm_traffic(b, h, 1)
    layer = 2 * norm + b * (10 * h + 9 * s.i + (6 if form.fused else 4) * (q + k))
    layer -= 2 * b * sum(s.biased)  # a product without a bias leaves one more operator behind
    if form.qk_norm:
        layer += _norm_traffic(b, q, s.heads) + _norm_traffic(b, k, s.kv_heads)
    rotation = b * s.rotated * (10 * (s.heads + s.kv_heads) + 4)
    once = norm + 2 * b * h + 24 + s.rotated * (42 if b == 4 else 54)
    return len(s.ropes) * layer + sum(s.ropes) * rotation + once


def _norm_traffic(b: int, width: int, heads: int) -> int:
    return (28 if b == 4 else 36) * width + 24 * heads


def _operators(s: _Shape) -> int:
    norm = 6 if s.b == 4 else 8  # with the casts to float32 and back
    layer = (4 if s.form.qk_norm else 2) * norm + (15 if s.form.fused else 19) - len(s.biased)
    once = norm + (12 if s.b == 4 else 14)
    return len(s.ropes) * layer + sum(s.ropes) * 10 + once
