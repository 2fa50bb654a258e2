"""Templates such as ``Summarize: {document}``, filled from the fields of a row.

Knows texts and values; knows nothing of files or of chat templates, which are the model's own.
"""

from __future__ import annotations

import json
import string
from functools import cache
from typing import Any

from bmx.errors import RowError, UsageError


@cache
def template_pieces(template: str) -> list[tuple[str, str | None]]:
    """(text, field name or None) pieces of a template; only plain names may stand in braces.

    Raises:
        UsageError: unbalanced braces, or a placeholder that is not a plain name.
    """
    try:
        pieces = [
            (text, f"{name}!{conversion}:{form}" if form or conversion else name)
            for text, name, form, conversion in string.Formatter().parse(template)
        ]
    except ValueError as error:
        raise UsageError(f"prompt_template: {error}", hint="write {{ and }} for braces in the text itself") from None
    for _, name in pieces:
        if name is not None and not name.isidentifier():
            raise UsageError(f"prompt_template: {{{name}}} is not the name of a field")
    return pieces


def filled(template: str, values: dict[str, Any]) -> str:
    """The template with the fields of a row in their places.

    Raises:
        RowError: the row has no such field, or no value for it.
    """
    parts = []
    for text, name in template_pieces(template):
        parts.append(text)
        if name is not None:
            value = values.get(name)
            if value is None:
                raise RowError("invalid_request", f"the row has no field {name!r} for the prompt template")
            parts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(parts)
