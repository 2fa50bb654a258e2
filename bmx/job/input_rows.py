"""Input rows: lines of strict JSON in the plain or the OpenAI-batch dialect, recognised line by line.

Knows the formats of requests; knows nothing of models. A line that cannot become a request is a row with an error.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import jsonlines

from bmx.errors import RowError, UsageError
from bmx.job.line_reader import LineSet, read_lines
from bmx.job.output_records import Dialect
from bmx.job.prompt_template import filled, template_pieces
from bmx.request import Request, SamplingParams
from bmx.run_config import MAX_LINE_BYTES, RunConfig, setting_named

SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams))
OPENAI_URLS: dict[str, Dialect] = {
    "/v1/chat/completions": "chat.completion",
    "/v1/completions": "text_completion",
}
OPENAI_KNOWN = {"model", "user", "metadata", "max_completion_tokens", "chat_template_kwargs"}
UNSUPPORTED_DEFAULTS: dict[str, tuple[Any, ...]] = {  # values of unsupported fields that ask for nothing
    "stream": (False,), "n": (1,), "best_of": (1,), "logprobs": (False,), "echo": (False,), "store": (False,),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "min_tokens": (0,), "tools": ([],),
    "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "service_tier": ("auto", "default"),
    "top_k": (-1,), "length_penalty": (1,), "use_beam_search": (False,), "num_beams": (1,),
}  # fmt: skip
NOT_SUPPORTED = {  # sampling fields of other programs, which would have no effect here
    *("best_of", "beam_width", "do_sample", "frequency_penalty", "guided_choice", "guided_grammar", "guided_json"),
    *("guided_regex", "length_penalty", "logit_bias", "logprobs", "max_completion_tokens", "max_length"),
    *("max_new_tokens", "min_new_tokens", "min_tokens", "n", "no_repeat_ngram_size", "num_beams"),
    *("num_return_sequences", "presence_penalty", "response_format", "stop_sequences", "stream", "tool_choice"),
    *("tools", "top_logprobs", "typical_p", "use_beam_search"),
}
BLANKS, BYTE_ORDER_MARK = b" \t\r\n", b"\xef\xbb\xbf"
REFERENCE = "reference"  # the field with a good answer, or a list of them, for `bmx calibrate`
LIKE_A_FIELD = 0.85  # an unknown name at least this similar to a sampling field is taken for a misspelling


@dataclass(slots=True)
class InputRow:
    """An input line: its id, its dialect, and its request or what is wrong with it.

    Attributes:
        line: its number, counted through all inputs.
        id: the row's own id, or ``line-<n>``.
        key: a hash of the line and of everything else that decides its answer.
        size: bytes of the line.
        dialect: how the row is written, and its record too.
        request, error: one of them is set.
        references: good answers, for `bmx calibrate`.
    """

    line: int
    id: str | int
    key: str
    size: int = 0
    dialect: Dialect = "plain"
    request: Request | None = None
    error: RowError | None = None
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Reads rows from files, any number of times, with one line in memory at a time.

    Attributes:
        paths: the files, read one after the other; their lines are counted through.
        defaults: sampling parameters; a row's own values replace them.
        template: text with {field} placeholders that makes the prompt of plain rows, or None.
        models: model names that a row may ask for; empty for any.
        hash_key: the key of the rows' hashes.
        longest: bytes of the longest line that is read.

    Raises:
        UsageError: the template has something else than plain names in braces.
    """

    paths: tuple[Path, ...]
    defaults: SamplingParams = SamplingParams()
    template: str | None = None
    models: frozenset[str] = frozenset()
    hash_key: bytes = b""
    longest: int = MAX_LINE_BYTES

    def __post_init__(self) -> None:
        if self.template is not None:
            template_pieces(self.template)

    def rows(
        self, skip: LineSet | None = None, every: int = 1, always: Container[int] = frozenset()
    ) -> Iterator[InputRow]:
        """Rows in the order of the files; blank lines are skipped.

        Args:
            skip: numbers of lines to skip.
            every: read only one in this many of the other lines, chosen at random, the same ones each time.
            always: numbers of lines that ``every`` never leaves out.

        Raises:
            InputFileError: a file is missing or cannot be read.
        """
        for row, values in self._parsed(skip, every, always):
            if values is not None:
                try:
                    self._fill(row, values)
                except RowError as error:
                    row.error = error
                except RecursionError:
                    row.error = RowError("invalid_request", "nested too deep")
            yield row

    def identities(self) -> Iterator[InputRow]:
        """All rows with their ids and keys alone."""
        return (row for row, _ in self._parsed())

    def _parsed(
        self, skip: LineSet | None = None, every: int = 1, always: Container[int] = frozenset()
    ) -> Iterator[tuple[InputRow, dict[str, Any] | None]]:
        """Rows with their ids and the values of their lines; a line that is not an object is a row with an error."""
        source = _Source(self.paths, self.longest, skip, every, always)
        reader = jsonlines.Reader(source, loads=strict_loads)
        while True:
            try:
                value = reader.read(allow_none=True)
                problem = None if isinstance(value, dict) else f"line {source.number} is not a JSON object"
            except EOFError:
                return
            except jsonlines.InvalidLineError as error:
                if source.blank:
                    continue
                value, problem = None, f"line {source.number}: {error.__cause__ or error}{source.torn}"
            key = blake2b(source.line.strip(), key=self.hash_key, digest_size=8)
            row = InputRow(source.number, f"line-{source.number}", key.hexdigest(), len(source.line))
            if source.left_out:
                problem = f"line {source.number} is longer than {self.longest:,} bytes (--max-line-bytes)"
                row.error = RowError("invalid_request", problem)
            elif problem:
                row.error = RowError("invalid_json", problem)
            else:
                _identify(row, value)
            yield row, None if row.error else value

    def _fill(self, row: InputRow, values: dict[str, Any]) -> None:
        """Turn the values of a line into the row's request."""
        row.request = self._plain(row, values) if row.dialect == "plain" else self._openai(row, values)

    def _plain(self, row: InputRow, values: dict[str, Any]) -> Request:
        prompt, messages = values.get("prompt"), values.get("messages")
        if self.template is None:
            _check_names(values)
        elif messages is None:
            prompt = filled(self.template, values)
        if prompt is not None and messages is not None:
            raise RowError("invalid_request", "give either 'prompt' or 'messages', not both")
        references = values.get(REFERENCE)
        texts = references if isinstance(references, list) else [references]
        row.references = tuple(text for text in texts if isinstance(text, str))
        return self._request(row, prompt, messages, values)

    def _openai(self, row: InputRow, values: dict[str, Any]) -> Request:
        body, url = values.get("body"), values.get("url")
        if values.get("method", "POST") != "POST" or not isinstance(url, str) or url not in OPENAI_URLS:
            raise RowError("invalid_request", f"only POST to {' or '.join(OPENAI_URLS)} is answered")
        if not isinstance(body, dict):
            raise RowError("invalid_request", "'body' must be an object")
        body = {name: value for name, value in body.items() if not _is_default(name, value)}
        prompt_field = "messages" if row.dialect == "chat.completion" else "prompt"
        unknown = body.keys() - SAMPLING_FIELDS - OPENAI_KNOWN - {prompt_field}
        if unknown:
            raise RowError("invalid_request", f"unsupported in 'body': {', '.join(sorted(unknown))[:500]}")
        model = body.get("model")
        if self.models and model is not None and not (isinstance(model, str) and model in self.models):
            message = f"this job answers as {' or '.join(sorted(self.models))} (more names: --served-model-name)"
            raise RowError("model_not_found", message)
        if body.get("max_completion_tokens") is not None:
            body = body | {"max_tokens": body["max_completion_tokens"]}
        if row.dialect == "text_completion":
            return self._request(row, body.get("prompt"), None, body, raw=True)
        return self._request(row, None, body.get("messages", ()), body)

    def _request(
        self, row: InputRow, prompt: Any, messages: Any, values: dict[str, Any], *, raw: bool = False
    ) -> Request:
        if messages is not None:
            messages = _messages(messages)
        elif not isinstance(prompt, str) or not prompt.strip():
            problem = "'prompt' must be text, and not empty" if prompt is not None else "no prompt"
            raise RowError("invalid_request", problem)
        own = {key: values[key] for key in SAMPLING_FIELDS & values.keys() if values[key] is not None}
        params = _params(self.defaults, own) if own else self.defaults
        return Request(
            id=row.id,
            prompt=prompt,
            messages=messages,
            params=params,
            raw=raw,
            seeded="seed" in own,
            chat_template_kwargs=_template_kwargs(values),
        )


