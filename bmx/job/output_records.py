"""Output lines: a result becomes a record in the dialect of its row, and a record is read again on resume.

Knows formats; knows nothing of files.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import Any, Literal

from bmx.errors import RowError
from bmx.request import Result

Dialect = Literal["plain", "chat.completion", "text_completion", "anthropic", "gemini"]
BATCH = "batch_req_"  # what the ids of records in a batch begin with; the row's hash follows
_KEYS = (re.compile(f"{BATCH}[0-9a-f]{{16}}"), re.compile("[0-9a-f]{16}"))  # of a batch's records; of plain ones
_ANTHROPIC_REASONS = {"length": "max_tokens", "stop": "end_turn"}  # it has no word for a repetition
_GEMINI_REASONS = {"length": "MAX_TOKENS", "stop": "STOP", "repetition": "OTHER"}
_ANTHROPIC_ERRORS = {  # its types of errors, by bmx's codes
    "model_not_found": "not_found_error",
    "out_of_memory": "api_error",
    "nan_logits": "api_error",
    "timeout": "timeout_error",
}


@dataclass(frozen=True, slots=True)
class KnownRecord:
    """A record that was read again.

    Attributes:
        id: of its row.
        key: the hash of the row.
        error_code: of an error; None for an answer.
        cut: whether the prompt or the answer was cut to fit, or something was left out of the row.
    """

    id: str | int
    key: str
    error_code: str | None
    cut: bool


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def strict_dumps(value: Any) -> bytes:
    """One line of JSON in UTF-8, with its newline.

    Raises:
        ValueError: the value holds NaN or infinity.
    """
    return _ENCODER.encode(value).encode() + b"\n"


def as_record(
    result: Result, key: str, dialect: Dialect = "plain", model: str = "", row: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A result as a line of the output, in the dialect of its row.

    Args:
        result: an answer or an error.
        key: the hash of the row.
        dialect: how the row was written.
        model: the model's name in records of the OpenAI dialects.
        row: fields of a plain row that its record repeats; None where nothing is repeated.
    """
    if dialect != "plain":
        writers = {"anthropic": _anthropic_record, "gemini": _gemini_record}
        record = (
            writers[dialect](result, key, model) if dialect in writers else _openai_record(result, key, dialect, model)
        )
        return {"id": f"{BATCH}{key}", **record}
    repeated = {} if row is None else {"row": row}
    if result.error:
        return {"id": result.id, "error": _error(result.error), **repeated, "row_hash": key}
    usage = result.usage
    return {
        "id": result.id,
        "text": result.text,
        **({"reasoning": result.reasoning} if result.reasoning else {}),
        "finish_reason": result.finish_reason,
        "usage": usage and {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens},
        **_extras(result),
        **repeated,
        "row_hash": key,
    }


def _error(error: RowError) -> dict[str, str]:
    return {"code": error.code, "message": error.message}


def _extras(result: Result) -> dict[str, Any]:
    """What only bmx reports: the row's KV cache, and what was done to a row that was too long."""
    kv = result.kv
    asked = {"asked": kv.asked} if kv and kv.asked else {}
    stored = {"format": kv.format} if kv and kv.format != "model" else {}
    extras: dict[str, Any] = {
        "kv": kv and {"budget": kv.budget, "kept": kv.kept, "evicted": kv.evicted, **stored, **asked},
        "truncated": result.truncated,
    }
    if result.ignored:
        extras["ignored"] = list(result.ignored)
    if result.clamped_to:
        extras["max_tokens"] = result.clamped_to
    return extras


def _openai_record(result: Result, key: str, dialect: Dialect, model: str) -> dict[str, Any]:
    if result.error:
        return {"custom_id": result.id, "response": None, "error": _error(result.error)}
    chat = dialect == "chat.completion"
    reasoning = {"reasoning": result.reasoning} if result.reasoning else {}
    message = {"role": "assistant", "content": result.text, **reasoning}
    content = {"message": message} if chat else {"text": result.text}
    prompt, answer = _tokens(result)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{key}",
        "object": dialect,
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": result.finish_reason}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
        **_extras(result),
    }
    response = {"status_code": 200, "request_id": key, "body": body}
    return {"custom_id": result.id, "response": response, "error": None}


def _anthropic_record(result: Result, key: str, model: str) -> dict[str, Any]:
    if result.error:
        error = {"type": _ANTHROPIC_ERRORS.get(result.error.code, "invalid_request_error"), **_error(result.error)}
        return {"custom_id": result.id, "result": {"type": "errored", "error": {"type": "error", "error": error}}}
    prompt, answer = _tokens(result)
    thought = [{"type": "thinking", "thinking": result.reasoning, "signature": ""}] if result.reasoning else []
    message = {
        "id": f"msg_{key}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [*thought, {"type": "text", "text": result.text}],
        "stop_reason": _ANTHROPIC_REASONS.get(str(result.finish_reason), result.finish_reason),
        "stop_sequence": None,
        "usage": {"input_tokens": prompt, "output_tokens": answer},
        **_extras(result),
    }
    return {"custom_id": result.id, "result": {"type": "succeeded", "message": message}}


def _gemini_record(result: Result, key: str, model: str) -> dict[str, Any]:
    if result.error:
        return {"key": result.id, "error": _error(result.error)}
    prompt, answer = _tokens(result)
    thought = [{"text": result.reasoning, "thought": True}] if result.reasoning else []
    candidate = {
        "content": {"role": "model", "parts": [*thought, {"text": result.text}]},
        "finishReason": _GEMINI_REASONS.get(str(result.finish_reason), result.finish_reason),
        "index": 0,
    }
    usage = {"promptTokenCount": prompt, "candidatesTokenCount": answer, "totalTokenCount": prompt + answer}
    response = {
        "responseId": key,
        "modelVersion": model,
        "candidates": [candidate],
        "usageMetadata": usage,
        **_extras(result),
    }
    return {"key": result.id, "response": response}


def _tokens(result: Result) -> tuple[int, int]:
    """Tokens of the prompt and of the answer."""
    return (result.usage.prompt_tokens, result.usage.completion_tokens) if result.usage else (0, 0)


def read_record(record: Any) -> KnownRecord | None:
    """What a line of an output says of its row; None if bmx did not write it."""
    if not isinstance(record, dict):
        return None
    field = _id_field(record)
    name, key = record.get(field), record.get("row_hash" if field == "id" else "id")
    if not isinstance(name, (str, int)) or not isinstance(key, str) or not _KEYS[field == "id"].fullmatch(key):
        return None
    error = record.get("error") if "result" not in record else _inner(record, "result", "error", "error")
    code = error.get("code", "") if isinstance(error, dict) else None
    places = {"custom_id": ("result", "message") if "result" in record else ("response", "body"), "key": ("response",)}
    body = _inner(record, *places.get(field, ()))
    cut = isinstance(body, dict) and any(map(body.get, ("truncated", "max_tokens", "ignored")))
    return KnownRecord(name, key.removeprefix(BATCH), code, cut)


def renamed(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The same record for a row of another id."""
    return record | {_id_field(record): name}


def _id_field(record: dict[str, Any]) -> str:
    return next((name for name in ("custom_id", "key") if name in record), "id")


def _inner(value: Any, *names: str) -> Any:
    """What stands in a value under these names; None if it has no such place."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value
