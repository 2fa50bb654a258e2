"""Every way to rank, with every kind of budget, in every format, alone and in company: what must hold of all of them.

Each way meets each kind of budget and each format; which three meet at once is drawn by turns, so that each pair of a
budget and a format occurs with several ways. ``test_scorers`` knows what each way is to keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import product

import pytest
import torch
from conftest import (
    answers,
    as_requests,
    random_prompts,
    reference_answers,
    tiny_engine,
    tiny_loaded,
    word_tokenizer,
    words,
)
from conftest import watched as watched_engine
from families import WINDOW, tiny_model

from bmx import Engine, EngineConfig, PromptConfig, policies
from bmx.compress.attention_scorers import AttentionMass, AverageAttention, Recency
from bmx.compress.policy import CompressionPolicy
from bmx.compress.scorer_api import Needs, ScorerDefaults, Seen
from bmx.engine.backend import ModelBackend
from bmx.errors import UsageError
from bmx.kv.layout import SlotIndex
from bmx.model.spec_settings import share_layers
from bmx.policies import POLICIES

SINK, RECENT, NEW = 2, 4, 5
FIXED = SINK + RECENT
EVICTING = tuple(name for name in POLICIES if name != "none")
ATTENTIVE = ("average-attention", "far-attention", "h2o", "decay", "roco", "window", "rocketkv", "tova", "r-kv")
FORMATS = ("model", "fp8", "int8", "int4")
BUDGETS = {"few": 14, "share": 0.4, "pyramid": 14, "all": 400}
LENGTHS = (33, 3, 21, 40, 13)  # one is shorter than the newest tokens that stay
BASE = {"kv_sink": SINK, "kv_recent": RECENT, "chunk_size": 10, "max_num_batched_tokens": 64}


def config(policy, budget="few", name="model", **others):
    """Settings of a cell."""
    shape = {"kv_layer_budgets": "pyramid"} if budget == "pyramid" else {}
    return BASE | {"kv_policy": policy, "kv_budget": BUDGETS[budget], "kv_format": name} | shape | others


def limits(budget, prompt_tokens, layers):
    """Pairs that each layer may keep of a sequence, as the settings say."""
    total = prompt_tokens + NEW
    if budget == "share":
        return [min(total, max(2 * FIXED, math.ceil(0.4 * prompt_tokens)))] * layers
    if budget == "pyramid":
        first, last = 2 - 1 / 20, 1 / 20
        falling = [first + (last - first) * i / (layers - 1) for i in range(layers)]
        return [min(total, FIXED + max(1, round((14 - FIXED) * factor))) for factor in falling]
    return [min(total, BUDGETS[budget])] * layers


def held(store):
    """The tensors of a store, or of what else has some."""
    return [t for f in fields(store) if isinstance(t := getattr(store, f.name), torch.Tensor)]


def tensors(part):
    """All that a layer holds."""
    newest = [] if part.newest is None else held(part.newest)
    return [part.positions, *part.row_stats.values(), *held(part.keys), *held(part.values), *newest]


@dataclass
class Watch:
    """Looks at the pool after each step: what must hold of every policy.

    Attributes:
        budget: kind of budget, or None if the counts are somebody else's business.
        steps: how many were looked at.
    """

    engine: object
    budget: str | None
    steps: int = 0

    def before(self, runner, step):
        """Remember what slots hold that have no part in the step."""
        pool = runner.pool
        stepped = {chunk.sequence.slot_index for chunk in step.chunks}
        self.others = []
        for group, parts in enumerate(pool.groups):
            for part in {part for layer in parts for part in layer}:
                away = [slot for slot in range(part.slots) if SlotIndex(group, slot) not in stepped]
                self.others.append((part, away, [t[away].clone() for t in tensors(part)]))

    def after(self, runner, step):
        """Look at the pool."""
        for part, away, old in self.others:
            for was, now in zip(old, tensors(part), strict=True):
                assert torch.equal(was.nan_to_num(), now[away].nan_to_num())
        for chunk in step.chunks:
            self.look(runner.pool, chunk)
        self.steps += 1

    def look(self, pool, chunk):
        """Counts, and tokens that must not go."""
        sequence, now = chunk.sequence, chunk.start + chunk.length
        group, slot, _ = sequence.slot_index
        layers = self.engine.spec.layers
        for index, layer in enumerate(layers):
            if layer.owner != index:
                continue
            part = pool.layer(group, index)[0]
            limit = part.layout.capacity
            if self.budget:
                limit = limits(self.budget, len(sequence.prompt), len(layers))[index]
            limit = min(limit, layer.window or limit)
            wanted = set(range(max(0, now - min(RECENT, limit)), now))
            if layer.window is None:
                wanted |= {*range(min(SINK, now))}
                wanted |= {p for span in sequence.spans for p in range(*span) if p < now}
            rows = (
                now if part.layout.by_channel else limit
            )  # where nothing is evicted, rows not in use have numbers too
            for positions in part.positions[slot, :, :rows].tolist():
                kept = [p for p in positions if p >= 0]
                assert len(set(kept)) == len(kept) == min(now, limit)
                assert max(kept) == now - 1
                assert wanted <= set(kept)
                assert self.engine.policy.scorer is None or positions[len(kept) :] == [-1] * (
                    len(positions) - len(kept)
                )
            if "probe" in part.row_stats:
                noted = part.row_stats["probe"][slot]
                late = part.positions[slot] >= len(sequence.prompt)
                assert (noted[late] == -1).all()


@pytest.fixture
def watched():
    """Answer requests under watch; the answers by id, and how many pairs were evicted in all."""

    def answer(engine, requests, plan=None, budget=None):
        watch = Watch(engine, budget)
        results = list(watched_engine(engine, watch.before, watch.after).run(requests, plan))
        assert [result.error for result in results if result.error] == []
        assert watch.steps > 0
        return {r.id: r.token_ids for r in results}, sum(r.kv.evicted for r in results)

    return answer


# ---- the matrix ----

CELLS = [
    (policy, budget, FORMATS[(i + j) % len(FORMATS)])
    for (i, policy), (j, budget) in product(enumerate(EVICTING), enumerate(BUDGETS))
]


def test_the_cells_hold_each_pair_of_a_way_a_budget_and_a_format():
    assert {(p, b) for p, b, _ in CELLS} == set(product(EVICTING, BUDGETS))
    assert {(p, f) for p, _, f in CELLS} == set(product(EVICTING, FORMATS))
    assert {(b, f) for _, b, f in CELLS} == set(product(BUDGETS, FORMATS))


@pytest.mark.parametrize(("policy", "budget", "name"), CELLS)
def test_counts_are_exact_others_untouched_and_company_changes_no_answer(policy, budget, name, watched):
    requests = as_requests(random_prompts(LENGTHS, seed=1), max_tokens=NEW)
    settings = config(policy, budget, name)
    crowd = tiny_engine("llama", **settings, max_num_seqs=3)
    answered, evicted = watched(crowd, requests, budget=budget)
    assert (evicted > 0) is (budget != "all")
    turn = EVICTING.index(policy) + list(BUDGETS).index(budget)  # one of the two comparisons for each cell, by turns
    if turn % 2 or budget == "all":
        alone, _ = watched(tiny_engine("llama", **settings), requests[3:4], budget=budget)
        assert alone == {"3": answered["3"]}
        return
    engine = tiny_engine("llama", **settings)
    plan = engine.plan(engine.measure(requests[3:]))  # other capacities, and slots that are larger than need be
    again, _ = watched(engine, requests[::-1], plan, budget=budget)
    assert again == answered


@pytest.mark.parametrize(
    ("family", "policy", "name"),
    [
        ("mistral", "roco", "int4"),
        ("mistral", "keydiff", "model"),
        ("gemma2", "window", "int4"),
        ("gemma2", "average-attention", "model"),
        ("gemma3n_text", "window", "int8"),
        ("gpt2", "roco", "model"),
        ("gpt2", "lagkv", "fp8"),
        ("gpt_oss", "roco", "int8"),
        ("gpt_oss", "keydiff", "int4"),
        ("deepseek_v3", "expected-attention", "int4"),
        ("deepseek_v3", "r-kv", "model"),
    ],
)
def test_other_models_keep_as_many_and_answer_alone_as_in_company(family, policy, name, watched):
    requests = as_requests(random_prompts(LENGTHS[:3], seed=1), max_tokens=NEW)
    settings = config(policy, "few", name)
    answered, _ = watched(tiny_engine(family, **settings, max_num_seqs=3), requests, budget="few")
    alone, _ = watched(tiny_engine(family, **settings), requests[:1], budget="few")
    assert alone == {"0": answered["0"]}


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
@pytest.mark.parametrize("policy", ["average-attention", "lagkv", "streaming"])
def test_a_share_counts_in_models_with_windows(family, policy, watched):
    requests = as_requests(random_prompts(LENGTHS, seed=1), max_tokens=NEW)
    settings = config(policy, "share")
    answered, _ = watched(tiny_engine(family, **settings, max_num_seqs=3), requests, budget="share")
    alone, _ = watched(tiny_engine(family, **settings), requests[3:4], budget="share")
    assert alone == {"3": answered["3"]}
    assert limits("share", 40, 1)[0] > WINDOW


@pytest.mark.parametrize(
    ("policy", "new"), [("window", 45), ("keydiff", 45), ("lagkv", 45), ("roco", 45), ("roco", 10), ("tova", 10)]
)
def test_a_slot_that_is_larger_than_a_share_is_ranked_at_the_same_tokens_as_one_of_its_size(policy, new):
    """Of long answers, pairs are ranked anew several times; with a short one, all would fit the larger slot."""
    requests = as_requests(random_prompts((80, 20), seed=1), max_tokens=new)
    settings = config(policy, "share")
    together = answers(tiny_engine("llama", **settings, max_num_seqs=1), requests)
    for request in requests[1:]:
        assert answers(tiny_engine("llama", **settings), [request]) == {request.id: together[request.id]}


# ---- while nothing is evicted ----


@pytest.mark.parametrize("policy", EVICTING)
def test_a_budget_of_everything_answers_as_the_full_cache(policy):
    """And where chunks end is of no importance."""
    prompts = random_prompts((30, 9, 22))
    expected = reference_answers(tiny_model("llama"), prompts, NEW)
    requests = as_requests(prompts, max_tokens=NEW)
    for chunk_size in (7, 64):
        settings = config(policy, "few") | {"kv_budget": 30 + NEW, "chunk_size": chunk_size}
        assert answers(tiny_engine("llama", **settings), requests) == expected


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_ranks_is_of_no_importance_while_nothing_goes(family, name):
    """In each format; in fp8, whose codes are the same with and without eviction, the full cache answers alike."""
    requests = as_requests(random_prompts((30, 9, 22)), max_tokens=NEW)

    def answers_of(policy, **others):
        settings = config(policy, "all", name) | others
        return answers(tiny_engine(family, **settings), requests)

    answered = [answers_of(policy) for policy in ("average-attention", "keydiff", "lagkv")]
    assert all(other == answered[0] for other in answered)
    assert answers_of("h2o", kv_value_norm=True, kv_probe="w5 w6") == answered[0]
    if name in ("model", "fp8"):
        assert answers_of("none") == answered[0]


@pytest.mark.parametrize("name", FORMATS[1:])
def test_fewer_bits_change_little_while_nothing_goes(name):
    """The first tokens are those of exact pairs: keys and values are nearly what they were."""
    requests = as_requests(random_prompts((40,) * 12), max_tokens=2)
    for policy in ("none", "average-attention"):
        exact, coded = (answers(tiny_engine("llama", **config(policy, "all", f)), requests) for f in ("model", name))
        same = sum(exact[i][0] == coded[i][0] for i in exact)
        assert same >= (11 if name == "int8" else 6)


@pytest.mark.parametrize("name", FORMATS)
def test_the_full_cache_keeps_everything_in_any_format(name, watched):
    requests = as_requests(random_prompts((70, 9, 40)), max_tokens=NEW)
    settings = config("none", "all", name, max_num_seqs=2)
    answered, evicted = watched(tiny_engine("llama", **settings), requests, budget="all")
    assert evicted == 0
    alone, _ = watched(tiny_engine("llama", **settings), requests[:1])
    assert alone == {"0": answered["0"]}


# ---- the job's own words ----

TEMPLATE = PromptConfig(prompt_template="w5 w6 {document} w7 w8 w9 w10 w11")


# The last words are more than the newest tokens that stay anyway.
def instructed(document):
    """The prompt that the template makes of a document."""
    return [5, 6, *document, 7, 8, 9, 10, 11]


def protecting(policy, budget="few", model="llama", **others):
    settings = config(policy, budget, kv_protect="instructions", **others)
    return Engine(EngineConfig(**settings), TEMPLATE, word_tokenizer(), ModelBackend(tiny_loaded(model)))


@pytest.mark.parametrize(("policy", "budget"), [*product(EVICTING, ["few"]), ("h2o", "share"), ("lagkv", "share")])
def test_the_jobs_own_words_are_never_lost(policy, budget, watched):
    """Watched after each step. Other documents are long enough for their words to have gone without protection."""
    requests = as_requests([instructed(d) for d in random_prompts((40, 27, 28))], max_tokens=NEW)
    engine = protecting(policy, budget, max_num_seqs=2)
    answered, evicted = watched(engine, requests, budget=budget)
    assert evicted > 0
    alone, _ = watched(protecting(policy, budget), requests[:1], budget=budget)
    assert alone == {"0": answered["0"]}


def test_words_that_would_fill_the_budget_are_an_error_of_the_row():
    engine = protecting("h2o", "few", kv_sink=1, kv_recent=9)
    (result,) = engine.stream(as_requests([instructed(random_prompts((40,))[0])], max_tokens=NEW))
    assert result.error is not None
    assert "14" in result.error.message


def instructions_kept(engine, prompt):
    """Whether the words stay to the last step, layer by layer; fails if the newest tokens do not."""
    kept = []

    def watching(runner, step):
        for chunk in step.chunks:
            now = chunk.start + chunk.length
            places = {p for p in (0, 1, *range(len(prompt) - 5, len(prompt))) if p < now}
            kept[:] = []
            for (part,) in runner.pool.groups[chunk.sequence.slot_index.group]:
                for row in part.positions[chunk.sequence.slot_index.slot].tolist():
                    assert set(range(max(0, now - RECENT), now)) <= set(row)
                    kept.append(places <= set(row))

    (result,) = watched_engine(engine, after=watching).stream(as_requests([prompt], max_tokens=NEW))
    return result, kept


def test_words_are_kept_in_layers_of_smaller_budgets_too(monkeypatch):
    """The first layer holds the whole sequence, the second does not."""
    prompt = instructed(random_prompts((20,))[0])
    engine = protecting("streaming", kv_sink=1, kv_budget=20, kv_layer_budgets=(2.0, 0.5))
    assert engine.policy.layout(engine.spec, 40).layers[0].capacity >= len(prompt) + NEW
    result, kept = instructions_kept(engine, prompt)
    assert result.error is None
    assert all(kept)


def test_words_that_would_fill_the_smallest_layer_are_an_error_or_cost_no_newest_token(monkeypatch):
    prompt = instructed(random_prompts((40,))[0])
    engine = protecting("h2o", kv_budget=20, kv_layer_budgets=(1.9, 0.1))
    result, kept = instructions_kept(engine, prompt)
    assert result.error is not None or all(kept)


# ---- the probe ----


@pytest.mark.parametrize("policy", ATTENTIVE)
@pytest.mark.parametrize(("budget", "family"), [("few", "gemma2"), ("share", "llama")])
def test_a_probe_leaves_nothing_behind_and_company_changes_no_answer(policy, budget, family, watched):
    """Counts are exact, and every position kept is a token's of the sequence."""
    requests = as_requests(random_prompts(LENGTHS, seed=1), max_tokens=NEW)
    settings = config(policy, budget, kv_probe="w5 w6 w7")
    answered, _ = watched(tiny_engine(family, **settings, max_num_seqs=3), requests, budget=budget)
    alone, _ = watched(tiny_engine(family, **settings), requests[3:4], budget=budget)
    assert alone == {"3": answered["3"]}
    if family == "llama":
        assert answered != answers(tiny_engine(family, **config(policy, budget)), requests)


