"""Lines in, lines out: the plain and the OpenAI-batch dialect, recognised line by line; strict JSON both ways.

Knows files and formats; knows nothing of models. A line that cannot become a request is a result at once.
"""

from __future__ import annotations

import io
import json
import string
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import jsonlines

from bmx.errors import BmxError, InputFileError, OutputError, RowError, UsageError
from bmx.request import Request, Result, SamplingParams

SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams))
OPENAI_URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
OPENAI_PLAIN = {"model", "messages", "prompt", "n", "stream", "user", "metadata"}
OPENAI_ONLY = {"stream": False, "n": 1}  # the one value that is answered
WRITE_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Reads requests from files, as often as it is iterated, one line in memory at a time.

    Attributes:
        paths: the files, read one after the other; their lines are numbered through.
        defaults: sampling parameters that a row's own replace.
        template: text with {field} places that makes the prompt of plain rows, or None.
        limit: only so many rows, or None.
    """

    paths: tuple[Path, ...]
    defaults: SamplingParams
    template: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.template is not None:
            _template_fields(self.template)

    def __iter__(self) -> Iterator[Request | Result]:
        """Requests in the order of the file; a bad line is a Result with its error.

        Raises:
            InputFileError: a file is missing or cannot be read.
        """
        with ExitStack() as files:
            lines = (line for path in self.paths for line in files.enter_context(open_input(path)))
            reader = jsonlines.Reader(lines, loads=strict_loads)
            for count, (number, row) in enumerate(_rows(reader), 1):
                yield self._item(number, row)
                if count == self.limit:
                    return

    def requests(self, bad: Callable[[Result], None] | None = None) -> Iterator[Request]:
        """Only the good lines; each bad one is handed to ``bad``."""
        for item in self:
            if isinstance(item, Request):
                yield item
            elif bad:
                bad(item)

    def _item(self, number: int, row: dict[str, Any] | RowError) -> Request | Result:
        if isinstance(row, RowError):
            return Result(id=f"line-{number}", error=row)
        name = row.get("custom_id") if _is_openai(row) else row.get("id")
        known = name if isinstance(name, (str, int)) and not isinstance(name, bool) else f"line-{number}"
        try:
            if name is not None and known is not name:
                raise RowError("invalid_request", f"an id must be text or a whole number, not {type(name).__name__}")
            request = self._openai(row, known) if _is_openai(row) else self._plain(row, known)
        except RowError as error:
            return Result(id=known, error=error)
        return request

    def _plain(self, row: dict[str, Any], name: str | int) -> Request:
        own = _own_sampling(row)
        prompt, messages = row.get("prompt"), row.get("messages")
        if self.template is not None and messages is None:
            prompt = _fill(self.template, row)
        if prompt is not None and messages is not None:
            raise RowError("invalid_request", "give either 'prompt' or 'messages', not both")
        return self._request(name, prompt, messages, own)

    def _openai(self, row: dict[str, Any], name: str | int) -> Request:
        body, url = row.get("body"), row.get("url")
        if row.get("method", "POST") != "POST" or not isinstance(url, str) or url not in OPENAI_URLS:
            raise RowError("invalid_request", f"only POST to {' or '.join(OPENAI_URLS)} is answered")
        if not isinstance(body, dict):
            raise RowError("invalid_request", "'body' must be an object")
        own = _own_sampling(body)
        if body.get("max_completion_tokens") is not None:
            own["max_tokens"] = body["max_completion_tokens"]
        unknown = body.keys() - SAMPLING_FIELDS - OPENAI_PLAIN - {"max_completion_tokens"}
        unknown |= {key for key, plain in OPENAI_ONLY.items() if body.get(key) not in (None, plain)}
        if unknown:
            raise RowError("invalid_request", f"unsupported in 'body': {', '.join(sorted(unknown))}")
        raw = OPENAI_URLS[url] == "prompt"
        wanted = body.get("prompt") if raw else body.get("messages")
        return self._request(name, wanted if raw else None, None if raw else wanted, own, raw=raw)

    def _request(
        self, name: str | int, prompt: Any, messages: Any, own: dict[str, Any], *, raw: bool = False
    ) -> Request:
        if messages is not None:
            messages = _messages(messages)
        elif not isinstance(prompt, str) or not prompt.strip():
            raise RowError(
                "invalid_request", "'prompt' must be text, and not empty" if prompt is not None else "no prompt"
            )
        params = _params(self.defaults, own)
        return Request(id=name, prompt=prompt, messages=messages, params=params, raw=raw, seeded="seed" in own)


def _rows(reader: Any) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """(line number, object or error) of every line that is not blank."""
    number = 0
    while True:
        number += 1
        try:
            row = reader.read(allow_none=True)
        except EOFError:
            return
        except jsonlines.InvalidLineError as error:
            if error.line.strip():
                yield number, RowError("invalid_json", str(error))
            continue
        good = isinstance(row, dict)
        yield number, row if good else RowError("invalid_json", f"line {number} is not a JSON object")


def open_input(path: Path) -> BinaryIO:
    """A file of lines, as bytes.

    Raises:
        InputFileError: missing, a folder, or not readable.
    """
    try:
        if path.is_dir():
            raise InputFileError(f"{path} is a folder, not a file of prompts")
        return path.open("rb")
    except OSError as error:
        raise InputFileError(f"cannot read {path}: {error.strerror}") from None


def strict_loads(text: str) -> Any:
    """JSON that any other reader understands in the same way.

    Raises:
        ValueError: not JSON, NaN or Infinity, a key twice, half a surrogate pair, or nested too deep.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_twins)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair") from None
    return value


