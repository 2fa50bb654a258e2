"""Lines in, lines out: whatever a line holds becomes one request or one error record; only strict JSON comes out."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bmx.errors import InputFileError, OutputError, RowError, UsageError
from bmx.jsonl import Reader, Writer, as_record, duplicate_ids
from bmx.request import KVUsage, Request, Result, SamplingParams, Usage

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
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

    def read_lines(*lines, defaults=SamplingParams(), end=b"\n", **options):
        path.write_bytes(b"".join(line(value) + end for value in lines))
        return list(Reader(paths=(path,), defaults=defaults, **options))

    return read_lines


def good(items: list[Request | Result]) -> Request:
    """The only item, which must be a request."""
    [item] = items
    assert isinstance(item, Request), item
    return item


def refusal(items: list[Request | Result], code: str = "invalid_request") -> str:
    """The message of the only item, which must be an error of that code."""
    [item] = items
    assert isinstance(item, Result), item
    assert item.error is not None
    assert item.error.code == code
    return item.error.message


# Ids


@pytest.mark.parametrize("name", ["a", 7, -1, 0, "", "../../x", "[/b]", "a\nb", 10**30])
def test_an_id_of_text_or_a_whole_number_is_kept(read, name):
    assert good(read({"id": name, "prompt": "x"})).id == name


@pytest.mark.parametrize("row", [{"prompt": "x"}, {"id": None, "prompt": "x"}])
def test_a_missing_id_is_the_number_of_the_line(read, row):
    items = read(row, {"id": "mine", "prompt": "x"}, "", row)
    assert [item.id for item in items] == ["line-1", "mine", "line-4"]


@pytest.mark.parametrize("name", [1.5, True, False, [], ["a"], {}])
def test_any_other_id_is_an_error_under_the_number_of_the_line(read, name):
    items = read({"id": name, "prompt": "x"})
    assert "id" in refusal(items)
    assert items[0].id == "line-1"


def test_an_error_keeps_the_id_of_its_row(read):
    assert [item.id for item in read({"id": "a"}, openai({}, custom_id="b"))] == ["a", "b"]


def test_duplicate_ids_are_found_in_order(read):
    rows = [{"id": name, "prompt": "x"} for name in ("b", "a", 1, "a", "c", "b", "b", "1")]
    assert duplicate_ids(read(*rows)) == ["a", "b", "1"]
    assert duplicate_ids(read(*rows[:3], {"prompt": "x"}, {"prompt": "x"})) == []


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
    assert [item.id for item in read({"id": 1, "prompt": "x"}, b'\n{"id": 2, "prompt": "y"}', end=b"")] == [1, 2]


def test_a_torn_last_line_fails_alone(read):
    first, *torn = read(b'{"id": 1, "prompt": "x"}\n{"id": 2, "pro', end=b"")
    assert first.prompt == "x"
    refusal(torn, "invalid_json")


@pytest.mark.parametrize("blank", ["", "   ", "\t", "\r"])
def test_blank_lines_are_skipped_but_counted(read, blank):
    assert [item.id for item in read(blank, {"prompt": "x"}, blank, blank, "bad", blank)] == ["line-2", "line-5"]


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


@pytest.mark.parametrize("body", [{"n": 1}, {"n": None}, {"stream": False}, {"stream": None}, {"user": "u"}])
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
        ({"tools": [], "frequency_penalty": 1}, "frequency_penalty, tools"),
    ],
)
def test_what_is_not_supported_is_named_and_nothing_else(read, body, named):
    assert refusal(read(openai({"prompt": "x", **body}))).endswith(f": {named}")


@pytest.mark.parametrize(
    "envelope",
    [
        {"method": "GET"},
        {"method": None},
        {"url": "/v1/embeddings"},
        {"url": None},
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


def test_both_dialects_may_stand_in_one_file(read):
    items = read({"prompt": "x"}, openai({"prompt": "x"}), {"prompt": "x"})
    assert [item.raw for item in items] == [False, True, False]


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
        ("temperature", 101),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("temperature", False),
        ("temperature", {}),
        ("top_p", 0),
        ("top_p", 2),
        ("top_k", -1),
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
    assert "temperature" in refusal(read('{"prompt": "x", "temperature": 1e999}'))


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


def test_a_field_that_the_row_lacks_is_named(read):
    assert "'document'" in refusal(read({"text": "x"}, template="{document}"))


def test_a_field_without_a_value_is_an_error_and_not_the_word_none(read):
    assert "document" in refusal(read({"document": None}, template="Summarize: {document}"))


@pytest.mark.parametrize(
    "template",
    ["{doc.__class__}", "{doc[0]}", "{}", "{0}", "{a b}", "{", "}", "{doc", "x } y", "{doc!r}", "{doc:>9}"],
)
def test_a_template_with_anything_but_plain_fields_is_refused_at_once(template):
    with pytest.raises(UsageError, match="prompt_template"):
        Reader(paths=(), defaults=SamplingParams(), template=template)


def test_a_template_leaves_messages_and_completions_alone(read):
    chat, raw = read({"messages": HELLO, "document": "x"}, openai({"prompt": "x"}), template="{document}")
    assert chat.messages == tuple(HELLO)
    assert raw.prompt == "x"


# Files


@pytest.mark.parametrize(("limit", "names"), [(1, ["line-2"]), (2, ["line-2", "line-3"]), (9, ["line-2", "line-3", 4])])
def test_a_limit_counts_rows_good_or_bad_but_not_blank_lines(read, limit, names):
    items = read("", {"prompt": "x"}, "bad", {"id": 4, "prompt": "x"}, limit=limit)
    assert [item.id for item in items] == names


def test_several_files_are_read_in_order_and_their_lines_numbered_through(tmp_path):
    paths = (tmp_path / "b.jsonl", tmp_path / "a.jsonl")
    paths[0].write_text('{"prompt": "one"}\nbad\n')
    paths[1].write_text('\ufeff{"prompt": "three"}\n', encoding="utf-8")
    reader = Reader(paths=paths, defaults=SamplingParams())
    assert [item.id for item in reader] == ["line-1", "line-2", "line-3"]
    bad: list[Result] = []
    assert [request.prompt for request in reader.requests(bad.append)] == ["one", "three"]
    assert [result.id for result in bad] == ["line-2"]


def test_a_file_that_is_missing_or_a_folder_is_an_input_error(tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(InputFileError, match=path.name):
            list(Reader(paths=(path,), defaults=SamplingParams()))


# Writing

ANSWER = Result(
    id="a",
    text="yes",
    token_ids=(1, 2),
    finish_reason="stop",
    usage=Usage(prompt_tokens=10, completion_tokens=2),
    kv=KVUsage(budget=8, kept=8, evicted=3),
)


def test_an_answer_as_a_record():
    assert as_record(ANSWER) == {
        "id": "a",
        "text": "yes",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 10, "completion_tokens": 2},
        "kv": {"budget": 8, "kept": 8, "evicted": 3},
        "truncated": 0,
    }


def test_an_error_as_a_record():
    record = as_record(Result(id=7, error=RowError("invalid_json", "no JSON")))
    assert record == {"id": 7, "error": {"code": "invalid_json", "message": "no JSON"}}


def test_every_answer_is_a_whole_line_in_the_file_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "out.jsonl"
    with Writer(path) as writer:
        for count in (1, 2, 3):
            writer.write(ANSWER)
            lines = path.read_bytes().split(b"\n")
            assert lines.pop() == b""
            assert [json.loads(line) for line in lines] == [as_record(ANSWER)] * count


def test_lines_written_before_a_crash_stay(tmp_path):
    path = tmp_path / "out.jsonl"
    with suppress(ZeroDivisionError), Writer(path) as writer:
        writer.write(ANSWER)
        raise ZeroDivisionError
    assert json.loads(path.read_bytes()) == as_record(ANSWER)


def test_an_existing_file_is_replaced_only_when_asked_for(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    with pytest.raises(OutputError, match=r"out\.jsonl"):
        Writer(path)
    assert path.read_text() == "precious"
    with Writer(path, overwrite=True) as writer:
        writer.write(ANSWER)
    assert json.loads(path.read_bytes()) == as_record(ANSWER)


@pytest.mark.parametrize("name", ["missing/out.jsonl", "."])
def test_a_file_that_cannot_be_created_is_an_output_error(tmp_path, name):
    with pytest.raises(OutputError, match="cannot create"):
        Writer(tmp_path / name)


def test_a_full_disk_is_an_output_error_that_names_the_file():
    with (
        pytest.raises(OutputError, match=r"/dev/full.*No space left"),
        Writer(Path("/dev/full"), overwrite=True) as out,
    ):
        out.write(ANSWER)


# Properties


@SLOW_MACHINES_TOO
@given(text=st.text(), ascii_only=st.booleans())
@example(text="\u2028\u2029\u0085\r\x00\ufeff\ufffd", ascii_only=False)
@example(text="😀\U0010ffff</script>", ascii_only=True)
def test_any_text_goes_in_and_comes_out(read, tmp_path_factory, text, ascii_only):
    prompt = f"<{text}>"
    row = json.dumps({"id": prompt, "prompt": prompt}, ensure_ascii=ascii_only)
    request = good(read(row))
    assert (request.id, request.prompt) == (prompt, prompt)

    path = tmp_path_factory.getbasetemp() / "round-trip.jsonl"
    with Writer(path, overwrite=True) as writer:
        writer.write(Result(id=request.id, text=prompt))
    written = path.read_bytes()
    assert written.count(b"\n") == 1
    record = json.loads(written)
    assert (record["id"], record["text"]) == (prompt, prompt)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(CHAT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "stop"]), inner, max_size=2),
    max_leaves=5,
)
FIELDS = [*SAMPLING, "id", "custom_id", "method", "url", "body", "prompt", "messages", "content", "n", "stream"]
ROWS = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6)


@SLOW_MACHINES_TOO
@given(raw=ROWS.map(line) | ROWS.map(openai).map(line) | st.binary(min_size=1).filter(lambda raw: b"\n" not in raw))
@example(raw=line(openai({"prompt": "x"}, url=[])))
@example(raw=line({"prompt": "x", "top_p": 10**400}))
def test_whatever_a_line_holds_it_is_one_request_or_one_error(read, tmp_path_factory, raw):
    items = read(raw, {"id": "next", "prompt": "x"})
    assert items[-1].prompt == "x"
    assert len(items) == 2 or not raw.decode().strip("\ufeff").strip()
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    with Writer(path, overwrite=True) as writer:
        for item in items:
            writer.write(item if isinstance(item, Result) else Result(id=item.id))
    assert path.read_bytes().count(b"\n") == len(items)
