"""What a row says that its answer must fit, whatever program it was written for: a schema, an expression, or choices.

Knows how requests name formats; knows nothing of grammars or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bmx.job.messages import invalid
from bmx.request import FORMATS
from bmx.units import parse_object, parse_schema

FORMAT_FIELDS = frozenset(("guided_json", "output_format", "response_format", "structured_outputs", *FORMATS))
ANY_OBJECT = '{"type":"object"}'
_NO_FORMAT: dict[str, Any] = {"json_schema": None, "guided_regex": None, "guided_choice": ()}
_GUIDED = {"json": "guided_json", "regex": "guided_regex", "choice": "guided_choice"}  # vLLM's newer names
_NO_FALLBACK = "disable_fallback"  # of vLLM: bmx has nothing to fall back to


def own_format(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that say what a row's answer must fit; empty where the row says nothing of it.

    OpenAI's ``response_format``, Anthropic's ``output_format``, vLLM's ``structured_outputs`` and ``guided_*``, and
    ``json_schema``. A row that names one has no other: those of the job do not count for it.

    Raises:
        RowError: a format that bmx does not know, two of them, or a value of another type.
    """
    found = [_of_field(name, fields[name]) for name in sorted(FORMAT_FIELDS) if fields.get(name) is not None]
    if len(found) > 1:
        names = sorted(name for name in FORMAT_FIELDS if fields.get(name) is not None)
        raise invalid(f"an answer has one format: {' and '.join(names)} contradict each other")
    return _NO_FORMAT | found[0] if found else {}


def with_gemini_format(config: Mapping[str, Any]) -> dict[str, Any]:
    """Gemini's generation config, with its MIME type and its schema of OpenAPI's kind as a format.

    Args:
        config: with names of bmx's own.

    Raises:
        RowError: another MIME type than text and JSON.
    """
    fields = dict(config)
    kind, schema = fields.pop("response_mime_type", None), fields.pop("response_schema", None)
    if kind not in (None, "text/plain", "application/json"):
        raise invalid(f"unsupported in 'generationConfig': responseMimeType {kind!s:.40}")
    if schema is not None:
        fields["guided_json"] = from_openapi(schema)
    elif kind == "application/json":
        fields.setdefault("guided_json", json.loads(ANY_OBJECT))
    return fields


def from_openapi(schema: Any) -> Any:
    """A schema of OpenAPI's kind as a JSON schema: types in capitals, ``nullable``, and an order of properties."""
    if isinstance(schema, list):
        return [from_openapi(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {
        name: part if name in ("enum", "default", "example") else from_openapi(part)
        for name, part in schema.items()
        if name not in ("nullable", "properties", "propertyOrdering")
    }
    if isinstance(schema.get("properties"), dict):
        parts["properties"] = {name: from_openapi(part) for name, part in schema["properties"].items()}
    if isinstance(parts.get("type"), str):
        parts["type"] = parts["type"].lower()
        if schema.get("nullable"):
            parts["type"] = [parts["type"], "null"]
    return parts


def _of_field(name: str, value: Any) -> dict[str, Any]:
    if name in ("response_format", "output_format"):
        return _of_response_format(name, value)
    if name == "structured_outputs":
        return _of_structured_outputs(value)
    if name in ("guided_json", "json_schema"):
        return {"json_schema": _schema(name, value)}
    if name == "guided_regex" and not (isinstance(value, str) and value):
        raise invalid("'guided_regex' must be a regular expression")
    if name == "guided_choice" and not (
        isinstance(value, list) and value and all(isinstance(text, str) and text for text in value)
    ):
        raise invalid("'guided_choice' must be a list of texts")
    return {name: value}


def _of_response_format(name: str, value: Any) -> dict[str, Any]:
    """OpenAI's has the schema in ``json_schema``, Anthropic's beside the type."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": ANY_OBJECT}
    if kind != "json_schema":
        found = "" if kind is None else f", not {kind!s:.40}"
        raise invalid(f"{name!r} must be an object of type text, json_object or json_schema{found}")
    inner = value.get("json_schema", value)
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if schema is None:
        raise invalid(f"{name!r} of type json_schema has no 'schema'")
    return {"json_schema": _schema(name, schema)}


def _of_structured_outputs(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid("'structured_outputs' must be an object")
    given = {name: part for name, part in value.items() if part not in (None, False) and name != _NO_FALLBACK}
    if given.pop("json_object", None):
        given["json"] = ANY_OBJECT
    unknown = sorted(given.keys() - _GUIDED.keys())
    if unknown:
        raise invalid(f"unsupported in 'structured_outputs': {', '.join(unknown)[:200]}")
    return own_format({_GUIDED[name]: part for name, part in given.items()})


def _schema(name: str, value: Any) -> str:
    """A schema as compact text.

    Raises:
        RowError: no JSON object, nor the text of one.
    """
    try:
        return parse_schema(parse_object(value))
    except (ValueError, TypeError, RecursionError):
        raise invalid(f"{name!r} must hold a JSON schema, which is an object") from None
