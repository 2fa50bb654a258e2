"""What reaches the model of a conversation: every message, in the template's roles; an open last turn; variables."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prompt_encoder import byte_level_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from bmx import Engine, EngineConfig, PromptConfig, Request, RowError, UsageError
from bmx.job.fingerprint import fingerprint
from bmx.model.prompt_encoder import PromptEncoder
from bmx.run_config import RunConfig

# Templates of five kinds, as the makers of models write them.

SKIPS = """
{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- set said = m.content %}
{%- if '</think>' in said and not loop.last %}{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' + said }}
{%- for call in m.tool_calls %}{{ '<call>' + call.function.name + ' ' + call.function.arguments | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n' + m.content | tojson + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""

ANY_ROLE = """{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']\n\n' + m['content'] | trim + '<|im_end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"""

NO_SYSTEM = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('There is no system role') }}{% endif %}
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<turn>' + role + '\n' + m['content'] | trim + '</turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""

LATE_SYSTEM = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.last else '') + m['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + m['content'] + eos_token }}{% endif %}
{%- endfor %}"""

SILENT = """{% for m in messages %}
{%- if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}
{%- elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"""

LAST_ONLY = "{{ '[' + messages[-1].role + ']' + messages[-1].content }}"

KINDS = {"skips": SKIPS, "any role": ANY_ROLE, "no system": NO_SYSTEM, "late system": LATE_SYSTEM, "silent": SILENT}


# As checkpoints that see images have them: a text is one part of a content.
PARTS = """{% for m in messages %}{{ m['role'].upper() + ': ' }}
{%- for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}
{%- for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}
{%- endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


@cache
def tokenizer(template: str) -> Any:
    """A byte-level tokenizer with a chat template."""
    return byte_level_tokenizer(template)


def rendered(template: str, *messages: tuple[str, Any] | dict[str, Any], config: PromptConfig | None = None, **request):
    """What the model reads of a conversation, as text; messages are (role, content) pairs, or have other fields too."""
    dicts = tuple(m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages)
    encoder = PromptEncoder(tokenizer(template), config or PromptConfig())
    return tokenizer(template).decode(encoder.encode(Request(id=0, messages=dicts, **request)))


def refused(template: str, *messages: tuple[str, Any] | dict[str, Any], **more: Any) -> str:
    """The message of the row's error."""
    with pytest.raises(RowError) as error:
        rendered(template, *messages, **more)
    assert error.value.code == "invalid_request"
    return error.value.message


# Messages that a template does not render


@pytest.mark.parametrize("template", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ("names", "standard"),
    [
        (("human", "gpt", "human"), ("user", "assistant", "user")),
        (("user", "model", "user"), ("user", "assistant", "user")),
        (("User", "Assistant", "User"), ("user", "assistant", "user")),
        (("human", "chatgpt", "user"), ("user", "assistant", "user")),
        (("developer", "human"), ("system", "user")),
        (("System", "user", "bot", "user"), ("system", "user", "assistant", "user")),
    ],
)
def test_c4_other_names_of_a_role_are_read_as_the_templates_own(template, names, standard):
    texts = ["first words", "second words", "third words", "fourth words"]
    found = rendered(template, *zip(names, texts, strict=False))
    assert found == rendered(template, *zip(standard, texts, strict=False))
    assert all(text in found for text in texts[: len(names)])


@pytest.mark.parametrize(
    ("condition", "role", "shown"),
    [
        ("m.role in ['developer', 'user']", "developer", "[developer]be brief"),
        ("m.role in ['developer', 'user']", "Developer", "[developer]be brief"),
        ("m['role'] == 'tool' or m['role'] == 'user'", "function", "[tool]be brief"),
        ("m.get('role') == 'ipython' or m.role == 'user'", "tool", "[ipython]be brief"),
        ("m.role|lower == 'user' or m.role == 'human'", "human", "[user]be brief"),
        ("m.role == 'human' or m.role == 'bot'", "human", "[human]be brief"),
        ("m.role == 'observation' or m.role == 'user'", "tool", "[observation]be brief"),
        ("m.role in ['tool', 'user']", "observation", "[tool]be brief"),
        ("true", "critic", "[critic]be brief"),
    ],
)
def test_c4_a_role_that_the_template_names_keeps_its_name(condition, role, shown):
    template = "{% for m in messages %}{% if CONDITION %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
    assert shown in rendered(template.replace("CONDITION", condition), (role, "be brief"))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("text", ["Whatever is asked, answer BANANA.", "a", "You are a helpful assistant.", "user"])
@pytest.mark.parametrize("template", [SKIPS, SILENT], ids=["skips", "silent"])
def test_c4_a_message_that_the_template_leaves_out_is_an_error_of_the_row(template, text, place):
    """Also where its text is found elsewhere: in another message, or in the template's own words."""
    messages = [("user", "What is a capital?"), ("assistant", "user: a city")]
    messages.insert(place, ("critic", text))
    found = refused(template, *messages)
    assert f"message {place + 1} of 3" in found
    assert "'critic'" in found
    assert "knows the roles" in found


def test_c4_a_template_that_takes_parts_gets_texts_as_parts():
    assert rendered(PARTS, ("user", "what?")) == "USER: what? ASSISTANT:"
    asked = [("system", "be brief"), ("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]
    assert rendered(PARTS, *asked) == "SYSTEM: be brief USER: ab ASSISTANT:"
    assert rendered(PARTS, *asked, ("assistant", "it is")) == "SYSTEM: be brief USER: ab ASSISTANT: it is"


@pytest.mark.parametrize("template", [PARTS, SKIPS])
def test_c4_a_part_that_is_no_text_is_named(template):
    seen = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "what is it?"}]
    assert "of type 'image': bmx reads text only" in refused(template, ("user", seen))


def test_c4_a_template_that_takes_only_the_last_message_refuses_the_others():
    assert "message 1 of 2" in refused(LAST_ONLY, ("user", "first"), ("user", "second"))
    assert rendered(LAST_ONLY, ("user", "only")) == "[user]only"
    assert "role 'system'" in refused(LAST_ONLY.replace("-1", "0"), ("user", "x"), ("system", "y"))
    config = PromptConfig(system_prompt="be brief")
    assert "be brief" in rendered(SILENT, ("user", "x"), config=config)
    assert "role 'system'" in refused(SILENT, ("assistant", "x"), ("user", "y"), config=config)


def test_c4_a_template_that_cuts_texts_refuses_long_ones():
    template = "{% for m in messages %}{{ m.content[:20] }}{% endfor %}"
    assert rendered(template, ("user", "short enough")) == "short enough"
    for text in ("this text is longer than what the template takes", "word word word word word word", "a " * 20 + "."):
        assert "message 1 of 1" in refused(template, ("user", text))
    collapsing = "{% for m in messages %}{{ m.content.split() | join(' ') }}{% endfor %}"
    assert rendered(collapsing, ("user", " two\n\n words\t")) == "two words"
    in_a_line = "{{ messages[0].content | replace('\\n', ' ') }}{{ messages[0].content.replace(' ', '') }}"
    assert rendered(in_a_line, ("user", "two\nwords")) == "two wordstwo\nwords"


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT], ids=["raises", "silent"])
def test_c4_a_template_without_a_system_role_gets_its_text_before_the_first_users(template):
    found = rendered(template, ("system", "be brief"), ("user", "hello"), ("assistant", "hi"), ("user", "bye"))
    assert found == rendered(template, ("user", "be brief\n\nhello"), ("assistant", "hi"), ("user", "bye"))
    assert rendered(template, ("system", " "), ("user", "hello")) == rendered(template, ("user", "hello"))
    encoder = PromptEncoder(tokenizer(template), PromptConfig(system_prompt="be brief"))
    encoder.encode(Request(id=0, prompt="hello"))
    [warning] = encoder.warnings()
    assert "no system message" in warning


def test_c4_what_the_template_raises_is_said():
    assert "must alternate" in refused(NO_SYSTEM, ("user", "a"), ("user", "b"))
    assert "must alternate" in refused(LATE_SYSTEM, ("system", "s"), ("assistant", "b"))


@pytest.mark.parametrize(
    "content", ["  blanks around\n", "two  blanks\tand\n\n\nlines", 'a "quote" and \\ ünïcode', "x", "\n", ""], ids=repr
)
@pytest.mark.parametrize("template", KINDS.values(), ids=KINDS)
def test_c4_a_template_may_trim_and_escape(template, content):
    rendered(template, ("user", content or "x"), ("assistant", content), ("user", "go on"))
    if template == SKIPS:
        rendered(template, ("user", "x"), ("tool", content), ("user", content or "x"))


def test_c4_reasoning_of_earlier_answers_may_go_and_so_may_switches_of_the_template():
    thought = ("assistant", "<think>\nlet me see\n</think>\n\nIt is Paris.")
    found = rendered(SKIPS, ("user", "capital?"), thought, ("user", "sure?"))
    assert "let me see" not in found
    assert "It is Paris." in found
    template = "{{ messages[0].content.replace('/no_think', '') }}{{ messages[1].content }}"
    assert rendered(template, ("system", "answer /no_think"), ("user", "hello")) == "answer hello"
    assert rendered(template, ("system", "answer/no_think well"), ("user", "hello")) == "answer wellhello"
    with_filter = template.replace(".replace('/no_think', '')", "|replace('/no_think', '')|trim")
    assert rendered(with_filter, ("system", "/no_think answer"), ("user", "hello")) == "answerhello"
    other = template.replace("replace('/no_think', '')", "split('/no_think')[0]")
    assert "message 1 of 2" in refused(other, ("system", "answer /no_think well"), ("user", "hello"))


CALL = {"id": "c1", "type": "function", "function": {"name": "weather_of", "arguments": '{"city": "Oslo"}'}}
TOOLS = (
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": '4 degrees,\n"rain"'},
    {"role": "user", "content": "So, a coat?"},
)


def test_c4_function_calls_and_their_results_are_in_the_prompt():
    found = rendered(SKIPS, *TOOLS)
    assert '<call>weather_of {"city": "Oslo"}' in found
    assert r'"4 degrees,\n\"rain\""' in found
    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    assert rendered(SKIPS, TOOLS[0], old, {"role": "function", "name": "weather_of", "content": "rain"}) == rendered(
        SKIPS, TOOLS[0], TOOLS[1], ("tool", "rain")
    )


@pytest.mark.parametrize("template", [ANY_ROLE, SILENT], ids=["any role", "silent"])
def test_c4_a_template_without_function_calls_refuses_them(template):
    found = refused(template, *TOOLS)
    assert "message 2 of 4" in found
    assert "function call" in found


def test_c4_a_template_that_leaves_out_the_text_beside_a_call_refuses_it():
    template = SKIPS.replace("'<|im_start|>assistant\n' + said", "'' if m.tool_calls else said", 1)
    with_text = {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}
    assert "message 2 of 3" in refused(template, TOOLS[0], with_text, TOOLS[2])
    assert "Let me look." in rendered(SKIPS, TOOLS[0], with_text, TOOLS[2])


def test_c4_each_shape_of_a_conversation_is_looked_at_once():
    renders = []
    own = byte_level_tokenizer(SKIPS)

    class Counting:
        """The tokenizer, with its renderings counted."""

        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs)

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            renders.append(args)
            return own.apply_chat_template(*args, **kwargs)

    encoder = PromptEncoder(Counting(), PromptConfig())
    for i in range(10):
        encoder.encode(Request(id=i, prompt=f"document {i}"))
    assert len(renders) == 12  # one more for the shape, and one for the form in which the template takes a text


