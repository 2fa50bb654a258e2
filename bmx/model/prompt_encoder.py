"""Text in, token ids out, and back: chat templates, control tokens in documents, decoding piece by piece.

Knows a tokenizer; knows nothing of models, slots or files.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bmx.config import PromptConfig
from bmx.errors import RowError, UsageError
from bmx.model.instructions import INSTRUCTIONS, Instructions
from bmx.request import Request

GUESSES = 12  # at where to cut a text that is too long
FILLED = 0.98  # of the tokens that are allowed, from which no better place is looked for
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class PromptEncoder:
    """Turns a request into the token ids that the model reads.

    Text that comes from the row never becomes a control token unless ``parse_special_tokens`` says so: where a
    document spells one (``<|im_end|>``), that spelling is tokenised in two pieces, and the rest as always.

    Args:
        tokenizer: a transformers tokenizer.
        config: how rows become text.

    Raises:
        UsageError: a system prompt without a chat template to carry it.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._instructions = Instructions.from_config(config)
        self._control = () if config.parse_special_tokens else _control_tokens(tokenizer)
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        if config.system_prompt is not None and not (self._has_template and config.chat_template):
            raise UsageError("a system prompt needs the model's chat template, which is missing or turned off")

    def encode(self, request: Request) -> list[int]:
        """Token ids of a request's prompt.

        Raises:
            RowError: ``invalid_request``, if there is no text, or the chat template cannot take the messages.
        """
        messages = self._messages(request)
        if messages is None:
            text, marks = self._hide(request.prompt or "")
            ids = self._tokens(text, marks, add_special_tokens=True)
        else:
            text, marks = self._render(messages)
            ids = self._tokens(text, marks, add_special_tokens=False)
        if not ids:
            raise RowError("invalid_request", "the prompt is empty")
        return ids

    def probe(self, text: str | None) -> tuple[int, ...]:
        """Token ids of a probe: a text of its own line; ``instructions`` stands for the job's own words.

        Raises:
            UsageError: there are no such words.
        """
        if text is None:
            return ()
        words = self._instructions.question if text == INSTRUCTIONS else text
        return tuple(self._tokens(*self._hide(f"\n\n{words}"), add_special_tokens=False))

    def instruction_spans(self, request: Request, length: int) -> tuple[tuple[int, int], ...]:
        """The places of the job's own words among the tokens of a request, from .. to.

        A text that begins where a token ends may begin in its middle once both are put together: a place may be off
        by one token.

        Args:
            length: tokens of the whole prompt.
        """
        messages = self._messages(request)
        if messages is None:
            text, marks = self._hide(request.prompt or "")
            system = ""
        else:
            text, marks = self._render(messages)
            system = next((str(m.get("content") or "") for m in messages if m.get("role") == "system"), "")
        end, begin = self._instructions.spans(text, self._hide(system)[0])
        special = messages is None
        head = len(self._tokens(text[:end], marks, add_special_tokens=special)) if end else 0
        tail = len(self._tokens(text[:begin], marks, add_special_tokens=special)) if begin < len(text) else length
        return tuple(span for span in ((0, min(head, length)), (tail, length)) if span[0] < span[1])

    @property
    def truncates(self) -> bool:
        """Whether prompts that are too long are cut."""
        return self._config.on_too_long.startswith("truncate")

    def truncate(self, request: Request, tokens: int) -> tuple[Request, list[int]]:
        """A request whose longest text is cut, and its token ids: as many as are allowed, or a little fewer.

        It is cut at its beginning, or in its middle, as the job says; what stands around it (the template, other
        messages) stays. Where nothing is left to cut, it is the whole request.

        Raises:
            RowError: as ``encode``.
        """
        at, text = _longest_text(request)
        ids = self.encode(request)
        best, least, most, kept = (request, ids), 0, len(text), len(text)
        for _ in range(GUESSES):
            kept = kept * tokens // len(ids) if ids else most
            if not least < kept < most:
                kept = (least + most) // 2
            if kept == least:
                break
            shorter = _with_text(request, at, self._cut_text(text, kept))
            try:
                ids = self.encode(shorter)
            except RowError:  # nothing but blanks is left: too little
                least, ids = kept, []
                continue
            if len(ids) > tokens:
                most = kept
                continue
            best, least = (shorter, ids), kept
            if len(ids) >= FILLED * tokens:
                break
        return best

    def _cut_text(self, text: str, kept: int) -> str:
        """So many characters of a text: its end, or its beginning and its end."""
        head = kept // 2 if self._config.on_too_long == "truncate-middle" else 0
        return text[:head] + text[len(text) - (kept - head) :]

    def _messages(self, request: Request) -> list[dict[str, Any]] | None:
        """The conversation to render, or None for a prompt that is read as it stands."""
        if not request.messages and not request.prompt:
            raise RowError("invalid_request", "the prompt is empty")
        if not request.messages:
            if request.raw or not (self._config.chat_template and self._has_template):
                return None
            messages: list[dict[str, Any]] = [{"role": "user", "content": request.prompt}]
        elif not self._has_template:
            raise RowError("invalid_request", "this model has no chat template: give 'prompt' instead of 'messages'")
        else:
            messages = [dict(message) for message in request.messages]
        if self._config.system_prompt is not None and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": self._config.system_prompt})
        return messages

    def _render(self, messages: list[dict[str, Any]]) -> tuple[str, dict[str, str]]:
        """The chat template's text, with marks where a document spells a control token."""
        marks: dict[str, str] = {}
        try:
            hidden = [self._hide_all(message, marks) for message in messages]
            text = self._tokenizer.apply_chat_template(hidden, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise RowError("invalid_request", f"the chat template refuses these messages: {error}") from error
        return str(text), marks

    def _hide_all(self, value: Any, marks: dict[str, str]) -> Any:
        """``value`` with every text in it hidden: a template may print any field of a message."""
        if not self._control:
            return value
        if isinstance(value, str):
            text, found = self._hide(value)
            marks.update(found)
            return text
        if isinstance(value, dict):
            return {self._hide_all(key, marks): self._hide_all(part, marks) for key, part in value.items()}
        return [self._hide_all(part, marks) for part in value] if isinstance(value, list) else value

    def _hide(self, text: str) -> tuple[str, dict[str, str]]:
        """``text`` with each spelled-out control token behind a mark that occurs nowhere else."""
        marks: dict[str, str] = {}
        for token in self._control:
            if token in text:
                mark = f"bmx{secrets.token_hex(8)}"
                marks[mark] = token
                text = text.replace(token, mark)
        return text, marks

    def _tokens(self, text: str, marks: dict[str, str], *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, each marked spelling as two pieces of plain text."""
        pieces = [(text, True)]
        for mark, token in marks.items():
            pieces = [part for piece, plain in pieces for part in _cut(piece, plain, mark, token)]
        ids: list[int] = []
        for i, (piece, _) in enumerate(pieces):
            if i == 0:
                ids += self._tokenizer(piece, add_special_tokens=add_special_tokens)["input_ids"]
            elif piece:  # behind a control token, so that no blank is put before it as at the start of a text
                ids += self._tokenizer(self._control[0] + piece, add_special_tokens=False)["input_ids"][1:]
        return ids


def _longest_text(request: Request) -> tuple[int | None, str]:
    """The longest text of a request, and its message's place; None for a prompt."""
    if not request.messages:
        return None, request.prompt or ""
    at = max(range(len(request.messages)), key=lambda i: len(str(request.messages[i].get("content") or "")))  # type: ignore[index]
    return at, str(request.messages[at].get("content") or "")


def _with_text(request: Request, at: int | None, text: str) -> Request:
    """A request with another text in that place."""
    if at is None or request.messages is None:
        return replace(request, prompt=text)
    messages = (*request.messages[:at], {**request.messages[at], "content": text}, *request.messages[at + 1 :])
    return replace(request, messages=messages)


class Detokenizer:
    """Text of a growing answer that never ends inside a character.

    Decodes the newest tokens together with a few before them, since what a token adds may depend on its neighbour.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # tokens from here on are decoded for context
        self._done = 0  # tokens up to here are in the text
        self.text = ""

    def add(self, token_id: int) -> str:
        """Take the next token; returns the text it completes, which may be none or several characters."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._context : self._done])
        after = self._decode(self._ids[self._context :])
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        self._context, self._done = self._done, len(self._ids)
        self.text += after[len(before) :]
        return after[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a whole answer, without special tokens and without half a character at its end."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip(REPLACEMENT)


def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Spellings that act as control tokens: special ones, and those that the chat template speaks. Longest first."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    spoken = {t.content for t in added if len(t.content.strip()) > 1 and (t.special or t.content in template)}
    return tuple(sorted(spoken, key=len, reverse=True))


def _cut(piece: str, plain: bool, mark: str, token: str) -> list[tuple[str, bool]]:
    """``piece`` cut at ``mark``, with the token's spelling, broken after its first character, in between."""
    if not plain or mark not in piece:
        return [(piece, plain)]
    head, *tails = piece.split(mark)
    cut = [(head, True)]
    for tail in tails:
        cut += [(token[0], False), (token[1:], False), (tail, True)]
    return cut