class _Source:
    """The lines of some files; ``number``, ``line`` and ``left_out`` describe the line that was read last."""

    def __init__(
        self, paths: tuple[Path, ...], longest: int, skip: LineSet | None, every: int, always: Container[int]
    ) -> None:
        self._paths, self._longest, self._skip, self._every, self._always = paths, longest, skip, every, always
        self.number = 0
        self.line = b""
        self.left_out = 0

    @property
    def blank(self) -> bool:
        """Whether the line holds nothing but white space or a byte order mark."""
        return not self.left_out and self.line.strip(BLANKS) in (b"", BYTE_ORDER_MARK)

    @property
    def torn(self) -> str:
        """A remark for a last line without a newline, which may still be growing."""
        return "" if self.line.endswith(b"\n") else " (the file ends in this line: is it still being written?)"

    def __iter__(self) -> Iterator[bytes]:
        chance, wanted, at, skip = Random(0), 0, -1, self._skip
        lines = (line for path in self._paths for line in read_lines(path, self._longest))
        for self.number, (self.line, self.left_out) in enumerate(lines, 1):
            if skip is not None and self.number > skip.last:
                return
            if skip is not None and self.number in skip:
                continue
            if self._every > 1:
                at += 1
                if at % self._every == 0:
                    wanted = at + chance.randrange(self._every)
                if at != wanted and self.number not in self._always:
                    continue
            yield b"" if self.left_out else self.line