@pytest.mark.parametrize("policy", ATTENTIVE)
def test_what_a_probe_asks_for_counts_for_every_way(policy):
    """With all the weight, or with almost none."""
    requests = as_requests(random_prompts((60, 55, 50), seed=2), max_tokens=NEW)
    with_probes = [
        answers(tiny_engine("llama", **config(policy, kv_probe=probe, kv_probe_weight=1.0)), requests)
        for probe in ("w5 w6 w7", "w90 w17 w33 w21")
    ]
    assert with_probes[0] != with_probes[1]


@pytest.mark.parametrize("policy", ATTENTIVE)
def test_of_two_that_are_alike_the_one_that_the_probe_looks_at_ranks_higher(policy):
    policy = tiny_engine("llama", **config(policy, kv_probe="w5")).policy
    ones = torch.ones(1, 6)
    probed = torch.tensor([[0.1, 0.1, 0.4, 0.1, 0.1, 0.2]])
    shown = {"mass": ones, "squares": ones, "keys": ones.unsqueeze(-1).expand(1, 6, 4), "probe": probed}
    scores = policy.score(Seen(positions=torch.arange(6).view(1, 6), now=6, inputs=shown, surplus=0, window=1))[0]
    assert scores[2] > scores[3]


def test_a_probe_may_be_the_jobs_own_words(watched):
    engine = protecting("h2o", kv_probe="instructions")
    assert engine.probe == (5, 6, 7, 8, 9, 10, 11)
    requests = as_requests([instructed(d) for d in random_prompts((40, 28))], max_tokens=NEW)
    answered, _ = watched(engine, requests, budget="few")
    assert answered == watched(protecting("h2o", kv_probe=words((5, 6, 7, 8, 9, 10, 11))), requests, budget="few")[0]


