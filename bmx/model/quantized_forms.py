"""Quantised forms of checkpoints: which ones nobody would unpack, and what transformers has unpacked.

transformers leaves out a form that it does not know, converts the packed numbers as they are, and drops their scales:
the model would answer nonsense. Knows formats by config.json, tensor types and tensor names; unpacks nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bmx.errors import ModelError
from bmx.model.checkpoint import FLOATS, read_headers
from bmx.model.folders import ELSEWHERE

ONLY_FOR = {"exl2": "ExLlamaV2", "exl3": "ExLlamaV3"}  # quant_method, and the tool that reads it
MODELOPT, MODELOPT_FILE = "NVIDIA ModelOpt", "hf_quant_config.json"
FROM_FLOATS = {"experts_int8"}  # other tools quantise such a checkpoint while they load it: its weights are floats
WHOLE_ON_CPU = {"fp8", "mxfp8", "mxfp4"}  # forms that only GPUs compute with
WHOLE = {*FLOATS, "I64", "BOOL", "C64"}  # types of tensors that are what they seem; I64 are indexes
MASKS = ("bias", "masked_bias", "position_ids")  # ends of names of buffers, in old checkpoints
SCALES = re.compile(r"(?:.*_)?(?:scales?|scale_inv|scale_2|zeros|zero_points?|qzeros|q_?weight|absmax|quant_state|SCB)")
OF_ACTIVATIONS = re.compile(r"(?:[qkv]|kv|qkv|input|output|act|activation)_scale")  # weights are whole without these


def stated_method(config: Mapping[str, Any]) -> str | None:
    """The quantised form that a config names; None if it names none, or one that other tools make of its floats.

    Args:
        config: the keys of config.json.
    """
    found = [part.get("quantization_config") for part in (config, config.get("text_config")) if isinstance(part, dict)]
    settings = next((part for part in found if isinstance(part, dict)), {})
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes_4bit" if settings.get("load_in_4bit") else "bitsandbytes_8bit"
    method = str(settings.get("quant_method") or ("unnamed" if settings else "none"))
    return None if method in ("none", *FROM_FLOATS) else method


def whole_in_memory(config: Mapping[str, Any], device: str) -> bool:
    """Whether loading makes whole weights of a quantised checkpoint, so that they take the memory of those.

    Args:
        config: the keys of config.json.
        device: ``cpu`` or ``cuda``.
    """
    return device == "cpu" and stated_method(config) in WHOLE_ON_CPU


def ask_for_whole(model_config: Any) -> None:
    """Let transformers make whole weights of a checkpoint; on a CPU it does so itself only where there is no GPU.

    Args:
        model_config: transformers' config of a quantised checkpoint.
    """
    for part in (model_config, model_config.get_text_config(decoder=True)):
        if isinstance(settings := getattr(part, "quantization_config", None), dict):
            settings["dequantize"] = True


def refuse_unknown_form(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose config names a quantised form that nobody would unpack.

    Args:
        name: how the user calls it.
        config: the keys of config.json.

    Raises:
        ModelError: it names the form.
    """
    method = stated_method(config)
    maker = ONLY_FOR.get(str(method)) or ("MLX" if isinstance(config.get("quantization"), dict) else None)
    if maker:
        raise ModelError(f"{name} was quantized for {maker}, and no other tool reads its weights", hint=ELSEWHERE)
    if method is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise _refusal(name, MODELOPT if method.startswith("modelopt") else method)


def refuse_packed(name: str, folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder with packed weights, where its config names no quantised form.

    Args:
        name: how the user calls it.
        folder: holds the checkpoint.
        config: the keys of config.json.

    Raises:
        ModelError: it names what is packed.
    """
    if stated_method(config):
        return
    if (folder / MODELOPT_FILE).is_file():
        raise _refusal(name, MODELOPT)
    packed = {
        tensor: header.dtype
        for tensor, header in read_headers(folder).items()
        if header.dtype not in WHOLE and not tensor.endswith(MASKS)
    }
    if packed:
        kinds = ", ".join(sorted(set(packed.values())))
        raise _refusal(name, f"numbers of type {kinds} ({_shown(packed)}), of which its config.json says nothing")


def check_unpacked(name: str, model: Any, unexpected: Iterable[str]) -> None:
    """Refuse a loaded model whose weights are not what the checkpoint means.

    Args:
        name: how the user calls it.
        model: as transformers has loaded it.
        unexpected: names of tensors of the checkpoint for which the model has no place.

    Raises:
        ModelError: scales of its weights were left out, or packed weights were left as they are.
    """
    modules = {module.removeprefix(f"{model.base_model_prefix}.") for module, _ in model.named_modules()}
    scales = [key for key in unexpected if _scales_of(key.removeprefix(f"{model.base_model_prefix}.")) in modules]
    if scales:
        raise _refusal(name, f"nothing reads {len(scales)} of its tensors ({_shown(scales)})")
    packed = [key for key, tensor in model.named_parameters() if tensor.dtype.itemsize == 1]
    if packed and not _quantizes(model):
        raise _refusal(name, f"its weights stay packed ({_shown(packed)})")


def convert_unpacked(model: Any, dtype: Any) -> None:
    """Give unpacked weights the type that was asked for: transformers gives them that of their scales, or bfloat16.

    Args:
        model: as transformers has loaded it, from a quantised checkpoint.
        dtype: torch's type.
    """
    if _quantizes(model):
        return
    kept = {re.compile(pattern): kind for pattern, kind in model._get_dtype_plan(dtype).items()}
    for name, parameter in model.named_parameters():
        kind = next((kind for pattern, kind in kept.items() if pattern.search(name)), dtype)
        if parameter.is_floating_point() and parameter.dtype != kind:
            parameter.data = parameter.data.to(kind)


def _quantizes(model: Any) -> bool:
    """Whether the model computes with packed weights."""
    return getattr(model, "hf_quantizer", None) is not None


def _scales_of(key: str) -> str | None:
    """The module whose weights a tensor scales, by its name; None for other tensors."""
    module, _, last = key.rpartition(".")
    if not SCALES.fullmatch(last) or OF_ACTIVATIONS.fullmatch(last):
        return None
    experts, found, _ = module.partition(".experts.")  # in the model, all of a layer are one module
    return f"{experts}.experts" if found else module


def _refusal(name: str, form: str) -> ModelError:
    return ModelError(f"{name} is quantized in a form that transformers does not unpack: {form}", hint=ELSEWHERE)


def _shown(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:2]) + (", ..." if len(shown) > 2 else "")


def not_split(name: str) -> ModelError:
    """The error of a checkpoint whose weights are quantised, on several devices."""
    hint = "leave out --tensor-parallel-size, or choose the model it was made from"
    return ModelError(f"model {name} has quantised weights, which cannot be split over devices", hint=hint)
