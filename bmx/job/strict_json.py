"""Strict JSON: values that every reader understands in the same way.

Knows JSON; knows nothing of what values mean.
"""

from __future__ import annotations

import json
from math import isinf
from typing import Any, NoReturn


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _finite(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise ValueError(f"a number is too large: {text[:40]}")
    return number


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_reject_duplicate_keys)


def strict_loads(text: str) -> Any:
    """A value from JSON that every reader understands in the same way.

    Raises:
        ValueError: not JSON, NaN, Infinity, a number beyond a float, a key twice, half a surrogate pair, or nested
            too deep.
    """
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair") from None
    return value


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than this in a value of JSON."""
    nested = [value]
    for _ in range(levels):
        nested = [
            inner
            for outer in nested
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not nested:
            return False
    return True
