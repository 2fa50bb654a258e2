"""Definitions of tools that a row gives the model, whatever program wrote them, in OpenAI's form.

Knows how requests write tools; knows nothing of chat templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bmx.job.answer_formats import from_openapi
from bmx.job.left_out import FLAG, LeftOut
from bmx.job.messages import invalid
from bmx.job.row_checks import IF_DATA

NO_CHOICE = ("none", {"type": "none"})  # values of tool_choice by which the model is shown no tool
_FUNCTION_TYPES = (None, "function", "custom")  # Anthropic's own type of functions is custom
_SCHEMAS = ("parameters", "input_schema", "parametersJsonSchema", "parameters_json_schema")


def own_tools(fields: Mapping[str, Any], left_out: LeftOut, *, may_be_data: bool = False) -> tuple[dict[str, Any], ...]:
    """The tools of a row; none where it says that none may be called.

    Args:
        fields: what the row asks.
        left_out: what may be left out.
        may_be_data: whether the row's fields may be data of the same names, for the message.

    Raises:
        RowError: no list of objects, or a tool that is no function with a name.
    """
    tools = fields.get("tools")
    if not tools or fields.get("tool_choice") in NO_CHOICE or left_out.takes("tools"):
        return ()
    way_out = IF_DATA if may_be_data else f"{FLAG} tools leaves all out"
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise invalid(f"'tools' must be a list of objects, each the definition of a function ({way_out})")
    listed = [one for tool in tools for one in _declared(tool)]
    if others := [problem for tool in listed if (problem := _problem(tool))]:
        raise invalid(f"a tool {others[0]} is no function with a name, as bmx knows them ({way_out})")
    return tuple(map(_function, listed))


def _declared(tool: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools of an item: it is one, or Gemini's list of several."""
    for name in ("functionDeclarations", "function_declarations"):
        several = tool.get(name)
        if isinstance(several, list) and len(tool) == 1 and all(isinstance(one, dict) for one in several):
            return [from_openapi(one) for one in several]
    return [tool]


def _problem(tool: dict[str, Any]) -> str | None:
    """What tells a tool from a function with a name; None for one."""
    inner, kind = tool.get("function", tool), tool.get("type")
    if kind not in _FUNCTION_TYPES:
        return f"of type {kind!r:.40}"
    named = isinstance(inner, dict) and isinstance(inner.get("name"), str) and inner["name"]
    return None if named else f"with {', '.join(sorted(tool))[:60]!r}"


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """A function in OpenAI's form, from which Anthropic's and Gemini's differ by names."""
    if "function" in tool:
        return tool
    schema = next((tool[name] for name in _SCHEMAS if tool.get(name) is not None), None)
    others = {name: part for name, part in tool.items() if name not in (*_SCHEMAS, "type", "cache_control")}
    return {"type": "function", "function": others | ({} if schema is None else {"parameters": schema})}


def reasoning_effort(fields: Mapping[str, Any], left_out: LeftOut) -> str | None:
    """How much the model should reason, as the row says it; None where it says nothing.

    Raises:
        RowError: it is no text.
    """
    effort = fields.get("reasoning_effort")
    if effort is None or left_out.takes("reasoning_effort"):
        return None
    if not isinstance(effort, str):
        raise invalid("'reasoning_effort' must be text, such as \"low\"")
    return effort
