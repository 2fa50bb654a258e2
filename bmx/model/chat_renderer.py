"""Conversations as text: what a chat template makes of them, and that it leaves nothing out.

Many templates skip a message of a role that they do not know without a word. Knows tokenizers and messages; knows
nothing of rows.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from bmx.errors import RowError
from bmx.model.chat_template import render_chat
from bmx.model.reasoning import PAIRS

STANDARD_ROLES = ("system", "user", "assistant", "tool")
ASSISTANTS = ("assistant", "ai", "bot", "chatgpt", "gpt", "model")
SAME_ROLES: Mapping[str, tuple[str, ...]] = {  # names of one role, the preferred one first
    "developer": ("developer", "system"),
    "human": ("user", "human"),
    **{name: ("assistant", name) for name in ASSISTANTS[1:]},
    "function": ("function", "tool", "ipython", "observation"),
    "observation": ("observation", "tool", "function", "ipython"),
    "tool": ("tool", "function", "ipython", "observation"),
}
REASONING_ENDS = tuple(ends[0] for _, *ends in PAIRS)  # templates drop what an earlier answer thought
SHAPES = 4096  # shapes of conversations that are remembered
GENERATION_TAG = r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}"  # transformers' own tag, which Jinja does not know

TOOLS = -1  # the place of the tools, among those of messages

Message = dict[str, Any]
Tool = dict[str, Any]


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Each shape of a conversation (its roles, and which parts its messages have) is rendered once more with random words
    in place of its texts: a word that is missing is a message that the template leaves out.

    Args:
        tokenizer: a transformers tokenizer.

    Attributes:
        folded: whether a system message became the beginning of a user message, since the template takes none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        self._source = str((template.get("default") if isinstance(template, dict) else template) or "")
        self._left_out: dict[object, frozenset[int]] = {}
        self.folded = False

    def normalised(self, message: Mapping[str, Any]) -> Message:
        """A message as templates expect it: its role by the template's name, and its content as text.

        Raises:
            RowError: ``invalid_request``, if its content is not text.
        """
        message = {**message, "role": self._role(message.get("role")), "content": _content(message.get("content"))}
        if isinstance(message.get("function_call"), dict) and not message.get("tool_calls"):
            message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [_with_object_arguments(call) for call in message["tool_calls"]]
        return message

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any], tools: Sequence[Tool] = ()) -> str:
        """The text of a conversation. An assistant's last message stays open, so that the answer continues it.

        Args:
            messages: normalised messages, at least one.
            variables: values of the template's own variables.
            tools: functions that the model may call, in OpenAI's form.

        Raises:
            RowError: ``invalid_request``, if the template refuses the messages, or leaves out one of them, or a tool.
        """
        messages = self._with_system_folded(messages)
        if tools:
            variables = {**variables, "tools": list(tools)}
        try:
            text = self._text(messages, variables)
        except RowError:
            raise
        except Exception as error:  # a template is code of the model's author and may raise anything
            raise RowError("invalid_request", f"the chat template refuses these messages: {error}") from error
        left_out = self._left_out_of(messages, variables)
        if TOOLS in left_out or not all(_name(tool) in text for tool in tools):
            hint = "--ignore-unsupported tools leaves them out"
            raise RowError("invalid_request", f"the chat template leaves out the tools, or some of them ({hint})")
        for place, message in enumerate(messages):
            if place in left_out or not all(self._shown(words, message, text) for words in _texts(message)):
                raise RowError("invalid_request", self._complaint(place, messages))
        return text

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads."""
        from jinja2 import nodes

        tree = self._tree
        return frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "load") if tree else frozenset()

    @cached_property
    def _roles(self) -> frozenset[str]:
        """The roles that the template compares a message's role with."""
        from jinja2 import nodes

        roles: set[str] = set()
        for comparison in self._tree.find_all(nodes.Compare) if self._tree else ():
            names = {part.attr for part in comparison.find_all(nodes.Getattr)}
            names |= {part.name for part in comparison.find_all(nodes.Name)}
            words = {part.value for part in comparison.find_all(nodes.Const) if isinstance(part.value, str)}
            if "role" in names | words:
                roles |= words - {"role"}
        return frozenset(roles)

    @cached_property
    def _switches(self) -> frozenset[str]:
        """What the template itself takes out of texts, such as ``/no_think``: the literals that it replaces."""
        from jinja2 import nodes

        calls = list(self._tree.find_all((nodes.Call, nodes.Filter))) if self._tree else []
        named = [call for call in calls if "replace" in (getattr(call, "name", ""), getattr(call.node, "attr", ""))]
        first = [call.args[0] for call in named if call.args]
        return frozenset(part.value for part in first if isinstance(part, nodes.Const) and isinstance(part.value, str))

    @cached_property
    def _tree(self) -> Any:
        """The template's syntax tree; None for a template that cannot be read."""
        from jinja2 import Environment, TemplateError

        environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701  # only parses: renders nothing
        try:
            return environment.parse(re.sub(GENERATION_TAG, "", self._source))
        except (TemplateError, RecursionError):
            return None

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template shows a system message, or fails without one too."""
        system, user = ({"role": role, "content": "text"} for role in ("system", "user"))
        left_out = self._probe([system, user], {})
        return (left_out is not None and 0 not in left_out) or self._probe([user], {}) is None

    def _role(self, name: Any) -> Any:
        if name in STANDARD_ROLES[:3] or not isinstance(name, str) or name in self._roles - SAME_ROLES.keys():
            return name
        if name.lower() in STANDARD_ROLES[:3]:
            return name.lower()
        names = SAME_ROLES.get(name.lower(), (name,))
        known = [other for other in names if other in self._roles]
        return (known or [other for other in names if other in STANDARD_ROLES] or [name])[0]

    def _with_system_folded(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The conversation, with a system message that the template does not take before the first user's text."""
        system, *rest = messages
        if system.get("role") != "system" or not rest or self._takes_system:
            return messages
        if not system["content"].strip():
            return rest
        if rest[0].get("role") != "user":
            return messages
        self.folded = True
        return [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]

    def _text(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """What the template prints: up to where an answer begins, or goes on.

        Raises:
            RowError: the last message, which the answer should continue, calls a function, or is not printed.
            Exception: what the template raises.
        """
        *before, last = messages
        if last.get("role") == "assistant" and _calls(last):
            raise RowError("invalid_request", "the last message calls a function: the function's result must follow")
        if last.get("role") != "assistant":
            return self._printed(messages, add_generation_prompt=True, **variables)
        mark, words = _new_mark(), last["content"] if last["content"].strip() else ""
        marked = [*before, {**last, "content": f"{words}{mark} "}]  # the blank shows whether the template trims
        text = self._printed(marked, add_generation_prompt=False, **variables)
        head, found, tail = text.rpartition(mark)
        if not found:
            raise RowError("invalid_request", self._complaint(len(before), messages))
        return head if tail.startswith(" ") else head.removesuffix(words[len(words.rstrip()) :])

    def _printed(self, messages: Sequence[Message], **options: Any) -> str:
        """What the template prints of messages, whose texts it gets in the form that it takes."""
        return render_chat(
            self._tokenizer, list(map(_in_parts, messages)) if self._takes_parts else messages, **options
        )

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template shows a text only as a list of parts, as templates for texts and images may."""
        mark = _new_mark()
        message = {"role": "user", "content": mark}
        for form in (message, _in_parts(message)):
            with contextlib.suppress(Exception):  # of the template
                if mark in render_chat(self._tokenizer, [form], add_generation_prompt=True):
                    return form is not message
        return False

    def _left_out_of(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> frozenset[int]:
        """Places of the messages that the template leaves out, whatever they say."""
        shape = (*map(_shape, messages), json.dumps(variables, sort_keys=True, default=str))
        if shape not in self._left_out:
            if len(self._left_out) >= SHAPES:
                self._left_out.clear()
            self._left_out[shape] = self._probe(messages, variables) or frozenset()
        return self._left_out[shape]

    def _probe(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> frozenset[int] | None:
        """Places of the messages that the template leaves out with random words as texts; None where it fails."""
        marked, marks = zip(*map(_marked, messages), strict=True)
        tools = {_new_mark(): tool for tool in variables.get("tools", ())}
        renamed = {"tools": [_renamed(tool, mark) for mark, tool in tools.items()]} if tools else {}
        try:
            text = self._text(marked, {**variables, **renamed})
        except Exception:
            return None
        return frozenset(place for place, own in (*enumerate(marks), (TOOLS, tools)) if any(m not in text for m in own))

    def _shown(self, words: str, message: Message, text: str) -> bool:
        """Whether the rendered text has a message's words, but for white space, JSON's escapes, reasoning, switches."""
        words = words.strip()
        if words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text:
            return True
        if message.get("role") == "assistant":
            for end in REASONING_ENDS:
                words = words.rpartition(end)[2]
        left = words
        for switch in self._switches:
            left = left.replace(switch, "")
        line = " ".join(text.split())
        return any(" ".join(part.split()) in line for part in (words, left))

    def _complaint(self, place: int, messages: Sequence[Message]) -> str:
        role = messages[place].get("role")
        what = "text or a function call" if _calls(messages[place]) else "text"
        unknown = "user" in self._roles and role not in self._roles
        known = f"; it knows the roles {', '.join(sorted(self._roles))}" if unknown else ""
        return f"the chat template leaves out {what} of message {place + 1} of {len(messages)}, role {role!r}{known}"


def _new_mark() -> str:
    return f"bmx{secrets.token_hex(8)}"


def _content(content: Any) -> str:
    """The text of a message's content: nothing, text, or parts that are text.

    Raises:
        RowError: something else.
    """
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        others = sorted({str(part.get("type")) for part in content} - {"text"})
        if others:
            raise RowError("invalid_request", f"a message has a part of type {others[0]!r:.40}: bmx reads text only")
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str | None):
        raise RowError("invalid_request", "a message's 'content' must be text")
    return content or ""


def _in_parts(message: Message) -> Message:
    """A message with its text as a list of one part."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_object_arguments(call: Any) -> Any:
    """A tool call whose arguments are an object, where they are the text of one."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_object_arguments(call["function"])}
    try:
        arguments = json.loads(call.get("arguments", ""))
    except (TypeError, ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _calls(message: Message) -> list[Message]:
    """The tool calls of a message: the objects that have the function's name."""
    calls = message.get("tool_calls")
    objects = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [call["function"] if isinstance(call.get("function"), dict) else call for call in objects]


def _name(tool: Tool) -> str:
    return str(tool["function"]["name"])


def _renamed(tool: Tool, name: str) -> Tool:
    """The same tool by another name."""
    return {**tool, "function": {**tool["function"], "name": name}}


def _texts(message: Message) -> list[str]:
    """What must not get lost: a message's text, and the names of the functions that it calls."""
    words = (message["content"], *(call.get("name") for call in _calls(message)))
    return [text for text in words if isinstance(text, str) and text.strip()]


def _shape(message: Message) -> tuple[object, ...]:
    """What a template may decide by, apart from what a message says."""
    return message.get("role"), bool(message["content"].strip()), len(_calls(message)), *message


def _marked(message: Message) -> tuple[Message, list[str]]:
    """A message with a random word in place of each of its texts, and these words."""
    marks = {text: _new_mark() for text in _texts(message)}

    def named(call: Any) -> Any:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            return {**call, "function": named(call["function"])}
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            return {**call, "name": marks.get(call["name"], call["name"])}
        return call

    copy = {**message, "content": marks.get(message["content"], message["content"])}
    if isinstance(message.get("tool_calls"), list):
        copy["tool_calls"] = [named(call) for call in message["tool_calls"]]
    return copy, list(marks.values())
