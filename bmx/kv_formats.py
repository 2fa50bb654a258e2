"""The names of the formats in which keys and values are stored, and what ``auto`` stands for.

How each is encoded is in ``bmx.kernels.formats``. Knows names; loads no torch.
"""

from __future__ import annotations

from bmx.errors import UsageError

KV_FORMATS = ("model", "fp8", "int8", "int4", "int2")  # "model" is the model's own dtype
AUTO_FORMAT = "int8/int4"  # what ``auto`` stands for where pairs are evicted; nothing is recorded as ``auto``
KEY_ROWS = {"int2": "int4"}  # formats with too few bits for a key that is not scaled by channel, and what it is then in


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


def format_of_key_rows(key_format: str) -> str:
    """The format of keys that are stored one by one, where the setting says ``key_format``."""
    return KEY_ROWS.get(key_format, key_format)


def check_keys(kv_format: str, kv_policy: str) -> None:
    """Refuse a format of keys that needs them scaled by channel, with a policy that replaces keys one by one.

    Raises:
        UsageError: the policy is not ``none``, and the format is such a one.
    """
    keys, values = formats_of(kv_format)
    if kv_policy == "none" or keys not in KEY_ROWS:
        return
    raise UsageError(
        f"keys in {keys} are scaled by channel over groups of tokens; {kv_policy} replaces them one by one",
        hint=f"--kv-format {KEY_ROWS[keys]}/{values} is for values alone; --kv-policy none --kv-format {keys}, or "
        f"--kv-archive {keys}, keeps every pair",
    )
