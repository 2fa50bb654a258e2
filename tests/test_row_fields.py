"""What a row asks in its object ``sampling``, and what of a row may be left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bmx.job.input_rows import InputRow, Reader
from bmx.request import SamplingParams

IN, OUT, ERRORS = Path("in.jsonl"), Path("in.out.jsonl"), Path("in.out.jsonl.errors.jsonl")
TURN = {"role": "user", "content": "w1"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
SEEN = {"role": "user", "content": [IMAGE, {"type": "text", "text": "w1"}]}
OPENAI = {"custom_id": "a", "url": "/v1/chat/completions"}


@pytest.fixture
def read(tmp_path):
    """Reads a file of one row."""

    def call(row: Any, **options: Any) -> InputRow:
        path = tmp_path / "row.jsonl"
        path.write_text(json.dumps(row))
        [found] = Reader(paths=(path,), **options).rows()
        return found

    return call


# The object sampling


@pytest.mark.parametrize("row", [{"prompt": "x"}, {"messages": [TURN]}, {"text": "x"}])
def test_what_a_row_asks_stands_in_its_object_sampling(read, row):
    own = {
        "max_tokens": 20,
        "temperature": 0.5,
        "stop": None,
        "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    found = read({"id": "a", **row, "sampling": own}, template="{text}" if "text" in row else None)
    wanted = SamplingParams(max_tokens=20, temperature=0.5, json_schema='{"type":"object"}')
    assert found.request.params == wanted
    assert found.request.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"sampling": {"max_tokns": 20}}, "unsupported in 'sampling': max_tokns; did you mean 'max_tokens'?"),
        ({"sampling": {"max_new_tokens": 20}}, "max_new_tokens (use 'max_tokens')"),
        ({"sampling": {"temperature": "hot"}}, "temperature"),
        ({"sampling": {"top_p": 0.5}, "top_p": 0.6}, "'top_p' stands in 'sampling' and beside it"),
    ],
)
def test_b6_what_is_wrong_in_the_object_sampling_is_named(read, row, said):
    message = read({"prompt": "x", **row}).error.message
    assert said in message
    assert "if it is data" not in message
    if "top_p" not in row:
        assert said in read({"text": "x", **row}, template="{text}").error.message


@pytest.mark.parametrize(
    ("value", "template"),
    [
        ("every tenth", "{text}"),
        ([1], "{text}"),
        ({"a": 1}, "{text} {sampling}"),
        ({"a": 1}, "{{ row.sampling.a }}"),
        (7, None),
    ],
)
def test_b6_sampling_may_be_data(read, value, template):
    row = read({"text": "x", "prompt": "y", "sampling": value}, template=template, jinja="row" in str(template))
    assert row.request.params == SamplingParams()


def test_fields_beside_the_object_sampling_count_without_a_template(read):
    row = read({"prompt": "x", "max_tokens": 5, "sampling": {"seed": 3, "max_tokens": None}})
    assert row.request.params == SamplingParams(max_tokens=5, seed=3)


def test_b6_a_format_that_may_be_data_says_so(read):
    row = read({"prompt": "x", "output_format": "markdown"})
    assert "'output_format' must be an object" in row.error.message
    assert "if it is data, rename it" in row.error.message


@pytest.mark.parametrize("name", ["messages", "body", "url", "params", "conversations"])
@pytest.mark.parametrize("value", ["some text", "", None])
def test_text_under_the_name_of_a_request_is_data_of_a_template(read, name, value):
    row = read({"custom_id": "a", "title": "x", name: value}, template="{title}")
    assert row.request.prompt == "x"
    assert row.dialect == "plain"


# What is left out

IN_ANTHROPIC = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]}
IN_GEMINI = {"contents": [{"parts": [{"inlineData": {}}, {"text": "w1"}]}], "safetySettings": [{"threshold": "LOW"}]}
UNSUPPORTED = [
    ({"prompt": "w1", "num_beams": 4}, ["num_beams"]),
    ({"prompt": "w1", "temprature": 0.5, "image": "x.png"}, ["temprature", "image"]),
    ({"messages": [SEEN, TURN]}, ["image_url"]),
    ({"messages": [{**TURN, "images": ["x"]}]}, ["images"]),
    ({**OPENAI, "body": {"messages": [SEEN], "n": 2, "prediction": {"a": 1}}}, ["n", "prediction", "image_url"]),
    (
        {"custom_id": "a", "params": {"messages": [IN_ANTHROPIC], "thinking": {"type": "enabled"}}},
        ["thinking", "image"],
    ),
    ({"key": "a", "request": IN_GEMINI}, ["safetySettings", "inlineData"]),
]


@pytest.mark.parametrize(("row", "names"), UNSUPPORTED, ids=lambda value: " ".join(value) if value else "")
def test_d7_what_bmx_does_not_do_is_named_and_may_be_left_out(bmx, row, names):
    IN.write_text(json.dumps(row) + "\n")
    assert bmx("run", IN, "-m", "fake").code == 3
    error = ERRORS.read_text()
    assert "--ignore-unsupported" in error or "did you mean" in error
    ended = bmx("run", IN, "-m", "fake", "--overwrite", "--ignore-unsupported", ",".join(names).lower())
    assert (ended.code, ERRORS.exists()) == (0, False)
    [record] = map(json.loads, OUT.read_text().splitlines())
    assert json.dumps({"ignored": names})[1:-1] in json.dumps(record)


def test_d7_only_what_is_there_is_named_and_a_prompt_is_needed_all_the_same(read):
    options = {"ignored": frozenset(("imageurl", "n"))}
    assert read({**OPENAI, "body": {"messages": [TURN], "n": 1}}, **options).ignored == ()
    assert "empty 'content'" in read({"messages": [{"role": "user", "content": [IMAGE]}]}, **options).error.message


def test_d7_data_of_a_row_is_never_left_out(read):
    row = read({"n": 3, "text": "x"}, template="{text} {n}", ignored=frozenset("n"))
    assert (row.request.prompt, row.ignored) == ("x 3", ())


@pytest.mark.parametrize("url", ["/v1/embeddings", "/v1/audio/speech"])
def test_d7_a_row_for_another_service_names_its_url(read, url):
    assert f"'url' is '{url}'" in read({"custom_id": "a", "url": url, "body": {"input": "w1"}}).error.message


def test_d7_what_bmx_reads_cannot_be_left_out(bmx):
    IN.write_text('{"prompt": "w1"}\n')
    ended = bmx("run", IN, "-m", "fake", "--ignore-unsupported", "n,temperature")
    assert ended.code == 2
    assert "'temperature', which bmx reads" in ended.err


def test_a9_rows_that_failed_are_answered_with_something_left_out_and_the_others_stay(bmx):
    rows = [{"id": "a", "prompt": "w1"}, {"id": "b", "prompt": "w1", "n": 2}, {"id": "c", "messages": [SEEN]}]
    IN.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bmx("run", IN, "-m", "fake").code == 3
    before = OUT.read_bytes()
    flags = ("--ignore-unsupported", "n,image_url")
    assert bmx("run", IN, "-m", "fake", "--retry-failed", *flags).code == 0
    after = OUT.read_bytes()
    assert after.startswith(before)
    assert after.count(b'"ignored"') == 2
    assert bmx("run", IN, "-m", "fake", *flags).code == 0
    ended = bmx("run", IN, "-m", "fake", "--ignore-unsupported", "n")
    assert (ended.code, OUT.read_bytes()) == (2, after)
    assert "see line 2, 3" in ended.err