def test_a_probe_is_asked_where_only_layers_of_smaller_budgets_evict(monkeypatch):
    """The first layer holds the whole sequence, the second does not: what the probe attends to counts there."""
    prompt = random_prompts((30,))
    engines = [
        tiny_engine(
            "llama", **config("h2o", kv_budget=24, kv_layer_budgets=(1.9, 0.1), kv_probe=p, kv_probe_weight=1.0)
        )
        for p in ("w5 w6 w7", "w90 w17 w33 w21")
    ]
    assert engines[0].policy.layout(engines[0].spec, 99).layers[0].capacity >= 30 + NEW
    kept = []

    def watching(runner, step):
        if not step.chunks[0].sequence.answer:
            kept.append({frozenset(row) for row in runner.pool.layer(0, 1)[0].positions[0].tolist()})

    for engine in engines:
        list(watched_engine(engine, after=watching).stream(as_requests(prompt, max_tokens=NEW)))
    half = len(kept) // 2
    assert kept[half - 1] != kept[-1]


# ---- other ways to weigh ----


@pytest.mark.parametrize("policy", ATTENTIVE)
def test_the_value_norm_keeps_long_values(policy):
    """Of what receives attention, pairs with long values stay sooner than without it."""

    def kept_length(**others):
        engine = tiny_engine("llama", **config(policy, "few", **others))
        lengths = []

        def watching(runner, step):
            part = runner.pool.layer(0, 1)[0]
            if len(step.chunks[0].sequence.prompt) == step.chunks[0].start + step.chunks[0].length:
                lengths.append(float(part.read(0, 14)[1].abs().sum(-1).mean()))

        watched = watched_engine(engine, after=watching)
        for request in as_requests(random_prompts((60,) * 4, seed=5), max_tokens=2):
            list(watched.stream([request]))
        return sum(lengths) / len(lengths)

    assert kept_length(kv_value_norm=True) > kept_length()


