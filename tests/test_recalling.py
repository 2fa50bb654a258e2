"""Recall in whole models: tokens of an answer that read chosen pairs."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from conftest import answers, as_requests, random_prompts, tiny_engine
from families import tiny_model

from bmx import Engine, EngineConfig, UsageError
from bmx.kv.layout import PAGE
from bmx.measure.candidates import Axes
from bmx.model.spec import use_attention
from bmx.policies import POLICIES

SINK, RECENT = 2, 5
PROMPTS = random_prompts((70, 9, 41, 64, 23), seed=3)
BASE = {"kv_budget": 16, "kv_sink": SINK, "kv_recent": RECENT, "chunk_size": 24, "max_num_batched_tokens": 72}
WAYS = ("attention", "pages", "clusters", "bits")
EVICTING = [policy for policy in POLICIES if policy != "none"]
EVERYTHING = 150  # more pairs than any sequence here has
FEW = 14


def recalling(family="llama", recall="pages", pairs=EVERYTHING, archive="model", **config):
    """An engine whose answers read chosen pairs."""
    config = BASE | {"max_num_seqs": 3} | config
    return tiny_engine(family, kv_archive=archive, kv_recall=recall, kv_recall_pairs=pairs, **config)


def requests(new_tokens=30, prompts=PROMPTS):
    return as_requests(prompts, max_tokens=new_tokens)


# ---- choosing everything ----


@pytest.mark.parametrize("recall", WAYS)
@pytest.mark.parametrize(("archive", "every"), [("model", 1), ("int8", 3), ("int4", 1), ("int2", 4)])
def test_choosing_everything_is_the_answer_on_the_whole_archive(recall, archive, every):
    expected = answers(recalling(recall="all", archive=archive), requests())
    assert answers(recalling(recall=recall, archive=archive, kv_recall_every=every), requests()) == expected


@pytest.mark.parametrize(("number", "policy"), list(enumerate(EVICTING)))
def test_choosing_everything_is_the_answer_on_the_whole_archive_whatever_the_policy(number, policy):
    recall = WAYS[number % len(WAYS)]
    expected = answers(recalling(recall="all", kv_policy=policy), requests(10))
    assert answers(recalling(recall=recall, kv_policy=policy), requests(10)) == expected


@pytest.mark.parametrize(
    ("family", "recall", "every"),
    [
        ("mistral", "pages", 1),
        ("gemma2", "attention", 3),
        ("gemma3n_text", "clusters", 1),
        ("gemma3n_text", "attention", 3),
        ("gpt_oss", "bits", 3),
        ("gpt_oss", "pages", 1),
        ("deepseek_v3", "bits", 1),
        ("gpt_bigcode", "clusters", 3),
        ("qwen3", "attention", 1),
    ],
)
def test_choosing_everything_is_the_answer_on_the_whole_archive_in_every_family(family, recall, every):
    expected = answers(recalling(family, "all"), requests(10))
    assert answers(recalling(family, recall, kv_recall_every=every), requests(10)) == expected


@pytest.mark.parametrize("policy", ["average-attention", "h2o", "window", "keydiff"])
@pytest.mark.parametrize("budget", [40, 0.4])
def test_choosing_every_page_of_an_evicting_slot_is_reading_it_whole(policy, budget):
    settings = BASE | {"kv_policy": policy, "kv_budget": budget, "max_num_seqs": 3}
    expected = answers(tiny_engine("llama", **settings), requests(10))
    chosen = tiny_engine("llama", **settings, kv_recall="pages", kv_recall_pairs=EVERYTHING)
    assert answers(chosen, requests(10)) == expected


# ---- choosing some ----


@pytest.mark.parametrize(
    ("recall", "every", "archive"),
    [
        ("attention", 1, "int4"),
        ("attention", 4, "model"),
        ("attention", 5, "int4"),
        ("pages", 1, "int4"),
        ("pages", 3, "model"),
        ("clusters", 1, "model"),
        ("clusters", 4, "int4"),
        ("bits", 1, "model"),
        ("bits", 3, "int4"),
    ],
)
def test_an_answer_on_chosen_pairs_does_not_depend_on_the_rows_beside_it(recall, every, archive):
    settings = {"recall": recall, "pairs": FEW, "archive": archive, "kv_recall_every": every}
    together = answers(recalling(**settings), requests(20))
    alone = recalling(**settings, max_num_seqs=1)
    for i, request in enumerate(requests(20)):
        assert answers(alone, [request]) == {str(i): together[str(i)]}
    if (recall, every) != ("attention", 1):  # then all tokens read all
        assert together != answers(recalling(recall="all", archive=archive), requests(20))


def test_an_answer_on_pages_of_an_evicting_slot_does_not_depend_on_the_rows_beside_it():
    settings = BASE | {"kv_budget": 30, "kv_recall": "pages", "kv_recall_pairs": FEW}
    together = answers(tiny_engine("llama", **settings, max_num_seqs=3), requests(20))
    for i, request in enumerate(requests(20)):
        alone = tiny_engine("llama", **settings, max_num_seqs=1)
        assert answers(alone, [request]) == {str(i): together[str(i)]}
    assert together != answers(tiny_engine("llama", **BASE | {"kv_budget": 30}), requests(20))


@pytest.mark.parametrize("recall", WAYS)
def test_layers_that_read_anothers_pairs_read_those_that_its_queries_chose(recall):
    asked = requests(12, PROMPTS[:2])
    settings = {"recall": recall, "pairs": FEW, "kv_recall_every": 2}
    together = answers(recalling("gemma3n_text", **settings), asked)
    for i, request in enumerate(asked):
        alone = recalling("gemma3n_text", **settings, max_num_seqs=1)
        assert answers(alone, [request]) == {str(i): together[str(i)]}


@pytest.mark.parametrize("recall", WAYS)
def test_text_that_prompts_share_is_indexed_once(recall):
    document = random_prompts((170,), seed=8)[0]
    rows = [document + question for question in random_prompts((12, 9, 14, 7), seed=9)]
    settings = {"recall": recall, "pairs": 40, "archive": "int4", "kv_recall_every": 2}
    engine = recalling(**settings)
    answered = answers(engine, requests(prompts=rows))
    assert engine.stats.reused_prompt_tokens >= 2 * 72
    assert answered == answers(recalling(**settings, prefix_reuse=False), requests(prompts=rows))


# ---- against the definition ----


class Definition:
    """An attention function that remembers every key: a token of the answer reads all rows, or those chosen.

    In float64 and plain loops: RefreshKV with a fixed stride (``attention``), or the bounds of pages.
    """

    def __init__(self, by, pairs, every, prompt_tokens):
        self.by, self.pairs, self.every, self.prompt = by, pairs, every, prompt_tokens
        self.keys, self.values, self.chosen, self.layer, self.seen = {}, {}, {}, 0, 0

    def __call__(self, module, query, key, value, mask, scaling=None, **kwargs):
        layer, count = self.layer, query.shape[2]
        self.layer += 1
        for store, new in ((self.keys, key), (self.values, value)):
            store[layer] = torch.cat([store[layer], new[0]], 1) if layer in store else new[0]  # [K, P, D]
        heads = key.shape[1]
        output = torch.zeros(1, count, query.shape[1], value.shape[-1], dtype=torch.float64)
        for head, i in product(range(heads), range(count)):
            at, group = self.seen + i, query.shape[1] // heads
            asking = query[0, head * group : (head + 1) * group, i]
            keys, values = self.keys[layer][head, : at + 1], self.values[layer][head, : at + 1]
            rows = list(range(at + 1))
            if at >= self.prompt:
                due = (at - self.prompt) % self.every == 0
                if due:
                    scores = self.scores(asking, keys, scaling)
                    rivals = range(SINK, at + self.every - RECENT)
                    best = sorted(rivals, key=lambda row, scores=scores: (scores[row], row), reverse=True)
                    self.chosen[layer, head] = set(best[: self.pairs - SINK - RECENT])
                if not (due and self.by == "attention"):
                    always = {row for row in rows if row < SINK or row > at - RECENT}
                    rows = sorted(self.chosen[layer, head] | always)
            weights = torch.softmax(asking @ keys[rows].T * scaling, -1)
            output[0, i, head * group : (head + 1) * group] = weights @ values[rows]
        return output, None

    def scores(self, asking, keys, scaling):
        """A number for each row."""
        if self.by == "attention":
            received = torch.softmax(asking @ keys.T * scaling, -1).mean(0).tolist()
            return [max(received[max(0, row - 3) : row + 4]) for row in range(len(received))]
        bounds = []
        for row in range(len(keys)):
            page = keys[row // PAGE * PAGE : row // PAGE * PAGE + PAGE]
            bounds.append([float(torch.maximum(q * page.amax(0), q * page.amin(0)).sum()) for q in asking])
        return torch.softmax(torch.tensor(bounds, dtype=torch.float64) * scaling, 0).mean(1).tolist()


@pytest.mark.parametrize(
    ("by", "pairs", "every"), [("attention", 20, 4), ("attention", 12, 5), ("pages", 16, 1), ("pages", 20, 3)]
)
def test_the_answer_is_what_the_definition_says(by, pairs, every):
    """The prompt is read whole, so that all that differs is what the answer reads."""
    [prompt] = random_prompts((70,), seed=3)
    engine = recalling(recall=by, pairs=pairs, kv_recall_every=every, kv_budget=100)
    answer = answers(engine, requests(24, [prompt]))["0"]
    model, definition = tiny_model("llama").double(), Definition(by, pairs, every, len(prompt))
    greedy, ids = [], list(prompt)
    with torch.inference_mode(), use_attention(model, definition):
        for token in answer:
            positions = torch.arange(definition.seen, definition.seen + len(ids)).unsqueeze(0)
            definition.layer = 0
            logits = model(input_ids=torch.tensor([ids]), position_ids=positions, use_cache=False).logits
            definition.seen += len(ids)
            greedy.append(int(logits[0, -1].argmax()))
            ids = [token]
    assert greedy == list(answer)
    assert greedy != list(answers(recalling(recall="all", kv_budget=100), requests(24, [prompt]))["0"])


# ---- memory and settings ----


@pytest.mark.parametrize("recall", WAYS)
@pytest.mark.parametrize(
    ("family", "archive", "every"), [("llama", "model", 1), ("gemma2", "int4", 3), ("gemma3n_text", "int8", 1)]
)
def test_what_is_planned_with_an_index_is_what_is_allocated(recall, family, archive, every):
    engine = recalling(family, recall, FEW, archive, kv_recall_every=every)
    plan = engine.plan(engine.measure(requests()))
    with engine.backend.runner(plan, engine.policy) as runner:
        assert runner.kv_bytes == plan.memory.pool
    without = recalling(family, "all", archive=archive)
    more = plan.memory.pool - without.plan(without.measure(requests())).memory.pool
    assert (more > 0) is not (recall == "attention" and every == 1)


def test_without_an_archive_pages_are_chosen_at_each_token():
    with pytest.raises(UsageError, match="at each token"):
        Engine.open("fake", kv_recall="pages", kv_recall_every=2)


def test_pages_that_stand_for_several_tokens_are_compared_on_archives_alone():
    config = EngineConfig(kv_archive="int4", kv_recall="pages", kv_recall_every=4)
    axes = Axes(policies=("h2o",), budgets=(512,), formats=("model",), archives=("none", "int4"))
    found = {candidate.kv_archive: candidate.kv_recall for candidate in axes.candidates(config, {}, "")}
    assert found == {"none": "all", "int4": "pages"}
