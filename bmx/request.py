"""One input line, one output line, and how to sample. Values only: nothing here knows files or tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from bmx.errors import RowError, UsageError
from bmx.settings import ALWAYS, IF_GIVEN, IF_TRUE, NOT_IN_BENCH, Setting, check_types, settings_in
from bmx.units import parse_schema

MAX_STOP_STRINGS = 16
FORMATS = ("json_schema", "guided_regex", "guided_choice")  # parameters that say what every answer fits
HOTTEST = (
    2  # the range of the interfaces whose files bmx reads; a larger number is likelier a row's data, as in degrees
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one answer are chosen.

    Raises:
        UsageError: a value of another type or out of range; the message names it.
    """

    max_tokens: Annotated[
        int, Setting("Longest answer", decides_answers=ALWAYS, unit="tokens", commands=NOT_IN_BENCH)
    ] = 256
    temperature: Annotated[
        float, Setting("0 is greedy: always the most likely token", decides_answers=ALWAYS, commands=NOT_IN_BENCH)
    ] = 0.0
    top_p: Annotated[
        float,
        Setting(
            "Sample among the most likely tokens that together have this probability",
            decides_answers=ALWAYS,
            commands=NOT_IN_BENCH,
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        Setting(
            "Sample among this many most likely tokens; 0 is all",
            decides_answers=ALWAYS,
            unit="tokens",
            commands=NOT_IN_BENCH,
        ),
    ] = 0
    min_p: Annotated[
        float,
        Setting(
            "Drop tokens less likely than this share of the most likely one",
            decides_answers=ALWAYS,
            rare=True,
            commands=NOT_IN_BENCH,
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Setting(
            "Above 1 makes tokens of the prompt and the answer less likely",
            decides_answers=ALWAYS,
            rare=True,
            commands=NOT_IN_BENCH,
        ),
    ] = 1.0
    stop: Annotated[
        tuple[str, ...],
        Setting(
            "End the answer before this text; may be given several times", decides_answers=ALWAYS, commands=NOT_IN_BENCH
        ),
    ] = ()
    stop_token_ids: Annotated[
        tuple[int, ...],
        Setting(
            "End the answer at this token id; may be given several times",
            decides_answers=ALWAYS,
            commands=NOT_IN_BENCH,
            metavar="ID",
            rare=True,
        ),
    ] = ()
    seed: Annotated[
        int,
        Setting(
            "Two runs with the same seed give the same answers",
            decides_answers=ALWAYS,
            help_in={"bench": "Seed of the random prompts"},
        ),
    ] = 0
    ignore_eos: Annotated[
        bool,
        Setting(
            "Continue past the model's own end token, up to max_tokens",
            decides_answers=ALWAYS,
            commands=NOT_IN_BENCH,
            rare=True,
        ),
    ] = False
    stop_repetition: Annotated[
        bool,
        Setting(
            "End an answer that repeats one stretch of tokens without end, with finish_reason repetition",
            decides_answers=IF_TRUE,
            commands=NOT_IN_BENCH,
            rare=True,
        ),
    ] = True
    json_schema: Annotated[
        str | None,
        Setting(
            "Answers are JSON that fits this schema: a file, or its text",
            decides_answers=IF_GIVEN,
            commands=NOT_IN_BENCH,
            metavar="FILE",
            parse=parse_schema,
            is_object=True,
        ),
    ] = None
    guided_regex: Annotated[
        str | None,
        Setting(
            "Answers match this regular expression as a whole",
            decides_answers=IF_GIVEN,
            commands=NOT_IN_BENCH,
            metavar="REGEX",
            rare=True,
        ),
    ] = None
    guided_choice: Annotated[
        tuple[str, ...],
        Setting(
            "Answers are one of these texts; given once for each",
            decides_answers=IF_GIVEN,
            commands=NOT_IN_BENCH,
            rare=True,
        ),
    ] = ()

    def __post_init__(self) -> None:
        for setting in settings_in(SamplingParams):
            object.__setattr__(self, setting.name, _plain(setting, getattr(self, setting.name)))
        check_types(self)
        checks = {
            "max_tokens": 1 <= self.max_tokens < 2**31,
            "temperature": 0 <= self.temperature <= HOTTEST,
            "top_p": 0 <= self.top_p <= 1,
            "top_k": 0 <= self.top_k < 2**31,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty <= 100,
            "stop": len(self.stop) <= MAX_STOP_STRINGS and all(self.stop),
            "seed": abs(self.seed) < 2**63,
            "guided_choice": all(self.guided_choice),
        }
        for name, ok in checks.items():
            if not ok:
                raise UsageError(f"{name} is out of range: {getattr(self, name)!r:.80}")
        given = [name for name in FORMATS if getattr(self, name) not in (None, ())]
        if len(given) > 1:
            raise UsageError(f"an answer has one format: {' and '.join(given)} contradict each other")


def _plain(setting: Setting, value: Any) -> Any:
    """A value as it is kept: one text or number in place of a list of them, whole numbers as such, no ``top_k`` as 0.

    Raises:
        UsageError: an item of a list has another type.
    """
    if setting.is_list:
        items = (value,) if type(value) in (str, int) else value
        if isinstance(items, list | tuple) and not all(type(item) is setting.item_type for item in items):
            raise UsageError(f"{setting.name} cannot be {value!r:.80}", hint=f"it takes {setting.expected}")
        return tuple(items) if isinstance(items, list) else items
    if setting.type is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    return 0 if setting.name == "top_k" and value == -1 else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to answer it: either ``prompt`` or ``messages``.

    Attributes:
        id: repeated in its result.
        prompt: text.
        messages: a conversation; each message has a ``role`` and a ``content``.
        params: how to sample the answer.
        raw: whether the prompt is continued as it stands, without the model's chat template.
        seeded: whether the seed is the request's own; otherwise the id is mixed into it.
        chat_template_kwargs: values for variables of the model's chat template, such as ``enable_thinking``.
        tools: functions that the model may call, in OpenAI's form; the chat template shows them to it.
        reasoning_effort: how much the model should reason, for a chat template that takes it; None says nothing.

    Raises:
        UsageError: both of them, or a value of another type.
    """

    id: str | int
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    params: SamplingParams = SamplingParams()
    raw: bool = False
    seeded: bool = False
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    tools: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    reasoning_effort: str | None = None

    def __post_init__(self) -> None:
        declared: tuple[tuple[str, Any, Any, str], ...] = (
            ("id", self.id, str | int, "text or a whole number"),
            ("prompt", self.prompt, str | None, "text"),
            ("params", self.params, SamplingParams, "SamplingParams"),
            ("chat_template_kwargs", self.chat_template_kwargs, dict, "a dict"),
            ("reasoning_effort", self.reasoning_effort, str | None, "text"),
        )
        for name, value, kind, words in declared:
            if not isinstance(value, kind):
                raise UsageError(f"a request's {name} must be {words}, not {type(value).__name__}")
        messages = () if self.messages is None else self.messages
        if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
            raise UsageError("a request's messages must be dicts", hint='[{"role": "user", "content": "Hello"}]')
        if not all(isinstance(name, str) for name in self.chat_template_kwargs):
            raise UsageError("a request's chat_template_kwargs must have names of variables as keys")
        if not isinstance(self.tools, list | tuple) or not all(map(_is_function, self.tools)):
            hint = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]'
            raise UsageError("a request's tools must be functions with names", hint=hint)
        if self.prompt is not None and self.messages is not None:
            raise UsageError("a request has a prompt or messages, not both")


def _is_function(tool: Any) -> bool:
    """Whether a tool is a function with a name, in OpenAI's form."""
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KVUsage:
    """KV pairs per layer and head of one answer.

    Attributes:
        budget: the most that may be kept.
        kept: those kept.
        evicted: the others.
        format: how they are stored: ``model`` (the model's own type), ``int8``, ``int8/int4`` (keys/values) and so on.
        asked: the budget as the user gave it, where that is a share: ``25%`` (of the pairs) or ``25%bytes``.
    """

    budget: int
    kept: int
    evicted: int
    format: str = "model"
    asked: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The answer to one request, or the error that took its place.

    Attributes:
        id: of the request.
        text: of the answer, without its reasoning.
        reasoning: what the model thought before it answered, where its chat template marks that; None for nothing.
        token_ids: of the answer, its end token included.
        finish_reason: ``stop`` (an end token, a stop string, or the end of the answer's format), ``length``, or
            ``repetition``.
        usage: tokens of the prompt and the answer.
        kv: KV pairs that were kept and evicted.
        truncated: prompt tokens that were cut out to make the prompt fit.
        clamped_to: most tokens that the model's own limit allowed, where that is less than ``max_tokens``.
        ignored: what the job has left out of the row, by name.
        error: why there is no answer.
    """

    id: str | int
    text: str = ""
    reasoning: str | None = None
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    kv: KVUsage | None = None
    truncated: int = 0
    clamped_to: int | None = None
    ignored: tuple[str, ...] = ()
    error: RowError | None = None
