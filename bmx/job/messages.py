"""Conversations of a row: each message with a role and a text, whatever program wrote them.

Knows how messages are written; knows nothing of chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bmx.errors import RowError
from bmx.job.left_out import FLAG, LeftOut

SPEAKERS = {  # names of speakers in "from", and their roles
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "claude", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    "system": "system",
}
NO_TEXT_NEEDED = {"assistant", "model", "tool", "function", "ipython", "observation"}
SEEN_OR_HEARD = ("audio", "audios", "image", "images", "multi_modal_data", "video", "videos")  # beside a text
TEXT_PARTS = (None, "text", "input_text", "output_text")
_CALL_PARTS = ("tool_use", "tool_result", "thinking", "redacted_thinking")  # Anthropic's, beside texts
_GEMINI_CALLS = (("functionCall", "function_call"), ("functionResponse", "function_response"))
_BESIDE_TEXT = ("text", "thought", "thoughtSignature", "thought_signature")  # of one of Gemini's parts
ONLY_TEXT = f"bmx reads text only ({FLAG} leaves it out)"


def invalid(message: str) -> RowError:
    """The error of a row that cannot be answered as it is."""
    return RowError("invalid_request", message)


def checked_messages(messages: Any, left_out: LeftOut) -> tuple[dict[str, Any], ...]:
    """Messages whose contents are plain text; all other fields of a message stay. Empty system messages are dropped.

    Args:
        messages: the messages of a row.
        left_out: what may be left out.

    Raises:
        RowError: not a list of messages, content that is not text, or a message without any.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise invalid("'messages' must be a list of at least one object")
    read = [_checked(message, left_out) for message in messages]
    kept = tuple(m for m in read if m["role"].lower() not in ("system", "developer") or m["content"].strip())
    if not kept:
        raise invalid("the messages hold no text")
    return kept


def _checked(message: dict[str, Any], left_out: LeftOut) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role.isidentifier():
        raise invalid("each message needs a 'role' that is a word")
    kind = role.lower()
    for name in SEEN_OR_HEARD:
        if message.get(name) and not left_out.takes(name):
            raise invalid(f"a message has {name!r}: {ONLY_TEXT}")
    text = _text(content, left_out)
    calls = message.get("tool_calls") or message.get("function_call")
    if kind == "assistant" and content is None and not calls:
        raise invalid("a message of role 'assistant' has neither 'content' nor 'tool_calls'")
    if not text.strip() and kind not in NO_TEXT_NEEDED and kind not in ("system", "developer"):
        raise invalid(f"a message of role {role!r} has an empty 'content'")
    read = {name: value for name, value in message.items() if name not in SEEN_OR_HEARD}
    return {**read, "role": role, "content": text}


def _text(content: Any, left_out: LeftOut) -> str:
    """The text of a message: text, a list of text parts, or null."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise invalid("the 'content' of a message must be text, or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type")
        if kind in TEXT_PARTS:
            texts.append(part.get("text"))
        elif not left_out.takes(str(kind)):
            raise invalid(f"a message has a part of type {str(kind)[:40]!r}: {ONLY_TEXT}")
    if not all(isinstance(text, str) for text in texts):
        raise invalid("a text part of a message has no 'text'")
    return "".join(texts)


def from_conversations(turns: Any, system: Any = None) -> list[dict[str, Any]]:
    """Messages of ShareGPT's kind, whose turns have ``from`` and ``value``; turns with a ``role`` stay as they are.

    Args:
        turns: the value of ``conversations``.
        system: the system prompt beside them, or None.

    Raises:
        RowError: not a list of turns, or a speaker without a role.
    """
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise invalid("'conversations' must be a list of at least one object")
    messages = [turn if "role" in turn else _spoken(turn) for turn in turns]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _spoken(turn: dict[str, Any]) -> dict[str, Any]:
    speaker = turn.get("from")
    role = SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise invalid(f"'from' of a turn is {str(speaker)[:40]!r}; known are {', '.join(SPEAKERS)}")
    return {"role": role, "content": turn.get("value")}


def from_anthropic(params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages of Anthropic's kind: the system prompt beside them, tools called and answered in parts of contents.

    Raises:
        RowError: not a list of messages.
    """
    messages = params.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise invalid("'messages' must be a list of at least one object")
    system = [{"role": "system", "content": params["system"]}] if params.get("system") else []
    return system + [turn for message in messages for turn in _turns(message)]


def _turns(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message, with each tool's answer as a message of its own before it, and its reasoning beside its text."""
    parts = message.get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return [message]
    by_type: dict[str, list[dict[str, Any]]] = {name: [] for name in (*_CALL_PARTS, "")}
    for part in parts:
        kind = part.get("type")
        by_type[kind if kind in _CALL_PARTS else ""].append(part)
    calls, answers, thoughts, _, texts = by_type.values()
    turns: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": part.get("tool_use_id"), **_named(part), "content": part.get("content")}
        for part in answers
    ]
    if texts or calls or not answers:
        called = [
            {
                "id": part.get("id"),
                "type": "function",
                "function": {"name": part.get("name"), "arguments": part.get("input")},
            }
            for part in calls
        ]
        thought = "\n".join(str(part.get("thinking") or "") for part in thoughts)
        beside = {"tool_calls": called, "reasoning_content": thought}
        turns.append({**message, "content": texts, **{name: value for name, value in beside.items() if value}})
    return turns


def _named(part: dict[str, Any]) -> dict[str, Any]:
    """The name of the function that a part answers for, where it has one."""
    return {"name": part["name"]} if isinstance(part.get("name"), str) else {}


def from_gemini(contents: Any, system: Any = None) -> list[dict[str, Any]]:
    """Messages of Gemini's kind, whose contents have a role and parts.

    Args:
        contents: the value of ``contents``: a list, one content, or text.
        system: the system instruction: a content, text, or None.

    Raises:
        RowError: something else.
    """
    listed = contents if isinstance(contents, list) else [contents]
    messages = [turn for content in listed for turn in _turns(_content(content, None))]
    return [_content(system, "system"), *messages] if system else messages


def _content(content: Any, role: str | None) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": role or "user", "content": content}
    if not isinstance(content, dict):
        raise invalid("'contents' must be a list of objects with 'role' and 'parts'")
    role = role or content.get("role") or "user"
    parts = content.get("parts")
    listed: list[Any] = parts if isinstance(parts, list) else [parts]
    if not all(isinstance(part, dict) and part for part in listed):
        raise invalid('\'parts\' of a content must be a list of objects such as {"text": "..."}')
    return {"role": "assistant" if role == "model" else role, "content": list(map(_as_anthropic, listed))}


def _as_anthropic(part: dict[str, Any]) -> dict[str, Any]:
    """A part of Gemini's kind as one of Anthropic's, with the type that it has there, or else the name of its field."""
    if part.get("thought") is True and "text" in part:
        return {"type": "thinking", "thinking": part["text"]}
    call, answer = (part.get(camel, part.get(snake)) for camel, snake in _GEMINI_CALLS)
    if isinstance(call, dict):
        return {"type": "tool_use", "id": call.get("id"), "name": call.get("name"), "input": call.get("args") or {}}
    if isinstance(answer, dict):
        told = json.dumps(answer.get("response"), ensure_ascii=False)
        return {"type": "tool_result", "tool_use_id": answer.get("id"), **_named(answer), "content": told}
    return {"type": next((name for name in part if name not in _BESIDE_TEXT), "text"), **part}
