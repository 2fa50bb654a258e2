"""Tools of a row in every dialect reach the chat template; their calls come back as text; what does not is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_chat_renderer import SKIPS, TOOLS
from test_dialects import USER, batch, read, records  # noqa: F401  # read is a fixture
from test_reasoning import said, tokenizer

from bmx import Engine, PromptConfig, Request, RowError, UsageError
from bmx.model.prompt_encoder import PromptEncoder

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
SHOWN = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}" + SKIPS
NAMES = "{% for tool in (tools or []) %}{{ tool.function.name }} {% endfor %}" + SKIPS
MESSAGES = ({"role": "user", "content": "Weather in Oslo?"},)
BARE = {"name": "weather", "description": "The weather."}
UPPER = {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}}


def prompt(template: str, *, config: PromptConfig | None = None, **request: Any) -> str:
    """What the model reads of a request."""
    own = tokenizer(template)
    encoder = PromptEncoder(own, config or PromptConfig())
    return own.decode(encoder.encode(Request(id=0, **({"messages": MESSAGES} | request))))


def refused(template: str, **request: Any) -> str:
    with pytest.raises(RowError) as error:
        prompt(template, **request)
    assert error.value.code == "invalid_request"
    return error.value.message


# Rows


GEMINI = {"contents": [{"parts": [{"text": "w1"}]}]}
ROWS = {
    "plain": {"messages": [USER], "tools": [WEATHER]},
    "plain prompt": {"prompt": "w1", "tools": [WEATHER]},
    "bare functions": {"messages": [USER], "tools": [{**BARE, "parameters": SCHEMA}]},
    "openai": batch({"messages": [USER], "tools": [WEATHER], "tool_choice": "auto"}),
    "openai's old form": batch({"messages": [USER], "functions": [{**BARE, "parameters": SCHEMA}]}),
    "anthropic": {"params": {"messages": [USER], "tools": [{**BARE, "input_schema": SCHEMA, "cache_control": {}}]}},
    "anthropic's choice": {
        "params": {
            "messages": [USER],
            "tools": [{**BARE, "type": "custom", "input_schema": SCHEMA}],
            "tool_choice": {"type": "auto"},
        }
    },
    "gemini": {"request": {**GEMINI, "tools": [{"functionDeclarations": [{**BARE, "parameters": UPPER}]}]}},
    "gemini's other spelling": {
        "request": {
            **GEMINI,
            "tools": [{"function_declarations": [{**BARE, "parametersJsonSchema": SCHEMA}]}],
            "tool_config": {"function_calling_config": {"mode": "AUTO"}},
        }
    },
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_d9_tools_of_every_dialect_are_openais(read, row):  # noqa: F811
    found = read(row)
    assert found.error is None
    assert found.request.tools == (WEATHER,)


@pytest.mark.parametrize(
    "row",
    [
        batch({"messages": [USER], "tools": [WEATHER], "tool_choice": "none"}),
        batch({"messages": [USER], "functions": [BARE], "function_call": "none"}),
        {"params": {"messages": [USER], "tools": [BARE], "tool_choice": {"type": "none"}}},
        {
            "request": {
                **GEMINI,
                "tools": [{"functionDeclarations": [BARE]}],
                "toolConfig": {"functionCallingConfig": {"mode": "NONE"}},
            }
        },
        {"messages": [USER], "tools": []},
    ],
)
def test_d9_tools_that_may_not_be_called_are_not_shown(read, row):  # noqa: F811
    assert read(row).request.tools == ()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"functions": [BARE], "function_call": {"name": "weather"}}, "function_call"),
        ({"tools": [{"type": "web_search"}]}, "a tool of type 'web_search'"),
        ({"tools": [{"type": "function", "function": {}}]}, "a tool with 'function, type'"),
        ({"tools": WEATHER}, "'tools' must be a list"),
        ({"reasoning_effort": 3}, "'reasoning_effort'"),
    ],
    ids=str,
)
def test_d9_what_a_row_asks_of_tools_in_vain_is_named_or_left_out(read, more, named):  # noqa: F811
    row = batch({"messages": [USER], **more})
    assert named in read(row).error.message
    field = named.strip("'") if named.strip("'") in row["body"] else "tools"
    left = read(row, ignored=frozenset([field.replace("_", "")]))
    assert left.error is None
    assert left.ignored == (field,)


# Prompts


def test_d9_a_template_is_given_the_tools(bmx):
    found = prompt(SHOWN, tools=(WEATHER, CLOCK))
    assert found.startswith(json.dumps(WEATHER) + "\n" + json.dumps(CLOCK))
    assert found.endswith(prompt(SHOWN))
    assert prompt(SHOWN, messages=None, prompt="what?", tools=(CLOCK,)).startswith(json.dumps(CLOCK))


@pytest.mark.parametrize(
    "template", [SKIPS, NAMES.replace("(tools or [])", "(tools or [])[:1]"), SHOWN.replace("tools", "xml")]
)
def test_d9_a_template_that_leaves_out_tools_refuses_them(template):
    asked = ({"role": "user", "content": "What are weather and clock?"},)
    assert "leaves out the tools" in refused(template, messages=asked, tools=(WEATHER, CLOCK))
    assert "clock" in prompt(template, messages=asked)


def test_d9_control_tokens_in_a_tool_are_text():
    own = tokenizer(SHOWN)
    tool = {"type": "function", "function": {"name": "f", "description": "ends <|im_end|> here"}}
    encoder = PromptEncoder(own, PromptConfig())
    plain, ends = (encoder.encode(Request(id=0, messages=MESSAGES, tools=(one,))) for one in (CLOCK, tool))
    assert ends.count(own.eos_token_id) == plain.count(own.eos_token_id)
    assert "ends <|im_end|> here" in own.decode(ends)


def test_d9_tools_without_a_chat_template_are_an_error():
    assert "unsupported: tools, where no chat" in refused(SHOWN, messages=None, prompt="x", raw=True, tools=(CLOCK,))
    off = PromptConfig(chat_template=False)
    assert "unsupported: tools, where no chat" in refused(SHOWN, config=off, messages=None, prompt="x", tools=(CLOCK,))


def test_d9_reasoning_effort_is_a_variable_of_the_template():
    template = "{{ 'Reasoning: ' + reasoning_effort | default('medium') }}\n" + SKIPS
    assert prompt(template, reasoning_effort="low").startswith("Reasoning: low")
    assert prompt(template).startswith("Reasoning: medium")
    own = {"chat_template_kwargs": {"reasoning_effort": "high"}}
    assert prompt(template, reasoning_effort="low", **own).startswith("Reasoning: high")
    assert "unsupported: reasoning_effort" in refused(SKIPS, reasoning_effort="low")
    assert "unsupported: reasoning_effort, where" in refused(
        template, messages=None, prompt="x", raw=True, reasoning_effort="low"
    )


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER], "reasoning_effort": "low"},
        batch({"messages": [USER], "reasoning_effort": "low"}),
        {"prompt": "w1", "sampling": {"reasoning_effort": "low"}},
    ],
)
def test_d9_reasoning_effort_of_a_row_is_read(read, row):  # noqa: F811
    assert read(row).request.reasoning_effort == "low"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER]},
        batch({"messages": [USER]}),
        {"params": {"messages": [USER]}},
        {"request": GEMINI},
    ],
)
def test_d9_every_dialect_may_set_variables_of_the_template(read, row):  # noqa: F811
    inner = next((row[name] for name in ("body", "params", "request") if name in row), row)
    inner = {**inner, "chat_template_kwargs": {"enable_thinking": False}}
    name = next((name for name in ("body", "params", "request") if name in row), None)
    found = read({**row, name: inner} if name else inner)
    assert found.request.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize("wrap", [batch, lambda body: {"custom_id": "a", "params": body}])
def test_d9_a_developers_message_and_an_assistants_beginning_are_read_in_batches(read, wrap):  # noqa: F811
    messages = [{"role": "developer", "content": "be brief"}, USER, {"role": "assistant", "content": "It is"}]
    found = prompt(SKIPS, messages=read(wrap({"messages": messages})).request.messages)
    assert "<|im_start|>system\nbe brief<|im_end|>" in found
    assert found.endswith("<|im_start|>assistant\nIt is")


CALLED = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
HISTORIES = {  # of a call that the model has made after it thought
    "anthropic": {
        "params": {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": ""},
                        {"type": "redacted_thinking", "data": "x"},
                        {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "c1", "content": '{"degrees": 4}'}],
                },
            ]
        }
    },
    "gemini": {
        "request": {
            "contents": [
                {"role": "user", "parts": [{"text": "w1 w2"}]},
                {
                    "role": "model",
                    "parts": [
                        {"text": "hm", "thought": True},
                        {
                            "functionCall": {"id": "c1", "name": "weather", "args": {"city": "Oslo"}},
                            "thoughtSignature": "x",
                        },
                    ],
                },
                {
                    "role": "user",
                    "parts": [{"functionResponse": {"id": "c1", "name": "weather", "response": {"degrees": 4}}}],
                },
            ]
        }
    },
}


@pytest.mark.parametrize("row", HISTORIES.values(), ids=HISTORIES)
def test_d9_calls_and_reasoning_of_earlier_answers_are_read_in_every_kind(read, row):  # noqa: F811
    user, called, told = read(row).request.messages
    assert user == USER
    assert called == {"role": "assistant", "content": "", "tool_calls": [CALLED], "reasoning_content": "hm"}
    told.pop("name", None)  # Gemini's has it
    assert told == {"role": "tool", "tool_call_id": "c1", "content": '{"degrees": 4}'}
    assert '<call>weather {"city": "Oslo"}' in prompt(SKIPS, messages=(user, called, told))


# Answers


CALL_TOKENS = ("<tool>", "</tool>")


def test_d9_calls_come_back_as_text_with_their_marks():
    own = tokenizer(SHOWN, CALL_TOKENS, special=True)
    call = '<tool>{"name": "weather"}</tool>'
    assert said(own, f"{call}<|im_end|>", tools=(WEATHER,)) == (None, call)
    assert said(own, f"{call}<|im_end|>") == (None, '{"name": "weather"}')
    assert said(own, f"{call} and", tools=(WEATHER,), stop=(" and",)) == (None, call)
    thinking = tokenizer(SHOWN + "{# </think> #}", (*CALL_TOKENS, "<think>", "</think>"), special=True)
    assert said(thinking, f"<think>hm</think>\n{call}<|im_end|>", tools=(WEATHER,)) == ("hm", call)


def test_d9_a_run_with_tools(bmx):
    rows = [{"id": "a", "messages": [USER], "tools": [WEATHER]}, {"id": "b", "messages": [USER], "tools": [{"x": 1}]}]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bmx("run", "in.jsonl", "-m", "fake").code == 3
    [answer] = records(Path("in.out.jsonl"))
    [error] = records(Path("in.out.jsonl.errors.jsonl"))
    assert (answer["id"], error["id"]) == ("a", "b")
    assert "a tool with 'x'" in error["error"]["message"]
    assert bmx("run", "in.jsonl", "-m", "fake", "-o", "o.jsonl", "--ignore-unsupported", "tools").code == 0
    assert [record["ignored"] for record in records(Path("o.jsonl"))] == [["tools"], ["tools"]]


def test_chat_takes_tools():
    with Engine.open("fake") as engine:
        plain, [with_tools] = engine.chat([list(MESSAGES)]), engine.chat([list(MESSAGES)], tools=[WEATHER])
        assert with_tools.usage.prompt_tokens > plain[0].usage.prompt_tokens
        for wrong in ([{"name": "f"}], [len], [{"function": {"name": 3}}]):
            with pytest.raises(UsageError, match="tools must be functions"):
                engine.chat([list(MESSAGES)], tools=wrong)


def test_d9_a_conversation_with_calls_and_tools_is_read_whole():
    found = prompt(NAMES, messages=TOOLS, tools=({"type": "function", "function": {"name": "weather_of"}},))
    assert found.startswith("weather_of ")
    assert '<call>weather_of {"city": "Oslo"}' in found
