"""The ways in which rows are written, recognised line by line: what each asks, and where its id stands.

Knows the formats of requests; knows nothing of files. To add one: a value of ``Envelope`` in ``ENVELOPES``, and its
record in ``bmx/job/output_records.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bmx.job.answer_formats import with_gemini_format
from bmx.job.left_out import FLAG, LeftOut, squeezed
from bmx.job.messages import from_anthropic, from_conversations, from_gemini, invalid
from bmx.job.output_records import Dialect
from bmx.job.row_checks import SAMPLING_FIELDS, own_sampling, refuse_unknown, refuse_unsupported
from bmx.prompt_template import shown_fields

LIKELY_PROMPTS = (
    *("question", "query", "user", "problem", "document", "article", "text", "content", "inputs", "input"),
)
_COMPLETIONS = re.compile(r"(?:^|/)(chat/)?completions/?(?:\?.*)?$")
_GEMINI_NAMES = {  # of its generation config, and bmx's own
    "candidatecount": "n",
    "frequencypenalty": "frequency_penalty",
    "maxoutputtokens": "max_tokens",
    "presencepenalty": "presence_penalty",
    "responsejsonschema": "guided_json",
    "responselogprobs": "logprobs",
    "responsemimetype": "response_mime_type",
    "responsemodalities": "modalities",
    "responseschema": "response_schema",
    "stopsequences": "stop",
    "topk": "top_k",
    "topp": "top_p",
}
_NO_FILTER = {"BLOCK_NONE", "OFF"}


@dataclass(slots=True, kw_only=True)
class Asked:
    """What a row asks, in bmx's own words, not yet checked.

    Attributes:
        prompt: text; or ``messages``.
        messages: a conversation.
        fields: sampling and other fields by name.
        raw: whether the prompt is continued as it stands.
        may_be_data: whether the fields stand among data of the user's.
    """

    prompt: Any = None
    messages: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False
    may_be_data: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """One way to write a row.

    Attributes:
        recognised: whether a line's object is written so.
        ids: names of the fields that may hold the row's id; the first that is there counts.
        dialect: how its record is written.
        asked: what it asks, but for what may be left out; raises RowError where that is nothing that bmx answers.
    """

    recognised: Callable[[Mapping[str, Any]], bool]
    ids: tuple[str, ...]
    dialect: Callable[[Mapping[str, Any]], Dialect]
    asked: Callable[[Mapping[str, Any], LeftOut], Asked]


def _is_openai(values: Mapping[str, Any]) -> bool:
    if isinstance(values.get("body"), dict):
        return "custom_id" in values or "url" in values
    return "custom_id" in values and ("body" in values or "url" in values) and not values.keys() & _OWN_PROMPTS


def _openai_dialect(values: Mapping[str, Any]) -> Dialect:
    url, body = values.get("url"), values.get("body")
    if isinstance(url, str):
        found = _COMPLETIONS.search(url)
        return "text_completion" if found and not found[1] else "chat.completion"
    only_prompt = isinstance(body, dict) and "prompt" in body and "messages" not in body
    return "text_completion" if only_prompt else "chat.completion"


def _openai_asked(values: Mapping[str, Any], left_out: LeftOut) -> Asked:
    body, url, method = values.get("body"), values.get("url"), values.get("method")
    if not (method is None or (isinstance(method, str) and method.upper() == "POST")):
        raise invalid("only POST is answered")
    if not (url is None or (isinstance(url, str) and _COMPLETIONS.search(url))):
        shown = str(url)[:60]
        raise invalid(f"'url' is {shown!r}: only those that end in /chat/completions or /completions are answered")
    if not isinstance(body, dict):
        raise invalid("'body' must be an object")
    raw = _openai_dialect(values) == "text_completion"
    others = {"max_completion_tokens", "random_seed", "functions", "prompt" if raw else "messages"}
    refuse_unknown(body, "'body'", frozenset(others), left_out)
    fields = dict(body)
    for name, other in (("max_tokens", "max_completion_tokens"), ("seed", "random_seed")):
        if body.get(other) is not None:
            fields[name] = body[other]
    if body.get("functions") and not body.get("tools"):
        fields |= {"tools": body["functions"], "tool_choice": body.get("function_call")}
    if raw:
        return Asked(prompt=_single_prompt(body.get("prompt")), fields=fields, raw=True)
    return Asked(messages=body.get("messages") or (), fields=fields)


def _anthropic_asked(values: Mapping[str, Any], left_out: LeftOut) -> Asked:
    params = values["params"]
    fields = {("stop" if name == "stop_sequences" else name): value for name, value in params.items()}
    refuse_unknown(fields, "'params'", frozenset(("messages", "system", "container", "mcp_servers")), left_out)
    return Asked(messages=from_anthropic(params), fields=fields)


def _gemini_asked(values: Mapping[str, Any], left_out: LeftOut) -> Asked:
    request = dict(values["request"])
    contents, system, config, safety, choice = (
        _pop(request, name)
        for name in ("contents", "systeminstruction", "generationconfig", "safetysettings", "toolconfig")
    )
    config, safety = config or {}, safety or []
    if not isinstance(config, dict):
        raise invalid("'generationConfig' must be an object")
    filters = not isinstance(safety, list) or any(not _filters_nothing(setting) for setting in safety)
    if filters and not left_out.takes("safetySettings"):
        but = f"but for the thresholds BLOCK_NONE and OFF; {FLAG} leaves it out"
        raise invalid(f"unsupported in 'request': safetySettings ({but})")
    named: dict[str, Any] = {_GEMINI_NAMES.get(squeezed(name)) or name: value for name, value in config.items()}
    fields = request | with_gemini_format(named) | _gemini_choice(choice)
    refuse_unknown(fields, "'request'", frozenset(), left_out)
    return Asked(messages=from_gemini(contents, system), fields=fields)


def _gemini_choice(config: Any) -> dict[str, Any]:
    """Gemini's tool config as OpenAI's ``tool_choice``, where it says AUTO or NONE; as it is where it says more."""
    inner = _pop(dict(config), "functioncallingconfig") if isinstance(config, dict) else None
    if isinstance(inner, dict) and inner.keys() == {"mode"} and inner["mode"] in ("AUTO", "NONE"):
        return {"tool_choice": inner["mode"].lower()}
    return {"toolConfig": config or None}


def _pop(values: dict[str, Any], name: str) -> Any:
    """Take out the field of that name, which may be written ``systemInstruction`` or ``system_instruction``."""
    return next((values.pop(written) for written in list(values) if squeezed(written) == name), None)


def _filters_nothing(setting: Any) -> bool:
    return isinstance(setting, dict) and setting.get("threshold") in _NO_FILTER


def _plain_asked(values: Mapping[str, Any], left_out: LeftOut) -> Asked:
    prompt, messages, turns = (values.get(name) for name in ("prompt", "messages", "conversations"))
    refuse_unsupported({**values, "system": None} if turns is not None else values, left_out)
    own = own_sampling(values, left_out)
    if twice := sorted(name for name in own if values.get(name) is not None):
        raise invalid(f"{twice[0]!r} stands in 'sampling' and beside it")
    if isinstance(prompt, list) and prompt and all(isinstance(item, dict) for item in prompt):
        prompt, messages = None, prompt if messages is None else (prompt, messages)
    elif messages is None and turns is not None:
        messages = from_conversations(turns, values.get("system"))
    if isinstance(messages, tuple) or (prompt is not None and messages is not None):
        raise invalid("give either 'prompt' or 'messages', not both")
    if messages is None and prompt is None:
        raise invalid(_no_prompt(values))
    if messages is None:
        prompt = _single_prompt(prompt)
    return Asked(prompt=prompt, messages=messages, fields={**values, **own} if own else values, may_be_data=not own)


def _single_prompt(prompt: Any) -> str:
    """A prompt that is text.

    Raises:
        RowError: it is something else, which is called what it is.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise invalid("'prompt' is empty")
        return prompt
    items = prompt if isinstance(prompt, list) else []
    if items and all(isinstance(item, int | list) and not isinstance(item, bool) for item in items):
        raise invalid("'prompt' is a list of token ids: bmx reads text only")
    if items and all(isinstance(item, str) for item in items):
        raise invalid("'prompt' is a list of texts: give each a row of its own")
    what = "is missing or null" if prompt is None else f"must be text, not {_kind(prompt)}"
    raise invalid(f"'prompt' {what}")


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "text")


