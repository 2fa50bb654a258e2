"""Rows of other programs: each is recognised, answered in its own kind under its own id, and found again on resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bmx.job.input_rows import InputRow, Reader
from bmx.job.output_records import read_record
from bmx.request import SamplingParams

USER = {"role": "user", "content": "w1 w2"}
IN, OUT, ERRORS = Path("in.jsonl"), Path("in.out.jsonl"), Path("in.out.jsonl.errors.jsonl")


@pytest.fixture
def read(tmp_path):
    """The only row of a file with this line."""

    def only_row(value: dict[str, Any], **options: Any) -> InputRow:
        path = tmp_path / "one.jsonl"
        path.write_text(json.dumps(value))
        [row] = Reader(paths=(path,), **options).rows()
        return row

    return only_row


def text_of(record: dict[str, Any]) -> Any:
    """The answer, where its kind of record has it."""
    match record:
        case {"text": text} | {
            "response": {"body": {"choices": [{"message": {"role": "assistant", "content": text}}]}}
        }:
            return text
        case {"response": {"body": {"object": "text_completion", "choices": [{"text": text}]}}}:
            return text
        case {"result": {"type": "succeeded", "message": {"content": [{"type": "text", "text": text}]}}}:
            return text
        case {"response": {"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}}]}}:
            return text
    return None


def batch(body: dict[str, Any], **envelope: Any) -> dict[str, Any]:
    return {"custom_id": "a", **envelope, "body": body}


CHAT = {"messages": [USER]}
AZURE_URL = "https://host/openai/deployments/x/chat/completions?api-version=1"
KINDS = {  # a row of each kind, the name of its id in the record, and a field of such records
    "openai": (batch(CHAT, method="POST", url="/v1/chat/completions"), "custom_id", "response"),
    "azure": (batch(CHAT, method="post", url="/chat/completions"), "custom_id", "response"),
    "full url": (batch(CHAT, url=AZURE_URL), "custom_id", "response"),
    "completion": (batch({"prompt": "w1 w2"}, url="/completions"), "custom_id", "response"),
    "mistral": (batch({**CHAT, "random_seed": 3, "safe_prompt": False}), "custom_id", "response"),
    "mistral completion": (batch({"prompt": "w1 w2"}), "custom_id", "response"),
    "anthropic": ({"custom_id": "a", "params": {"max_tokens": 9, **CHAT}}, "custom_id", "result"),
    "gemini": ({"key": "a", "request": {"contents": [{"parts": [{"text": "w1 w2"}]}]}}, "key", "response"),
    "messages with custom_id": ({"custom_id": "a", **CHAT}, "id", "text"),
    "prompt with custom_id": ({"custom_id": "a", "prompt": "w1 w2"}, "id", "text"),
    "trl": ({"id": "a", "prompt": [USER]}, "id", "text"),
    "sharegpt": ({"id": "a", "conversations": [{"from": "human", "value": "w1 w2"}]}, "id", "text"),
}
EVERY_KIND = pytest.mark.parametrize(("row", "id_field", "answer_field"), KINDS.values(), ids=KINDS)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(record: dict[str, Any]) -> str:
    """A record without the time at which it was made."""
    body = (record.get("response") or {}).get("body", {})
    return json.dumps({**record, "response": {**(record.get("response") or {}), "body": {**body, "created": 0}}})


@EVERY_KIND
def test_d1_a_row_is_answered_in_its_own_kind_and_found_again(bmx, row, id_field, answer_field):
    broken = json.loads(json.dumps(row).replace('"a"', '"bad"').replace("w1 w2", "  "))
    IN.write_text("".join(json.dumps(line) + "\n" for line in (row, broken, {"id": "other", "prompt": "w1 w2"})))
    assert bmx("run", IN, "-m", "fake").code == 3
    before = records(OUT)
    [record] = [found for found in before if found.get(id_field) == "a"]
    assert answer_field in record
    assert isinstance(text_of(record), str)
    [error] = records(ERRORS)
    assert error[id_field] == "bad"
    known = read_record(error)
    assert known is not None
    assert (known.id, known.error_code) == ("bad", "invalid_request")

    again = bmx("run", IN, "-m", "fake")  # finds all of them again
    assert (again.code, records(OUT), records(ERRORS)) == (3, before, [error])

    OUT.write_text("".join(json.dumps(found) + "\n" for found in before if found is not record))
    assert bmx("run", IN, "-m", "fake", "--retry-failed").code == 3
    assert sorted(map(without_time, records(OUT))) == sorted(map(without_time, before))
    assert [found[id_field] for found in records(ERRORS)] == ["bad"]


def test_d1_all_kinds_may_stand_in_one_file(bmx):
    rows = [json.loads(json.dumps(row).replace('"a"', json.dumps(kind))) for kind, (row, _, _) in KINDS.items()]
    IN.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bmx("run", IN, "-m", "fake", "--order", "input").code == 0
    assert [read_record(record).id for record in records(OUT)] == list(KINDS)


@pytest.mark.parametrize(
    "row",
    [
        {"body": {"prompt": "x"}, "url": "/v1/completions"},
        {"params": {"messages": [USER]}},
        {"request": {"contents": "w1 w2"}},
        {"conversations": [{"from": "human", "value": "w1"}]},
    ],
    ids=lambda row: next(iter(row)),
)
def test_d1_a_row_without_an_id_is_the_number_of_its_line_in_every_kind(read, row):
    found = read(row)
    assert (found.id, found.error) == ("line-1", None)


@pytest.mark.parametrize("field", ["id", "custom_id"])
def test_d3_a_whole_number_may_be_written_as_a_float(read, field):
    row = read({field: 1.0, "prompt": "x", "max_tokens": 64.0, "top_k": -1, "seed": 3.0, "stop_token_ids": [2.0]})
    assert (row.id, type(row.id)) == (1, int)
    assert row.request.params == SamplingParams(max_tokens=64, seed=3, stop_token_ids=(2,))
    assert type(row.request.params.max_tokens) is int
    assert "max_tokens" in read({"prompt": "x", "max_tokens": 64.5}).error.message
    assert "id must be" in read({"id": 1.5, "prompt": "x"}).error.message


def test_d3_a_top_p_of_zero_is_the_likeliest_token_alone(read):
    assert read({"prompt": "x", "top_p": 0}).request.params.top_p == 0


# Anthropic


def test_d1_anthropic_params_with_a_system_prompt_parts_and_names_of_their_own(read):
    params = {
        "model": "mine",
        "system": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief.", "cache_control": {}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello."}]}],
        "max_tokens": 20,
        "stop_sequences": ["END"],
        "temperature": 1.0,
        "top_k": 5,
        "metadata": {"user_id": "u"},
        "stream": False,
        "thinking": {"type": "disabled"},
        "tools": [],
    }  # fmt: skip
    request = read({"custom_id": "a", "params": params}, models=frozenset({"mine"})).request
    assert [m["content"] for m in request.messages] == ["Be brief.", "Hello."]
    assert request.params == SamplingParams(max_tokens=20, stop=("END",), temperature=1.0, top_k=5)


def test_d1_anthropic_tools_are_calls_and_messages_of_their_own(read):
    messages = [
        USER,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "4 degrees"}]},
            {"type": "text", "text": "So, coat?"},
        ]},
    ]  # fmt: skip
    found = read({"custom_id": "a", "params": {"messages": messages}}).request.messages
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {}}}
    assert found[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert found[2] == {"role": "tool", "tool_call_id": "c1", "content": "4 degrees"}
    assert found[3] == {"role": "user", "content": "So, coat?"}


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
        ({"tools": [{"name": "f"}], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"unheard_of": 1}, "unheard_of"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "'image': bmx reads text only",
        ),
    ],
)
def test_d1_what_an_anthropic_row_asks_in_vain_is_named(read, params, named):
    row = read({"custom_id": "a", "params": {"messages": [USER], **params}})
    assert named in row.error.message
    assert row.dialect == "anthropic"


def test_d1_an_anthropic_row_for_another_model_is_told_so(read):
    row = read({"custom_id": "a", "params": {"model": "other", "messages": [USER]}}, models=frozenset({"mine"}))
    assert row.error.code == "model_not_found"


# Gemini


@pytest.mark.parametrize(
    "names", [("systemInstruction", "generationConfig"), ("system_instruction", "generation_config")]
)
def test_d1_gemini_requests_in_both_spellings(read, names):
    system, config = names
    request = {
        "contents": [
            {"role": "user", "parts": [{"text": "Hel"}, {"text": "lo."}]},
            {"role": "model", "parts": [{"text": "Hi."}]},
            {"parts": {"text": "Who are you?"}},
        ],
        system: {"parts": [{"text": "Be brief."}]},
        config: {
            "maxOutputTokens": 20, "topP": 0.5, "topK": 7, "stopSequences": ["END"], "temperature": 1, "seed": 4,
            "candidateCount": 1, "responseMimeType": "text/plain", "presencePenalty": 0.0,
        },
        "safetySettings": [{"category": "X", "threshold": "BLOCK_NONE"}],
    }  # fmt: skip
    found = read({"key": "a", "request": request})
    assert found.error is None
    assert [(m["role"], m["content"]) for m in found.request.messages] == [
        ("system", "Be brief."),
        ("user", "Hello."),
        ("assistant", "Hi."),
        ("user", "Who are you?"),
    ]
    wanted = SamplingParams(max_tokens=20, top_p=0.5, top_k=7, stop=("END",), temperature=1.0, seed=4)
    assert found.request.params == wanted


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"generationConfig": {"responseMimeType": "text/x-enum"}}, "responseMimeType"),
        ({"generationConfig": {"candidateCount": 2}}, "n"),
        ({"tools": [{"googleSearch": {}}]}, "'googleSearch'"),
        ({"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}, "toolConfig"),
        ({"safetySettings": [{"threshold": "BLOCK_LOW_AND_ABOVE"}]}, "safetySettings"),
        ({"contents": [{"parts": [{"inlineData": {"data": "x"}}]}]}, "'inlineData': bmx reads text only"),
        ({"contents": [{"role": "user"}]}, "'parts'"),
        ({"contents": None}, "'contents'"),
    ],
    ids=str,
)
def test_d1_what_a_gemini_row_asks_in_vain_is_named(read, more, named):
    row = read({"key": "a", "request": {"contents": [{"parts": [{"text": "x"}]}], **more}})
    assert named in row.error.message
    assert (row.id, row.dialect) == ("a", "gemini")


# Conversations


def test_d1_sharegpt_speakers_are_roles(read):
    speakers = ["system", "human", "gpt", "User", "chatgpt", "human", "bard", "tool", "assistant", "user"]
    turns = [{"from": name, "value": f"w{n}", "weight": 1} for n, name in enumerate(speakers)]
    roles = [m["role"] for m in read({"conversations": turns}).request.messages]
    assert roles == [
        *("system", "user", "assistant", "user", "assistant", "user", "assistant", "tool", "assistant", "user")
    ]


def test_d1_sharegpt_with_a_system_prompt_beside_it_or_an_unknown_speaker(read):
    turns = [{"from": "human", "value": "w1"}]
    found = read({"conversations": turns, "system": "Be brief."}).request.messages
    assert [m["content"] for m in found] == ["Be brief.", "w1"]
    assert "'narrator'" in read({"conversations": [{"from": "narrator", "value": "w1"}]}).error.message


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}], ids=str)
def test_d2_a_history_of_tools_is_kept_for_the_template(read, content):
    called = {"role": "assistant", **content, "tool_calls": [CALL]}
    told = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": ""}
    found = read({"messages": [USER, called, told, USER]}).request.messages
    assert found == (USER, {**called, "content": ""}, told, USER)


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("content", ["", "  ", None, []])
def test_d2_an_empty_system_message_is_dropped(read, role, content):
    assert read({"messages": [{"role": role, "content": content}, USER]}).request.messages == (USER,)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user", "content": ""}], "role 'user' has an empty 'content'"),
        ([{"role": "user"}], "role 'user' has an empty 'content'"),
        ([USER, {"role": "assistant", "content": None}], "neither 'content' nor 'tool_calls'"),
        ([{"role": "system", "content": ""}], "no text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url': bmx reads text only"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "'input_audio': bmx reads text only"),
        ([{"role": "user", "content": [{"type": "text"}]}], "no 'text'"),
        ([{"role": "user", "content": 5}], "must be text"),
    ],
)  # fmt: skip
def test_d6_a_message_without_text_is_called_what_it_is(read, messages, said):
    assert said in read({"messages": messages}).error.message


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([1, 2, 3], "list of token ids"),
        ([[1, 2]], "list of token ids"),
        (["a", "b"], "a row of its own"),
        ([], "a list"),
        ({"text": "x"}, "an object"),
        (5, "a number"),
        (" ", "empty"),
    ],
)
def test_d6_a_prompt_that_is_no_text_is_called_what_it_is(read, prompt, said):
    assert said in read({"prompt": prompt}).error.message
    assert said in read({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": prompt}}).error.message


@pytest.mark.parametrize(
    ("row", "shown", "template"),
    [
        ({"id": 1, "question": "Why?", "answer": "So."}, "'question', 'answer'", "{question}"),
        ({"id": 1, "title": "T", "text": "x"}, "'title', 'text'", "{text}"),
        ({"id": 1, "my column": "x"}, "'my column'", "{my column}"),
        ({"instruction": "Name it.", "input": "", "output": "x"}, "'input'", r"{instruction}\n\n{input}"),
        ({"instruction": "Name it.", "output": "x"}, "'output'", "{instruction}"),
        ({"id": 1}, "no fields", None),
        ({"id": 1, "n_pages": 5}, "'n_pages'", None),
        ({"recordId": "r1", "modelInput": {}}, "'modelInput'", None),
        ({"title": "T", "body": "a longer text"}, "'title', 'body'", "{body}"),
    ],
)
def test_d6_a_row_without_a_prompt_is_told_what_it_has_and_how_to_use_it(read, row, shown, template):
    message = read(row).error.message
    assert message.startswith("no 'prompt' or 'messages'")
    assert shown in message
    if template is None:
        assert "template" not in message
    else:
        assert f"--prompt-template '{template}'" in message
        assert read(row, template=template.replace(r"\n", "\n")).error is None


def test_d6_a_list_of_rows_within_an_object_is_seen(read):
    assert "jq -c '.data[]'" in read({"version": 1, "data": [{"prompt": "x"}]}).error.message


@pytest.mark.parametrize(
    ("messages", "fields", "fine"),
    [
        ([USER], {"add_generation_prompt": True, "continue_final_message": False}, True),
        ([USER], {"continue_final_message": True}, False),
        ([USER], {"add_generation_prompt": False}, False),
        ([USER, {"role": "assistant", "content": "w3"}], {"continue_final_message": True}, True),
        ([USER, {"role": "assistant", "content": "w3"}], {"add_generation_prompt": False}, True),
        ([USER, {"role": "assistant", "content": "w3"}], {"add_generation_prompt": True}, False),
    ],
)
def test_c10_how_a_conversation_goes_on_may_be_said_as_bmx_does_it(read, messages, fields, fine):
    error = read({"messages": messages, **fields}).error
    assert (error is None) is fine
    if not fine:
        assert next(iter(fields)) in error.message


# Data that looks like an envelope


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a", "prompt": "x", "body": {"height": 5}},
        {"custom_id": "a", "prompt": "x", "url": "https://example.org", "method": "oil on canvas"},
        {"id": "a", "prompt": "x", "params": {"p": 1}, "request": "a loan", "key": "C minor"},
        {"id": "a", "prompt": "x", "response": "y", "result": "z"},
    ],
)
def test_d1_a_plain_row_may_have_columns_that_others_use_for_requests(read, row):
    found = read(row)
    assert (found.id, found.error, found.dialect) == ("a", None, "plain")