def test_factors_share_the_budget_out_over_the_layers(watched):
    engine = tiny_engine("llama", **config("h2o", kv_layer_budgets=(1.5, 0.5)))
    layout = engine.policy.layout(engine.spec, 400)
    assert [layer.capacity for layer in layout.layers] == [FIXED + 12, FIXED + 4]
    uniform = tiny_engine("llama", **config("h2o")).policy.layout(engine.spec, 400)
    assert layout.kv_bytes == uniform.kv_bytes
    _, evicted = watched(engine, as_requests(random_prompts((30,)), max_tokens=NEW))
    assert evicted > 0


@pytest.mark.parametrize("layers", [2, 4])
def test_a_pyramid_falls_from_layer_to_layer_and_costs_what_the_even_share_does(layers):
    family = {2: "llama", 4: "olmo3"}[layers]
    engine = tiny_engine(family, kv_layer_budgets="pyramid", kv_budget=106, kv_sink=2, kv_recent=4)
    spec = engine.spec
    spec = type(spec)(**{f.name: getattr(spec, f.name) for f in fields(spec)} | {"layers": unbounded(spec.layers)})
    rows = [layer.capacity for layer in engine.policy.layout(spec, 10**6).layers]
    assert rows == [6 + round(100 * (1.95 - 1.9 * i / (layers - 1))) for i in range(layers)]
    assert sum(rows) == pytest.approx(106 * layers, abs=layers / 2)


