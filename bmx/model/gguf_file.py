"""What stands in the head of a GGUF file, whole or split. Knows the format; knows no models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmx.errors import ModelError
from bmx.model.folders import SOURCES

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQS, LONG, SHORT)
OTHER_WAY = "use the model's own folder with config.json and safetensors, as it was before it was converted to GGUF"
BIG_ARRAYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
NAMES = "name the parts model-00001-of-00003.gguf and so on, or merge them: llama-gguf-split --merge FIRST WHOLE.gguf"
NO_TOKEN = 2**32 - 1  # how some writers say that there is none
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def find_parts(file: Path, name: str) -> list[Path]:
    """The files of a model in order: all parts of a split one, whichever is given; else the file alone.

    Args:
        file: a GGUF file.
        name: how the user calls it.

    Raises:
        ModelError: the file does not exist, or other parts of it are missing.
    """
    if not file.is_file():
        raise ModelError(f"no such model file: {name}", hint=SOURCES)
    match = PART.fullmatch(file.name)
    if not match:
        return [file]
    stem, _, count, suffix = match.groups()
    parts = [file.with_name(f"{stem}-{i:05}-of-{count}{suffix}") for i in range(1, int(count) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"{name} is a part of a split model, and {len(missing)} of {int(count)} parts are missing ({shown})",
            hint=f"put all parts in {file.parent}, or merge them: llama-gguf-split --merge FIRST WHOLE.gguf",
        )
    return parts


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file's metadata and the shapes of its tensors.

    Attributes:
        name: the file, for messages.
        metadata: values by their keys; long arrays are left out.
        sizes: elements of each tensor by its name.
        factors: values of the tensors that change rotary frequencies.
    """

    name: str
    metadata: Mapping[str, Any]
    sizes: Mapping[str, int]
    factors: Mapping[str, list[float]]

    @classmethod
    def read(cls, parts: Sequence[Path]) -> GgufFile:
        """Read the head of a file, or of the parts of a split one, and no weights.

        Raises:
            ModelError: it holds something else than a whole model.
            Exception: whatever the reader raises about a broken file.
        """
        from gguf import GGUFReader

        readers = [GGUFReader(part) for part in parts]
        metadata = {
            name: field.contents()
            for name, field in readers[0].fields.items()
            if name not in BIG_ARRAYS and not name.startswith("GGUF.")
        }
        kind, count = metadata.get("general.type", "model"), metadata.get("split.count") or 1
        if kind != "model":
            raise ModelError(f"{parts[0]} is not a model: it says that it is of the type {kind}")
        if count != len(parts):
            raise ModelError(f"{parts[0]} is one of {count} parts of a model", hint=NAMES)
        tensors = [tensor for reader in readers for tensor in reader.tensors]
        return cls(
            str(parts[0]),
            metadata,
            {tensor.name: int(tensor.n_elements) for tensor in tensors},
            {tensor.name: tensor.data.tolist() for tensor in tensors if tensor.name in ROPE_TENSORS},
        )

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def keys(self) -> Iterator[tuple[str, Any]]:
        """The keys of its architecture without the architecture's name, and their values."""
        prefix = f"{self.architecture}."
        for key, value in self.metadata.items():
            if key.startswith(prefix):
                yield key.removeprefix(prefix), value

    def refusal(self, reason: str) -> ModelError:
        """The error that refuses the file."""
        return ModelError(f"bmx cannot read {self.name} faithfully: {reason}", hint=OTHER_WAY)

    @property
    def end_token_ids(self) -> list[int]:
        """Ids of the tokens that end a text, a turn or a message."""
        ids = {self.metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS}
        return sorted(int(token) for token in ids if token is not None and token != NO_TOKEN)

    def check_all_read(self, model: Any) -> None:
        """Refuse the file if it has more numbers than the loaded model: some of its tensors were left out.

        Raises:
            ModelError: it has.
        """
        held = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
        there = sum(size for name, size in self.sizes.items() if name not in ROPE_TENSORS and "rot_embd" not in name)
        if there > sum(held.values()):
            reason = f"its tensors have {there:,} numbers, and {type(model).__name__} {sum(held.values()):,}"
            raise self.refusal(reason)