def _no_prompt(values: Mapping[str, Any]) -> str:
    """What a row has in place of a prompt, and how to make one of it."""
    names = [name for name in values if name not in {*SAMPLING_FIELDS, *_IDS}]
    message = f"no 'prompt' or 'messages': the row has {shown_fields(names)}"
    template = _likely_template({name: values[name] for name in names if "{" not in name and "}" not in name})
    if template:
        return f"{message}; --prompt-template '{template}' makes a prompt of such rows"
    inner = next((name for name in names if _is_list_of_objects(values[name]) and name.isidentifier()), None)
    return f"{message}; jq -c '.{inner}[]' makes rows of that list" if inner else message


def _likely_template(values: Mapping[str, Any]) -> str | None:
    """A template of the fields that most likely are the prompt: of a usual name, or else the longest text."""
    texts = {name: value for name, value in values.items() if isinstance(value, str) and value.strip()}
    if "instruction" in texts:
        return "{instruction}\\n\\n{input}" if isinstance(values.get("input"), str) else "{instruction}"
    usual = [name for name in LIKELY_PROMPTS if name in texts]
    others = [name for name in texts if not squeezed(name).endswith("id")]
    likely = usual[0] if usual else max(others, key=lambda name: len(texts[name]), default=None)
    return f"{{{likely}}}" if likely else None


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _is_gemini(values: Mapping[str, Any]) -> bool:
    request = values.get("request")
    return isinstance(request, dict) and "contents" in request and not values.keys() & _OWN_PROMPTS


