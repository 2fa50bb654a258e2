"""bmx from Python: settings by name, plain texts and messages in, results in order out, and clear errors."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
from conftest import answers, as_requests, random_prompts, tiny_engine, words
from families import tiny_model

import bmx
from bmx import Engine, EngineConfig, PromptConfig, Request, SamplingParams, UsageError
from bmx.errors import ModelError

PROMPTS = random_prompts((5, 30, 12))


@pytest.fixture
def fake():
    with Engine.open("fake") as engine:
        yield engine


# ---- settings ----


def test_settings_are_keywords_as_on_the_command_line():
    engine = Engine.open("fake", kv_budget="2k", memory_limit="4G", chunk_size=64, system_prompt="Be brief.")
    assert (engine.config.kv_budget, engine.config.memory_limit, engine.config.chunk_size) == (2000, 4 * 10**9, 64)
    prompt = "What is it?"
    plain = Engine.open("fake")
    assert len(engine.encode(Request(id=0, prompt=prompt))) == len(plain.encode(Request(id=0, prompt=prompt))) + 2


def test_e_a_model_may_lie_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    with pytest.raises(ModelError, match="/home/somebody/no-such-model"):
        Engine.open("~/no-such-model")


def test_what_auto_stands_for_is_decided_by_all_keywords_together():
    assert Engine.open("fake").config.kv_format == "int8/int4"
    assert Engine.open("fake", kv_policy="none").config.kv_format == "model"


def test_keywords_replace_what_a_config_says():
    config = EngineConfig(model="fake", kv_budget=300, kv_sink=2)
    engine = Engine.open(config, PromptConfig(chat_template=False), kv_budget=400)
    assert (engine.config.kv_budget, engine.config.kv_sink) == (400, 2)


@pytest.mark.parametrize(
    ("keywords", "says", "hint"),
    [
        ({"kv_buget": 512}, "unknown setting 'kv_buget'", "did you mean 'kv_budget'?"),
        ({"kv_budget": "much"}, "kv_budget cannot be 'much'", "a count like 1024"),
        ({"kv_budget": 8}, "kv_budget 8 leaves no room", None),
        ({"kv_policy": "newest"}, "kv_policy cannot be 'newest'", "average-attention"),
        ({"chat_template": "no"}, "chat_template cannot be 'no'", "true or false"),
        ({"gpu_memory_utilization": 2}, "gpu_memory_utilization", None),
        ({"max_tokens": 9}, "max_tokens belongs to a call", "engine.generate(prompts, max_tokens=9)"),
        ({"output_file": "x"}, "unknown setting 'output_file'", None),
        ({"kv_budget": "auto"}, "kv_budget auto is for runs of the command line", "give a number"),
        ({"dtype": object()}, "dtype cannot be of type object", "bfloat16"),
        ({"prompt_template": "Sum up: {document}"}, "prompts from Python are whole", "fill it yourself"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(keywords, says, hint):
    with pytest.raises(UsageError) as raised:
        Engine.open("fake", **keywords)
    assert says in raised.value.message
    assert hint is None or hint in raised.value.hint


@pytest.mark.parametrize("arguments", [(5,), (None,), ({"model": "fake"},), ("fake", "prompt")])
def test_an_engine_is_opened_by_a_name_or_a_config(arguments):
    with pytest.raises(UsageError, match="a model's name or an EngineConfig"):
        Engine.open(*arguments)


# ---- texts and messages ----


def test_results_come_in_the_order_of_the_texts():
    texts = [words(prompt) for prompt in PROMPTS]
    engine = tiny_engine("llama", kv_budget=24, kv_sink=2, kv_recent=4, max_num_seqs=2)
    results = engine.generate(texts, max_tokens=6)
    expected = answers(engine, as_requests(PROMPTS, max_tokens=6))
    assert [result.token_ids for result in results] == [expected[str(i)] for i in range(len(PROMPTS))]
    assert [result.usage.prompt_tokens for result in results] == [5, 30, 12]


def test_any_iterable_of_texts_is_accepted(fake):
    texts = ["one two", "three", "four five six"]
    expected = fake.generate(texts)
    assert fake.generate(iter(texts)) == fake.generate(tuple(texts)) == expected
    assert fake.generate([]) == []


def test_conversations_are_put_into_the_chat_template(fake):
    hello = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    results = fake.chat([hello, hello[1:]], max_tokens=5)
    assert [result.usage.prompt_tokens for result in results] == [3, 1]
    assert all(result.text for result in results)


def test_sampling_parameters_belong_to_the_call(fake):
    long, short = (fake.generate(["a b"], max_tokens=most, ignore_eos=True)[0] for most in (9, 4))
    assert len(long.token_ids) == 9
    assert long.token_ids[:4] == short.token_ids
    assert fake.generate(["a b"], max_tokens="4", ignore_eos=True)[0] == short


def test_requests_have_ids_and_parameters_of_their_own(fake):
    requests = [
        Request(id=name, prompt="a b", params=SamplingParams(max_tokens=most, ignore_eos=True))
        for name, most in (("long", 9), ("short", 4))
    ]
    results = fake.stream(requests)
    assert [(result.id, len(result.token_ids)) for result in results] == [("short", 4), ("long", 9)]


def test_a_text_that_cannot_be_answered_is_an_error_among_the_others():
    engine = tiny_engine("llama", kv_policy="none")
    first, empty, last = engine.generate([words(PROMPTS[0]), "", words(PROMPTS[2])], max_tokens=3)
    assert empty.error.code == "invalid_request"
    assert first.error is last.error is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda engine: engine.generate("one text"), "a list of texts is needed, not str"),
        (lambda engine: engine.generate(None), "a list of texts is needed, not None"),
        (lambda engine: engine.generate(5), "a list of texts is needed, not int"),
        (lambda engine: engine.generate(["a", 5]), "item 1 must be a text, not int"),
        (lambda engine: engine.generate([Request(id=1, prompt="a")]), "item 0 must be a text, not Request"),
        (lambda engine: engine.generate(["a"], max_token=5), "unknown setting 'max_token'"),
        (lambda engine: engine.generate(["a"], max_tokens=0), "max_tokens is out of range: 0"),
        (lambda engine: engine.generate(["a"], temperature="hot"), "temperature cannot be 'hot'"),
        (lambda engine: engine.generate(["a"], kv_budget=9), "unknown setting 'kv_budget'"),
        (lambda engine: engine.chat({"role": "user"}), "a list of conversations is needed, not dict"),
        (lambda engine: engine.chat([{"role": "user", "content": "a"}]), "item 0 must be a list of messages"),
        (lambda engine: engine.chat(["Hello"]), "a list of messages is needed, not str"),
        (lambda engine: engine.chat([[]]), "item 0 has no messages"),
        (lambda engine: engine.chat([[{"role": "user"}]]), "item 0 has a message without a role and a content"),
        (lambda engine: engine.chat([["Hello"]]), "item 0 has a message without a role and a content"),
        (lambda engine: engine.stream(["a"]), "item 0 must be a Request, not str"),
        (lambda engine: engine.stream("a"), "a list of requests is needed, not str"),
        (lambda engine: engine.stream(Request(id=1)), "a list of requests is needed, not Request"),
        (lambda engine: Request(id=1, prompt=5), "a request's prompt must be text, not int"),
        (lambda engine: Request(id=1, messages="a"), "a request's messages must be dicts"),
        (lambda engine: Request(id=None, prompt="a"), "a request's id must be text or a whole number, not NoneType"),
        (lambda engine: Request(id=1, prompt="a", params={"top_k": 5}), "params must be SamplingParams, not dict"),
        (lambda engine: Request(id=1, prompt="a", messages=({"role": "user", "content": "b"},)), "not both"),
        (lambda engine: SamplingParams(max_tokens="5"), "max_tokens must be int, not '5'"),
        (lambda engine: SamplingParams(max_tokens=True), "max_tokens must be int, not True"),
        (lambda engine: SamplingParams(stop=5), "stop cannot be 5"),
        (lambda engine: SamplingParams(stop=["a", 5]), "stop cannot be"),
        (lambda engine: SamplingParams(max_tokens=5.5), "max_tokens must be int, not 5.5"),
        (lambda engine: EngineConfig(kv_sink="4"), "kv_sink must be int, not '4'"),
        (lambda engine: EngineConfig(memory_limit="8G"), "memory_limit must be int or None, not '8G'"),
        (lambda engine: EngineConfig(kv_budget="512"), "kv_budget must be a whole number or a share, not '512'"),
        (lambda engine: EngineConfig(kv_budget=5.5), "kv_budget must be a whole number or a share, not 5.5"),
        (lambda engine: PromptConfig(system_prompt=5), "system_prompt must be str or None, not 5"),
    ],
)
def test_a_wrong_type_is_a_clear_error(fake, call, says):
    with pytest.raises(UsageError) as raised:
        call(fake)
    assert says in raised.value.message
    assert len(fake.generate(["a"])) == 1  # the engine is of use all the same


def test_c11_one_stop_string_and_whole_numbers_may_be_written_as_such(fake):
    plain = SamplingParams(max_tokens=5, stop=("THE END",), stop_token_ids=(7,), top_k=0, seed=3)
    short = SamplingParams(max_tokens=5.0, stop="THE END", stop_token_ids=7, top_k=-1, seed=3.0)
    assert short == plain
    assert [type(value) for value in (short.max_tokens, short.seed)] == [int, int]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")

    whole = fake.generate(["w1 w2"], max_tokens=40, ignore_eos=True)[0].text
    word = whole.split()[3]
    [cut] = fake.generate(["w1 w2"], max_tokens=40.0, ignore_eos=True, stop=word, top_k=-1)
    assert cut.text == whole[: whole.index(word)]


def test_results_are_copied_and_pickled_with_their_errors():
    engine = tiny_engine("llama", kv_policy="none")
    answer, failed = engine.generate([words(PROMPTS[0]), ""], max_tokens=3)
    pickled = pickle.loads(pickle.dumps([answer, failed]))  # noqa: S301 - its own
    for again in (pickled, copy.deepcopy([answer, failed])):
        assert again[0] == answer
        assert (again[1].id, again[1].error.code, again[1].error.message) == (1, "invalid_request", str(failed.error))


def test_a_model_may_be_a_path():
    with pytest.raises(ModelError, match="no such model folder: /nowhere"):
        Engine.open(Path("/nowhere"))


def test_wrong_values_are_usage_errors():
    for wrong in (lambda: SamplingParams(max_tokens=0), lambda: EngineConfig(kv_sink=-1)):
        with pytest.raises(UsageError):
            wrong()


# ---- the end ----


def test_a_closed_engine_frees_its_model_and_says_so_when_it_is_used():
    with tiny_engine(tiny_model("llama"), kv_policy="none") as engine:
        assert engine.generate([words(PROMPTS[0])], max_tokens=2)[0].error is None
        model = weakref.ref(engine.backend.model)
    gc.collect()
    assert model() is None
    request = Request(id=1, prompt="w5")
    for use in (
        lambda: engine.generate(["w5"]),
        lambda: engine.chat([[{"role": "user", "content": "w5"}]]),
        lambda: list(engine.stream([request])),
        lambda: engine.encode(request),
        lambda: engine.measure([request]),
        lambda: engine.plan([]),
        lambda: engine.with_config(engine.config),
        engine.describe,
    ):
        with pytest.raises(UsageError, match="this engine is closed"):
            use()
    for use in (lambda: engine.stream([request]), lambda: engine.generate([]), engine.__enter__):
        with pytest.raises(UsageError, match="this engine is closed"):
            use()  # at once, not only when a first result is wanted
    engine.close()  # once more does no harm


def test_a_stream_outlives_its_closed_engine_and_frees_the_model_when_it_ends():
    requests = as_requests(PROMPTS, max_tokens=4)
    engine = tiny_engine(tiny_model("llama"), kv_policy="none", max_num_seqs=1)
    model = weakref.ref(engine.backend.model)
    stream = engine.stream(requests)
    first = next(stream)
    engine.close()
    assert len([first, *stream]) == len(requests)
    gc.collect()
    assert model() is None


def test_two_engines_answer_at_once_and_one_engine_refuses_a_second_stream():
    requests = as_requests(PROMPTS, max_tokens=4)
    first, second = (tiny_engine(tiny_model("llama"), kv_policy="none", max_num_seqs=1) for _ in range(2))
    pairs = list(zip(first.stream(requests), second.stream(requests), strict=True))
    assert [a.token_ids for a, _ in pairs] == [b.token_ids for _, b in pairs]
    stream = first.stream(requests)
    next(stream)
    with pytest.raises(UsageError, match="answering other requests"):
        first.generate(["w5"])
    stream.close()
    assert first.generate(["w5"], max_tokens=1)[0].error is None


def test_an_engine_with_the_same_model_keeps_it():
    with tiny_engine("llama", kv_policy="none") as engine:
        other = engine.with_config(engine.config)
    assert other.generate([words(PROMPTS[0])], max_tokens=2)[0].error is None


# ---- the package ----


def test_the_package_shows_its_public_names():
    assert set(bmx.__all__) <= set(dir(bmx))
    assert all(getattr(bmx, name) for name in dir(bmx))
    with pytest.raises(AttributeError, match="no attribute 'Engines'"):
        _ = bmx.Engines
