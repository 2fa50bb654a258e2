"""Sampling: the distributions are those of transformers' own processors, and a row's token is its own affair."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import answers, as_requests, random_prompts, tiny_engine, words
from families import tiny_model
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bmx import Request, SamplingParams
from bmx.engine.sampler import NO_TOKEN, SamplingRow, sample
from bmx.kernels.drawing import draw

VOCAB = 24
SEEN = (3, 3, 7, 11, 20)
GRID = 4000  # draws, evenly spread over [0, 1)


def normal(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def reference(logits: torch.Tensor, params: SamplingParams, seen=SEEN) -> torch.Tensor:
    """Probabilities [V] that `generate` samples from, by its own processors in its own order."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature not in (0, 1):
        chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    return torch.softmax(chain(torch.tensor([seen]), logits.float()[None])[0], dim=-1)


def tokens(logits, rows):
    """The next token of each row; None where there is none."""
    return [None if token == NO_TOKEN else token for token in sample(logits, rows, draw).tolist()]


def frequencies(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Share [V] of an even grid of draws that each token gets."""
    rows = [SamplingRow(params, (i + 0.5) / GRID, SEEN) for i in range(GRID)]
    ids = tokens(logits.repeat(GRID, 1), rows)
    return torch.bincount(torch.tensor(ids), minlength=len(logits)) / GRID


def assert_distribution(logits: torch.Tensor, **params) -> None:
    params = SamplingParams(**params)
    expected = reference(logits, params)
    actual = frequencies(logits, params)
    assert set(actual.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1.5 / GRID)


SETTINGS = {
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 2.0},
    "cold": {"temperature": 0.2},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_k of one": {"temperature": 1.5, "top_k": 1},
    "top_k beyond the vocabulary": {"temperature": 1.0, "top_k": 1000},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
    "top_p of almost nothing": {"temperature": 1.0, "top_p": 1e-6},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "min_p of one": {"temperature": 1.0, "min_p": 1.0},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.3},
    "reward": {"temperature": 1.0, "repetition_penalty": 0.6},
    "top_k, then top_p of what is left": {"temperature": 1.3, "top_k": 6, "top_p": 0.8},
    "top_p, then min_p of what is left": {"temperature": 2.0, "top_p": 0.9, "min_p": 0.15},
    "everything": {"temperature": 1.7, "top_k": 9, "top_p": 0.85, "min_p": 0.05, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize(("seed", "params"), list(enumerate(SETTINGS.values())), ids=SETTINGS)
def test_draws_are_distributed_as_transformers_says(seed, params):
    assert_distribution(normal(VOCAB, seed=seed), **params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_sampled_in_float32(dtype):
    assert_distribution(normal(VOCAB, seed=5).to(dtype), temperature=1.4, top_p=0.9, min_p=0.02)


def test_forbidden_tokens_are_never_drawn():
    logits = normal(VOCAB)
    logits[[0, 5, 6]] = -math.inf
    assert_distribution(logits, temperature=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("penalty", [1.1, 0.8, 1.7])
def test_a_penalised_greedy_token_is_that_of_transformers(dtype, penalty):
    """transformers penalises in float32; rounding a penalised bfloat16 logit would tie it with its neighbours."""
    logits = normal(400, VOCAB, seed=1, scale=1.5).to(dtype)
    params = SamplingParams(repetition_penalty=penalty)
    expected = [reference(row, params).argmax().item() for row in logits]
    assert tokens(logits.clone(), [SamplingRow(params, seen=SEEN)] * 400) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_is_the_largest_of_the_models_own_logits(dtype):
    logits = normal(100, 5000).to(dtype)
    actual = tokens(logits.clone(), [SamplingRow(SamplingParams())] * 100)
    assert actual == logits.argmax(-1).tolist()


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-24, 1 - 2**-53], ids=["0", "half", "near one", "nearest to one"])
@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.4}], ids=str)
def test_no_draw_picks_what_was_filtered_out(params, draw):
    """Two tokens stay; the others are nearly as likely. random() does return the largest number below one."""
    logits = torch.full((VOCAB,), -1.0)
    logits[4], logits[9] = 3.0, 3.5
    assert tokens(logits[None], [SamplingRow(SamplingParams(temperature=1.0, **params), draw)])[0] in {4, 9}


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-50])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = normal(50, VOCAB, scale=2.0)
    logits[:, 0] = 0.0
    actual = tokens(logits.clone(), [SamplingRow(SamplingParams(temperature=temperature), 0.3)] * 50)
    assert actual == logits.argmax(-1).tolist()


BAD = {"nan": math.nan, "infinity": math.inf, "nothing allowed": -math.inf}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}], ids=str)
def test_logits_that_are_no_numbers_give_no_token_and_leave_the_others_alone(kind, params):
    logits = normal(5, VOCAB)
    rows = [SamplingRow(SamplingParams(**params), 0.1 + 0.2 * i) for i in range(5)]
    expected = tokens(logits.clone(), rows)
    if kind == "nothing allowed":
        logits[2] = BAD[kind]
    else:
        logits[2, 13] = BAD[kind]
    expected[2] = None
    assert tokens(logits, rows) == expected


def mixed_rows(number: int) -> list[SamplingRow]:
    """Rows of all kinds, each with a draw of its own."""
    kinds = [SamplingParams(), *(SamplingParams(**params) for params in SETTINGS.values())]
    draws = torch.rand(number, generator=torch.Generator().manual_seed(9)).tolist()
    return [SamplingRow(kinds[i % len(kinds)], draws[i], SEEN) for i in range(number)]


def test_a_rows_token_depends_on_that_row_alone():
    """Two hundred rows: more than are sampled at a time. Alone, permuted or in part, each gives the same token."""
    logits, rows = normal(200, VOCAB), mixed_rows(200)
    together = tokens(logits.clone(), rows)
    assert together == [tokens(logits[[i]], [rows[i]])[0] for i in range(200)]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(4)).tolist()
    assert tokens(logits[order], [rows[i] for i in order]) == [together[i] for i in order]
    some = list(range(30, 130))
    assert tokens(logits[some], [rows[i] for i in some]) == together[30:130]


def test_no_rows_are_no_tokens():
    assert tokens(torch.empty(0, VOCAB), []) == []


# ---- through an engine ----

PROMPTS = random_prompts((5, 12, 9, 20, 3, 14, 7, 30), seed=3)
HOT = {"temperature": 1.0, "max_tokens": 10}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def ask(model, requests, **config):
    return answers(tiny_engine(model, **config), requests)


@pytest.mark.parametrize("config", [{"max_num_seqs": 3}, {"chunk_size": 4}, {"max_num_seqs": 1}], ids=str)
def test_the_same_seed_gives_the_same_answers_in_any_company_and_order(llama, config):
    requests = as_requests(PROMPTS, **HOT)
    together = ask(llama, requests)
    if "chunk_size" not in config:
        alone = {}
        for request in requests:
            alone |= ask(llama, [request])
        assert alone == together
    assert ask(llama, requests[::-1], **config) == together


def test_another_seed_gives_other_answers(llama):
    first = ask(llama, as_requests(PROMPTS, seed=1, **HOT))
    second = ask(llama, as_requests(PROMPTS, seed=2, **HOT))
    assert all(first[name] != second[name] for name in first)


def test_the_jobs_seed_differs_by_row(llama):
    """The same prompt twice is two answers: the row's id goes into the seed."""
    actual = ask(llama, as_requests([PROMPTS[0]] * 4, seed=5, **HOT))
    assert len(set(actual.values())) == 4


def seeded(names, seed):
    params = SamplingParams(seed=seed, **HOT)
    return [Request(id=name, prompt=words(PROMPTS[0]), params=params, seeded=True) for name in names]


def test_a_rows_own_seed_makes_its_answer_whatever_its_id(llama):
    actual = ask(llama, seeded("abc", 5))
    assert len(set(actual.values())) == 1
    assert ask(llama, seeded("a", 6))["a"] != actual["a"]


def test_a_negative_seed_is_a_seed_of_its_own(llama):
    assert ask(llama, seeded("a", -5)) != ask(llama, seeded("a", 5))


def test_a_greedy_answer_has_no_seed(llama):
    assert ask(llama, as_requests(PROMPTS, seed=1, max_tokens=8)) == ask(
        llama, as_requests(PROMPTS, seed=2, max_tokens=8)
    )


def result(model, **params):
    (actual,) = tiny_engine(model).stream(as_requests(PROMPTS[:1], **params))
    assert actual.error is None
    return actual


def test_an_answer_ends_after_max_tokens(llama):
    actual = result(llama, max_tokens=6)
    assert len(actual.token_ids) == 6
    assert actual.finish_reason == "length"
    assert actual.text == words(actual.token_ids)
    assert actual.usage.prompt_tokens == len(PROMPTS[0])
    assert actual.usage.completion_tokens == 6


def test_an_answer_ends_at_a_stop_token_which_is_not_in_its_text(llama):
    free = result(llama, max_tokens=12).token_ids
    stop = free[4]
    actual = result(llama, max_tokens=12, stop_token_ids=(stop,))
    assert actual.token_ids == free[: free.index(stop) + 1]
    assert actual.finish_reason == "stop"
    assert actual.text == words(actual.token_ids[:-1])


def test_a_stop_token_at_the_last_place_is_still_a_stop(llama):
    free = result(llama, max_tokens=5).token_ids
    assert free.index(free[4]) == 4
    actual = result(llama, max_tokens=5, stop_token_ids=(free[4],))
    assert (actual.token_ids, actual.finish_reason) == (free, "stop")


@pytest.fixture
def ending(llama):
    """The model with an end token of its own: the fifth token of its greedy answer."""
    end = result(llama, max_tokens=12).token_ids[4]
    llama.generation_config.eos_token_id = [end, 0]
    yield llama, end
    llama.generation_config.eos_token_id = None


def test_the_models_own_end_token_ends_an_answer(ending):
    model, end = ending
    actual = result(model, max_tokens=12)
    assert actual.token_ids[-1] == end
    assert actual.finish_reason == "stop"
    assert end not in actual.token_ids[:-1]
    assert actual.text == words(actual.token_ids[:-1])


def test_ignore_eos_goes_on_past_the_end_token_but_not_past_a_stop_token(ending):
    model, end = ending
    actual = result(model, max_tokens=12, ignore_eos=True)
    assert len(actual.token_ids) == 12
    assert end in actual.token_ids
    assert actual.finish_reason == "length"
    stopped = result(model, max_tokens=12, ignore_eos=True, stop_token_ids=(end,))
    assert stopped.token_ids == actual.token_ids[: actual.token_ids.index(end) + 1]
    assert stopped.finish_reason == "stop"


def test_an_answer_ends_before_a_stop_string(llama):
    free = result(llama, max_tokens=12).token_ids
    actual = result(llama, max_tokens=12, stop=(words(free[3:5]),))
    assert actual.text.strip() == words(free[:3])
    assert actual.finish_reason == "stop"


def test_a_row_whose_logits_are_no_numbers_is_an_error_and_the_others_are_answered(llama):
    """Token 7 poisons whoever reads it; the neighbours' answers are those that they give without it."""
    model = tiny_model("llama")
    model.get_input_embeddings().weight.data[7] = math.nan
    healthy = [[i for i in prompt if i != 7] for prompt in PROMPTS[:3]]
    engine = tiny_engine(model)
    actual = {r.id: r for r in engine.stream(as_requests([*healthy, [5, 7, 9]], max_tokens=4))}
    assert actual["3"].error.code == "nan_logits"
    assert {name: actual[name].token_ids for name in "012"} == ask(llama, as_requests(healthy, max_tokens=4))
