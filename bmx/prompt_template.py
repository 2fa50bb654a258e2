"""Templates such as ``Summarize: {document}``, filled from the fields of a row.

Knows texts and values; knows nothing of files or of chat templates, which are the model's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bmx.errors import RowError, UsageError

SHOWN = 12  # fields of a row named in a message
LITERAL_BRACES = "write {{ and }} for braces in the text itself, or the template in Jinja (a file *.jinja, or --jinja)"
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A template that was read.

    Attributes:
        fields: names of the fields that it reads.
        needed: those of them that a row must have.
        before: its text before the first field.
        after: its text after the last field; empty without fields.
        filled: the prompt for the fields of a row; raises RowError where it cannot be made.
    """

    fields: tuple[str, ...]
    needed: tuple[str, ...]
    before: str
    after: str
    filled: Callable[[Mapping[str, Any]], str]


def brace_template(text: str) -> PromptTemplate:
    """The template of a text with ``{field}`` placeholders.

    Raises:
        UsageError: unbalanced braces, a field without a name, or fields in double braces alone.
    """
    pieces = _pieces(text)
    names = tuple(dict.fromkeys(name for _, name in pieces if name is not None))
    return PromptTemplate(
        fields=names,
        needed=names,
        before=pieces[0][0],
        after=pieces[-1][0] if names else "",
        filled=lambda values: _filled(pieces, values),
    )


def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """(text, name of the field that follows it, or None at the end) pieces of a template."""
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
            raise UsageError(f"prompt_template has a single {found[0]!r}", hint=LITERAL_BRACES)
    if not pieces and "{{" in template:
        hint = "a field stands in single braces: {document}; --jinja reads double ones"
        raise UsageError("prompt_template has no field", hint=hint)
    return (*pieces, (text + template[end:], None))


def _named(name: str) -> str:
    if not name.strip():
        hint = f"write {{document}} for a field; {LITERAL_BRACES}"
        raise UsageError("prompt_template has braces without the name of a field", hint=hint)
    return name


def _filled(pieces: Iterable[tuple[str, str | None]], values: Mapping[str, Any]) -> str:
    """The template with the fields of a row in their places.

    Raises:
        RowError: the row has no such field, or no value for it.
    """
    parts = []
    for text, name in pieces:
        parts.append(text)
        if name is not None:
            value = values.get(name)
            if value is None:
                what = f"the field {name!r} is null" if name in values else f"the row has no field {name!r}"
                needed = f"{what}, which the prompt template needs"
                raise RowError("invalid_request", f"{needed}; the row has {fields_with_values(values)}")
            parts.append(printed(value))
    return "".join(parts)


def printed(value: Any) -> str:
    """A value as prompts and tables show it: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def fields_with_values(values: Mapping[str, Any]) -> str:
    """Names of the fields of a row that are not null, for a message."""
    return shown_fields(field for field, value in values.items() if value is not None)


def shown_fields(names: Iterable[str]) -> str:
    """Names of fields for a message: a few of them, each cut if it is long."""
    listed = [repr(name[:40]) for name in names]
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return (", ".join(listed[:SHOWN]) or "no fields") + more
