"""A model's sizes before it is loaded: from its config alone, or from transformers' model of tensors without contents.

Knows where configs lie; reads no weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bmx.config import EngineConfig
from bmx.errors import ModelError
from bmx.model.checkpoint import read_headers, weight_bytes
from bmx.model.config_spec import spec_from_config
from bmx.model.demo import local_path
from bmx.model.loader import (
    SOURCES,
    dtype_name,
    find_source,
    gguf_folder,
    int8_refusal,
    loading_errors,
    prepare,
    silence_transformers,
)
from bmx.model.spec import ModelSpec, check_config

TOKENIZER_SIZE = 25  # times its file, measured on one vocabulary of 49,000
OUTPUT_BYTES = 8  # of a layer in bytes: a scale and a sum
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def preview_spec(config: EngineConfig, device: str) -> ModelSpec:
    """What the configured model would be once loaded, without its weights.

    From a local folder's config.json where that says it all, without torch; else from a model of transformers on
    tensors that hold nothing.

    Args:
        device: ``cpu`` or ``cuda``, which decides on the type if the configuration does not.

    Raises:
        ModelError: not to be found or read, or bmx cannot run it.
    """
    if config.int8 and device != "cpu":
        raise int8_refusal()
    spec = _as_it_is(config, device)
    return _in_bytes(spec) if config.int8 else spec


def _in_bytes(spec: ModelSpec) -> ModelSpec:
    """About what a model would be with its linear layers in bytes: a byte a weight, and eight for each output."""
    weights = 0 if spec.merged_bytes else spec.costs.flops // 2  # experts stay as they are
    hidden = spec.head_bytes // spec.itemsize // spec.vocab
    less = weights * (spec.itemsize - 1) - OUTPUT_BYTES * weights // hidden
    return replace(spec, weight_bytes=spec.weight_bytes - less, int8=True)


def _as_it_is(config: EngineConfig, device: str) -> ModelSpec:
    source, gguf = locate_files(config)
    dtype = dtype_name(config, device)
    known = not gguf and not config.trust_remote_code and Path(source).is_dir()
    spec = spec_from_config(Path(source), ITEMSIZE[dtype]) if known else None
    return spec or _foreseen_by_transformers(source, gguf, config, dtype)


def _foreseen_by_transformers(source: str, gguf: str | None, config: EngineConfig, dtype: str) -> ModelSpec:
    from transformers import AutoConfig

    silence_transformers()
    trust = {"trust_remote_code": config.trust_remote_code}
    named = {"gguf_file": gguf} if gguf else {}
    with loading_errors(config.model):
        model_config = AutoConfig.from_pretrained(source, revision=config.revision, **named, **trust)
    check_config(model_config)
    quantised = getattr(model_config, "quantization_config", None) is not None
    if quantised:
        del model_config.quantization_config
    try:
        spec = _spec_without_contents(model_config, dtype, config)
    except ModelError:
        if dtype == "bfloat16":
            raise
        spec = _spec_without_contents(model_config, "bfloat16", config)  # the only type that experts take there
        factor = ITEMSIZE[dtype] / spec.itemsize
        spec = replace(
            spec,
            costs=spec.costs.scaled(factor),
            weight_bytes=round(factor * spec.weight_bytes),
            head_bytes=round(factor * spec.head_bytes),
            itemsize=ITEMSIZE[dtype],
        )
    headers = read_headers(Path(source)) if quantised and not gguf and Path(source).is_dir() else {}
    return replace(spec, weight_bytes=weight_bytes(headers, spec.itemsize)) if headers else spec


def _spec_without_contents(model_config: Any, dtype: str, config: EngineConfig) -> ModelSpec:
    import torch
    from transformers import AutoModelForCausalLM

    with loading_errors(config.model), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=getattr(torch, dtype), trust_remote_code=config.trust_remote_code
        )
    return prepare(model.eval()).spec


def locate_files(config: EngineConfig) -> tuple[str, str | None]:
    """The folder or hub id of a model, and the name of its GGUF file where that has not been unpacked yet."""
    path = local_path(config.model)
    if path.suffix.lower() != ".gguf":
        return find_source(config), None
    if not path.is_file():
        raise ModelError(f"no such model file: {config.model}", hint=SOURCES)
    folder = gguf_folder(path)
    return (str(folder), None) if (folder / "config.json").is_file() else (str(path.parent), path.name)


def tokenizer_bytes(config: EngineConfig) -> int:
    """About what a local model's tokenizer takes in memory; 0 where its file is not to be seen."""
    source, _ = locate_files(config)
    file = Path(source) / "tokenizer.json"
    return TOKENIZER_SIZE * file.stat().st_size if file.is_file() else 0
