"""Unpacks GGUF files, whole or split, into folders that are kept in the user's cache.

Knows transformers' loading of GGUF files; knows nothing of running a model.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bmx.cache import cache_folder, filled, is_whole, remedy
from bmx.errors import ModelError
from bmx.model.gguf_config import complete_config
from bmx.model.gguf_file import GgufFile
from bmx.model.loader import check_complete, loading_errors, silence_transformers
from bmx.model.spec import check_config

CACHE_VERSION = "2"  # of unpacked GGUF files


def kept_folder(parts: Sequence[Path]) -> Path | None:
    """The folder in which the unpacked model of these parts is kept; None if it is not there, or damaged."""
    with contextlib.suppress(OSError):
        folder = _folder(parts)
        return folder if is_whole(folder) else None
    return None


def unpacked_folder(parts: Sequence[Path]) -> Path:
    """The folder of a GGUF model in bfloat16 and its tokenizer, unpacked once for each content of its parts.

    Raises:
        ModelError: the file cannot be read faithfully, or the cache cannot be written.
    """
    try:
        return filled(_folder(parts), partial(_unpack, parts))
    except OSError as error:
        place = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        raise ModelError(
            f"cannot keep the unpacked model in the cache {place}/bmx: {error.strerror or error}",
            hint=f"make room there if it is full, or {remedy(error)}",
        ) from None


def _folder(parts: Sequence[Path]) -> Path:
    return cache_folder("gguf") / f"{_digest(parts)}-{CACHE_VERSION}"


def read_config(parts: Sequence[Path]) -> Any:
    """The config of a GGUF model, with all that its file says.

    Raises:
        ModelError: the file cannot be read faithfully, or bmx cannot run its architecture.
    """
    return _read_config(parts)[1]


def _read_config(parts: Sequence[Path]) -> tuple[GgufFile, Any]:
    from transformers import AutoConfig

    silence_transformers()
    with loading_errors(str(parts[0])):
        file = GgufFile.read(parts)
        try:
            config = AutoConfig.from_pretrained(parts[0].parent, gguf_file=parts[0].name)
        except Exception as error:
            raise file.refusal(f"transformers fails on its architecture, {file.architecture}: {error}") from error
    check_config(config)
    complete_config(file, config)
    return file, config


def _unpack(parts: Sequence[Path], folder: Path) -> None:
    import torch
    import transformers

    if sum(part.stat().st_size for part in parts) / 2 > shutil.disk_usage(folder).free:  # more than half, in any format
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    file, config = _read_config(parts)
    with loading_errors(str(parts[0])), contextlib.redirect_stderr(io.StringIO()):  # its reader draws bars of its own
        whole = parts[0] if len(parts) == 1 else _merge(parts, folder / "whole.gguf")
        extra = {}
        if hasattr(transformers, "GgufConfig"):  # newer releases keep the weights packed by default
            extra["quantization_config"] = transformers.GgufConfig(gguf_file=whole.name, dequantize=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(whole.parent, gguf_file=whole.name)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            whole.parent,
            gguf_file=whole.name,
            config=config,
            dtype=torch.bfloat16,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # those are refused below, by name
            **extra,
        )
    check_complete(file.name, loading)
    file.check_all_read(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config.eos_token_id = config.eos_token_id
    _save(model, folder)
    tokenizer.save_pretrained(folder)
    if len(parts) > 1:
        del model
        whole.unlink()


def _save(model: Any, folder: Path) -> None:
    """Write a model's files.

    Raises:
        OSError: they cannot be written; safetensors has errors of its own for that.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def _merge(parts: Sequence[Path], whole: Path) -> Path:
    """Write the parts of a split model into one file, which transformers can read."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    readers = [GGUFReader(part) for part in parts]
    fields = {name: field for name, field in readers[0].fields.items() if not name.startswith(("GGUF.", "split."))}
    writer = GGUFWriter(whole, fields.pop("general.architecture").contents())
    for name, field in fields.items():
        kind, inner = field.types[0], field.types[-1]
        writer.add_key_value(name, field.contents(), kind, inner if kind == GGUFValueType.ARRAY else None)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
    return whole


def _digest(parts: Sequence[Path]) -> str:
    digests = []
    for part in parts:
        with part.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0][:32] if len(parts) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()[:32]
