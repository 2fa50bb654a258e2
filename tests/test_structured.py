"""Answers that must fit a format: JSON of a schema, a regular expression, one of some texts."""

from __future__ import annotations

import json
import re
from functools import cache

import jsonschema
import pytest
import torch
from conftest import answers, watched
from families import random_model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_reasoning import THINKING, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from bmx import Engine, EngineConfig, PromptConfig, Request, SamplingParams
from bmx.engine.allowed_tokens import AllowedTokens
from bmx.engine.backend import ModelBackend
from bmx.engine.grammar import MAX_TEXT, Grammars, check_format
from bmx.engine.sequence import Sequence
from bmx.errors import RowError, UsageError
from bmx.job.answer_formats import own_format, with_gemini_format
from bmx.model.loader import prepare
from bmx.model.prompt_encoder import PromptEncoder
from bmx.run_config import setting_named

MERGES = ["true", "false", '":', '",', "the", "  ", "}]", "12"]
END, ALSO_END = 0, 1
QUICK = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, some longer ones, two that end answers."""
    names = ["<end>", "<also>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in (word.replace(" ", "Ġ") for word in MERGES):
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
                names.append("".join(pair))
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.add_special_tokens({"additional_special_tokens": ["<also>"]})
    return fast


@cache
def model():
    """A random model of that tokenizer, with more logits than it has tokens."""
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()) + 9,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        eos_token_id=[END, ALSO_END],
    )
    return prepare(random_model(AutoModelForCausalLM, config))


def engine(**config) -> Engine:
    config = {"kv_format": "model"} | config
    return Engine(EngineConfig(**config), PromptConfig(chat_template=False), byte_tokenizer(), ModelBackend(model()))


@cache
def evicting() -> Engine:
    """One that keeps 40 pairs, in few bits."""
    return engine(kv_budget=40, kv_recent=8, kv_format="int8/int4", chunk_size=16, max_num_seqs=3)


def request(name: str, prompt: str = "Once upon a time", **params) -> Request:
    return Request(id=name, prompt=prompt, params=SamplingParams(**{"temperature": 1.0, "max_tokens": 160} | params))


def as_text(schema: object) -> str:
    return json.dumps(schema)


def small_schemas() -> st.SearchStrategy[dict]:
    """Schemas whose answers are short, so that random ones end."""
    word = st.sampled_from(["name", "größe", 'a "b"', "x"])
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
            st.integers(-99, 99),
            st.integers(0, 50),
        ),
        st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 6)),
        st.builds(
            lambda words: {"enum": words}, st.lists(word | st.integers(-9, 9), min_size=1, max_size=3, unique=True)
        ),
        st.builds(lambda value: {"const": value}, word | st.booleans()),
        st.just({"type": "string", "pattern": "^[a-c]{1,4}$"}),
    )

    def inside(parts: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
        arrays = st.builds(
            lambda item, least, more: {"type": "array", "items": item, "minItems": least, "maxItems": least + more},
            parts,
            st.integers(0, 2),
            st.integers(0, 1),
        )
        objects = st.dictionaries(word, parts, max_size=3).flatmap(
            lambda named: st.builds(
                lambda needed: {
                    "type": "object",
                    "properties": named,
                    "required": needed,
                    "additionalProperties": False,
                },
                st.lists(st.sampled_from(sorted(named)), unique=True) if named else st.just([]),
            )
        )
        return arrays | objects

    return st.recursive(leaves, inside, max_leaves=4)


def check_fits(result, schema) -> None:
    """An answer that ended parses and fits; one that was cut says so."""
    assert result.error is None
    if result.finish_reason == "stop":
        jsonschema.validate(json.loads(result.text), schema)
    else:
        assert result.finish_reason == "length"
        assert len(result.token_ids) == 160


@QUICK
@given(st.lists(small_schemas(), min_size=2, max_size=3), st.integers(0, 999))
def test_every_finished_answer_parses_and_fits_its_rows_schema_whatever_runs_beside_it(schemas, seed):
    rows = [request(str(i), json_schema=as_text(schema), seed=seed) for i, schema in enumerate(schemas)]
    free = request("free", seed=seed, max_tokens=30)
    results = {result.id: result for result in evicting().run([*rows, free])}
    for i, schema in enumerate(schemas):
        check_fits(results[str(i)], schema)
    assert answers(evicting(), [free]) == {"free": results["free"].token_ids}
    assert answers(evicting(), rows[:1]) == {"0": results["0"].token_ids}


def test_most_random_answers_end_so_that_the_test_above_sees_them():
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, 2]}}, "required": ["a", "b"]}
    schema["additionalProperties"] = False
    rows = [request(str(i), json_schema=as_text(schema)) for i in range(12)]
    results = list(evicting().run(rows))
    assert sum(result.finish_reason == "stop" for result in results) >= 8
    assert len({result.text for result in results}) > 1
    for result in results:
        check_fits(result, schema)


@pytest.mark.parametrize("expression", [r"[0-9]{3}-[0-9]{4}", r"(ja|nein)!{0,2}", r"[^x]{2,5}x"])
def test_an_answer_matches_its_regular_expression_as_a_whole(expression):
    for result in engine().run([request(str(i), guided_regex=expression) for i in range(4)]):
        assert result.finish_reason == "stop"
        assert re.fullmatch(expression, result.text, re.DOTALL)


def test_an_answer_is_one_of_the_choices_letter_by_letter():
    choices = ("yes", "yesterday", 'no "quotes" \\ ', "zwölf\nZeilen")
    results = list(engine().run([request(str(i), guided_choice=choices) for i in range(20)]))
    assert {result.text for result in results} <= set(choices)
    assert len({result.text for result in results}) > 2
    assert {result.finish_reason for result in results} == {"stop"}


def test_i31_an_answer_that_is_cut_says_length():
    [result] = engine().run([request("cut", guided_regex="a{50}", max_tokens=7)])
    assert (result.finish_reason, result.text) == ("length", "aaaaaaa")


def test_a_complete_answer_ends_without_an_end_token_at_its_last_allowed_token_too():
    [result] = engine().run([request("exact", guided_regex="a{7}", max_tokens=7)])
    assert (result.finish_reason, result.text, len(result.token_ids)) == ("stop", "aaaaaaa", 7)


@pytest.mark.parametrize(
    "params", [{"ignore_eos": True}, {"repetition_penalty": 1.5}, {"temperature": 0.0}, {"top_k": 3}]
)
def test_formats_go_with_other_sampling_parameters(params):
    schema = {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 3}
    [result] = engine().run([request("one", json_schema=as_text(schema), **params)])
    check_fits(result, schema)


def test_i30_a_schema_that_is_no_json_is_refused_with_its_place():
    with pytest.raises(UsageError) as refused:
        setting_named("json_schema").coerce('{"type": "object"')
    assert refused.value.message.startswith("json_schema is not JSON")
    assert "line 1 column 18" in refused.value.hint


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"json_schema": '{"type": "nothing"}'}, "json_schema cannot be used: Invalid type: nothing"),
        ({"json_schema": '{"not": {}}'}, 'Unimplemented keys: ["not"]'),
        ({"json_schema": '{"$ref": "http://nowhere.invalid/a"}'}, "json_schema cannot be used"),
        ({"json_schema": as_text({"enum": ["x" * MAX_TEXT]})}, "more than 1,000,000"),
        ({"guided_regex": "(a"}, "guided_regex cannot be used: error: unclosed group"),
    ],
)
def test_i30_a_format_that_cannot_be_compiled_is_that_rows_error_and_of_a_job_it_is_refused_at_once(params, says):
    results = {r.id: r for r in engine().run([request("bad", **params), request("good", guided_regex="a")])}
    assert results["bad"].error.code == "invalid_request"
    assert says in results["bad"].error.message
    assert "\n" not in results["bad"].error.message
    assert results["good"].text == "a"
    with pytest.raises(UsageError) as refused:
        check_format(SamplingParams(**params))
    assert says in refused.value.message


def test_i30_a_choice_that_no_answer_can_spell_is_the_rows_error():
    [result] = engine().run([request("bad", guided_choice=("a", "<end>!"))])
    assert "it holds <end>, a control token of the model" in result.error.message


@pytest.mark.parametrize(
    "schema",
    [{"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}],
)
def test_i30_a_schema_that_no_answer_fits_is_the_rows_error(schema):
    [result] = engine().run([request("a", json_schema=as_text(schema))])
    assert result.error.code == "invalid_request"
    assert "json_schema cannot be used: no token could follow" in result.error.message


@pytest.mark.parametrize("own", [{"whitespace_pattern": "z"}, {"item_separator": ";"}, {"lenient": True}])
def test_a_schema_cannot_say_that_answers_are_no_json(own):
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2, "x-guidance": own}
    results = engine().run([request(str(seed), seed=seed, json_schema=as_text(schema)) for seed in range(3)])
    assert all(len(json.loads(result.text)) == 2 for result in results)


def test_a_tokenizer_that_is_not_known_is_the_rows_error():
    class Strange:
        def __len__(self):
            return 9

    with pytest.raises(RowError, match="cannot be used"):
        Grammars(Strange(), 9, frozenset({END})).of(SamplingParams(guided_regex="a"))


def test_the_allowed_tokens_are_those_that_the_format_takes():
    grammars = Grammars(byte_tokenizer(), model().spec.vocab, frozenset({END, ALSO_END}))
    matcher = grammars.of(SamplingParams(json_schema='{"enum": [true, 12, "the"]}')).begin()
    vocab = model().spec.vocab
    while not matcher.complete:
        logits = torch.randn(3, vocab)
        before = logits.clone()
        AllowedTokens([None, matcher, None]).keep_in(logits)
        taken = [token for token in range(vocab) if matcher.state.deep_copy().consume_token(token)]
        allowed = torch.isfinite(logits[1]).nonzero().flatten().tolist()
        assert allowed == taken
        assert torch.equal(logits[1, taken], before[1, taken])
        assert torch.equal(logits[::2], before[::2])
        matcher.accept(taken[-1])


def test_a_tokenizer_may_know_more_tokens_than_the_model_has_logits():
    vocab = len(byte_tokenizer()) - 40
    matcher = Grammars(byte_tokenizer(), vocab, frozenset({END})).of(SamplingParams(guided_regex="[ab]")).begin()
    logits = torch.zeros(1, vocab)
    AllowedTokens([matcher]).keep_in(logits)
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == byte_tokenizer()("ab")["input_ids"]


def test_either_end_token_ends_a_complete_answer():
    grammars = Grammars(byte_tokenizer(), model().spec.vocab, frozenset({END, ALSO_END}))
    matcher = grammars.of(SamplingParams(guided_regex="a?")).begin()
    logits = torch.zeros(1, model().spec.vocab)
    AllowedTokens([matcher]).keep_in(logits)
    allowed = torch.isfinite(logits[0]).nonzero().flatten().tolist()
    assert allowed == sorted([END, ALSO_END, *byte_tokenizer()("a")["input_ids"]])


def test_masks_are_found_while_the_model_computes(monkeypatch):
    asked = []
    compute = AllowedTokens.__init__

    def noted(self, rows):
        asked.append("masks")
        compute(self, rows)

    monkeypatch.setattr(AllowedTokens, "__init__", noted)
    hook = model().model.register_forward_pre_hook(lambda *_: asked.append("forward"))
    try:
        list(engine().run([request("one", guided_regex="a{3}")]))
    finally:
        hook.remove()
    assert asked[-6:] == ["masks", "forward"] * 3  # before them, the largest step is measured


def test_an_answer_begins_anew_with_its_format_when_memory_runs_out():
    failed = []

    def fail_once(runner, step):
        if len(step.chunks[0].sequence.answer) == 3 and not failed:
            failed.append(True)
            raise MemoryError

    rows = [request(str(i), guided_regex="[ab]{9}") for i in range(3)]
    undisturbed = answers(engine(), rows)
    assert answers(watched(engine(), before=fail_once), rows) == undisturbed
    assert failed


def test_a_forced_answer_fits_no_format():
    forced = tuple(byte_tokenizer()("xyz")["input_ids"])
    [result] = engine().run([request("one", guided_regex="a{3}", max_tokens=3)], forced={"one": forced})
    assert result.text == "xyz"


def test_a_python_schema_is_a_mapping_or_text():
    schema = {"type": "boolean"}
    texts = [engine().generate(["x"], json_schema=form, seed=1)[0].text for form in (schema, as_text(schema))]
    assert texts[0] == texts[1] in ("true", "false")
    with pytest.raises(UsageError, match="an answer has one format: json_schema and guided_regex contradict"):
        engine().generate(["x"], json_schema=schema, guided_regex="a")


def test_i31_the_format_begins_behind_the_reasoning_that_the_prompt_left_open():
    own = tokenizer(THINKING, ("<think>", "</think>"))
    encoder, asked = PromptEncoder(own, PromptConfig()), request("one", guided_choice=("yes", "no"))
    prompt, ends, vocab = encoder.encode(asked), (own.eos_token_id,), len(own)
    grammar = Grammars(own, vocab, frozenset(ends)).of(asked.params)
    sequence = Sequence(
        request=asked,
        prompt=prompt,
        max_tokens=99,
        rows_needed=1,
        end_token_ids=frozenset(ends),
        tokenizer=own,
        grammar=grammar,
        reasoning=encoder.reasoning(asked, prompt),
    )

    def allowed() -> list[int]:
        logits = torch.zeros(1, vocab)
        AllowedTokens([sequence.allowed]).keep_in(logits)
        return torch.isfinite(logits[0]).nonzero().flatten().tolist()

    for token in own("fire is hot</think>", add_special_tokens=False)["input_ids"]:
        assert allowed() == [i for i in range(vocab) if i not in ends]
        sequence.accept(token)
    assert {own.decode([i]) for i in allowed()} <= {"y", "ye", "yes", "n", "no"}
    for token in own("yes", add_special_tokens=False)["input_ids"]:
        sequence.accept(token)
    result = sequence.result(budget=99)
    assert (result.reasoning, result.text, result.finish_reason) == ("fire is hot", "yes", "stop")
    assert sequence.restarted().allowed == ends
    off = Request(id="two", prompt="x", params=asked.params, chat_template_kwargs={"enable_thinking": False})
    assert not encoder.reasoning(off, encoder.encode(off)).open


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
COMPACT = '{"type":"object","properties":{"a":{"type":"integer"}}}'


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, {}),
        ({"response_format": None}, {}),
        ({"response_format": {"type": "text"}}, {"json_schema": None}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": '{"type":"object"}'}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            {"json_schema": COMPACT},
        ),
        ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, {"json_schema": COMPACT}),
        ({"guided_json": SCHEMA}, {"json_schema": COMPACT}),
        ({"guided_json": as_text(SCHEMA)}, {"json_schema": COMPACT}),
        ({"structured_outputs": {"json": SCHEMA, "backend": None}}, {"json_schema": COMPACT}),
        ({"structured_outputs": {"json_object": True}}, {"json_schema": '{"type":"object"}'}),
        ({"structured_outputs": {"regex": "a+", "disable_fallback": True}}, {"guided_regex": "a+"}),
        ({"structured_outputs": {"choice": ["a"], "disable_any_whitespace": False}}, {"guided_choice": ["a"]}),
        ({"guided_regex": "a+"}, {"guided_regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"guided_choice": ["a", "b"]}),
    ],
)
def test_a_format_is_read_under_every_name_that_programs_give_it(fields, found):
    none = {"json_schema": None, "guided_regex": None, "guided_choice": ()} if found else {}
    assert own_format(fields) == none | found


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"response_format": {"type": "xml"}}, "'response_format' must be an object of type text, json_object or"),
        ({"response_format": "json"}, "'response_format' must be an object"),
        ({"response_format": {"type": "json_schema"}}, "has no 'schema'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}}, "must hold a JSON schema"),
        ({"guided_json": "/etc/passwd"}, "must hold a JSON schema"),
        ({"guided_json": True}, "must hold a JSON schema"),
        ({"guided_regex": 5}, "must be a regular expression"),
        ({"guided_choice": "yes"}, "must be a list of texts"),
        ({"guided_choice": []}, "must be a list of texts"),
        ({"structured_outputs": {"grammar": "x"}}, "unsupported in 'structured_outputs': grammar"),
        ({"structured_outputs": {"json": {}, "disable_additional_properties": True}}, "disable_additional_properties"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "an answer has one format"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_json and guided_regex contradict each other"),
    ],
)
def test_a_format_that_is_not_one_is_the_rows_error(fields, says):
    with pytest.raises(RowError, match=re.escape(says)):
        own_format(fields)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"response_mime_type": "text/plain"}, {}),
        ({"response_mime_type": "application/json"}, {"guided_json": {"type": "object"}}),
        ({"response_mime_type": "application/json", "guided_json": SCHEMA}, {"guided_json": SCHEMA}),
        (
            {
                "response_schema": {
                    "type": "OBJECT",
                    "properties": {"type": {"type": "STRING", "nullable": True, "enum": ["STRING"]}},
                    "propertyOrdering": ["type"],
                }
            },
            {
                "guided_json": {
                    "type": "object",
                    "properties": {"type": {"type": ["string", "null"], "enum": ["STRING"]}},
                }
            },
        ),
    ],
)
def test_geminis_schemas_are_those_of_json(config, found):
    assert with_gemini_format(config) == found
    with pytest.raises(RowError, match="responseMimeType text/x-enum"):
        with_gemini_format({"response_mime_type": "text/x-enum"})
