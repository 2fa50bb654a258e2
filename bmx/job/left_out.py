"""What a row has that bmx does not know, and leaves out because the user has said so.

Knows names; knows nothing of how a row is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FLAG = "--ignore-unsupported"


def squeezed(name: str) -> str:
    """A name without case, hyphens, underscores and blanks: ``maxTokens`` and ``Max-Tokens`` are ``max_tokens``."""
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


@dataclass(slots=True)
class LeftOut:
    """What is left out of one row.

    Attributes:
        allowed: squeezed names of fields, and of types of message parts, that may be left out.
        names: those that the row has, as it writes them.
    """

    allowed: frozenset[str]
    names: list[str] = field(default_factory=list)

    def takes(self, name: str) -> bool:
        """Whether something of that name may be left out; then it is noted."""
        taken = bool(self.allowed) and squeezed(name) in self.allowed
        if taken and name not in self.names:
            self.names.append(name)
        return taken