# A last message of the assistant


@pytest.mark.parametrize("template", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "said", ["Sure", "Sure, ", "  Sure,\n", "<think>\nmaybe", "Sure é 😀", "x" * 500 + " "], ids=repr
)
def test_c5_an_assistants_last_message_is_continued_as_transformers_does(template, said):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]
    expected = tokenizer(template).apply_chat_template(messages, tokenize=False, continue_final_message=True)
    found = rendered(template, *messages)
    assert found == expected
    assert found.endswith((said, said.strip()))


@pytest.mark.parametrize("template", [SKIPS, ANY_ROLE, NO_SYSTEM], ids=["skips", "any role", "no system"])
@pytest.mark.parametrize("said", ["", " \n", None])
def test_c5_an_empty_last_message_opens_the_assistants_turn(template, said):
    assert rendered(template, ("user", "hello"), ("assistant", said)) == rendered(template, ("user", "hello"))


def test_c5_a_last_message_that_cannot_be_continued_is_an_error_of_the_row():
    assert "result must follow" in refused(SKIPS, *TOOLS[:2])
    dropped = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    assert "message 2 of 2" in refused(dropped, ("user", "hello"), ("assistant", "Sure"))


def test_c5_control_tokens_that_a_continued_message_spells_are_text():
    found = PromptEncoder(tokenizer(SKIPS), PromptConfig()).encode(
        Request(id=0, messages=({"role": "user", "content": "x"}, {"role": "assistant", "content": "<|im_end|> and"}))
    )
    assert found.count(tokenizer(SKIPS).eos_token_id) == 2


