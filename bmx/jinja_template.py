"""Templates written in Jinja, with loops and conditions over the fields of a row; and which notation a text is in.

They are rendered as transformers renders chat templates: in Jinja's sandbox, with blocks trimmed. Knows texts and
values; knows nothing of files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NoReturn

from bmx.errors import RowError, UsageError
from bmx.prompt_template import PromptTemplate, brace_template, fields_with_values, printed, shown_fields
from bmx.render_limits import TemplateLimitError, limited

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from jinja2.sandbox import SandboxedEnvironment

ROW = "row"  # the variable that is the whole row, for fields whose names are no variables; a field of that name wins
NULL = "it prints a value that is null ({{ name or '' }} prints nothing then)"
NO_VALUE = "x | list makes a list of several values; row['items'] reads a field, where row.items is a method"
_TESTS, _DEFAULTS = {"defined", "undefined"}, {"default", "d"}


@cache
def parse_template(text: str, *, jinja: bool) -> PromptTemplate:
    """The template of a text, in Jinja or with ``{field}`` placeholders.

    Raises:
        UsageError: it cannot be read; the message says where.
    """
    return jinja_template(text) if jinja else brace_template(text)


def jinja_template(text: str) -> PromptTemplate:
    """The template of a text in Jinja.

    A row must have the fields that the template uses, but for those that it tests with ``is defined`` or gives a
    default. A null may be tested; to print one is an error of the row.

    Raises:
        UsageError: it cannot be read; the message says where.
    """
    from jinja2 import TemplateSyntaxError, meta, nodes

    environment = _environment()
    try:
        tree, template = environment.parse(text), environment.from_string(text)
    except TemplateSyntaxError as error:
        raise UsageError(f"prompt_template, line {error.lineno}: {error.message}", hint="it is read as Jinja") from None
    except RecursionError:
        raise UsageError("prompt_template is nested too deep") from None
    if any(meta.find_referenced_templates(tree)):
        raise UsageError("prompt_template includes another file", hint="write it as one file")
    fields = meta.find_undeclared_variables(tree)
    if ROW in fields:
        fields |= set(filter(None, map(_row_field, tree.find_all(nodes.Expr))))
    optional = {ROW, *_tested(tree)}
    before, after = _ends(tree)
    return PromptTemplate(
        fields=tuple(sorted(fields)),
        needed=tuple(sorted(fields - optional)),
        before=before,
        after=after,
        filled=partial(_filled, template),
    )


def _environment() -> SandboxedEnvironment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        extensions=["jinja2.ext.loopcontrols"],
        undefined=StrictUndefined,
        finalize=_printable,
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    return environment


def _printable(value: Any) -> Any:
    """What an expression of a template prints, as in other templates: values that are not text are written as JSON."""
    from jinja2 import Undefined

    if value is None:
        _refuse(NULL)
    if isinstance(value, bool | dict | list | tuple):
        return printed(value)
    if not isinstance(value, str | int | float | Undefined):  # an undefined one says so itself
        _refuse(f"it prints a {type(value).__name__}, which is no text ({NO_VALUE})")
    return value


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _filled(template: Template, values: Mapping[str, Any]) -> str:
    """The template with the fields of a row as its variables.

    Raises:
        RowError: whatever goes wrong.
    """
    characters = sum(len(str(value)) for value in values.values())
    try:
        return limited(lambda: template.render({ROW: values, **values}), characters)
    except TemplateLimitError as error:
        message = f"the prompt template takes too long or prints too much: {error}"
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        nulls = [name for name, value in values.items() if value is None]
        fields = fields_with_values(values) + (f", and null: {shown_fields(nulls)}" if nulls else "")
        message = f"the prompt template{_place(error)}: {said}; the row has {fields}"
    raise RowError("invalid_request", message)


def _place(error: Exception) -> str:
    """The line of the template in which an error was raised, for a message."""
    line, trace = 0, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}" if line else ""


def _tested(tree: nodes.Template) -> Iterator[str | None]:
    """The fields that a template tests for being defined, or gives a default."""
    from jinja2 import nodes

    for use in tree.find_all((nodes.Test, nodes.Filter)):
        if use.name in (_TESTS if isinstance(use, nodes.Test) else _DEFAULTS):
            yield use.node.name if isinstance(use.node, nodes.Name) else _row_field(use.node)


def _row_field(node: nodes.Node | None) -> str | None:
    """The field that ``row.name`` or ``row["name"]`` names; None for other expressions."""
    from jinja2 import nodes

    if not isinstance(node, nodes.Getattr | nodes.Getitem):
        return None
    if not (isinstance(node.node, nodes.Name) and node.node.name == ROW):
        return None
    if isinstance(node, nodes.Getattr):
        return None if hasattr(dict, node.attr) else node.attr
    return node.arg.value if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str) else None


def _ends(tree: nodes.Template) -> tuple[str, str]:
    """The text before the first and after the last expression or block of a template; definitions print nothing."""
    from jinja2 import nodes

    quiet = (nodes.Assign, nodes.AssignBlock, nodes.Macro)
    printing = [
        piece
        for node in tree.body
        if not isinstance(node, quiet)
        for piece in (node.nodes if isinstance(node, nodes.Output) else [node])
    ]
    texts = [piece.data if isinstance(piece, nodes.TemplateData) else None for piece in printing]
    if None not in texts:
        return "".join(filter(None, texts)), ""
    first = texts.index(None)
    last = len(texts) - texts[::-1].index(None)
    return "".join(filter(None, texts[:first])), "".join(filter(None, texts[last:]))