def unbounded(layers):
    """The same layers without windows."""
    return tuple(type(y)(**{f.name: getattr(y, f.name) for f in fields(y)} | {"window": None}) for y in layers)


# ---- layers that share ----


@pytest.mark.parametrize("policy", ["none", "average-attention", "roco", "keydiff", "expected-attention", "lagkv"])
def test_a_layer_that_reads_anothers_pairs_holds_none(policy, watched):
    settings = config(policy, "few" if policy != "none" else "all")
    requests = as_requests(random_prompts(LENGTHS, seed=1), max_tokens=NEW)
    engine = tiny_engine("olmo2", **settings, kv_share_layers="2:1", max_num_seqs=3)
    own = tiny_engine("olmo2", **settings)
    assert [layer.owner for layer in engine.spec.layers] == [0, 1, 1]
    sizes = [e.policy.layout(e.spec, 14).nbytes for e in (engine, own)]
    assert sizes[0] * 3 == sizes[1] * 2
    answered, _ = watched(engine, requests)
    alone, _ = watched(tiny_engine("olmo2", **settings, kv_share_layers="2:1"), requests[:1])
    assert alone == {"0": answered["0"]}
    assert answered != answers(own, requests)


def test_a_chain_of_readers_ends_at_the_one_that_holds():
    spec = tiny_engine("olmo2", kv_policy="none").spec
    assert [layer.owner for layer in share_layers(spec, "1:0,2:1").layers] == [0, 0, 0]
    assert share_layers(spec, None) == spec
    assert share_layers(spec, "2:0").last_reader(0) == 2


