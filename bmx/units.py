"""The notations of values: sizes, counts, times, shares, budgets and policies are read from text here.

Knows notations; knows no setting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from bmx.kv_formats import KV_FORMATS, format_name, formats_of
from bmx.methods import METHODS, parse_method
from bmx.policies import POLICIES, find_scorer

LEAST_MEMORY = 10**6  # no model runs in less: a smaller size has lost its unit
LayerFactors = tuple[float | tuple[float, ...], ...]  # of each layer, or of each of its kv heads
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class UnlikelyError(ValueError):
    """A value that can be read and that nobody means; ``hint`` says what may be meant."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def parse_bytes(text: str | int) -> int:
    """Bytes from ``300M``, ``8G`` (powers of ten) or ``8GiB`` (powers of two).

    Raises:
        ValueError: not a size, or not above zero.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmgt]i?|)b?", str(text).strip().lower())
    if not match:
        raise ValueError(f"not a size: {text!r}")
    size = float(match[1]) * _UNITS[match[2]]
    if not 1 <= size < 2**63:
        raise ValueError(f"not a size: {text!r}")
    return int(size)


def parse_memory(text: str | int) -> int:
    """Bytes of memory for a model, written as for ``parse_bytes``.

    Raises:
        ValueError: not a size, or too small for any model, as where a unit was forgotten.
    """
    size = parse_bytes(text)
    if size < LEAST_MEMORY:
        number = re.match(r"[0-9.]+", str(text).strip())
        value = float(number[0]) if number else 0
        meant = f"did you mean {value:g}{'G' if value < 200 else 'M'}? " if 0 < value < 1000 else ""
        shown = "1 byte" if size == 1 else f"{size:,} bytes"
        raise UnlikelyError(shown, f"{meant}sizes are written like 300M, 8G or 8GiB")
    return size


def parse_count(text: str | int) -> int:
    """Tokens or sequences from ``4096`` or ``32k`` (``k`` is 1,000, ``K`` is 1,024).

    Raises:
        ValueError: not a whole number above zero.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)([kK]?)", str(text).strip())
    number = float(match[1]) * {"": 1, "k": 1000, "K": 1024}[match[2]] if match else 0
    if not 1 <= number < 2**63 or number != int(number):
        raise ValueError(f"not a count: {text!r}")
    return int(number)


def parse_counts(text: str | int) -> tuple[int, ...]:
    """Counts from ``1000,2k``.

    Raises:
        ValueError: one of them is not a count.
    """
    return tuple(map(parse_count, str(text).split(",")))


def parse_budget(text: str | float) -> int | float | str:
    """A KV budget from ``1024``, ``2k``, ``25%`` (of the prompt; 0.25 in a file), ``25%bytes`` or ``auto``.

    Raises:
        ValueError: not in any of these notations.
    """
    words = str(text).strip()
    if words == "auto":
        return words
    if words.endswith("bytes"):
        return f"{100 * _byte_share(words):g}%bytes"
    if isinstance(text, float) or words.endswith("%") or words.startswith("0."):
        share = float(words.removesuffix("%")) / (100 if words.endswith("%") else 1)
        if not 0 < share < 1:
            raise ValueError(f"not a share below 100%: {text!r}")
        return share
    return parse_count(words)


def byte_share(budget: float | str) -> float | None:
    """The share of the full cache's bytes that a budget is; None for one in pairs."""
    return _byte_share(budget) if isinstance(budget, str) and budget.endswith("bytes") else None


def is_budget(value: float | str) -> bool:
    """Whether a value is a KV budget as ``parse_budget`` returns it."""
    if isinstance(value, str):
        try:
            return parse_budget(value) == value
        except ValueError:
            return False
    return isinstance(value, int) or 0 < value < 1


def _byte_share(words: str) -> float:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)%\s*bytes", words)
    if not match or not 0 < float(match[1]) < 100:
        raise ValueError(f"not a share of bytes below 100%: {words!r}")
    return float(match[1]) / 100


def parse_policy(text: str) -> str:
    """A policy's name: one of bmx's own, or of another package's entry points.

    Raises:
        ValueError: neither bmx nor an installed package has such a policy.
    """
    if text not in POLICIES and find_scorer(text) is None:
        raise ValueError(f"no policy: {text!r}")
    return text


def parse_format(text: str) -> str:
    """A KV format's canonical name: ``int8`` for keys and values alike, ``int8/int4`` for each its own, or ``auto``.

    Raises:
        ValueError: not one or two names of formats.
    """
    return text if text == "auto" else format_name(*formats_of(str(text)))


