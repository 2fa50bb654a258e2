"""Lines in, records out: whatever a line holds becomes one request or one error; only strict JSON comes out."""

from __future__ import annotations

import gzip
import json
import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bmx.errors import InputFileError, RowError, UsageError
from bmx.job.input_rows import InputRow, Reader
from bmx.job.line_reader import LineSet
from bmx.job.output_records import KnownRecord, as_record, read_record, strict_dumps
from bmx.job.row_checks import NOT_SUPPORTED
from bmx.job.strict_json import strict_loads
from bmx.request import KVUsage, Request, Result, SamplingParams, Usage

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
DIALECTS = ("plain", "chat.completion", "text_completion")
SLOW_MACHINES_TOO = settings(deadline=None)


def line(value: Any) -> bytes:
    """A line of a file: bytes and text as they are, anything else as JSON."""
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def openai(body: Any, **envelope: Any) -> dict[str, Any]:
    """A line of an OpenAI batch file, for a completion unless the envelope says otherwise."""
    return {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": body} | envelope


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Reads a file of these lines."""
    path = tmp_path_factory.mktemp("jsonl") / "in.jsonl"

    def read_lines(*lines, end=b"\n", skip=None, every=1, **options):
        path.write_bytes(b"".join(line(value) + end for value in lines))
        return list(Reader(paths=(path,), **options).rows(skip, every))

    return read_lines


def good(rows: list[InputRow]) -> Request:
    """What the only row asks, which must be free of errors."""
    [row] = rows
    assert row.error is None
    assert row.request is not None
    assert row.request.id == row.id
    return row.request


def refusal(rows: list[InputRow], code: str = "invalid_request") -> str:
    """What is wrong with the only row, which must be an error of that code."""
    [row] = rows
    assert row.request is None
    assert row.error is not None, row
    assert row.error.code == code
    return row.error.message


# Ids


@pytest.mark.parametrize("name", ["a", 7, -1, 0, "", "../../x", "[/b]", "a\nb", 10**30])
def test_an_id_of_text_or_a_whole_number_is_kept(read, name):
    assert good(read({"id": name, "prompt": "x"})).id == name


@pytest.mark.parametrize("row", [{"prompt": "x"}, {"id": None, "prompt": "x"}])
def test_a_missing_id_is_the_number_of_the_line(read, row):
    rows = read(row, {"id": "mine", "prompt": "x"}, "", row)
    assert [row.id for row in rows] == ["line-1", "mine", "line-4"]


@pytest.mark.parametrize("name", [1.5, True, False, [], ["a"], {}])
def test_any_other_id_is_an_error_under_the_number_of_the_line(read, name):
    rows = read({"id": name, "prompt": "x"})
    assert "id" in refusal(rows)
    assert rows[0].id == "line-1"


def test_an_error_keeps_the_id_of_its_row(read):
    assert [row.id for row in read({"id": "a"}, openai({}, custom_id="b"))] == ["a", "b"]


# Strict JSON


@pytest.mark.parametrize(
    "bad",
    [
        "nonsense",
        '{"prompt": "torn',
        '{"prompt": "x"} {"prompt": "y"}',
        '{"prompt": "x",}',
        "{'prompt': 'x'}",
        '{"prompt": "x", "score": NaN}',
        '{"prompt": "x", "score": -Infinity}',
        '{"prompt": "x", "prompt": "y"}',
        '{"prompt": "x", "more": {"a": 1, "a": 2}}',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"prompt": "x", "n": ' + "1" * 5000 + "}",
        r'{"prompt": "half a pair \ud800"}',
        r'{"prompt": "half a pair \uDFFF"}',
        r'{"prompt": "x", "\ud800": 1}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\xed\xa0\x80"}',
        '{"prompt": "raw \x00 NUL"}',
        '{"prompt": "x"}'.encode("utf-16"),
        "[1]",
        '"x"',
        "null",
        "5",
        "true",
    ],
    ids=lambda bad: repr(bad[:30]),
)
def test_a_line_that_is_no_strict_json_object_fails_alone(read, bad):
    before, *failed, after = read({"id": "before", "prompt": "x"}, bad, {"id": "after", "prompt": "x"})
    refusal(failed, "invalid_json")
    assert [before.id, failed[0].id, after.id] == ["before", "line-2", "after"]


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (r'{"prompt": "a\u0000b"}', "a\0b"),
        (r'{"prompt": "\ud83d\ude00"}', "😀"),
        (r'{"prompt": "\\ud800"}', r"\ud800"),
        ('{"prompt": "a\u2028b\u2029c\u0085d"}', "a\u2028b\u2029c\u0085d"),
        (r'{"prompt": "a\rb"}', "a\rb"),
        ('  {"prompt":\t"x"}  ', "x"),
        ('\ufeff{"prompt": "x"}', "x"),
        ('{"prompt": "x"}\r', "x"),
    ],
)
def test_unusual_but_valid_json_is_one_row(read, text, prompt):
    assert good(read(text)).prompt == prompt


def test_a_last_line_without_newline_is_read(read):
    assert [row.id for row in read({"id": 1, "prompt": "x"}, b'\n{"id": 2, "prompt": "y"}', end=b"")] == [1, 2]


def test_a_torn_last_line_fails_alone(read):
    first, *torn = read(b'{"id": 1, "prompt": "x"}\n{"id": 2, "pro', end=b"")
    assert first.request.prompt == "x"
    refusal(torn, "invalid_json")


@pytest.mark.parametrize("blank", ["", "   ", "\t", "\r"])
def test_blank_lines_are_skipped_but_counted(read, blank):
    assert [row.id for row in read(blank, {"prompt": "x"}, blank, blank, "bad", blank)] == ["line-2", "line-5"]


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_a_file_without_rows_gives_none(read, lines):
    assert read(*lines) == []


# Prompts and messages


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": None},
        {"prompt": ""},
        {"prompt": " \n\t"},
        {"prompt": 5},
        {"prompt": ["x"]},
        {"prompt": {"text": "x"}},
        {"prompt": "x", "messages": HELLO},
        {"messages": []},
        {"messages": "hello"},
        {"messages": {"role": "user", "content": "hello"}},
        {"messages": ["hello"]},
        {"messages": [None]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": "  "}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": ["hello"]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [*HELLO, {"role": "user", "content": None}]},
        {"messages": [{"content": "hello"}]},
        {"messages": [{"role": None, "content": "hello"}]},
        {"messages": [{"role": 5, "content": "hello"}]},
    ],
    ids=str,
)
def test_a_row_without_text_to_answer_is_an_error(read, row):
    assert refusal(read(row))


def test_messages_keep_their_order_and_fields(read):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "n"}]
    assert good(read({"messages": messages})).messages == tuple(messages)


def test_text_parts_of_a_message_are_joined(read):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    [message] = good(read({"messages": [{"role": "user", "content": parts}]})).messages
    assert message["content"] == "one two"


def test_other_fields_of_a_plain_row_are_no_errors(read):
    assert good(read({"prompt": "x", "label": 3, "meta": {"a": [None]}})).prompt == "x"


# OpenAI batch lines


def test_a_chat_completion_has_messages(read):
    request = good(read(openai({"model": "any", "messages": HELLO}, url=CHAT)))
    assert (request.id, request.messages, request.prompt, request.raw) == ("a", tuple(HELLO), None, False)


def test_a_completion_continues_its_prompt_as_it_stands(read):
    request = good(read(openai({"model": "any", "prompt": "once"})))
    assert (request.id, request.prompt, request.messages, request.raw) == ("a", "once", None, True)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": None, "max_completion_tokens": None}, 256),
    ],
)
def test_the_longest_answer_has_two_names(read, body, expected):
    assert good(read(openai({"prompt": "x", **body}))).params.max_tokens == expected


@pytest.mark.parametrize(
    "body",
    [
        {"n": 1},
        {"n": None},
        {"stream": False},
        {"stream": None},
        {"user": "u"},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1},
        {"logprobs": None, "tools": None, "response_format": None, "stream_options": None},
        {"logprobs": False, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "top_k": -1},
        {"logprobs": 0, "top_logprobs": 0, "parallel_tool_calls": True, "modalities": ["text"], "logit_bias": None},
        {"n": 1.0, "seed": None, "stop": [], "metadata": {"a": "b"}, "store": False, "service_tier": "flex"},
        {"skip_special_tokens": True, "include_stop_str_in_output": False, "safety_identifier": "u"},
        {"add_generation_prompt": True, "continue_final_message": False, "extra_body": {}},
    ],
)
def test_fields_that_change_nothing_are_accepted(read, body):
    assert good(read(openai({"prompt": "x", **body}))).prompt == "x"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"stream": True}, "stream"),
        ({"stream": True, "n": 1}, "stream"),
        ({"logprobs": True}, "logprobs"),
        ({"tool_choice": "required", "frequency_penalty": 1}, "frequency_penalty, tool_choice"),
        ({"n": True}, "n"),
        ({"logprobs": 1, "top_logprobs": 0}, "logprobs"),
        ({"skip_special_tokens": False, "prompt_logprobs": 3}, "prompt_logprobs, skip_special_tokens"),
        ({"extra_body": {"top_k": 1}, "unheard_of": 0}, "extra_body, unheard_of"),
    ],
)
def test_what_is_not_supported_is_named_and_nothing_else(read, body, named):
    assert refusal(read(openai({"prompt": "x", **body}))).endswith(f": {named} (--ignore-unsupported leaves it out)")


@pytest.mark.parametrize(
    "envelope",
    [
        {"method": "GET"},
        {"method": 5},
        {"url": "/v1/embeddings"},
        {"url": "/v1/responses"},
        {"url": "/v1/chatcompletions"},
        {"url": []},
        {"url": {}},
        {"body": None},
        {"body": []},
        {"body": {}},
        {"body": {"messages": HELLO}},
        {"url": CHAT},
        {"url": CHAT, "body": {"messages": None}},
    ],
    ids=str,
)
def test_an_envelope_that_cannot_be_answered_is_an_error(read, envelope):
    assert refusal(read({**openai({"prompt": "x"}), **envelope}))


@pytest.mark.parametrize("row", [{"prompt": "x"}, openai({"messages": HELLO}, url=CHAT)])
def test_c9_variables_of_the_chat_template_are_read(read, row):
    def with_kwargs(kwargs):
        own = {"chat_template_kwargs": kwargs}
        return read(row | ({"body": row["body"] | own} if "body" in row else own))

    assert good(with_kwargs({"enable_thinking": False})).chat_template_kwargs == {"enable_thinking": False}
    assert good(with_kwargs(None)).chat_template_kwargs == {}
    assert "'chat_template_kwargs' must be an object" in refusal(with_kwargs("off"))


def test_both_dialects_may_stand_in_one_file(read):
    rows = read({"prompt": "x"}, openai({"prompt": "x"}), {"prompt": "x"})
    assert [row.request.raw for row in rows] == [False, True, False]


# Sampling

SAMPLING = {
    "max_tokens": 9,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "stop": ["a", "b"],
    "stop_token_ids": [1, 2],
    "seed": -4,
    "ignore_eos": True,
}
BOTH_DIALECTS = pytest.mark.parametrize(
    "dialect", [lambda own: {"prompt": "x", **own}, lambda own: openai({"prompt": "x", **own})], ids=["plain", "openai"]
)


@BOTH_DIALECTS
@pytest.mark.parametrize("name", SAMPLING)
def test_a_rows_own_value_wins_over_the_default(read, dialect, name):
    defaults = SamplingParams(max_tokens=77, temperature=0.25, stop=("default",))
    params = good(read(dialect({name: SAMPLING[name]}), defaults=defaults)).params
    value = tuple(SAMPLING[name]) if isinstance(SAMPLING[name], list) else SAMPLING[name]
    changed = {f: getattr(params, f) for f in SAMPLING if getattr(params, f) != getattr(defaults, f)}
    assert changed == {name: value}


@BOTH_DIALECTS
@pytest.mark.parametrize("name", SAMPLING)
def test_a_null_leaves_the_default(read, dialect, name):
    defaults = SamplingParams(max_tokens=77, temperature=0.25, stop=("default",))
    assert good(read(dialect({name: None}), defaults=defaults)).params == defaults


@pytest.mark.parametrize(("row", "seeded"), [({}, False), ({"seed": 0}, True), ({"seed": 5}, True)])
def test_a_seed_of_its_own_marks_the_row(read, row, seeded):
    assert good(read({"prompt": "x", **row})).seeded is seeded


def test_one_stop_string_may_stand_alone(read):
    assert good(read({"prompt": "x", "stop": "end"})).params.stop == ("end",)


@BOTH_DIALECTS
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", "many"),
        ("max_tokens", []),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("temperature", False),
        ("temperature", {}),
        ("top_p", -0.1),
        ("top_p", 2),
        ("top_k", -2),
        ("top_k", 0.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 1000),
        ("stop", 5),
        ("stop", True),
        ("stop", {"a": 1}),
        ("stop", [None]),
        ("stop_token_ids", ["x"]),
        ("stop_token_ids", [1.7]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [[1]]),
        ("seed", 2**63),
        ("seed", "lucky"),
        ("ignore_eos", 1),
        ("ignore_eos", "yes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_sampling_value_of_wrong_type_or_range_is_an_error_that_names_it(read, dialect, name, value):
    assert name in refusal(read(dialect({name: value})))


def test_a_number_too_large_for_a_float_is_an_error(read):
    assert "1e999" in refusal(read('{"prompt": "x", "temperature": 1e999}'), "invalid_json")


# Templates


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("Summarize:\n{document}", "Summarize:\nthe text"),
        ("{document} / {title} / {document}", "the text / T / the text"),
        ('{{"text": "{document}"}}', '{"text": "the text"}'),
        ("{year}", "2024"),
        ("{prompt}!", "own!"),
        ("no field", "no field"),
    ],
)
def test_a_template_is_filled_from_the_fields_of_the_row(read, template, prompt):
    row = {"document": "the text", "title": "T", "year": 2024, "prompt": "own"}
    assert good(read(row, template=template)).prompt == prompt


def test_braces_in_a_document_are_only_text(read):
    row = {"document": "{title} {0} {{x}} {document.__class__}", "title": "T"}
    assert good(read(row, template="{document}")).prompt == row["document"]


@pytest.mark.parametrize("name", ["my column", "doc-id", "a.b", "a[0]", "Größe", "文書", "0", "x!r", "n:>9", " padded"])
def test_d4_a_column_of_a_template_may_have_any_name_without_braces(read, name):
    assert good(read({name: "the text", "a": {"b": 1}}, template=f"<{{{name}}}>")).prompt == "<the text>"


def test_d4_a_field_that_the_row_lacks_is_named_with_those_that_it_has(read):
    message = refusal(read({"text": "x", "title": "y", "note": None}, template="{document}"))
    assert message.startswith("the row has no field 'document'")
    assert message.endswith("the row has 'text', 'title'")


def test_d4_a_field_without_a_value_is_an_error_and_not_the_word_none(read):
    message = refusal(read({"document": None, "text": "x"}, template="Summarize: {document}"))
    assert message.startswith("the field 'document' is null")
    assert message.endswith("the row has 'text'")


@pytest.mark.parametrize(
    "template", ["{}", "{ }", "{", "}", "{doc", "x } y", "{a{b}", "{{document}}", "{{doc}} or {{text}}"]
)
def test_a_template_with_anything_but_fields_is_refused_at_once(template):
    with pytest.raises(UsageError, match="prompt_template"):
        Reader(paths=(), template=template)


def test_a_template_leaves_messages_and_completions_alone(read):
    chat, raw = read({"messages": HELLO, "document": "x"}, openai({"prompt": "x"}), template="{document}")
    assert chat.request.messages == tuple(HELLO)
    assert raw.request.prompt == "x"


# Names of fields


def test_c10_what_other_programs_call_sampling_is_refused_by_name(read):
    rows = read(*({"prompt": "x", name: 2} for name in NOT_SUPPORTED))
    assert [row.error and row.error.message.split()[1] for row in rows] == list(NOT_SUPPORTED)


def test_c10_a_field_of_another_program_that_asks_for_nothing_is_no_error(read):
    rows = read(
        *({"prompt": "x", name: nothing} for name, plain in NOT_SUPPORTED.items() for nothing in (None, *plain))
    )
    assert [row.error for row in rows] == [None] * len(rows)


@pytest.mark.parametrize(("name", "instead"), [("max_new_tokens", "max_tokens"), ("stop_strings", "stop")])
def test_c10_the_message_has_the_name_that_bmx_gives_it(read, name, instead):
    assert f"use '{instead}'" in refusal(read({"prompt": "x", name: [5]}))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("tempreature", "temperature"),
        ("max-tokens", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("max_token", "max_tokens"),
        ("topp", "top_p"),
        ("repetition_penality", "repetition_penalty"),
    ],
)
def test_a_misspelt_sampling_field_is_refused_with_what_was_meant(read, name, meant):
    message = refusal(read({"prompt": "x", name: 1}))
    assert repr(name) in message
    assert repr(meant) in message
    assert "--prompt-template" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("speed", 120), ("stops", 2), ("Temperature", "cold"), ("Temperature", 31.5), ("Seed", "of a maple")),
        *(("reference", {"doi": "x"}), ("stream_name", "Rhine"), ("temperatures", [1, 2]), ("ignore_eof", 1)),
    ],
)
def test_b6_a_name_that_only_resembles_a_sampling_field_is_data(read, name, value):
    assert good(read({"prompt": "x", name: value})).params == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", 31.5), ("n", 12), ("stream", "Rhine"), ("tools", ["hammer"]), ("top_p", "A")),
        *(("seed", "maple"), ("max_tokens", []), ("ignore_eos", "no")),
    ],
)
def test_b6_a_sampling_field_with_data_is_an_error_with_a_way_out(read, name, value):
    message = refusal(read({"prompt": "x", name: value}))
    assert name in message
    assert "if it is data, rename it, or use --prompt-template" in message
    assert "template" not in refusal(read(openai({"prompt": "x", name: value})))


def test_of_several_bad_fields_it_is_always_the_same_that_is_named(read):
    row = {"prompt": "x", "top_p": 5, "temperature": 77, "max_tokens": "many", "min_p": -1}
    assert refusal(read(row)).startswith("max_tokens")
    assert "'Max-Tokens'" in refusal(read({"prompt": "x", "temprature": 1, "Max-Tokens": 1, "maxtokens": 1}))


def test_all_unsupported_fields_of_a_row_are_named(read):
    row = {"messages": HELLO, "num_beams": 4, "best_of": 2, "label": 1}
    assert refusal(read(row)).startswith("unsupported: best_of, num_beams (")


@pytest.mark.parametrize("name", ["text", "label", "seeds_of_doubt", "step", "category", "x" * 1000, "", "stop me"])
def test_other_names_are_data(read, name):
    assert good(read({"prompt": "x", name: 1})).prompt == "x"


def test_with_a_template_every_name_is_data(read):
    row = {"n": 3, "tools": ["saw"], "temprature": "warm"}
    assert good(read(row, template="{n} {tools} {temprature}")).prompt == '3 ["saw"] warm'


def test_b6_with_a_template_no_field_of_a_row_is_a_sampling_value(read):
    row = {
        "id": 5,
        "document": "x",
        "max_tokens": 3,
        "temperature": 31.5,
        "stop": 7,
        "seed": "oak",
        "n": 2,
        "system": "y",
    }
    request = good(read(row, template="{document}", defaults=SamplingParams(max_tokens=9)))
    assert (request.id, request.params, request.seeded) == (5, SamplingParams(max_tokens=9), False)
    request = good(read(row | {"sampling": {"seed": 4}}, template="{document}"))
    assert (request.params, request.seeded) == (SamplingParams(seed=4), True)


def test_b6_with_a_template_a_row_of_messages_is_a_request_unless_the_template_names_them(read):
    chat = {"messages": HELLO, "max_tokens": 3}
    assert good(read(chat, template="{document}")).params.max_tokens == 3
    assert good(read(chat, template="{messages}")).prompt == json.dumps(HELLO)
    assert good(read(openai("the text"), template="{body}")).prompt == "the text"


def test_a_template_that_a_row_fills_with_nothing_is_an_error(read):
    assert "prompt" in refusal(read({"document": " "}, template="{document}\n"))


# Models


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": "mine"}, {"model": "yours"}])
def test_a_row_may_ask_for_any_name_of_the_model_or_for_none(read, body):
    assert good(read(openai({"prompt": "x", **body}), models=frozenset({"mine", "yours"}))).prompt == "x"


@pytest.mark.parametrize("model", ["gpt-9", "", 5, "Mine"])
def test_a_row_that_asks_for_another_model_is_told_the_names(read, model):
    rows = read(openai({"prompt": "x", "model": model}), models=frozenset({"mine", "yours"}))
    assert "mine or yours" in refusal(rows, "model_not_found")


def test_a_plain_row_has_no_model_to_ask_for(read):
    assert good(read({"prompt": "x", "model": "gpt-9"}, models=frozenset({"mine"}))).prompt == "x"


# Dialects


@pytest.mark.parametrize(
    ("row", "dialect"),
    [
        ({"prompt": "x"}, "plain"),
        ({"custom_id": "a", "prompt": "x"}, "plain"),
        ("no JSON", "plain"),
        (openai({"messages": HELLO}, url=CHAT), "chat.completion"),
        (openai({"prompt": "x"}), "text_completion"),
        (openai({}), "text_completion"),
        (openai({"prompt": "x"}, custom_id=1.5), "text_completion"),
        (openai({}, url="/v1/embeddings"), "chat.completion"),
    ],
)
def test_a_row_knows_the_dialect_that_it_is_answered_in(read, row, dialect):
    [found] = read(row)
    assert found.dialect == dialect


# Keys


def test_a_line_has_the_same_key_wherever_it_stands(read):
    row = {"id": "a", "prompt": "x"}
    first, bad, _, again, bad_again = read(row, "bad", {"id": "b", "prompt": "x"}, f"  {json.dumps(row)}\r", "bad")
    assert (first.key, bad.key) == (again.key, bad_again.key)
    assert [read(row)[0].key, read(row, end=b"")[0].key] == [first.key] * 2


def test_other_content_or_another_seed_is_another_key(read):
    rows = [{"prompt": "x"}, {"prompt": "y"}, {"prompt": "x", "label": 1}, {"prompt": "x", "seed": 1}, "bad", "worse"]
    keys = [row.key for seed in (b"", b"one", b"two") for row in read(*rows, hash_key=seed)]
    assert len(set(keys)) == len(keys)


def test_identities_are_those_of_the_rows(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [{"id": 3, "prompt": "x"}, "", "bad", {"id": 1.5}, openai({}), {"id": "too long" * 100}, {"prompt": 5}]
    path.write_bytes(b"".join(line(row) + b"\n" for row in rows))
    reader = Reader(paths=(path,), hash_key=b"s", longest=100)
    expected = [(row.line, row.id, row.key) for row in reader.rows()]
    assert [number for number, _, _ in expected] == [1, 3, 4, 5, 6, 7]
    assert [(row.line, row.id, row.key) for row in reader.identities()] == expected


# Long lines


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_line_that_is_too_long_fails_alone(read, end):
    fits = line({"id": "fits", "prompt": "x" * 50})
    longest = len(fits) + len(end) - 1
    first, fit, *failed, last = read({"prompt": "a"}, fits, b"x" + fits, {"prompt": "b"}, longest=longest, end=end)
    assert [first.request.prompt, fit.id, last.request.prompt] == ["a", "fits", "b"]
    assert f"{longest} bytes" in refusal(failed)
    assert "--max-line-bytes" in refusal(failed)
    assert (failed[0].line, failed[0].id, last.line) == (3, "line-3", 4)


@pytest.mark.parametrize("blanks", ["", " " * 300_000, "\t\r "])
def test_a_line_that_is_too_long_has_the_key_of_the_whole_line(read, blanks):
    text = f'{blanks}{{"prompt": "{"x y" * 100_000}{" " * 300_000}z"}}{blanks}'
    [whole] = read(text)
    for longest in (20, 131_072, 300_001, 500_000):
        cut, after = read(text, {"prompt": "x"}, longest=longest)
        assert (cut.key, cut.size) == (whole.key, whole.size)
        assert "longer than" in cut.error.message
        assert after.request


def test_a_last_line_without_newline_may_be_as_long_as_any(read):
    row = line({"id": "a", "prompt": "x"})
    assert good(read(row, longest=len(row), end=b"")).prompt == "x"
    assert "longer" in refusal(read(row, longest=len(row) - 1, end=b""))


@pytest.mark.parametrize("size", [131_071, 131_072, 131_073, 262_144, 500_000])
def test_what_follows_a_line_of_any_length_is_read(read, size):
    _, after = read(b"x" * size, {"id": "after", "prompt": "x"}, longest=64)
    assert (after.line, after.id) == (2, "after")


def zstd_frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def zstd_stream(data: bytes) -> bytes:
    """A frame that does not say how long its contents are, as pipes write it."""
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("in.jsonl", bytes),
        ("in.jsonl.gz", gzip.compress),
        pytest.param("in.jsonl.zst", zstd_frame),
    ],
)
def test_a_huge_line_takes_no_more_memory_than_is_allowed(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(b'{"prompt": "' + b"a" * 48_000_000 + b'"}\n{"id": "after", "prompt": "x"}\n'))
    tracemalloc.start()
    try:
        rows = list(Reader(paths=(path,), longest=1000).rows())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [row.id for row in rows] == ["line-1", "after"]
    assert peak < 24_000_000


# Files


def rows_of(*paths: Path, **options: Any) -> list[InputRow]:
    return list(Reader(paths=paths, **options).rows())


def test_several_files_are_read_in_order_and_their_lines_numbered_through(tmp_path):
    paths = (tmp_path / "b.jsonl", tmp_path / "a.jsonl")
    paths[0].write_text('{"prompt": "one"}\nbad')
    paths[1].write_text('\ufeff{"prompt": "three"}\n', encoding="utf-8")
    rows = rows_of(*paths)
    assert [(row.line, row.id) for row in rows] == [(1, "line-1"), (2, "line-2"), (3, "line-3")]
    assert [row.request and row.request.prompt for row in rows] == ["one", None, "three"]


def test_a_reader_reads_as_often_as_it_is_asked_to(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "one"}\nbad\n')
    reader = Reader(paths=(path,))
    assert list(map(repr, reader.rows())) == list(map(repr, reader.rows()))


def test_a_file_that_is_missing_or_a_folder_is_an_input_error(tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path, tmp_path / "missing.jsonl.gz", tmp_path / "missing.zst"):
        with pytest.raises(InputFileError, match=path.name):
            rows_of(path)


MANY = b"".join(b'{"prompt": "%d"}\n' % number for number in range(20_000))
HALF = MANY.index(b'"9999"') + 3  # inside a line
SKIPPABLE = bytes.fromhex("502a4d18 03000000") + b"any"


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        (".gz", gzip.compress(MANY)),
        (".gz", gzip.compress(MANY[:HALF]) + gzip.compress(b"") + gzip.compress(MANY[HALF:])),
        (".zst", zstd_frame(MANY)),
        (".zst", zstd_stream(MANY)),
        (".zst", zstd_stream(MANY[:HALF]) + zstd_frame(b"") + zstd_frame(MANY[HALF:])),
        (".zst", SKIPPABLE + zstd_frame(MANY[:HALF]) + SKIPPABLE + zstd_stream(MANY[HALF:])),
        (".zst", b"".join(zstd_frame(part + b"\n") for part in MANY.splitlines())),
    ],
    ids=["gzip", "gzip-members", "zstd", "zstd-stream", "zstd-frames", "zstd-skippable", "zstd-many-frames"],
)
def test_a_compressed_file_is_read_like_any_other(tmp_path, suffix, data):
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(data)
    assert [row.request.prompt for row in rows_of(path)] == [str(number) for number in range(20_000)]


SOME = b"".join(b'{"prompt": "%d"}\n' % number for number in range(50))
PACKED = pytest.mark.parametrize(
    ("suffix", "data"),
    [
        (".gz", gzip.compress(SOME)),
        (".zst", zstd_frame(SOME)),
        (".zst", zstd_stream(SOME)),
    ],
    ids=["gzip", "zstd", "zstd-stream"],
)


@PACKED
@pytest.mark.parametrize("before", [0, 1], ids=["alone", "after-a-whole-one"])
def test_a_compressed_file_that_ends_too_early_is_refused(tmp_path, suffix, data, before):
    path = tmp_path / f"in.jsonl{suffix}"
    for size in range(1, len(data)):
        path.write_bytes(data * before + data[:size])
        with pytest.raises(InputFileError, match=f"cannot read .*in.jsonl{suffix}"):
            rows_of(path)


@PACKED
def test_a_damaged_compressed_file_is_refused(tmp_path, suffix, data):
    path = tmp_path / f"in.jsonl{suffix}"
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 255
    for content in (bytes(damaged), SOME, random.Random(0).randbytes(5000), data + b"garbage"):
        path.write_bytes(content)
        with pytest.raises(InputFileError, match=f"in.jsonl{suffix}"):
            rows_of(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_empty_file_has_no_rows_whatever_its_name(tmp_path, suffix):
    path = tmp_path / f"in.jsonl{suffix}"
    path.touch()
    assert rows_of(path) == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd_frame], ids=["plain", "gzip", "zstd"])
def test_utf_16_is_refused_with_a_hint(tmp_path, encoding, pack):
    path = tmp_path / {bytes: "in.jsonl", gzip.compress: "in.jsonl.gz", zstd_frame: "in.jsonl.zst"}[pack]
    path.write_bytes(pack(SOME.decode().encode(encoding)))
    with pytest.raises(InputFileError, match=encoding[:6].upper()) as refused:
        rows_of(path)
    assert "iconv" in refused.value.hint


# Skipping and sampling


def line_set(numbers: set[int], last: int) -> LineSet:
    found = LineSet(last)
    for number in numbers:
        found.add(number)
    return found


def test_lines_that_are_skipped_are_neither_read_nor_renumbered(read):
    rows = read({"prompt": "a"}, "bad", "", {"prompt": "d"}, "bad", skip=line_set({1, 2}, 4))
    assert [(row.line, row.id) for row in rows] == [(4, "line-4")]


def test_nothing_behind_the_last_line_of_the_set_is_read(read):
    assert [row.line for row in read(*[{"prompt": "x"}] * 9, skip=line_set({2}, 4))] == [1, 3, 4]
    assert read(*[{"prompt": "x"}] * 9, skip=LineSet(0)) == []


@SLOW_MACHINES_TOO
@given(skipped=st.sets(st.integers(1, 60)), last=st.integers(60, 70), every=st.integers(1, 12))
def test_one_of_every_so_many_rows_that_are_not_skipped_is_sampled(read, skipped, last, every):
    lines = [{"prompt": "x"}] * 60
    left = [number for number in range(1, 61) if number not in skipped]
    sample = [row.line for row in read(*lines, skip=line_set(skipped, last), every=every)]
    blocks = [left[start : start + every] for start in range(0, len(left), every)]
    counts = [len(set(block) & set(sample)) for block in blocks]
    whole = len(left) // every
    assert counts[:whole] == [1] * whole
    assert sum(counts) == len(sample)
    assert max(counts, default=1) == 1
    assert [row.line for row in read(*lines, skip=line_set(skipped, last), every=every)] == sample


def test_a_sample_is_not_of_the_same_place_each_time(read):
    sample = [row.line for row in read(*[{"prompt": "x"}] * 400, every=4)]
    assert {number % 4 for number in sample} == {0, 1, 2, 3}


# Records

ANSWER = Result(
    id="a",
    text="yes",
    token_ids=(1, 2),
    finish_reason="stop",
    usage=Usage(prompt_tokens=10, completion_tokens=2),
    kv=KVUsage(budget=8, kept=8, evicted=3, format="int8/int4"),
)
KV = {"budget": 8, "kept": 8, "evicted": 3, "format": "int8/int4"}
KEY = "00ff" * 4


def test_an_answer_to_a_plain_row():
    assert as_record(ANSWER, KEY) == {
        "id": "a",
        "text": "yes",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 10, "completion_tokens": 2},
        "kv": KV,
        "truncated": 0,
        "row_hash": KEY,
    }


@pytest.mark.parametrize(
    ("dialect", "prefix", "said"),
    [
        ("chat.completion", "chatcmpl", {"message": {"role": "assistant", "content": "yes"}}),
        ("text_completion", "cmpl", {"text": "yes"}),
    ],
)
def test_an_answer_to_a_row_of_an_openai_batch(dialect, prefix, said):
    record = as_record(ANSWER, KEY, dialect, "mine")
    assert isinstance(record["response"]["body"].pop("created"), int)
    assert record == {
        "id": f"batch_req_{KEY}",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": KEY,
            "body": {
                "id": f"{prefix}-{KEY}",
                "object": dialect,
                "model": "mine",
                "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
                "kv": KV,
                "truncated": 0,
            },
        },
        "error": None,
    }


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_error_in_each_dialect(dialect):
    record = as_record(Result(id=7, error=RowError("invalid_json", "no JSON")), KEY, dialect, "mine")
    error = {"code": "invalid_json", "message": "no JSON"}
    if dialect == "plain":
        assert record == {"id": 7, "error": error, "row_hash": KEY}
    else:
        assert record == {"id": f"batch_req_{KEY}", "custom_id": 7, "response": None, "error": error}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_was_cut_and_what_was_clamped_is_said_in_each_dialect(dialect):
    result = Result(id="a", text="x", finish_reason="length", truncated=5, clamped_to=3)
    record = as_record(result, KEY, dialect)
    said = record if dialect == "plain" else record["response"]["body"]
    assert (said["truncated"], said["max_tokens"]) == (5, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_never_written(value):
    with pytest.raises(ValueError, match="JSON"):
        strict_dumps({"id": value})


@pytest.mark.parametrize(
    "record",
    [
        None,
        5,
        [],
        {},
        {"id": "a"},
        {"row_hash": KEY},
        {"id": 1.5, "row_hash": KEY},
        {"id": "a", "row_hash": 5},
        {"custom_id": "a"},
        {"custom_id": None, "id": f"batch_req_{KEY}"},
    ],
    ids=str,
)
def test_a_record_that_is_not_ours_is_not_read(record):
    assert read_record(record) is None


# Properties


@SLOW_MACHINES_TOO
@given(text=st.text(), ascii_only=st.booleans(), dialect=st.sampled_from(DIALECTS))
@example(text="\u2028\u2029\u0085\r\x00\ufeff\ufffd", ascii_only=False, dialect="plain")
@example(text="😀\U0010ffff</script>", ascii_only=True, dialect="chat.completion")
def test_any_text_goes_in_and_comes_out(read, text, ascii_only, dialect):
    prompt = f"<{text}>"
    request = good(read(json.dumps({"id": prompt, "prompt": prompt}, ensure_ascii=ascii_only)))
    assert (request.id, request.prompt) == (prompt, prompt)

    written = strict_dumps(as_record(Result(id=request.id, text=prompt), KEY, dialect, prompt))
    assert written.count(b"\n") == 1
    assert written.endswith(b"\n")
    record = strict_loads(written.decode())
    assert read_record(record) == KnownRecord(prompt, KEY, None, cut=False)
    if dialect != "plain":
        [choice] = record["response"]["body"]["choices"]
    said = {"plain": lambda: record["text"], "text_completion": lambda: choice["text"]}
    assert said.get(dialect, lambda: choice["message"]["content"])() == prompt


@given(name=st.text() | st.integers(), code=st.none() | st.text(), message=st.text(), dialect=st.sampled_from(DIALECTS))
def test_a_record_says_again_who_it_is_of_and_how_it_went(name, code, message, dialect):
    error = None if code is None else RowError(code, message)
    written = strict_dumps(as_record(Result(id=name, error=error), KEY, dialect, "mine"))
    assert read_record(strict_loads(written.decode())) == KnownRecord(name, KEY, code, cut=False)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(CHAT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "stop"]), inner, max_size=2),
    max_leaves=5,
)
FIELDS = [*SAMPLING, "id", "custom_id", "method", "url", "body", "prompt", "messages", "content", "n", "stream"]
ROWS = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6)


@SLOW_MACHINES_TOO
@given(
    raw=ROWS.map(line) | ROWS.map(openai).map(line) | st.binary(min_size=1).filter(lambda raw: b"\n" not in raw),
    template=st.none() | st.just("{content}{prompt}"),
)
@example(raw=line(openai({"prompt": "x"}, url=[])), template=None)
@example(raw=line({"prompt": "x", "top_p": 10**400}), template=None)
def test_whatever_a_line_holds_it_is_one_request_or_one_error(read, raw, template):
    neighbour = {"prompt": "x", "content": "y"}
    rows = read({"id": "before", **neighbour}, raw, {"id": "after", **neighbour}, template=template)
    assert [rows[0].id, rows[-1].id] == ["before", "after"]
    assert rows[0].request.prompt == rows[-1].request.prompt == ("yx" if template else "x")
    assert len(rows) == 3 or not raw.decode().strip("\ufeff").strip()
    for row in rows:
        assert (row.request is None) is (row.error is not None)
        assert strict_dumps(as_record(Result(id=row.id, error=row.error), row.key, row.dialect)).count(b"\n") == 1
