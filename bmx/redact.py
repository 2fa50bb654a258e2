"""Takes secrets out of text that other programs wrote: passwords in addresses, tokens, signatures. Knows only text."""

from __future__ import annotations

import re

HIDDEN = "***"
SECRETS = (
    re.compile(r"(://)[^/\s]+(?=@)"),  # user and password of an address
    re.compile(r"(?i)([?&][\w.-]*(?:token|signature|credential|password|secret|key)[\w.-]*=)[^&\s'\"]+"),
    re.compile(r"(?i)(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?)[\w.~+/=-]+"),
    re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}"),
    re.compile(r"(\bhf_)[A-Za-z0-9]{10,}"),
)


def without_secrets(text: str) -> str:
    """The text with *** in place of what nobody should read in a log."""
    for secret in SECRETS:
        text = secret.sub(rf"\g<1>{HIDDEN}", text)
    return text
