"""The names of the formats in which keys and values are stored, and what ``auto`` stands for.

How each is encoded is in ``bmx.kernels.formats``. Knows names; loads no torch.
"""

from __future__ import annotations

KV_FORMATS = ("model", "fp8", "int8", "int4")  # "model" is the model's own dtype
AUTO_FORMAT = "int8/int4"  # what ``auto`` stands for where pairs are evicted; nothing is recorded as ``auto``


def format_name(keys: str, values: str) -> str:
    """The canonical name of a pair of formats: ``int8`` for both, ``int8/int4`` for each its own."""
    return keys if keys == values else f"{keys}/{values}"


def formats_of(text: str) -> tuple[str, str]:
    """The formats of keys and values in ``int8`` or ``int8/int4``.

    Raises:
        ValueError: not one or two names of formats.
    """
    keys, slash, values = text.partition("/")
    pair = (keys, values if slash else keys)
    if not set(pair) <= set(KV_FORMATS):
        raise ValueError(f"no format: {text!r}")
    return pair
