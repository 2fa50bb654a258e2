"""From plain Python to settings and requests: keywords, texts and messages, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from os import PathLike
from typing import Any

from bmx.config import EngineConfig
from bmx.errors import UsageError
from bmx.methods import expand_method
from bmx.model.instructions import INSTRUCTIONS
from bmx.prompt_config import PromptConfig, refuse_template_arguments
from bmx.request import Request, Result, SamplingParams
from bmx.run_config import MethodConfig
from bmx.settings import settings_in


def gather_settings(
    model: str | PathLike[str] | EngineConfig, prompt: PromptConfig | None, keywords: Mapping[str, Any]
) -> tuple[EngineConfig, PromptConfig]:
    """The settings of an engine.

    Args:
        model: a model's name or path, or settings to begin with.
        prompt: settings of prompts to begin with.
        keywords: settings by name, with values as on the command line or in a file; they replace those given before.

    Raises:
        UsageError: an unknown name, a wrong type, a value out of range, or values that contradict each other.
    """
    if not isinstance(model, str | PathLike | EngineConfig) or not isinstance(prompt, PromptConfig | None):
        raise UsageError(
            f"an engine is opened by a model's name or an EngineConfig, and a PromptConfig: not {_kind(model)}, "
            f"{_kind(prompt)}",
            hint='Engine.open("demo", kv_budget=512)',
        )
    names = {field.name for field in fields(SamplingParams)} & keywords.keys()
    if names:
        name = min(names)
        raise UsageError(
            f"{name} belongs to a call, not to the engine", hint=f"engine.generate(prompts, {name}={keywords[name]!r})"
        )
    values = expand_method(_coerced(keywords, (EngineConfig, PromptConfig, MethodConfig)))
    of_engine = {field.name for field in fields(EngineConfig)}
    own = {name: value for name, value in values.items() if name in of_engine}
    if isinstance(model, EngineConfig):
        config = replace(model, **own)
    else:
        config = EngineConfig(**_coerced({"model": str(model)}, (EngineConfig,)) | own)
    if values.get("prompt_template") and INSTRUCTIONS not in (config.kv_protect, config.kv_probe):
        raise UsageError(
            "prompt_template is filled from the rows of a file; prompts from Python are whole",
            hint="fill it yourself: engine.generate([template.format(document=text) for text in texts])",
        )
    others = {name: value for name, value in values.items() if name not in of_engine}
    return config, replace(prompt or PromptConfig(), **others)


def sampling_params(keywords: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from keywords.

    Raises:
        UsageError: an unknown name, a wrong type, or a value out of range.
    """
    return SamplingParams(**_coerced(keywords, (SamplingParams,)))


def text_requests(prompts: Iterable[str], params: SamplingParams) -> list[Request]:
    """Requests for texts, with their places as ids.

    Args:
        prompts: the texts.
        params: how to sample all answers.

    Raises:
        UsageError: not a list of texts.
    """
    return [
        Request(id=place, prompt=_checked(text, str, "a text", place), params=params)
        for place, text in enumerate(_listed(prompts, "texts", "one text is a list of one: [text]"))
    ]


def chat_requests(
    conversations: Iterable[Iterable[Mapping[str, Any]]],
    params: SamplingParams,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Iterable[Mapping[str, Any]] = (),
) -> list[Request]:
    """Requests for conversations, with their places as ids.

    Args:
        conversations: lists of messages, each message with its role and its content.
        params: how to sample all answers.
        chat_template_kwargs: values for variables of the chat template.
        tools: functions that the model may call.

    Raises:
        UsageError: not a list of lists of messages, tools that are no functions, or values that bmx sets itself.
    """
    hint = 'a conversation is a list of messages: [[{"role": "user", "content": "Hello"}]]'
    kwargs = _coerced({"chat_template_kwargs": chat_template_kwargs}, (PromptConfig,))["chat_template_kwargs"] or {}
    refuse_template_arguments(kwargs)
    given = tuple(dict(tool) if isinstance(tool, Mapping) else tool for tool in tools)
    requests = []
    for place, conversation in enumerate(_listed(conversations, "conversations", hint)):
        if isinstance(conversation, Mapping):
            raise UsageError(f"item {place} must be a list of messages, not a single message", hint=hint)
        messages = tuple(_message(m, place, hint) for m in _listed(conversation, "messages", hint))
        if not messages:
            raise UsageError(f"item {place} has no messages", hint=hint)
        requests.append(Request(id=place, messages=messages, params=params, chat_template_kwargs=kwargs, tools=given))
    return requests


def checked_requests(requests: Iterable[Request | Result]) -> Iterator[Request]:
    """The same requests.

    Raises:
        UsageError: an item that is not a request.
    """
    hint = 'Request(id="a", prompt="text"); generate() takes plain texts'
    for place, request in enumerate(_listed(requests, "requests", hint)):
        yield _checked(request, Request, "a Request", place, hint)


def _coerced(keywords: Mapping[str, Any], sections: tuple[type, ...]) -> dict[str, Any]:
    """Values of settings in their types; the sections are the dataclasses that declare them."""
    known = {setting.name: setting for section in sections for setting in settings_in(section)}
    for name in keywords:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise UsageError(f"unknown setting {name!r}", hint=f"did you mean {near[0]!r}?" if near else None)
    return {name: known[name].coerce(value) for name, value in keywords.items()}


def _listed(items: Any, what: str, hint: str) -> Iterable[Any]:
    """The items, where they are several."""
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise UsageError(f"a list of {what} is needed, not {_kind(items)}", hint=hint)
    return items


def _checked(item: Any, kind: type, what: str, place: int, hint: str | None = None) -> Any:
    if not isinstance(item, kind):
        raise UsageError(f"item {place} must be {what}, not {_kind(item)}", hint=hint)
    return item


def _message(message: Any, place: int, hint: str) -> dict[str, Any]:
    if (
        not isinstance(message, Mapping)
        or not isinstance(message.get("role"), str)
        or not isinstance(message.get("content") or ("" if message.get("tool_calls") else None), str)
    ):
        raise UsageError(f"item {place} has a message without a role and a content that are text", hint=hint)
    return dict(message)


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
