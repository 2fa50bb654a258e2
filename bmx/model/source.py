"""Where the files of a model are: a hub id, a local folder, a GGUF file or the demo model."""

from __future__ import annotations

from bmx.config import EngineConfig
from bmx.errors import ModelError
from bmx.model.demo import local_path
from bmx.model.folders import SOURCES, refuse_no_model
from bmx.model.gguf_cache import unpacked_folder
from bmx.model.gguf_file import find_parts
from bmx.model.hub import reach_model


def find_source(config: EngineConfig) -> str:
    """The folder or hub id to load from; a GGUF file is first unpacked into a folder that is kept.

    Raises:
        ModelError: the demo model is not installed, or the file or folder does not exist.
    """
    path = local_path(config.model)
    name = str(path) if config.model == "demo" else config.model
    if path.suffix.lower() == ".gguf":
        return str(unpacked_folder(find_parts(path, name)))
    if path.exists():
        try:
            refuse_no_model(path, name)
        except OSError as error:
            raise ModelError(f"cannot read {name}: {error.strerror}") from None
        return str(path)
    if name.startswith(("/", "./", "../", "~")):
        raise ModelError(f"no such model folder: {name}", hint=SOURCES)
    reach_model(name, config.revision)
    return name