def parse_layers(text: str) -> str | LayerFactors:
    """Layer budgets from ``uniform``, ``pyramid``, or factors like ``1.5,1,0.5``, which are scaled to a mean of 1.

    A layer's kv heads may have factors of their own: ``1.5:0.9,0.6:1``. The mean is that of the layers' means.

    Raises:
        ValueError: not in any of these notations.
    """
    if text in ("uniform", "pyramid"):
        return text
    layers = [tuple(float(head) for head in layer.split(":")) for layer in str(text).split(",")]
    if not all(0 < head < 1e6 for layer in layers for head in layer):
        raise ValueError(f"not factors: {text!r}")
    mean = sum(sum(layer) / len(layer) for layer in layers) / len(layers)
    scaled = (tuple(round(head / mean, 4) for head in layer) for layer in layers)
    return tuple(layer if len(layer) > 1 else layer[0] for layer in scaled)


def layers_text(layers: str | LayerFactors) -> str:
    """Layer budgets in the notation of ``parse_layers``."""
    if isinstance(layers, str):
        return layers
    return ",".join(":".join(f"{head:g}" for head in heads_of(layer)) for layer in layers)


def heads_of(layer: float | tuple[float, ...]) -> tuple[float, ...]:
    """A layer's factors: one for all of its kv heads, or one for each."""
    return (layer,) if isinstance(layer, int | float) else tuple(layer)


def parse_shared(text: str) -> str:
    """Pairs of layers from ``7:3,12:5``, in which layer 7 reads the keys and values of layer 3.

    Raises:
        ValueError: not such pairs, or a layer that would read those of a later layer.
    """
    pairs = [tuple(map(int, pair.split(":"))) for pair in str(text).split(",")]
    if not all(len(pair) == 2 and 0 <= pair[1] < pair[0] for pair in pairs) or len({p[0] for p in pairs}) < len(pairs):
        raise ValueError(f"not pairs of layers: {text!r}")
    return ",".join(f"{reader}:{owner}" for reader, owner in sorted(pairs))


def parse_seconds(text: str | float) -> float:
    """Seconds from ``30``, ``0.5``, ``90s``, ``5m`` or ``2h``.

    Raises:
        ValueError: not a time, or a negative one.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([smh]?)", str(text).strip().lower())
    if not match:
        raise ValueError(f"not a time: {text!r}")
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    if not seconds < 2**31:
        raise ValueError(f"not a time: {text!r}")
    return seconds


def parse_shard(text: str) -> str:
    """A share like ``2/8``: the second of eight.

    Raises:
        ValueError: not a share I/N with 1 <= I <= N.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", str(text).strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"not a share: {text!r}")
    return f"{int(match[1])}/{int(match[2])}"


def parse_object(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object from its text, or from a mapping of a YAML file or of Python.

    Raises:
        ValueError: not a JSON object.
        TypeError: a value that JSON does not have.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    found = json.loads(value if isinstance(value, str) else json.dumps(value), parse_constant=refuse)
    if not isinstance(found, dict):
        raise ValueError(f"not a JSON object: {value!r}")
    return found


def parse_schema(value: str | Mapping[str, Any]) -> str:
    """A JSON schema as compact text, from its text, or from a mapping of a YAML file or of Python.

    Raises:
        ValueError: not a JSON object.
        TypeError: a value that JSON does not have.
    """
    return json.dumps(parse_object(value), ensure_ascii=False, separators=(",", ":"))


def parse_names(text: str) -> tuple[str, ...]:
    """Names from ``title,url``.

    Raises:
        ValueError: one of them is empty.
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ValueError(f"an empty name: {text!r}")
    return names


EXPECTED: Mapping[Callable[[Any], Any], str] = {
    parse_budget: "a count like 1024 or 2k, a share of the prompt like 25%, or of its bytes like 25%bytes, or auto",
    parse_policy: f"one of {', '.join(POLICIES)}",
    parse_method: f"one of {', '.join(METHODS)}",
    parse_format: f"auto, {', '.join(KV_FORMATS)}, or those of keys and values, like int8/int4",
    parse_layers: "uniform, pyramid, a factor per layer like 1.5,1,0.5, or one per kv head like 1.2:0.8,1:1",
    parse_shared: "pairs of layers like 7:3,12:5",
    parse_bytes: "a size like 300M, 8G or 8GiB",
    parse_memory: "a size like 300M, 8G or 8GiB",
    parse_count: "a count like 4096 or 32k",
    parse_counts: "counts like 1000,2k",
    parse_seconds: "seconds, or a time like 90s, 5m or 2h",
    parse_object: 'a JSON object, like {"name": true}',
    parse_schema: "a JSON schema: a file of it, or its text, which begins with {",
    parse_names: "names like title,url",
    parse_shard: "a share like 2/8, the second of eight",
}


def now(ago: float = 0.0) -> str:
    """The time ``ago`` seconds ago, for files and logs: ISO 8601, UTC."""
    return (datetime.now(UTC) - timedelta(seconds=ago)).isoformat(timespec="seconds").replace("+00:00", "Z")