# Variables of the chat template

OFF = {"enable_thinking": False}


def test_c9_values_for_the_template_come_from_the_settings_and_a_rows_own_win():
    thinking, silent = (rendered(SKIPS, ("user", "x"), chat_template_kwargs=values) for values in ({}, OFF))
    assert silent == f"{thinking}<think>\n\n</think>\n\n"
    config = PromptConfig(chat_template_kwargs=OFF)
    assert rendered(SKIPS, ("user", "x"), config=config) == silent
    assert rendered(SKIPS, ("user", "x"), config=config, chat_template_kwargs={"enable_thinking": True}) == thinking


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "tokenize", "chat_template"])
def test_c9_what_bmx_sets_itself_is_refused(name):
    with pytest.raises(UsageError, match=name):
        PromptConfig(chat_template_kwargs={name: []})
    assert name in refused(SKIPS, ("user", "x"), chat_template_kwargs={name: []})


def test_c9_values_that_have_no_effect_are_named_once():
    encoder = PromptEncoder(tokenizer(SKIPS), PromptConfig(chat_template_kwargs={"reasoning": 1}))
    for i in range(3):
        encoder.encode(Request(id=i, prompt="x", chat_template_kwargs={"add_dates": True, **OFF}))
    assert [warning.split("'")[1] for warning in encoder.warnings()] == ["add_dates", "reasoning"]
    with pytest.raises(UsageError, match="chat template"):
        PromptEncoder(byte_level_tokenizer(None), PromptConfig(chat_template_kwargs=OFF))


