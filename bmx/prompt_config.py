"""The settings of prompts: how a row becomes the text that the model reads.

Each setting is declared once, as a field with its type, its default and its ``Setting``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bmx.errors import UsageError
from bmx.settings import ALWAYS, IF_CUT, IF_GIVEN, IF_TRUE, NEVER, NOT_IN_BENCH, Setting, check_types
from bmx.units import parse_object

TEMPLATE_ARGUMENTS = frozenset(  # what rendering a chat template takes beside the template's own variables
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents"),
        *("max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
        *("sanitize_control_tokens", "tokenize", "tokenizer", "tokenizer_kwargs", "tools", "truncation"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """How a row becomes the text that the model reads.

    Raises:
        UsageError: a value of another type.
    """

    system_prompt: Annotated[
        str | None,
        Setting(
            "System message for every conversation that has none of its own; @FILE reads it from a file",
            decides_answers=ALWAYS,
            private=True,
            from_file=True,
        ),
    ] = None
    prompt_template: Annotated[
        str | None,
        Setting(
            "Prompt of plain rows: text with {field} placeholders, filled from the row's fields; @FILE reads it from a "
            "file, @@ begins a text with @",
            decides_answers=ALWAYS,
            private=True,
            from_file=True,
            typed_escapes=True,
        ),
    ] = None
    jinja: Annotated[
        bool,
        Setting(
            "The prompt template is written in Jinja; one in a file *.jinja, *.jinja2 or *.j2 always is",
            decides_answers=IF_TRUE,
        ),
    ] = False
    constant_prompt: Annotated[
        bool,
        Setting(
            "Allow a prompt template without fields, which gives all rows the same prompt",
            decides_answers=NEVER,
            commands=NOT_IN_BENCH,
            rare=True,
        ),
    ] = False
    chat_template: Annotated[
        bool, Setting("Wrap plain prompts in the model's chat template, if it has one", decides_answers=ALWAYS)
    ] = True
    parse_special_tokens: Annotated[
        bool,
        Setting("Read control tokens written in a document as control tokens", decides_answers=ALWAYS, rare=True),
    ] = False
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        Setting(
            'Values for variables of the chat template, as a JSON object: {"enable_thinking": false}; a row\'s own win',
            decides_answers=IF_GIVEN,
            parse=parse_object,
            metavar="JSON",
            aliases=("default_chat_template_kwargs",),
            rare=True,
        ),
    ] = None
    on_too_long: Annotated[
        Literal["error", "skip", "truncate-left", "truncate-middle"],
        Setting(
            "A prompt longer than the model takes: error; skip: leave it out, which is no failure; truncate-left, "
            "truncate-middle: cut its longest text at the beginning or in the middle, so that the answer has room",
            decides_answers=IF_CUT,
            commands=NOT_IN_BENCH,
        ),
    ] = "error"

    def __post_init__(self) -> None:
        check_types(self)
        refuse_template_arguments(self.chat_template_kwargs or {})


def refuse_template_arguments(values: Mapping[str, Any]) -> None:
    """Refuse values for the chat template by names that bmx or transformers gives values itself.

    Raises:
        UsageError: names them.
    """
    taken = sorted(values.keys() & TEMPLATE_ARGUMENTS)
    if taken:
        raise UsageError(f"chat_template_kwargs cannot set {', '.join(taken)}")