def _is_anthropic(values: Mapping[str, Any]) -> bool:
    params = values.get("params")
    return isinstance(params, dict) and "messages" in params and not values.keys() & _OWN_PROMPTS


_IDS = ("id", "custom_id")
_OWN_PROMPTS = {"prompt", "messages", "conversations"}
_ENVELOPES = {"body", "url", "params", "request"}
_REQUESTS = _OWN_PROMPTS | {"body", "params", "request"}
PLAIN = Envelope(recognised=lambda _: True, ids=_IDS, dialect=lambda _: "plain", asked=_plain_asked)
ENVELOPES = (
    Envelope(recognised=_is_openai, ids=("custom_id", "id"), dialect=_openai_dialect, asked=_openai_asked),
    Envelope(recognised=_is_anthropic, ids=("custom_id", "id"), dialect=lambda _: "anthropic", asked=_anthropic_asked),
    Envelope(recognised=_is_gemini, ids=("key", "custom_id", "id"), dialect=lambda _: "gemini", asked=_gemini_asked),
    PLAIN,
)


def envelope_of(values: Mapping[str, Any]) -> Envelope:
    """How a row is written; plain if it has no other envelope."""
    if values.keys().isdisjoint(_ENVELOPES):
        return PLAIN
    return next(envelope for envelope in ENVELOPES if envelope.recognised(values))


def is_answer(values: Mapping[str, Any]) -> bool:
    """Whether a line is a record of an output, of bmx or of a batch API, and no request."""
    if not values.keys().isdisjoint(_REQUESTS):
        return False
    if "row_hash" in values:
        return "text" in values or "error" in values
    return ("custom_id" in values and bool(values.keys() & {"response", "result"})) or {
        "key",
        "response",
    } <= values.keys()
