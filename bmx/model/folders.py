"""Folders and files that look like a model and are none, or are one that bmx cannot read: what they are, in a line.

Knows the files of other tools and formats; loads nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bmx.errors import ModelError

SOURCES = "--model takes a hub id, a local folder with config.json and safetensors, or a .gguf file"
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json", "*.bpe", "tokenizer*.py")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ELSEWHERE = "use the model that it was made from, in transformers' format, or a .gguf file of it"
MERGE = "merge it into its model once: peft's merge_and_unload(), then save_pretrained() of the model and its tokenizer"
SAVE = "save it as safetensors once, where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
OTHER_FORMATS = {"*.onnx": "ONNX", "onnx/*.onnx": "ONNX", "*.h5": "TensorFlow", "*.msgpack": "Flax"}


def refuse_no_model(path: Path, name: str) -> None:
    """Refuse a file that is no GGUF file, or a folder without config.json, and say what it is.

    Args:
        path: exists.
        name: how the user calls it.

    Raises:
        ModelError: always, but for a folder with config.json.
    """
    if path.is_file():
        raise _of_file(path, name)
    if not path.is_dir():
        raise ModelError(f"{name} is neither a file nor a folder", hint=SOURCES)
    if (path / "config.json").is_file():
        return
    inner = sorted(file.parent for pattern in ("*", "snapshots/*") for file in path.glob(f"{pattern}/config.json"))
    if (path / "adapter_config.json").is_file():
        raise _adapter(path, name)
    _refuse_several("GGUF files", sorted(path.glob("*.gguf")))
    _refuse_several("models in folders of their own", inner)
    if own := _names(path, ["params.json", "consolidated*"]):
        message = f"{name} has a model in its author's own format ({_shown(own)})"
        raise ModelError(message, hint="take the release in transformers' format, with config.json and safetensors")
    if (path / "model_index.json").is_file():
        raise ModelError(f"{name} makes images or sound: it is a pipeline of diffusers", hint=SOURCES)
    _refuse_format(path, name)
    missing = "it is empty" if not any(path.iterdir()) else "it has no config.json"
    raise ModelError(f"{name} is not a model folder: {missing}", hint=SOURCES)


def refuse_no_weights(folder: Path, name: str) -> None:
    """Refuse a folder with config.json whose weights are missing, or in files that bmx cannot read.

    Args:
        folder: has config.json.
        name: how the user calls it.

    Raises:
        ModelError: it says what is there instead.
    """
    if any(not file.name.startswith("adapter_") for file in folder.glob("*.safetensors")):
        return
    if (folder / "adapter_config.json").is_file():
        raise _adapter(folder, name)
    _refuse_several("GGUF files", sorted(folder.glob("*.gguf")))
    if pickled := _names(folder, PICKLED):
        message = f"{name} has pickled weights only ({_shown(pickled)}): they can run code, and bmx never reads them"
        raise ModelError(message, hint=f"take its safetensors, or {SAVE}")
    _refuse_format(folder, name)
    if not list(folder.glob("*.index.json")):  # else the shards that it names are missing
        raise ModelError(f"{name} has no weights: there is no model.safetensors", hint="download the model again")


def tokenizer_problem(folder: Path) -> str:
    """Why the tokenizer in a folder could not be made."""
    found = _names(folder, TOKENIZER_FILES)
    if found:
        return f"its tokenizer ({_shown(found)}) needs a package that is missing, or another file beside it"
    return "it has no tokenizer: neither tokenizer.json nor tokenizer.model, nor vocab.json with merges.txt"


def _refuse_several(what: str, places: list[Path]) -> None:
    if places:
        raise ModelError(
            f"{places[0].parent} holds {what}", hint=f"--model takes one of them: {_shown(list(map(str, places)))}"
        )


def _of_file(path: Path, name: str) -> ModelError:
    with path.open("rb") as stream:
        begins_as_gguf = stream.read(4) == b"GGUF"
    if begins_as_gguf:
        return ModelError(f"{name} is a GGUF file without the ending .gguf", hint=f"ln -s {name} {name}.gguf")
    if path.suffix == ".safetensors":
        hint = "--model takes the folder that holds it, with its config.json and tokenizer"
        return ModelError(f"{name} is only the weights of a model", hint=hint)
    if any(path.match(pattern) for pattern in PICKLED):
        return ModelError(f"{name} holds pickled weights: they can run code, and bmx never reads them", hint=SOURCES)
    return ModelError(f"{name} is not a model", hint=SOURCES)


def _adapter(folder: Path, name: str) -> ModelError:
    base = _json(folder / "adapter_config.json").get("base_model_name_or_path")
    return ModelError(f"{name} is a LoRA adapter of {base or 'some model'}, not a whole model", hint=MERGE)


def _refuse_format(folder: Path, name: str) -> None:
    for pattern, maker in OTHER_FORMATS.items():
        if found := _names(folder, [pattern]):
            raise ModelError(f"{name} is a model for {maker} ({_shown(found)})", hint=ELSEWHERE)


def _names(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Names of the files in a folder that match one of some patterns."""
    found = {file.relative_to(folder) for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(map(str, found))


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _json(file: Path) -> dict[str, Any]:
    """A JSON object in a file; empty for anything else, which is for the file's own reader to refuse."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