@pytest.mark.parametrize(("family", "pairs"), [("llama", "2:0"), ("gemma2", "1:0"), ("olmo2", "2:1,1:0")])
def test_layers_that_cannot_share_are_refused(family, pairs):
    """There is no such layer, windows differ, or another reads it already."""
    with pytest.raises(UsageError, match="kv_share_layers"):
        tiny_engine(family, kv_share_layers=pairs)


# ---- what cannot be combined ----


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ATTENTIVE])
@pytest.mark.parametrize("settings", [{"kv_probe": "w5"}, {"kv_value_norm": True}], ids=["probe", "value norm"])
def test_what_weighs_attention_needs_a_way_that_looks_at_it(policy, settings):
    with pytest.raises(UsageError, match=next(iter(settings))) as refused:
        tiny_engine("llama", **config(policy, "all"), **settings)
    assert policy in str(refused.value)
    assert all(name in refused.value.hint for name in ATTENTIVE)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kv_policy": "h20"}, "h20"),
        ({"kv_budget": 0.5, "kv_layer_budgets": "pyramid"}, "share"),
        ({"kv_budget": 0.5, "kv_layer_budgets": (1.5, 0.5)}, "share"),
        ({"kv_layer_budgets": (1.2, 1.0, 0.8)}, "3 factors, the model has 2 layers"),
        ({"kv_probe": "instructions"}, "template"),
        ({"kv_probe_weight": 0.0}, "kv_probe_weight"),
        ({"kv_budget": "auto"}, "auto"),
        ({"kv_budget": SINK + RECENT}, "leaves no room"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        list(tiny_engine("llama", **config("h2o") | settings).stream(as_requests([[5, 6]], max_tokens=1)))


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"kv_policy": "h20"}, "h2o"),
        ({"kv_probe": "instructions"}, "--kv-probe"),
        ({"kv_budget": 6}, "the smallest budget is 7"),
    ],
    ids=str,
)
def test_a_refusal_says_what_would_do(settings, hint):
    with pytest.raises(UsageError) as refused:
        tiny_engine("llama", **config("h2o") | settings)
    assert hint in refused.value.hint