def strict_dumps(value: Any) -> str:
    """One line of JSON; numbers that are none are refused."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _own_sampling(values: dict[str, Any]) -> dict[str, Any]:
    """The sampling fields that a row sets; null leaves the default."""
    return {key: values[key] for key in SAMPLING_FIELDS & values.keys() if values[key] is not None}


def _is_openai(row: dict[str, Any]) -> bool:
    return "custom_id" in row and ("body" in row or "url" in row)


def _messages(messages: Any) -> tuple[dict[str, Any], ...]:
    """Messages whose contents are plain text.

    Raises:
        RowError: no list of them, or content that is no text.
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


def _params(defaults: SamplingParams, own: dict[str, Any]) -> SamplingParams:
    """The row's values over the defaults.

    Raises:
        RowError: a wrong type, or out of range.
    """
    from bmx.config import setting_named

    try:
        return replace(defaults, **{key: setting_named(key).coerce(value) for key, value in own.items()})
    except (ValueError, UsageError) as error:
        raise RowError("invalid_request", str(error)) from None


def _template_fields(template: str) -> list[tuple[str, str | None]]:
    """(text, field name or None) pieces of a template; only plain names may stand in braces.

    Raises:
        UsageError: unbalanced braces, or a place that is no plain name.
    """
    try:
        pieces = [
            (text, f"{name}!{conversion}:{form}" if form or conversion else name)
            for text, name, form, conversion in string.Formatter().parse(template)
        ]
    except ValueError as error:
        raise UsageError(
            f"prompt_template: {error}", hint="write {{ and }} for braces that are meant as such"
        ) from None
    for _, name in pieces:
        if name is not None and not name.isidentifier():
            raise UsageError(f"prompt_template: {{{name}}} is not the name of a field")
    return pieces


def _fill(template: str, row: dict[str, Any]) -> str:
    parts = []
    for text, name in _template_fields(template):
        parts.append(text)
        if name is not None:
            value = row.get(name)
            if value is None:
                raise RowError("invalid_request", f"the row has no field {name!r} for the prompt template")
            parts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(parts)


class Writer:
    """Writes results, each as a whole line as soon as it is there.

    Args:
        path: a file that does not exist yet, or None for standard output.
        overwrite: whether the file may exist.

    Raises:
        OutputError: it cannot be created or written; what was written before stays.
    """

    def __init__(self, path: Path | None, *, overwrite: bool = False) -> None:
        import sys

        self._name = str(path) if path else "standard output"
        try:
            stream = sys.stdout.buffer if path is None else path.open("wb" if overwrite else "xb", WRITE_BUFFER)
        except OSError as error:
            raise OutputError(f"cannot create {self._name}: {error.strerror}") from None
        self._stream: Any = stream
        self._lines = jsonlines.Writer(stream, dumps=strict_dumps, flush=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if isinstance(self._stream, io.BufferedWriter) and self._name != "standard output":
                self._stream.close()
        except OSError as error:
            if kind is None:
                raise self._failure(error) from None

    def write(self, result: Result) -> None:
        """Append one line.

        Raises:
            OutputError: the disk is full, or the reader of a pipe has gone.
        """
        try:
            self._lines.write(as_record(result))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> BmxError:
        return OutputError(f"cannot write {self._name}: {error.strerror}", hint="rows written before are intact")


def as_record(result: Result) -> dict[str, Any]:
    """A result in the plain dialect."""
    if result.error:
        return {"id": result.id, "error": {"code": result.error.code, "message": result.error.message}}
    usage, kv = result.usage, result.kv
    return {
        "id": result.id,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "usage": {f.name: getattr(usage, f.name) for f in fields(usage)} if usage else None,
        "kv": {f.name: getattr(kv, f.name) for f in fields(kv)} if kv else None,
        "truncated": 0,
    }


def duplicate_ids(items: Iterable[Request | Result]) -> list[str]:
    """Ids that occur more than once, in order, as text; only hashes of ids are kept while reading."""
    seen: set[int] = set()
    twice: dict[str, None] = {}
    for item in items:
        name = str(item.id)
        if hash(name) in seen:
            twice[name] = None
        seen.add(hash(name))
    return list(twice)
