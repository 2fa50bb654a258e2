"""What an answer must fit (a JSON schema, a regular expression, one of some texts), and which tokens that allows next.

llguidance compiles formats and finds the tokens. Its wheels are for x86 and ARM and need no torch; the tokens of a
step take it microseconds. Knows tokenizers and token ids; knows nothing of rows, steps or logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

from bmx.errors import RowError, UsageError
from bmx.hardware import resident_bytes
from bmx.request import FORMATS, Request, SamplingParams

MAX_TEXT = 1_000_000  # characters of a format
KEPT = 64  # compiled formats that are kept: one of a megabyte takes 20
BLANKS = r" |\n[ \t]{0,40}"  # between the parts of JSON: a blank, or a line break with its indent; never without end
DEAD_END = "NoExtensionBias"  # how llguidance's error begins where nothing could follow
QUIET = 0  # llguidance's log level: its errors are told to the row


class Grammars:
    """Compiles formats of answers for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer; None for a stand-in model: formats are only checked.
        vocab: columns of the model's logits.
        end_token_ids: ids that may end an answer.

    Attributes:
        host_bytes: memory that the tokenizer's tokens take, once a request with a format was seen.
    """

    def __init__(self, tokenizer: Any, vocab: int, end_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab, self._ends = tokenizer, vocab, end_token_ids
        self._known: Any = None
        self.host_bytes = 0
        self._compiled = lru_cache(KEPT)(self._compile)

    def of(self, params: SamplingParams) -> Grammar | None:
        """The format of an answer; None where it may be any text.

        Raises:
            RowError: ``invalid_request``: the format is too large or cannot be compiled, or the tokenizer is of a kind
                whose tokens llguidance does not know.
        """
        name = _format_named(params)
        grammar = None if name is None else self._compiled(name, getattr(params, name))
        return None if self._tokenizer is None else grammar

    def foreseen(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The same requests; what the first one with a format needs is loaded, so that a plan knows its memory."""
        for request in requests:
            if self._known is None and _format_named(request.params):
                with suppress(ValueError):  # the row's error, once it is answered
                    self._tokens()
            yield request

    def _compile(self, name: str, form: Any) -> Grammar:
        from llguidance import LLMatcher

        try:
            if name == "guided_choice":
                self._refuse_control_tokens(form)
            matcher = LLMatcher(self._tokens(), _grammar(name, form), log_level=QUIET)
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            raise RowError("invalid_request", f"{name} cannot be used: {_first_line(problem)}")
        return Grammar(matcher, name, self._tokens().vocab_size)

    def _refuse_control_tokens(self, texts: Iterable[str]) -> None:
        """Refuse texts that no answer can spell, since a control token would be read in their place.

        Raises:
            ValueError: names the token.
        """
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        for token in (token.content for token in added if token.special):
            if any(token in text for text in texts):
                raise ValueError(f"it holds {token}, a control token of the model, which no answer can spell")

    def _tokens(self) -> Any:
        """The tokens as llguidance knows them, which takes half a second, once.

        Raises:
            ValueError: a kind of tokenizer that it does not know.
        """
        if self._known is None:
            before = resident_bytes()
            self._known = self._read_tokens()
            self.host_bytes = max(0, resident_bytes() - before)
        return self._known

    def _read_tokens(self) -> Any:
        if self._tokenizer is None:
            from llguidance import LLTokenizer

            return LLTokenizer("byte")
        from llguidance.hf import from_tokenizer

        size = max(self._vocab, len(self._tokenizer))
        return from_tokenizer(self._tokenizer, n_vocab=size, eos_token=sorted(self._ends) or None)


class Grammar:
    """A compiled format.

    Args:
        matcher: llguidance's, at the start of an answer.
        name: the sampling parameter that says the format.
        vocab: token ids that llguidance knows.
    """

    def __init__(self, matcher: Any, name: str, vocab: int) -> None:
        self._matcher, self._name, self._vocab = matcher, name, vocab

    def begin(self) -> Matcher:
        """The state of a new answer."""
        return Matcher(self._matcher.deep_copy(), self._name, self._vocab)


class Matcher:
    """How far one answer has come within its format.

    Args:
        state: llguidance's matcher, which changes.
        name: the sampling parameter that says the format.
        vocab: token ids that llguidance knows: those of the tokenizer may be more than the model has logits.
    """

    def __init__(self, state: Any, name: str, vocab: int) -> None:
        self.state, self._name, self.vocab = state, name, vocab

    def accept(self, token_id: int) -> None:
        """Take the next token.

        Raises:
            RowError: ``invalid_request``: the format needs more computation than is allowed for one token, or no token
                could follow.
        """
        if self.state.consume_token(token_id) and not self.state.is_error():
            return
        problem = _first_line(self.state.get_error())
        what = "no token could follow: does any answer fit it?" if problem == DEAD_END else f"too complex: {problem}"
        raise RowError("invalid_request", f"{self._name} cannot be used: {what}")

    @property
    def complete(self) -> bool:
        """Whether the answer fits as it is, and nothing may follow."""
        return bool(self.state.is_stopped())


def check_format(params: SamplingParams) -> None:
    """Check the format that all answers of a job must fit, without a tokenizer.

    Raises:
        UsageError: it is too large, or cannot be compiled.
    """
    name = _format_named(params)
    if name is None:
        return
    from llguidance import LLMatcher

    try:
        problem = LLMatcher.validate_grammar(_grammar(name, getattr(params, name)))
    except ValueError as error:
        problem = str(error)
    if problem and not problem.startswith("WARNING"):
        raise UsageError(f"{name} cannot be used: {_first_line(problem)}")


def _format_named(params: SamplingParams) -> str | None:
    """The name of the sampling parameter that says what the answer must fit; None where it may be any text."""
    return next((name for name in FORMATS if getattr(params, name) not in (None, ())), None)


def _grammar(name: str, form: Any) -> str:
    """A format in llguidance's language.

    Raises:
        ValueError: it is too large.
    """
    from llguidance import LLMatcher

    size = len(form) if isinstance(form, str) else sum(map(len, form))
    if size > MAX_TEXT:
        raise ValueError(f"it has {size:,} characters, more than {MAX_TEXT:,}")
    if name == "json_schema":
        return LLMatcher.grammar_from_json_schema(
            form,
            overrides={  # whatever the schema itself says of how llguidance is to read it
                "whitespace_pattern": BLANKS,
                "item_separator": ",",
                "key_separator": ":",
                "lenient": False,
                "coerce_one_of": False,
            },
        )
    if name == "guided_regex":
        return LLMatcher.grammar_from_regex(form)
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in form))


def _first_line(problem: str) -> str:
    lines = [line.strip() for line in problem.strip().splitlines()]
    told = next((line for line in lines if line.startswith("error:")), lines[0] if lines else "no reason given")
    return told[:300]