# ---- ways of other packages ----


class Oldest(ScorerDefaults):
    """Old tokens stay."""

    def __call__(self, seen):
        return -seen.positions.float()


class Looking(ScorerDefaults):
    """What received much attention goes."""

    needs = Needs.ATTENTION_MASS

    def __call__(self, seen):
        return -seen.attention_mass


@dataclass
class Found:
    """An entry point."""

    loaded: object
    value: str = "their.package:Way"

    def load(self):
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture
def offered(monkeypatch):
    """Offer something under the name of a policy."""

    def offer(name, loaded):
        def look(*, group, name=None):
            return [Found(loaded)] if (group, name) == ("bmx.scorers", wanted) else []

        wanted = name
        monkeypatch.setattr(policies, "entry_points", look)

    return offer


@pytest.mark.parametrize("loaded", [Oldest, Oldest()], ids=["class", "instance"])
def test_a_way_of_another_package_is_known_by_its_name(loaded, offered, watched):
    offered("oldest", loaded)
    engine = tiny_engine("llama", **config("oldest"))
    prompt, kept = random_prompts((40,)), []

    def watching(runner, step):
        kept[:] = [set(row) for row in runner.pool.layer(0, 0)[0].positions[0].tolist()]

    list(watched_engine(engine, after=watching).stream(as_requests(prompt, max_tokens=1)))
    assert kept == [{*range(14 - RECENT), *range(40 - RECENT, 40)}] * 2
    watched(engine, as_requests(random_prompts(LENGTHS), max_tokens=NEW), budget="few")


def test_a_way_of_another_package_sees_what_it_needs(offered, watched):
    offered("looking", Looking)
    requests = as_requests(random_prompts(LENGTHS), max_tokens=NEW)
    answered, _ = watched(tiny_engine("llama", **config("looking")), requests, budget="few")
    assert answered != answers(tiny_engine("llama", **config("h2o")), requests)


