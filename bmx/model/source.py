"""Where the files of a model are: a hub id, a local folder, a GGUF file or the demo model."""

from __future__ import annotations

from bmx.config import EngineConfig
from bmx.errors import ModelError
from bmx.model.demo import local_path
from bmx.model.gguf_cache import find_parts, unpacked_folder
from bmx.model.hub import reach_model
from bmx.model.loader import SOURCES


def find_source(config: EngineConfig) -> str:
    """The folder or hub id to load from; a GGUF file is first unpacked into a folder that is kept.

    Raises:
        ModelError: the demo model is not installed, or the file or folder does not exist.
    """
    path = local_path(config.model)
    name = str(path) if config.model == "demo" else config.model
    if path.suffix.lower() == ".gguf":
        return str(unpacked_folder(find_parts(path, name)))
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{name} is not a model folder: it has no config.json", hint=SOURCES)
    if not path.exists() and name.startswith(("/", "./", "../", "~")):
        raise ModelError(f"no such model folder: {name}", hint=SOURCES)
    if path.exists():
        return str(path)
    reach_model(name, config.revision)
    return name
