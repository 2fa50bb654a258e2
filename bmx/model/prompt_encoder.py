"""Prompts to token ids: chat templates, control tokens in documents, truncation.

Knows a tokenizer; knows nothing of models, slots or files.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bmx.errors import RowError, UsageError
from bmx.model.chat_renderer import ASSISTANTS, ChatRenderer
from bmx.model.instructions import INSTRUCTIONS, Instructions
from bmx.model.reasoning import ReasoningMarks
from bmx.prompt_config import PromptConfig, refuse_template_arguments
from bmx.request import Request

GUESSES = 12  # lengths that are tried for a text that is too long
LEADING = 200  # first characters of a text, among which a control token may begin it
TAG = re.compile(r"</?[A-Za-z0-9]+>|\[/?[A-Za-z0-9]+\]")  # a control token that may well be a word of a document
FILLED = 0.98  # share of the allowed tokens from which no better length is tried
HUGE = 1_000_000  # characters of a text from which it is worth to look at its size first
COMPOSED = 4  # characters that a tokenizer may read as one before it looks for tokens


class PromptEncoder:
    """Turns a request into the token ids that the model reads.

    Text of a row never becomes a control token unless ``parse_special_tokens`` is set: where a document spells a
    control token (``<|im_end|>``), that spelling is tokenised as two pieces of plain text, and the rest as usual. What
    an assistant has said may hold tokens that are not special, such as ``<think>``: the model wrote them as such.

    Args:
        tokenizer: a transformers tokenizer.
        config: how rows become prompts.

    Raises:
        UsageError: there is a system prompt, or values for the chat template, but no chat template to take them.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._instructions = Instructions.from_config(config)
        self._renderer = ChatRenderer(tokenizer)
        self._reasoning = ReasoningMarks.of(tokenizer)
        self._spellings, special = _control_tokens(tokenizer)
        self._control = () if config.parse_special_tokens else self._spellings
        self._of_assistants = () if config.parse_special_tokens else special
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        if not (self._has_template and config.chat_template):
            given = {
                "a system prompt": config.system_prompt is not None,
                "chat_template_kwargs": config.chat_template_kwargs,
            }
            for what in (name for name, value in given.items() if value):
                raise UsageError(f"{what} needs the model's chat template, which is missing or turned off")
        template = str(getattr(tokenizer, "chat_template", None) or "")
        of_turns = (token for token in self._spellings if not template or token in template)
        self._turn_tokens = tuple(token for token in of_turns if not TAG.fullmatch(token))
        self._unused: set[str] = set()  # names of values that no chat template takes
        self._looked_at = self._rendered = 0  # prompts that were measured, and those of them that are rendered already

    def encode(self, request: Request) -> list[int]:
        """Token ids of a request's prompt.

        Raises:
            RowError: ``invalid_request``, if the prompt is empty, or the chat template refuses the messages or leaves
                out one of them.
        """
        messages = self._messages(request)
        if messages is None:
            text, marks = self._hide(request.prompt or "", self._control)
            ids = self._tokens(text, marks, add_special_tokens=True)
            self._unused |= _own_variables(request).keys()
        else:
            text, marks = self._render(request, messages)
            ids = self._tokens(text, marks, add_special_tokens=False)
        if not ids:
            raise RowError("invalid_request", "the prompt is empty")
        return ids

    def reasoning(self, request: Request, ids: Sequence[int]) -> ReasoningMarks | None:
        """The marks around the reasoning of a request's answer; None where there are none, or no chat template.

        Args:
            request: the request.
            ids: token ids of its prompt.
        """
        if self._reasoning is None or not self._is_rendered(request):
            return None
        last = request.messages[-1] if request.messages else {}
        continues = str(last.get("role")).lower() in ASSISTANTS
        return self._reasoning.after(ids, self._renderer.normalised(last)["content"] if continues else "")

    def _is_rendered(self, request: Request) -> bool:
        """Whether the chat template makes the request's prompt."""
        return bool(request.messages) or (not request.raw and self._config.chat_template and self._has_template)

    def probe(self, text: str | None) -> tuple[int, ...]:
        """Token ids of a probe, which is a paragraph of its own; no ids without one.

        Args:
            text: the probe; ``instructions`` stands for the job's own instructions.

        Raises:
            UsageError: the job has no instructions.
        """
        if text is None:
            return ()
        words = self._instructions.question if text == INSTRUCTIONS else text
        return tuple(self._tokens(*self._hide(f"\n\n{words}", self._control), add_special_tokens=False))

    def instruction_spans(self, request: Request, length: int) -> tuple[tuple[int, int], ...]:
        """The spans of the job's own instructions among the tokens of a prompt, as (first, end) places.

        The text on both sides of a border is tokenised together in the prompt, so a border may be off by one token.

        Args:
            request: the prompt's request.
            length: tokens of the whole prompt.
        """
        messages = self._messages(request)
        if messages is None:
            text, marks = self._hide(request.prompt or "", self._control)
            system = ""
        else:
            text, marks = self._render(request, messages)
            system = next((str(m.get("content") or "") for m in messages if m.get("role") == "system"), "")
        end, begin = self._instructions.spans(text, self._hide(system, self._control)[0])
        special = messages is None
        head = len(self._tokens(text[:end], marks, add_special_tokens=special)) if end else 0
        tail = len(self._tokens(text[:begin], marks, add_special_tokens=special)) if begin < len(text) else length
        return tuple(span for span in ((0, min(head, length)), (tail, length)) if span[0] < span[1])

    def note(self, request: Request) -> None:
        """Look at a prompt for what a person should know of; ``warnings`` tells it."""
        self._looked_at += 1
        if self._config.parse_special_tokens and (request.raw or request.messages or not self._config.chat_template):
            return  # its control tokens act, and nothing is wrapped around them
        texts = [request.prompt] if request.messages is None else [m.get("content") for m in request.messages]
        texts.append(self._config.system_prompt)
        self._rendered += any(isinstance(text, str) and self._looks_rendered(text) for text in texts)

    def _looks_rendered(self, text: str) -> bool:
        """Whether a text begins with a control token, or has two different ones that no other text has."""
        if text[:LEADING].lstrip().startswith(self._spellings):
            return True
        return sum(token in text for token in self._turn_tokens) > 1

    def warnings(self) -> list[str]:
        """What a person should know of the prompts so far."""
        lines, rendered = [], f"{self._rendered:,} of {self._looked_at:,} prompts"
        if self._rendered and self._config.parse_special_tokens:
            lines.append(
                f"{rendered} begin with a control token of the model and are put into its chat template once more: "
                "--no-chat-template leaves them as they are"
            )
        elif self._rendered:
            lines.append(
                f"{rendered} contain control tokens of the model, which are read as text: --parse-special-tokens lets "
                "them act, with --no-chat-template if they are rendered already"
            )
        if self._renderer.folded:
            lines.append("the model's chat template takes no system message: its text begins the first user message")
        lines += [
            f"chat_template_kwargs sets {name!r}, which the model's chat template does not use: it has no effect"
            for name in sorted(self._unused)
        ]
        return lines

    def surely_longer(self, request: Request, tokens: int) -> bool:
        """Whether a prompt must have more tokens than this, told from its size alone: reading it would take gigabytes.

        Args:
            request: the prompt's request.
            tokens: most tokens of the prompt.
        """
        characters = len(_longest_text(request)[1])
        if characters < HUGE or not hasattr(self._tokenizer, "get_vocab"):
            return False
        longest = max(len(spelling) for spelling in self._tokenizer.get_vocab())
        return characters > tokens * longest * COMPOSED

    @property
    def truncates(self) -> bool:
        """Whether prompts that are too long are truncated."""
        return self._config.on_too_long.startswith("truncate")

    def truncate(self, request: Request, tokens: int) -> tuple[Request, list[int]]:
        """Shorten the longest text of a request until its prompt fits; returns the request and the token ids.

        The text loses its beginning or its middle, as ``on_too_long`` says; all else (the template, other messages)
        stays. A prompt that does not fit even without the text is returned whole.

        Args:
            request: whose prompt is too long.
            tokens: most tokens of the prompt; the result has as many, or a few less.

        Raises:
            RowError: as ``encode``.
        """
        at, text = _longest_text(request)
        ids = self.encode(request)
        best, low, high, kept = (request, ids), 0, len(text), len(text)  # characters: low fits, high does not
        for _ in range(GUESSES):
            kept = kept * tokens // len(ids) if ids else high
            if not low < kept < high:
                kept = (low + high) // 2
            if kept == low:
                break
            shorter = _with_text(request, at, self._shorten(text, kept))
            try:
                ids = self.encode(shorter)
            except RowError:  # nothing but blanks is left
                low, ids = kept, []
                continue
            if len(ids) > tokens:
                high = kept
                continue
            best, low = (shorter, ids), kept
            if len(ids) >= FILLED * tokens:
                break
        return best

    def _shorten(self, text: str, kept: int) -> str:
        """``kept`` characters of a text: its end, or its beginning and its end."""
        head = kept // 2 if self._config.on_too_long == "truncate-middle" else 0
        return text[:head] + text[len(text) - (kept - head) :]

    def _messages(self, request: Request) -> list[dict[str, Any]] | None:
        """The conversation that the chat template renders; None for a prompt without a template."""
        if not request.messages and not request.prompt:
            raise RowError("invalid_request", "the prompt is empty")
        if not request.messages:
            if not self._is_rendered(request):
                for what in (name for name in ("tools", "reasoning_effort") if getattr(request, name)):
                    raise RowError("invalid_request", f"unsupported: {what}, where no chat template acts")
                return None
            messages: list[dict[str, Any]] = [{"role": "user", "content": request.prompt}]
        elif not self._has_template:
            raise RowError("invalid_request", "this model has no chat template: give 'prompt' instead of 'messages'")
        else:
            messages = [self._renderer.normalised(message) for message in request.messages]
        if self._config.system_prompt is not None and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": self._config.system_prompt})
        return messages

    def _render(self, request: Request, messages: list[dict[str, Any]]) -> tuple[str, dict[str, str]]:
        """The chat template's text, and the control tokens that documents spell, by the marks in their place."""
        marks: dict[str, str] = {}
        variables = {**(self._config.chat_template_kwargs or {}), **self._effort(request), **_own_variables(request)}
        try:
            hidden = [self._hide_all(message, marks, self._hidden_in(message)) for message in messages]
            values = self._hide_all(variables, marks, self._control)
            tools = self._hide_all(list(request.tools), marks, self._control)
        except RecursionError:
            raise RowError("invalid_request", "nested too deep") from None
        if variables:
            self._unused |= variables.keys() - self._renderer.variables
        return self._renderer.render(hidden, values, tools), marks

    def _effort(self, request: Request) -> dict[str, Any]:
        """A request's ``reasoning_effort`` as a variable of the chat template.

        Raises:
            RowError: ``invalid_request``, if the template does not use it.
        """
        if request.reasoning_effort is None:
            return {}
        if "reasoning_effort" not in self._renderer.variables:
            message = "unsupported: reasoning_effort, which the model's chat template does not use"
            raise RowError("invalid_request", f"{message} (--ignore-unsupported leaves it out)")
        return {"reasoning_effort": request.reasoning_effort}

    def _hidden_in(self, message: Mapping[str, Any]) -> tuple[str, ...]:
        """The control tokens that a message's texts may spell but not use."""
        return self._of_assistants if message.get("role") == "assistant" else self._control

    def _hide_all(self, value: Any, marks: dict[str, str], tokens: tuple[str, ...]) -> Any:
        """``value`` with marks in all of its texts, since a template may print any field of a message."""
        if not tokens:
            return value
        if isinstance(value, str):
            text, new = self._hide(value, tokens)
            marks.update(new)
            return text
        if isinstance(value, dict):
            return {self._hide_all(k, marks, tokens): self._hide_all(part, marks, tokens) for k, part in value.items()}
        return [self._hide_all(part, marks, tokens) for part in value] if isinstance(value, list) else value

    def _hide(self, text: str, tokens: tuple[str, ...]) -> tuple[str, dict[str, str]]:
        """``text`` with each spelled control token replaced by a random mark, and the tokens by their marks."""
        marks: dict[str, str] = {}
        for token in tokens:
            if token in text:
                mark = f"bmx{secrets.token_hex(8)}"
                marks[mark] = token
                text = text.replace(token, mark)
        return text, marks

    def _tokens(self, text: str, marks: dict[str, str], *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, with each mark read as the spelling of its token in two pieces of plain text."""
        pieces = [(text, True)]
        for mark, token in marks.items():
            pieces = [part for piece, plain in pieces for part in _split_at(mark, piece, plain, token)]
        ids: list[int] = []
        for i, (piece, _) in enumerate(pieces):
            if i == 0:
                ids += self._tokenizer(piece, add_special_tokens=add_special_tokens)["input_ids"]
            elif piece:  # after a control token, so that the tokenizer adds no blank as at the start of a text
                ids += self._tokenizer(self._control[0] + piece, add_special_tokens=False)["input_ids"][1:]
        first = getattr(self._tokenizer, "bos_token_id", None)
        while first is not None and ids[:2] == [first, first]:  # the text has its own, beside the tokenizer's
            ids = ids[1:]
        return ids


def _own_variables(request: Request) -> Mapping[str, Any]:
    """A request's own values for variables of the chat template.

    Raises:
        RowError: ``invalid_request``, if bmx sets one of them itself.
    """
    try:
        refuse_template_arguments(request.chat_template_kwargs)
    except UsageError as error:
        raise RowError("invalid_request", error.message) from None
    return request.chat_template_kwargs


def _longest_text(request: Request) -> tuple[int | None, str]:
    """The longest text of a request, and the place of its message; None in place of that for a plain prompt."""
    if not request.messages:
        return None, request.prompt or ""
    at = max(range(len(request.messages)), key=lambda i: len(str(request.messages[i].get("content") or "")))  # type: ignore[index]
    return at, str(request.messages[at].get("content") or "")


def _with_text(request: Request, at: int | None, text: str) -> Request:
    """A request with another text in the message at ``at``, or in its prompt."""
    if at is None or request.messages is None:
        return replace(request, prompt=text)
    messages = (*request.messages[:at], {**request.messages[at], "content": text}, *request.messages[at + 1 :])
    return replace(request, messages=messages)


def _control_tokens(tokenizer: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Spellings of control tokens, the longest first: all of them, and the special ones.

    Control tokens are the special tokens, and added tokens that the chat template uses.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = [t for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if len(t.content.strip()) > 1]
    special = {t.content for t in added if t.special}
    spellings = special | {t.content for t in added if t.content in template}
    return tuple(sorted(spellings, key=len, reverse=True)), tuple(sorted(special, key=len, reverse=True))


def _split_at(mark: str, piece: str, plain: bool, token: str) -> list[tuple[str, bool]]:
    """A piece split at a mark, with the token's spelling, broken after its first character, in place of the mark.

    Args:
        mark: stands for the spelling of ``token``.
        piece: a part of a prompt.
        plain: whether the piece may contain marks; False for a part of a spelling.
        token: a control token.

    Returns:
        The new pieces, each with whether it may contain marks.
    """
    if not plain or mark not in piece:
        return [(piece, plain)]
    head, *tails = piece.split(mark)
    pieces = [(head, True)]
    for tail in tails:
        pieces += [(token[0], False), (token[1:], False), (tail, True)]
    return pieces