def test_a_way_of_another_package_is_shown_the_chunks_queries_and_not_the_probes(offered):
    shown = []

    class Asking(Looking):
        needs = Needs.ATTENTION_MASS | Needs.QUERIES

        def __call__(self, seen):
            if "queries" in seen.inputs:  # only while a prompt is read
                shown.append(seen.queries.clone())
            return super().__call__(seen)

    offered("asking", Asking)
    first = []
    for probe in ({}, {"kv_probe": "w5 w6 w7"}):
        engine, requests = (
            tiny_engine("llama", **config("asking"), **probe),
            as_requests(random_prompts((40,)), max_tokens=1),
        )
        plan = engine.plan(engine.measure(requests))
        shown.clear()
        list(engine.run(requests, plan))
        first.append(shown[0])
    torch.testing.assert_close(first[0], first[1], atol=1e-4, rtol=1e-4)  # longer steps may round in another way


@pytest.mark.parametrize(
    ("loaded", "said"),
    [
        (ImportError("no such module"), "no such module"),
        (RuntimeError("it broke"), "it broke"),
        (lambda seen: seen.positions, "not a scorer"),
        (3, "not a scorer"),
        (type("Broken", (), {"__init__": lambda self: 1 / 0}), "division by zero"),
    ],
    ids=("not importable", "raises", "a function", "a number", "cannot be made"),
)
def test_a_broken_way_of_another_package_is_an_error_with_its_name(loaded, said, offered):
    offered("theirs", loaded)
    with pytest.raises(UsageError, match=said) as refused:
        tiny_engine("llama", **config("theirs"))
    assert "theirs" in str(refused.value)
    assert "their.package:Way" in str(refused.value)


def test_another_package_cannot_take_a_name_of_bmxs_own(offered):
    offered("h2o", Oldest)
    assert tiny_engine("llama", **config("h2o")).policy.scorer == AttentionMass()


def reversed_formula(base):
    """A scorer of another package that ranks the other way round than the one of bmx that it extends."""

    class Reversed(base):
        def __call__(self, seen):
            return -base.__call__(self, seen)

    return Reversed


EXTENDED = {"average-attention": AverageAttention, "h2o": AttentionMass, "streaming": Recency}


@pytest.mark.parametrize("name", EXTENDED)
def test_kernels_rank_by_the_formula_of_a_scorer_and_not_by_that_of_its_parent(name, offered):
    base = EXTENDED[name]
    offered("theirs", reversed_formula(base))
    spec = tiny_loaded("llama").spec
    own, theirs = (CompressionPolicy.from_config(EngineConfig(kv_policy=policy)) for policy in (name, "theirs"))
    assert own.eviction_order(own.layout(spec, 40).layers[0]) is not None
    assert theirs.eviction_order(theirs.layout(spec, 40).layers[0]) is None
    offered("alike", type("Alike", (base,), {}))
    alike = CompressionPolicy.from_config(EngineConfig(kv_policy="alike"))
    assert alike.eviction_order(alike.layout(spec, 40).layers[0]) is not None


@pytest.mark.parametrize(
    ("kernels", "name"), [("triton", "average-attention"), *(("reference", name) for name in EXTENDED)]
)
def test_a_scorer_that_extends_one_of_bmx_answers_by_its_own_formula(kernels, name, offered, cpu_kernels):
    """On kernels that rank by themselves, as in plain torch."""
    requests = as_requests(random_prompts((33, 21)), max_tokens=3)
    cpu_kernels("reference")
    offered("theirs", reversed_formula(EXTENDED[name]))
    expected = answers(tiny_engine("llama", **config("theirs")), requests)
    assert expected != answers(tiny_engine("llama", **config(name)), requests)
    cpu_kernels(kernels)
    assert answers(tiny_engine("llama", **config("theirs")), requests) == expected
