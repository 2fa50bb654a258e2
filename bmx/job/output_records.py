"""Output lines: a result becomes a record in the dialect of its row, and a record is read again on resume.

Knows formats; knows nothing of files.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, Literal

from bmx.errors import RowError
from bmx.request import Result

Dialect = Literal["plain", "chat.completion", "text_completion"]


@dataclass(frozen=True, slots=True)
class KnownRecord:
    """A record that was read again.

    Attributes:
        id: of its row.
        key: the hash of the row.
        error_code: of an error; None for an answer.
        cut: whether the prompt or the answer was cut to fit.
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


def as_record(result: Result, key: str, dialect: Dialect = "plain", model: str = "") -> dict[str, Any]:
    """A result as a line of the output, in the dialect of its row.

    Args:
        result: an answer or an error.
        key: the hash of the row.
        dialect: how the row was written.
        model: the model's name in records of the OpenAI dialects.
    """
    if dialect != "plain":
        return _openai_record(result, key, dialect, model)
    if result.error:
        return {"id": result.id, "error": _error(result.error), "row_hash": key}
    usage = result.usage
    return {
        "id": result.id,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "usage": usage and {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens},
        **_extras(result),
        "row_hash": key,
    }


def _error(error: RowError) -> dict[str, str]:
    return {"code": error.code, "message": error.message}


def _extras(result: Result) -> dict[str, Any]:
    """What only bmx reports: the row's KV cache, and what was done to a row that was too long."""
    kv = result.kv
    extras: dict[str, Any] = {
        "kv": kv and {"budget": kv.budget, "kept": kv.kept, "evicted": kv.evicted},
        "truncated": result.truncated,
    }
    if result.clamped_to:
        extras["max_tokens"] = result.clamped_to
    return extras


def _openai_record(result: Result, key: str, dialect: Dialect, model: str) -> dict[str, Any]:
    if result.error:
        return {"id": f"batch_req_{key}", "custom_id": result.id, "response": None, "error": _error(result.error)}
    chat = dialect == "chat.completion"
    content = {"message": {"role": "assistant", "content": result.text}} if chat else {"text": result.text}
    prompt, answer = (result.usage.prompt_tokens, result.usage.completion_tokens) if result.usage else (0, 0)
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
    return {"id": f"batch_req_{key}", "custom_id": result.id, "response": response, "error": None}


def read_record(record: Any) -> KnownRecord | None:
    """What a line of an output says of its row; None if bmx did not write it."""
    if not isinstance(record, dict):
        return None
    openai = "custom_id" in record
    name, key = record.get("custom_id" if openai else "id"), record.get("id" if openai else "row_hash")
    if not isinstance(name, (str, int)) or not isinstance(key, str):
        return None
    error, body = record.get("error"), record
    if openai and isinstance(record.get("response"), dict):
        body = record["response"].get("body")
    cut = isinstance(body, dict) and bool(body.get("truncated") or body.get("max_tokens"))
    code = error.get("code", "") if isinstance(error, dict) else None
    return KnownRecord(name, key.removeprefix("batch_req_"), code, cut)


def renamed(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The same record for a row of another id."""
    return record | {"custom_id" if "custom_id" in record else "id": name}
