"""Where a chat template marks reasoning, an answer is told apart into reasoning and text; others are left alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_prompt_encoder import byte_level_tokenizer
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from bmx import Engine, PromptConfig, Request, SamplingParams
from bmx.engine.sequence import Sequence
from bmx.job.output_records import as_record
from bmx.model.prompt_encoder import PromptEncoder
from bmx.request import Result, Usage

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKING = (  # as Qwen 3.5: thinking is open unless it is turned off
    TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}"
)
GPT_OSS = TURNS + OPENING + "{# <|channel|>analysis<|message|> <|end|> <|channel|>final<|message|> #}"
ANALYSIS = "<|channel|>analysis<|message|>"
PARIS = "<|channel|>final<|message|>Paris."


@cache
def tokenizer(template: str, marks: tuple[str, ...] = (), *, special: bool = False) -> Any:
    """A byte-level tokenizer in which each of these marks is one token."""
    own = byte_level_tokenizer(template)
    own.add_tokens([AddedToken(mark, normalized=False, special=special) for mark in marks], special_tokens=special)
    return own


def marked(begin: str, end: str) -> str:
    """A template that knows these marks, and leaves it to the model to write them."""
    return TURNS.replace("m.content", f"m.content.split('{end}')[-1]") + OPENING + f"{{# {begin} #}}"


KINDS = {
    "tokens that are text": (tokenizer(marked("<think>", "</think>"), ("<think>", "</think>")), "<think>", "</think>"),
    "special tokens": (
        tokenizer(marked("[THINK]", "[/THINK]"), ("[THINK]", "[/THINK]"), special=True),
        "[THINK]",
        "[/THINK]",
    ),
    "plain text": (tokenizer(marked("<seed:think>", "</seed:think>")), "<seed:think>", "</seed:think>"),
    "a channel": (
        tokenizer(marked("<|channel>", "<channel|>"), ("<|channel>", "<channel|>"), special=True),
        "<|channel>thought\n",
        "<channel|>",
    ),
}
OSS = tokenizer(GPT_OSS, ("<|channel|>", "<|message|>", "<|end|>", "<|start|>"), special=True)
EVERY_KIND = pytest.mark.parametrize(("own", "begin", "end"), KINDS.values(), ids=KINDS)


def said(own: Any, text: str, stop: tuple[str, ...] = (), **request: Any) -> tuple[str | None, str]:
    """Reasoning and text of an answer in which the model says this text."""
    params = SamplingParams(stop=stop)
    asked = Request(id="a", params=params, **({"prompt": "which city?"} | request))
    encoder = PromptEncoder(own, PromptConfig())
    prompt = encoder.encode(asked)
    ids = own(text, add_special_tokens=False)["input_ids"]
    sequence = Sequence(
        request=asked,
        prompt=prompt,
        max_tokens=len(ids),
        rows_needed=1,
        end_token_ids=frozenset([own.eos_token_id]),
        tokenizer=own,
        reasoning=encoder.reasoning(asked, prompt),
    )
    for token in ids:
        if not sequence.finish_reason:
            sequence.accept(token)
    result = sequence.result(budget=8)
    return result.reasoning, result.text


@EVERY_KIND
def test_reasoning_is_told_from_the_text(own, begin, end):
    assert said(own, f"{begin}\nFrance, so\n\nParis\n{end}\n\n It is Paris.\n") == (
        "France, so\n\nParis",
        "It is Paris.\n",
    )
    assert said(own, f"\n{begin}hm{end}Paris<|im_end|>") == ("hm", "Paris")
    assert said(own, f"{begin}hm{end}Paris", prompt=None, messages=({"role": "user", "content": "?"},)) == (
        "hm",
        "Paris",
    )


@EVERY_KIND
def test_reasoning_that_does_not_end_is_all_of_the_answer(own, begin, end):
    assert said(own, f"{begin}let me see") == ("let me see", "")
    assert said(own, f"{begin}let me see<|im_end|>") == ("let me see", "")


@EVERY_KIND
def test_an_answer_without_reasoning_is_all_text(own, begin, end):
    for text in (" It is Paris.\n", f"It is {begin.strip('<>[]|◁▷')} Paris.", ""):
        assert said(own, text) == (None, text)
    assert said(own, f"{begin}\n\n{end}\n\nParis") == (None, "Paris")


def test_a_mark_in_the_middle_of_an_answer_begins_no_reasoning():
    own, *_ = KINDS["tokens that are text"]
    text = "The tag that begins it is <think>, and </think> ends it, as you see in all of their answers."
    assert said(own, text) == (None, text)


@EVERY_KIND
def test_a_prompt_that_is_continued_as_it_stands_is_never_split(own, begin, end):
    reasoning, text = said(own, f"{begin}hm{end}Paris", raw=True)
    assert reasoning is None
    assert text.endswith("Paris")
    assert "hm" in text


@EVERY_KIND
def test_a_stop_string_ends_reasoning_as_it_ends_text(own, begin, end):
    assert said(own, f"{begin}one, two{end}\nthree, four", stop=(", f",)) == ("one, two", "three")
    assert said(own, f"{begin}one, two{end}three, four", stop=(", t",)) == ("one", "")
    assert said(own, "three, four", stop=(", f",)) == (None, "three")


def test_a_stop_string_takes_special_tokens_out_of_the_text_only_as_before():
    own, *_ = KINDS["special tokens"]
    assert said(own, "[THINK]one[/THINK]tw<|im_start|>o, three", stop=(", t",)) == ("one", "two")


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ()], ids=["tokens", "plain text"])
def test_a_prompt_may_leave_reasoning_open_or_close_it(marks):
    own = tokenizer(THINKING, marks)
    assert said(own, "hm, France\n</think>\n\nParis") == ("hm, France", "Paris")
    assert said(own, "hm, France") == ("hm, France", "")
    assert said(own, "<think>hm</think>Paris") == ("hm", "Paris")
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert said(own, "hm, France", **off) == (None, "hm, France")
    encoder = PromptEncoder(own, PromptConfig())
    for request, is_open in ((Request(id=0, prompt="x"), True), (Request(id=0, prompt="x", **off), False)):
        marks_of = encoder.reasoning(request, encoder.encode(request))
        assert marks_of.open == is_open
        assert own.decode(marks_of.end_ids[0]) == "</think>"


def test_an_assistants_last_message_may_leave_reasoning_open():
    own = tokenizer(TURNS + OPENING + "{# </think> #}", ("<think>", "</think>"))
    asked = {"role": "user", "content": "which city?"}
    for begun, expected in (
        ("<think>Let me see:", ("hm", "Paris")),
        ("<think>no</think>It", (None, "hm</think>Paris")),
        ("It", (None, "hm</think>Paris")),
    ):
        messages = (asked, {"role": "assistant", "content": begun})
        assert said(own, "hm</think>Paris", prompt=None, messages=messages) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{ANALYSIS}hm<|end|><|start|>assistant{PARIS}", ("hm", "Paris.")),
        (
            f"{ANALYSIS}hm<|end|><|start|>assistant{ANALYSIS}so<|end|><|start|>assistant{PARIS}",
            ("hm\nso", "Paris."),
        ),
        (f"{ANALYSIS}hm", ("hm", "")),
        (PARIS, (None, "Paris.")),
        ("Paris.", (None, "Paris.")),
    ],
)
def test_channels_are_reasoning_and_text(text, expected):
    assert said(OSS, text) == expected
    assert said(OSS, f"{text}, and", stop=(", and",)) == expected


RESULT = Result(
    id="a",
    text="Paris",
    reasoning="hm",
    finish_reason="stop",
    usage=Usage(prompt_tokens=1, completion_tokens=2),
)


def test_records_of_every_kind_hold_the_reasoning_beside_the_text():
    def record(dialect: Any, result: Result = RESULT) -> dict[str, Any]:
        return as_record(result, "0" * 16, dialect)

    plain, none = record("plain"), record("plain", Result(id="a", text="Paris"))
    assert (plain["text"], plain["reasoning"]) == ("Paris", "hm")
    assert "reasoning" not in none
    message = record("chat.completion")["response"]["body"]["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Paris", "reasoning": "hm"}
    thought, text = record("anthropic")["result"]["message"]["content"]
    assert (thought["type"], thought["thinking"], text) == ("thinking", "hm", {"type": "text", "text": "Paris"})
    parts = record("gemini")["response"]["candidates"][0]["content"]["parts"]
    assert parts == [{"text": "hm", "thought": True}, {"text": "Paris"}]


def thinking_model(folder: Path) -> Any:
    """A folder with a tiny random model whose template opens reasoning; returns its tokenizer."""
    own = tokenizer(THINKING, ("<think>", "</think>"))
    config = LlamaConfig(
        vocab_size=len(own),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=own.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    own.save_pretrained(folder)
    return own


def test_a_run_splits_the_answers_of_a_model_that_thinks(tmp_path):
    own = thinking_model(tmp_path)
    forced = tuple(own("hm, France</think>\n\nParis<|im_end|>", add_special_tokens=False)["input_ids"])
    off = {"enable_thinking": False}
    requests = [Request(id=0, prompt="city?"), Request(id=1, prompt="city?", chat_template_kwargs=off)]
    with Engine.open(str(tmp_path), dtype="float32", memory_limit="8G") as engine:
        answers = {0: forced, 1: forced[-6:]}
        results = {result.id: result for result in engine.run(requests, forced=answers)}
        assert (results[0].reasoning, results[0].text) == ("hm, France", "Paris")
        assert (results[1].reasoning, results[1].text) == (None, "Paris")
        assert results[0].usage.completion_tokens == len(forced)
        [unfinished] = engine.chat([[{"role": "user", "content": "city?"}]], max_tokens=3, ignore_eos=True)
        assert (unfinished.text, unfinished.finish_reason) == ("", "length")
