"""Preview of a model's spec before it is loaded: from its config alone, or from its model on the meta device.

Knows where configs are; reads no weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bmx.config import EngineConfig
from bmx.errors import ModelError, PreviewError
from bmx.kernels import choose, fp8, int8
from bmx.model.checkpoint import read_config as read_keys
from bmx.model.checkpoint import read_headers, weight_bytes
from bmx.model.config_spec import known_keys, spec_from_config
from bmx.model.demo import local_path
from bmx.model.gguf_cache import kept_folder, read_config
from bmx.model.gguf_file import find_parts
from bmx.model.loader import check_libraries, check_quantization, loading_errors, prepare, silence_transformers
from bmx.model.number_type import dtype_name
from bmx.model.quantized_forms import not_split, refuse_packed, refuse_unknown_form, whole_in_memory
from bmx.model.source import find_source
from bmx.model.spec import ModelSpec, check_config
from bmx.model.text_side import TextSide, find_text_side

TOKENIZER_SIZE = 25  # bytes in memory for each byte of tokenizer.json, measured with one vocabulary of 49,000 tokens
OUTPUT_BYTES = 8  # an int8 layer of compiled kernels keeps a scale and a sum for each output
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def preview_spec(config: EngineConfig, device: str) -> ModelSpec:
    """The spec that the configured model will have once loaded; no weights are read.

    A local folder's config.json is enough for common architectures, without torch. For others, transformers builds
    the model on the meta device, where tensors have no contents.

    Args:
        config: names the model.
        device: ``cpu`` or ``cuda``; decides on the type of numbers if the configuration does not.

    Raises:
        ModelError: the model cannot be found or read, or bmx cannot run it.
        UsageError: quantised weights would be slower here.
    """
    spec = _unquantized_spec(config, device)
    return spec if config.quantization == "none" else with_quantized_weights(spec, config, device)


def with_quantized_weights(spec: ModelSpec, config: EngineConfig, device: str) -> ModelSpec:
    """About the spec of the model with quantised linear layers, as if all of them read the hidden state.

    Where the library multiplies int8, projections to keys and values may be too small for it.

    Args:
        spec: of the model without them.
        config: the settings.
        device: ``cpu`` or ``cuda``.

    Raises:
        UsageError: they would be slower here.
    """
    auto = "bfloat16" if spec.itemsize == ITEMSIZE["bfloat16"] else "float32"
    dtype = auto if config.dtype == "auto" else config.dtype
    check_quantization(config.quantization, dtype, device)
    weights = 0 if spec.merged_bytes else spec.costs.flops // 2  # experts stay as they are
    hidden = spec.head_bytes // spec.itemsize // spec.vocab
    if config.quantization == "fp8":
        held = weights // hidden * (hidden + fp8.OUTPUT_BYTES)
    elif int8.takes(choose(device).capabilities, dtype, 0, hidden):
        held = weights // hidden * (hidden + OUTPUT_BYTES)
    else:
        widths = (layer.kv_heads * dim for layer in spec.layers for dim in (layer.key_dim, layer.value_dim))
        small = sum(width * hidden for width in widths if width * hidden < int8.LEAST_WEIGHTS)
        weights -= min(weights, small)
        held = int8.packed_bytes(weights // hidden, hidden)
    left = spec.weight_bytes - weights * spec.itemsize
    return replace(spec, weight_bytes=left + held, quantization=config.quantization)


def _unquantized_spec(config: EngineConfig, device: str) -> ModelSpec:
    source, gguf = locate_files(config)
    folder = Path(source)
    plain_folder = not gguf and not config.trust_remote_code and folder.is_dir()
    if not gguf and folder.is_dir():
        keys = read_keys(folder)
        refuse_unknown_form(config.model, keys)
        refuse_packed(config.model, folder, keys)
    known = known_keys(folder) if plain_folder else None
    itemsize = ITEMSIZE[dtype_name(config, device, known)] if known else 0
    known = None if config.tensor_parallel_size > 1 else known  # parts are those of a model
    spec = spec_from_config(folder, itemsize, whole_in_memory(known, device)) if known else None
    return spec or _spec_from_transformers(source, gguf, config, device)


def _spec_from_transformers(source: str, gguf: str | None, config: EngineConfig, device: str) -> ModelSpec:
    check_libraries()
    from transformers import AutoConfig

    silence_transformers()
    trust = {"trust_remote_code": config.trust_remote_code}
    if gguf:
        model_config = read_config(find_parts(Path(source) / gguf, config.model))
    else:
        with loading_errors(config.model):
            model_config = AutoConfig.from_pretrained(source, revision=config.revision, **trust)
        refuse_unknown_form(config.model, model_config.to_dict())
    check_config(model_config)
    dtype = dtype_name(config, device, model_config.to_dict())
    quantized = getattr(model_config, "quantization_config", None) is not None
    stored = quantized and not gguf and not whole_in_memory(model_config.to_dict(), device)
    if quantized and config.tensor_parallel_size > 1:
        raise not_split(config.model)
    if quantized:
        del model_config.quantization_config
    with loading_errors(config.model):
        text_side = find_text_side(model_config, config.trust_remote_code)
    try:
        spec = _meta_spec(text_side, dtype, config)
    except ModelError:
        if dtype == "bfloat16":
            raise
        spec = _meta_spec(text_side, "bfloat16", config)  # on the meta device, experts take this type alone
        factor = ITEMSIZE[dtype] / spec.itemsize
        spec = replace(
            spec,
            costs=spec.costs.scaled(factor),
            weight_bytes=round(factor * spec.weight_bytes),
            head_bytes=round(factor * spec.head_bytes),
            itemsize=ITEMSIZE[dtype],
            states=tuple(s if s.recurrent else replace(s, itemsize=ITEMSIZE[dtype]) for s in spec.states),
        )
    found = read_headers(Path(source)) if stored and Path(source).is_dir() else {}
    headers = {name: tensor for name, tensor in found.items() if text_side.holds(name)}
    return replace(spec, weight_bytes=weight_bytes(headers, spec.itemsize)) if headers else spec


def _meta_spec(text_side: TextSide, dtype: str, config: EngineConfig) -> ModelSpec:
    with loading_errors(config.model):
        model = text_side.on_meta(dtype, config.trust_remote_code)
    whole = prepare(model).spec
    return whole if config.tensor_parallel_size == 1 else _part_of(whole, text_side, dtype, config)


def _part_of(whole: ModelSpec, text_side: TextSide, dtype: str, config: EngineConfig) -> ModelSpec:
    """The spec of one device's part of a model.

    Raises:
        ModelError: it cannot be split.
        UsageError: not over as many devices.
    """
    from bmx.model.split_modules import check_parts, split

    devices = config.tensor_parallel_size
    model = split(text_side.on_meta(dtype, config.trust_remote_code), devices)
    try:
        part = prepare(model).spec
    except PreviewError:
        check_parts(whole, None, devices)
        raise
    check_parts(whole, part, devices)
    return part


def locate_files(config: EngineConfig) -> tuple[str, str | None]:
    """The folder or hub id of a model, and the name of its (first) GGUF file if that has not been unpacked yet.

    Raises:
        ModelError: there is no such file, or the demo model is not installed.
    """
    path = local_path(config.model)
    if path.suffix.lower() != ".gguf":
        return find_source(config), None
    parts = find_parts(path, config.model)
    folder = kept_folder(parts)
    return (str(folder), None) if folder else (str(path.parent), parts[0].name)


def tokenizer_bytes(config: EngineConfig) -> int:
    """Estimated bytes of a local model's tokenizer in memory; 0 without a tokenizer.json to go by."""
    source, _ = locate_files(config)
    file = Path(source) / "tokenizer.json"
    return TOKENIZER_SIZE * file.stat().st_size if file.is_file() else 0
