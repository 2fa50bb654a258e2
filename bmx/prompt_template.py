"""Templates such as ``Summarize: {document}``, filled from the fields of a row.

Knows texts and values; knows nothing of files or of chat templates, which are the model's own.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from bmx.errors import RowError, UsageError

SHOWN = 12  # fields of a row named in a message
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@cache
def template_pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """(text, name of the field that follows it, or None at the end) pieces of a template.

    Raises:
        UsageError: unbalanced braces, a field without a name, or fields in double braces alone.
    """
    pieces: list[tuple[str, str | None]] = []
    text, end = "", 0
    for found in _BRACES.finditer(template):
        text += template[end : found.start()]
        end = found.end()
        if found[1] is not None:
            pieces.append((text, _named(found[1])))
            text = ""
        elif len(found[0]) == 2:
            text += found[0][0]
        else:
            hint = "write {{ and }} for braces in the text itself"
            raise UsageError(f"prompt_template has a single {found[0]!r}", hint=hint)
    if not pieces and "{{" in template:
        raise UsageError("prompt_template has no field", hint="a field stands in single braces: {document}")
    return (*pieces, (text + template[end:], None))


def _named(name: str) -> str:
    if not name.strip():
        hint = "write {document} for a field, and {{ and }} for braces in the text itself"
        raise UsageError("prompt_template has braces without the name of a field", hint=hint)
    return name


def template_fields(template: str) -> tuple[str, ...]:
    """The names of a template's fields, in the order of the text."""
    return tuple(name for _, name in template_pieces(template) if name is not None)


def filled(template: str, values: dict[str, Any]) -> str:
    """The template with the fields of a row in their places; values that are not text are written as JSON.

    Raises:
        RowError: the row has no such field, or no value for it.
    """
    parts = []
    for text, name in template_pieces(template):
        parts.append(text)
        if name is not None:
            value = values.get(name)
            if value is None:
                what = f"the field {name!r} is null" if name in values else f"the row has no field {name!r}"
                others = shown_fields(field for field, other in values.items() if other is not None)
                raise RowError("invalid_request", f"{what}, which the prompt template needs; the row has {others}")
            parts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(parts)


def shown_fields(names: Any) -> str:
    """Names of fields for a message: a few of them, each cut if it is long."""
    listed = [repr(name[:40]) for name in names]
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return (", ".join(listed[:SHOWN]) or "no fields") + more