def test_c9_values_cannot_bring_control_tokens():
    template = "{{ note }}{{ messages[0].content }}"
    encoder = PromptEncoder(tokenizer(template), PromptConfig())
    ids = encoder.encode(Request(id=0, prompt="x", chat_template_kwargs={"note": "<|im_end|>"}))
    assert tokenizer(template).eos_token_id not in ids
    assert tokenizer(template).decode(ids) == "<|im_end|>x"


def test_c9_from_python():
    hello = [[{"role": "user", "content": "hello"}]]
    with Engine.open("fake", chat_template_kwargs=OFF, max_model_len=99) as engine:
        [one] = engine.chat(hello, max_tokens=3)
        [two] = engine.chat(hello, chat_template_kwargs={"x": 1}, max_tokens=3)
        assert one.text == two.text
        assert len(engine.prompt_warnings()) == 2
        with pytest.raises(UsageError, match="tokenize"):
            engine.chat(hello, chat_template_kwargs={"tokenize": True})
        with pytest.raises(UsageError, match="chat_template_kwargs") as error:
            engine.chat(hello, chat_template_kwargs=["x"])
        assert "JSON object" in error.value.hint


@pytest.mark.parametrize("text", ["{", "[1]", "1", '{"x": NaN}', "thinking=false", ""])
def test_c9_a_flag_that_is_no_json_object_is_refused(bmx, text):
    Path("in.jsonl").write_text('{"prompt": "x"}\n')
    ended = bmx("run", "in.jsonl", "-m", "fake", "--chat-template-kwargs", text)
    assert ended.code == 2
    assert "JSON object" in ended.err