def _identify(row: InputRow, values: dict[str, Any]) -> None:
    """Give a row its own id, if it has one, and its dialect."""
    openai = _is_openai(values)
    name = values.get("custom_id") if openai else values.get("id")
    if isinstance(name, (str, int)) and not isinstance(name, bool):
        row.id = name
    elif name is not None:
        row.error = RowError("invalid_request", f"an id must be text or a whole number, not {type(name).__name__}")
    if openai:
        url = values.get("url")
        row.dialect = OPENAI_URLS.get(url if isinstance(url, str) else "", "chat.completion")


def _is_openai(values: dict[str, Any]) -> bool:
    return "custom_id" in values and ("body" in values or "url" in values)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_reject_duplicate_keys)


def strict_loads(text: str) -> Any:
    """A value from JSON that every reader understands in the same way.

    Raises:
        ValueError: not JSON, NaN or Infinity, a key twice, half a surrogate pair, or nested too deep.
    """
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair") from None
    return value


def _check_names(values: dict[str, Any]) -> None:
    """Refuse a sampling field that is unsupported or misspelt and so would have no effect; other fields are data.

    Raises:
        RowError: names it.
    """
    unsupported = {name for name in NOT_SUPPORTED & values.keys() if not _is_default(name, values[name])}
    if unsupported:
        raise RowError("invalid_request", f"unsupported: {', '.join(sorted(unsupported))}")
    for name in sorted(values.keys() - SAMPLING_FIELDS - NOT_SUPPORTED):
        meant = _meant(name) if len(name) < 40 else None
        if meant:
            raise RowError("invalid_request", f"unknown field {name!r}: did you mean {meant!r}?")


def _is_default(name: str, value: Any) -> bool:
    """Whether a field has the value that it has when it is left out."""
    return value is None or value in UNSUPPORTED_DEFAULTS.get(name, ())


@lru_cache(maxsize=1024)
def _meant(name: str) -> str | None:
    """The sampling field that a name is a misspelling of."""
    near = difflib.get_close_matches(name.lower().replace("-", "_"), SAMPLING_FIELDS, n=1, cutoff=LIKE_A_FIELD)
    return near[0] if near else None


def _messages(messages: Any) -> tuple[dict[str, Any], ...]:
    """Messages whose contents are plain text.

    Raises:
        RowError: not a list of messages, or content that is not text.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise RowError("invalid_request", "'messages' must be a list of at least one object")
    return tuple(
        {**message, "role": _role(message), "content": _content(message.get("content"))} for message in messages
    )


def _role(message: dict[str, Any]) -> str:
    role = message.get("role")
    if not isinstance(role, str) or not role.isidentifier():
        raise RowError("invalid_request", "each message needs a 'role' that is a word")
    return role


def _content(content: Any) -> str:
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str) or not content.strip():
        raise RowError("invalid_request", "each message needs a 'content' that is text, and not empty")
    return content


def _template_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    """The row's values for variables of the chat template.

    Raises:
        RowError: not an object.
    """
    kwargs = values.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RowError(
            "invalid_request", "'chat_template_kwargs' must be an object, such as {\"enable_thinking\": false}"
        )
    return kwargs or {}


def _params(defaults: SamplingParams, own: dict[str, Any]) -> SamplingParams:
    """The row's values over the defaults.

    Raises:
        RowError: a wrong type, or out of range.
    """
    typed = tuple((key, type(value), value) for key, value in own.items())
    try:
        return _replaced(defaults, typed) if _hashable(own) else _replaced.__wrapped__(defaults, typed)
    except UsageError as error:
        raise RowError("invalid_request", f"{error.message}: {error.hint}" if error.hint else error.message) from None


def _hashable(own: dict[str, Any]) -> bool:
    return not any(isinstance(value, (list, dict)) for value in own.values())


@lru_cache(maxsize=1024)
def _replaced(defaults: SamplingParams, own: tuple[tuple[str, type, Any], ...]) -> SamplingParams:
    """The defaults with some values replaced; cached, since few rows differ. Types keep 1, 1.0 and True apart."""
    return replace(defaults, **{key: setting_named(key).coerce(value) for key, _, value in own})


def input_reader(config: RunConfig, paths: tuple[Path, ...], hash_key: bytes = b"") -> Reader:
    """A reader of these files, with the defaults and the template of the job.

    Args:
        config: all settings.
        paths: the files.
        hash_key: the key of the rows' hashes; commands that keep no records need none.
    """
    return Reader(
        paths=paths,
        defaults=config.sampling,
        template=config.prompt.prompt_template,
        models=frozenset(model_names(config)),
        hash_key=hash_key,
        longest=config.job.max_line_bytes,
    )


def model_names(config: RunConfig) -> tuple[str, ...]:
    """The model names that a row may ask for: those of the settings, the model's own, and its last part."""
    model = config.engine.model
    last = Path(model).name.removesuffix(".gguf")
    demo = ("SmolLM2-135M-Instruct",) if model == "demo" else ()
    return tuple(dict.fromkeys((*config.job.served_model_name, model, last, *demo)))
