"""A checkpoint's description of itself: config.json, and the names, types and shapes of its safetensors tensors.

Reads headers, never weights, and needs no torch; of architectures, it knows the usual names of tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmx.errors import ModelError

MAX_HEADER = 100_000_000  # bytes; the format's own limit
LENGTH_BYTES = 8  # little-endian, before the header
FLOATS = {"F64", "F32", "F16", "BF16"}  # loading converts these to the type of the activations
UNPACKED = {*FLOATS, "F8_E4M3", "F8_E5M2"}  # stored in the shape that the tensor has in the model
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
DAMAGED = "the file is damaged, an unfinished download or a git-lfs pointer: download it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """One tensor of a checkpoint.

    Attributes:
        dtype: its type by the name that safetensors uses: ``BF16``, ``F8_E4M3``, ...
        shape: its sizes; quantised tensors may be packed.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of a folder's config.json.

    Raises:
        ModelError: the file is missing, or is not a JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        reason = "" if isinstance(config, dict) else "is not an object"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        reason = "is not JSON"
    if reason:
        raise ModelError(
            f"cannot load model {folder}: config.json {reason}", hint="correct it, or download the model again"
        )
    return dict(config)


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """The tensors of a folder's safetensors files by name; empty for a folder without such files.

    As transformers does, it reads ``model.safetensors`` if it exists, else the shards that
    ``model.safetensors.index.json`` names, else every safetensors file.

    Raises:
        ModelError: a file is missing, damaged, or shorter than its header says.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files: Iterable[Path]
    if single.exists():
        files = [single]
    elif index.exists():
        files = _shards(index)
    else:
        files = sorted(folder.glob("*.safetensors"))
    headers: dict[str, TensorHeader] = {}
    for file in files:
        headers.update(_read_file(file))
    return headers


def weight_bytes(headers: Mapping[str, TensorHeader], itemsize: int) -> int:
    """Bytes of the tensors once loaded.

    Args:
        headers: the tensors by name.
        itemsize: bytes of an activation; floating tensors are converted to its type, quantised ones stay as they are.
    """
    return sum(
        tensor.size * itemsize if tensor.dtype in FLOATS else math.ceil(tensor.size * _bits(tensor.dtype) / 8)
        for tensor in headers.values()
    )


def sizes_in_headers(headers: Mapping[str, TensorHeader], heads: int, kv_heads: int, head_dim: int) -> dict[str, float]:
    """The sizes that follow from the shapes of the tensors, by their keys in config.json.

    Packed tensors tell nothing. A width alone does not tell how many heads share it, so config.json's heads are taken.

    Args:
        headers: the tensors by name.
        heads: query heads, by config.json.
        kv_heads: key and value heads, by config.json.
        head_dim: size of a head, by config.json.
    """
    names = {name.removeprefix("model."): tensor for name, tensor in headers.items()}
    layers = [int(name.split(".")[1]) for name in names if re.match(r"layers\.\d+\.", name)]
    weights = {
        name.removesuffix(".weight").removeprefix("layers.0."): tensor.shape
        for name, tensor in names.items()
        if len(tensor.shape) == 2 and tensor.dtype in UNPACKED
    }
    sizes: dict[str, float] = {"num_hidden_layers": max(layers) + 1} if layers else {}
    if "embed_tokens" in weights:
        sizes |= dict(zip(("vocab_size", "hidden_size"), weights["embed_tokens"], strict=True))
    if "mlp.down_proj" in weights:
        sizes["intermediate_size"] = weights["mlp.down_proj"][1]
    if "self_attn.o_proj" not in weights or not weights.keys() & {"self_attn.k_proj", "self_attn.qkv_proj"}:
        return sizes
    q = weights["self_attn.o_proj"][1]
    k = weights["self_attn.k_proj"][0] if "self_attn.k_proj" in weights else (weights["self_attn.qkv_proj"][0] - q) / 2
    if q / heads == k / kv_heads:
        return sizes | {"head_dim": q / heads}
    return sizes | {"num_attention_heads": q / head_dim, "num_key_value_heads": k / head_dim}


def _bits(dtype: str) -> int:
    """Bits of an element: the number in the type's name, except for types smaller than a byte."""
    if dtype in BITS:
        return BITS[dtype]
    digits = dtype.partition("_")[0].lstrip("BFIUC")
    return int(digits) if digits.isdigit() else 8  # BOOL


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        shards = [index.parent / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"cannot read {index}: it names no shards", hint=DAMAGED) from error
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"{index.parent} is incomplete: {len(missing)} of {len(shards)} weight files are missing ({shown})",
            hint="download the model again",
        )
    return shards


def _read_file(file: Path) -> dict[str, TensorHeader]:
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(MAX_HEADER, size - LENGTH_BYTES):
                raise ModelError(_header_problem(file, size, length), hint=DAMAGED)
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        headers = {name: _tensor(entry) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError(f"cannot read {file}: its safetensors header is corrupt", hint=DAMAGED) from error
    expected = LENGTH_BYTES + length + end
    if size < expected:
        raise ModelError(
            f"cannot read {file}: it has {size:,} bytes, and its header promises {expected:,}", hint=DAMAGED
        )
    return headers


def _header_problem(file: Path, size: int, length: int) -> str:
    if size >= LENGTH_BYTES and length > MAX_HEADER:
        return f"cannot read {file}: its header would be {length:,} bytes long, and safetensors allows {MAX_HEADER:,}"
    return f"cannot read {file}: it ends within its header"


def _tensor(entry: Any) -> TensorHeader:
    """A checked entry of a header.

    Raises:
        ValueError: a size is not a number, or is negative.
        KeyError: a part is missing.
    """
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    sizes = [*shape, begin, end - begin]
    if type(dtype) is not str or any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"not a tensor's entry: {entry}")
    return TensorHeader(dtype=dtype, shape=tuple(shape))