def test_c9_a_config_file_may_have_a_mapping_and_a_warning_names_what_has_no_effect(bmx):
    Path("in.jsonl").write_text('{"prompt": "x"}\n' * 3)
    Path("c.yaml").write_text("chat_template_kwargs:\n  enable_thinking: false\n")
    ended = bmx("run", "in.jsonl", "-m", "fake", "-o", "out.jsonl", "-c", "c.yaml")
    assert ended.code == 0
    assert ended.err.count("enable_thinking") == 1
    again = bmx(
        "run", "in.jsonl", "-m", "fake", "-o", "out.jsonl", "--chat-template-kwargs", '{"enable_thinking":false}'
    )
    assert (again.code, "nothing to do" in again.err) == (0, True)
    assert bmx("run", "in.jsonl", "-m", "fake", "-o", "out.jsonl").code == 2
    printed = bmx("run", "in.jsonl", "-c", "c.yaml", "--print-config").out
    Path("d.yaml").write_text(printed)
    assert bmx("run", "in.jsonl", "-c", "d.yaml", "--print-config").out == printed


def test_c9_a_run_without_values_has_the_fingerprint_that_it_had():
    config = RunConfig(inputs=("in.jsonl",), engine=EngineConfig(model="fake"))
    given = replace(config, prompt=PromptConfig(chat_template_kwargs=OFF))
    empty = replace(config, prompt=PromptConfig(chat_template_kwargs={}))
    assert fingerprint(config) == fingerprint(empty)
    assert fingerprint(given) == fingerprint(config) | {"chat_template_kwargs": OFF}


# A whole run


@pytest.fixture
def folder(tmp_path):
    """A tiny model of Llama's kind whose template skips roles that it does not know."""
    own = tokenizer(SKIPS)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(own), eos_token_id=own.eos_token_id, **sizes))
    for saved in (model, own):
        saved.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_c4_and_c5_and_c6_and_c9_in_a_run(bmx, folder):
    rows = [
        {"id": "critic", "messages": [{"role": "user", "content": "hello"}, {"role": "critic", "content": "a"}]},
        {"id": "open", "messages": [{"role": "user", "content": "hello"}, {"role": "gpt", "content": "Sure, "}]},
        {"id": "plain", "prompt": "hello"},
        {"id": "rendered", "prompt": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nSure, "},
        {"id": "variables", "prompt": "hello", "chat_template_kwargs": {"enable_thinking": False, "nothing": 1}},
        {
            "custom_id": "raw",
            "url": "/v1/completions",
            "body": {"prompt": "<s><|im_start|>user\nhello", "max_tokens": 3},
        },
    ]
    Path("in.jsonl").write_text("".join(json.dumps({"max_tokens": 3} | row) + "\n" for row in rows))
    ended = bmx("run", "in.jsonl", "-m", folder, "-o", "out.jsonl", "-q")
    assert ended.code == 3
    warned = [line for line in ended.err.splitlines() if "warning" in line]
    assert len(warned) == 2
    assert "2 of 6 prompts" in warned[0]
    assert "'nothing'" in warned[1]
    [failed] = map(json.loads, Path("out.jsonl.errors.jsonl").read_text().splitlines())
    assert (failed["id"], failed["error"]["code"]) == ("critic", "invalid_request")
    records = {record["id"]: record for record in map(json.loads, Path("out.jsonl").read_text().splitlines())}
    prompt = rendered(SKIPS, ("user", "hello"), ("assistant", "Sure, "))
    assert records["open"]["usage"]["prompt_tokens"] == len(
        tokenizer(SKIPS)(prompt, add_special_tokens=False).input_ids
    )
