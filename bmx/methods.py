"""Methods of the literature by name: each is a set of settings of the cache.

Knows names and values; the settings themselves are declared in ``bmx.config``. The guide names the papers, and what
differs from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bmx.errors import UsageError

_ARCHIVED = {"kv_archive": "model"}  # every pair is kept as it is, behind the slots
METHODS: Mapping[str, Mapping[str, Any]] = {
    "a2sf": {"kv_policy": "decay"},
    "batch-max": {"kv_policy": "average-attention"},
    "clusterkv": _ARCHIVED | {"kv_recall": "clusters", "kv_recall_pairs": 1024},
    "expected-attention": {"kv_policy": "expected-attention"},
    "full": {"kv_policy": "none"},
    "h2o": {"kv_policy": "h2o"},
    "keydiff": {"kv_policy": "keydiff"},
    "kivi": {"kv_policy": "none", "kv_format": "int2"},
    "lagkv": {"kv_policy": "lagkv"},
    "pyramidkv": {"kv_policy": "window", "kv_layer_budgets": "pyramid"},
    "r-kv": {"kv_policy": "r-kv"},
    "refreshkv": _ARCHIVED | {"kv_recall": "attention", "kv_recall_every": 5},
    "rocketkv": {"kv_policy": "rocketkv", "kv_recall": "pages"},
    "roco": {"kv_policy": "roco"},
    "snapkv": {"kv_policy": "window"},
    "specache": _ARCHIVED | {"kv_recall": "bits", "kv_recall_pairs": 100},
    "streaming-llm": {"kv_policy": "streaming"},
    "tova": {"kv_policy": "tova"},
    "vatp": {"kv_value_norm": True},
}


def parse_method(text: str) -> str:
    """A method's name, in whatever case it was written.

    Raises:
        ValueError: there is no such method.
    """
    name = str(text).strip().lower()
    if name not in METHODS:
        raise ValueError(f"no method: {text!r}")
    return name


def expand_method(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings with a method's own in the place of its name.

    Args:
        given: settings by name, in their types.

    Raises:
        UsageError: a setting that was given contradicts the method.
    """
    values = dict(given)
    name = values.pop("method", None)
    own = dict(METHODS[name]) if name else {}
    for setting, value in own.items():
        if setting in values and values[setting] != value:
            raise UsageError(
                f"method {name} sets {setting} to {value}; it was given as {values[setting]}",
                hint="leave one of them out: a method is nothing but its settings, which can be given one by one",
            )
    return values | own
