"""Kv heads of a layer with budgets of their own: counts, bytes and answers, step by step and in kernels."""

from __future__ import annotations

import pytest
import torch
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine, watched
from families import tiny_model
from instruction_sets import on_every_set, required
from test_fused_steps import NEAR, Chosen
from test_kernels import normal
from test_prefix import SOME_ROWS, with_and_without

from bmx import EngineConfig
from bmx.compress.budgets import Budget
from bmx.compress.policy import CompressionPolicy
from bmx.engine.attention import SlotAttention
from bmx.engine.packed import DecodeBatch, DecodeGroup, PackedStep, PromptChunk
from bmx.engine.ranking import DecodingSlot
from bmx.errors import UsageError
from bmx.kernels.slot_views import Chunks
from bmx.kv.layout import KVLayout, LayerLayout, SlotIndex
from bmx.kv.pool import KVPool
from bmx.kv_formats import formats_of
from bmx.units import layers_text, parse_layers

BF16, CPU = torch.bfloat16, torch.device("cpu")
SINK, RECENT, NEW = 2, 4, 8
FIXED = SINK + RECENT
FACTORS = ((1.5, 0.5), (0.25, 1.75))
BASE = {"kv_sink": SINK, "kv_recent": RECENT, "chunk_size": 10, "max_num_batched_tokens": 64, "kv_budget": 14}


def budgets(factors=FACTORS, pairs=14):
    """Pairs of each head, as the settings say."""
    return [tuple(FIXED + max(1, round((pairs - FIXED) * factor)) for factor in layer) for layer in factors]


# ---- the notation ----


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("1.5:0.5,0.25:1.75", FACTORS),
        ("1.5,1,0.5", (1.5, 1.0, 0.5)),
        ("3:1,2", ((1.5, 0.5), 1.0)),
        ("2:2,2:2", ((1.0, 1.0), (1.0, 1.0))),
        ("pyramid", "pyramid"),
    ],
)
def test_factors_are_read_and_written(text, factors):
    assert parse_layers(text) == factors
    assert parse_layers(layers_text(factors)) == factors


@pytest.mark.parametrize("text", ["1:,1", "1:0,1:1", "1:x", ":"])
def test_what_is_no_factor_is_refused(text):
    with pytest.raises(ValueError, match=r"factors|float"):
        parse_layers(text)


def test_the_heads_of_a_model_are_counted():
    budget = Budget.of(14, FIXED, ((1.2, 1.0, 0.8), 1.0))
    assert budget.heads(0, 2, 3) == (16, 14, 12)
    assert budget.heads(0, 2, 3, alike=True) == (14,) * 3
    assert budget.heads(1, 2, 3) == (14,) * 3
    assert (budget.rows(100, 9), budget.least(100, 9)) == (16, 12)
    with pytest.raises(UsageError, match="3 factors of layer 1, which has 2 kv heads"):
        budget.heads(0, 2, 2)
    with pytest.raises(UsageError, match="2 factors, the model has 4 layers"):
        budget.heads(0, 4, 3)


# ---- whole models ----


@pytest.mark.parametrize("kv_format", ["model", "int8", "int4"])
@pytest.mark.parametrize("policy", ["far-attention", "average-attention", "h2o", "streaming", "keydiff", "r-kv"])
def test_each_head_keeps_its_own_number_of_pairs(policy, kv_format):
    """With sinks and newest among them; and slots are as large as planned."""
    engine = tiny_engine("llama", **BASE, kv_policy=policy, kv_format=kv_format, kv_layer_budgets=FACTORS)
    looked = []

    def after(runner, step):
        assert runner.pool.nbytes == sum(
            layout.nbytes * len(parts[0][0].positions)
            for layout, parts in zip(engine.plan_layouts, runner.pool.groups, strict=True)
        )
        for chunk in step.chunks:
            (group, slot, _), now = chunk.sequence.slot_index, chunk.start + chunk.length
            for layer, wanted in enumerate(budgets()):
                rows = [row for part in runner.pool.layer(group, layer) for row in part.positions[slot].tolist()]
                for row, limit in zip(rows, wanted, strict=True):
                    kept = {p for p in row if p >= 0}
                    assert len(kept) == min(now, limit)
                    assert {*range(min(SINK, now)), *range(max(0, now - RECENT), now)} <= kept
                looked.append(now)

    requests = as_requests(random_prompts((33, 3, 21, 40, 13)), max_tokens=NEW)
    engine.plan_layouts = engine.plan(engine.measure(requests)).layouts
    assert all(result.error is None for result in watched(engine, after=after).stream(requests))
    assert max(looked) > 40


def test_a_budget_of_everything_answers_as_the_full_cache():
    prompts = random_prompts((33, 3, 21))
    factors = ((1.0, 1.6), (0.6, 0.8))
    engine = tiny_engine("llama", **BASE | {"kv_budget": 100}, kv_format="model", kv_layer_budgets=factors)
    assert answers(engine, as_requests(prompts, max_tokens=NEW)) == reference_answers(tiny_model("llama"), prompts, NEW)


def test_heads_share_out_what_even_heads_hold_and_windows_keep_heads_alike():
    for family in ("llama", "mistral"):
        model = tiny_model(family)
        engine, even = (tiny_engine(model, **BASE, kv_layer_budgets=of) for of in (FACTORS, "uniform"))
        layout, uniform = (one.policy.layout(one.spec, 400) for one in (engine, even))
        assert layout.nbytes == uniform.nbytes
        if family == "llama":
            assert [layer.capacities for layer in layout.layers] == budgets()
        else:
            assert not any(layer.heads_differ for layer in layout.layers)


@pytest.mark.parametrize("policy", ["far-attention", "h2o", "streaming", "window"])
def test_reused_prefixes_change_nothing(policy):
    """Between slots of any size: small ones hold as many pairs of all heads."""
    for budget in (24, 70, 110):
        config = {"kv_policy": policy, "kv_budget": budget, "kv_format": "model", "kv_layer_budgets": FACTORS}
        answered, expected, reused = with_and_without(rows=SOME_ROWS, **config)
        assert answered == expected, budget
        assert reused > 0


@pytest.mark.parametrize("settings", [{"kv_probe": "w5 w6 w7"}, {"kv_value_norm": True}])
def test_company_changes_no_answer(settings):
    """Of a row that is read with others, what it answers alone."""
    requests = as_requests(random_prompts((33, 21, 40)), max_tokens=NEW)
    engine = tiny_engine("llama", **BASE, kv_policy="h2o", kv_format="model", kv_layer_budgets=FACTORS, **settings)
    together = answers(engine, requests)
    assert together == {key: own for one in requests for key, own in answers(engine, [one]).items()}


# ---- kernels ----

GROUPS = (((31, 20), 3), ((48, 27), 5))  # capacities of two heads, and slots


def attention_of(chosen, policy, form, window=None, groups=GROUPS):
    """One layer's attention and its pool, with the same random pairs each time; D 32."""
    capacity, (keys, values) = groups[-1][0][0], formats_of(form)
    made = CompressionPolicy.from_config(
        EngineConfig(kv_policy=policy, kv_budget=capacity, kv_sink=SINK, kv_recent=5, kv_format=form)
    )
    layouts = tuple(
        KVLayout((
            LayerLayout(
                capacity=max(capacities), capacities=capacities, kv_heads=2, key_dim=32, value_dim=32, itemsize=2,
                window=window, owner=0, last_reader=0, by_age=False, row_stats=made._row_stats,
                key_format=keys, value_format=values,
            ),
        ))
        for capacities, _ in groups
    )  # fmt: skip
    pool = KVPool(layouts, tuple(slots for _, slots in groups), BF16, CPU)
    for group, (_, slots) in enumerate(groups):
        for slot in range(slots):
            for head, part in enumerate(pool.layer(group, 0)):
                for seed, store in enumerate((part.keys, part.values)):
                    vectors = normal(1, part.layout.capacity, 32, seed=4 * slot + 2 * head + seed, dtype=BF16)
                    store.append(slot, 0, vectors)
    return SlotAttention(pool, made, chosen), pool


def fill(parts, slot, tokens, rows):
    """A slot after some tokens: each head keeps as many as it can, in any order, with attention that they received."""
    random = torch.Generator().manual_seed(slot)
    for part in parts:
        limit = min(rows, part.layout.capacity)
        left = torch.randperm(tokens, generator=random) if tokens > limit else torch.arange(tokens)
        part.positions[slot, 0, : min(tokens, limit)] = left[:limit].int()
        for stat in part.row_stats.values():
            stat[slot] = torch.rand(stat[slot].shape, generator=random) * (part.positions[slot] >= 0)


def attended(attention, step, tokens):
    """What a layer says of random queries, keys and values; H 6, K 2, D 32."""
    q, k, v = (normal(1, heads, tokens, 32, seed=heads + i, dtype=BF16) for i, heads in enumerate((6, 2, 2)))
    sinks = normal(6, seed=9)
    with attention.forward(step):
        return attention(None, q, k, v, scaling=0.2, s_aux=sinks)[0]


def assert_same(results):
    """The same output, and the same pairs in the same rows; attention where sequences evict."""
    (output, pool), (other_output, other) = results
    torch.testing.assert_close(output, other_output, **NEAR)
    for name in ("positions", "keys", "values", "key_scales", "value_scales"):
        one, two = getattr(pool.rows[0], name), getattr(other.rows[0], name)
        assert one is two is None or torch.equal(one, two), name
    for name in ("mass", "ranks"):
        if getattr(pool.rows[0], name) is not None:
            torch.testing.assert_close(getattr(pool.rows[0], name), getattr(other.rows[0], name), **NEAR)


EITHER = pytest.mark.parametrize(
    ("back_end", "form"),
    [
        *(("reference", form) for form in ("model", "int8/int4")),
        *on_every_set(
            ((form,) for form in ("model", "int8", "int4", "int8/int4")), few=[("int8/int4",), ("int4/model",)]
        ),
    ],
    indirect=["back_end"],
)


@pytest.fixture
def back_end(request):
    """The name of kernels that this machine can have."""
    return required(request.param)


POLICIES = pytest.mark.parametrize("policy", ["far-attention", "average-attention", "decay", "tova", "streaming"])


@EITHER
@POLICIES
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("limits", [(48, 48, 48, 48), (40, 48, 24, 48)])
def test_a_decoding_step_in_one_call_is_what_policy_and_pool_do(back_end, policy, form, window, limits):
    assert_decodes_alike(back_end, policy, form, window, limits, (100, 30, 60, 47))


RANKED = pytest.mark.parametrize("policy", ["window", "r-kv", "keydiff"])


@RANKED
@pytest.mark.parametrize("seen", [(96, 48, 59, 47), (91, 64, 27, 43)])
def test_each_head_is_ranked_when_it_is_due(policy, seen):
    assert_decodes_alike("reference", policy, "int8/int4", None, (40, 48, 24, 48), seen)


def assert_decodes_alike(back_end, policy, form, window, limits, asked):
    found = []
    for kernels, fused in (("reference", False), (back_end, False), (back_end, True)):
        attention, pool = attention_of(Chosen(kernels, "", fused), policy, form, window)
        groups = []
        for group, (slots, seen, rows) in enumerate((((2, 0), (20, 7), (31, 31)), ((4, 0, 2, 3), asked, limits))):
            for slot, count, limit in zip(slots, seen, rows, strict=True):
                fill(pool.layer(group, 0), slot, count, limit)
            groups.append(
                DecodeGroup(
                    rows=slice(2 * group, 2 + 4 * group), group=group, slots=torch.tensor(slots), slots_host=slots,
                    positions=torch.tensor(seen), positions_host=seen, totals=tuple(n + 90 for n in seen),
                    row_limits=torch.tensor(rows), row_limits_host=rows,
                )
            )  # fmt: skip
        batch = DecodeBatch(
            slots=torch.cat([groups[0].slots, 3 + groups[1].slots]), evicting=True,
            positions=torch.cat([one.positions for one in groups]),
            row_limits=torch.cat([one.row_limits for one in groups]),
        )  # fmt: skip
        step = PackedStep(input_ids=None, positions=None, logits_at=0, decode_batch=batch, decode_groups=tuple(groups))
        if fused:
            numbers = (batch.slots, batch.positions, batch.row_limits)
            attention.rank(DecodingSlot(*one) for one in zip(*(each.tolist() for each in numbers), strict=True))
        found.append((attended(attention, step, 6), pool))
    assert_same(found[:2])
    assert_same(found[1:])


@EITHER
@POLICIES
@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize(
    ("start", "tokens", "limit"), [(0, 30, 48), (0, 60, 40), (20, 30, 48), (30, 9, 48), (100, 64, 40)]
)
def test_chunks_read_in_one_call_leave_what_policy_and_pool_leave(back_end, policy, form, start, tokens, limit, window):
    """One that evicts in every head, and one that does so in the smaller alone."""
    found = []
    for fused in (False, True):
        attention, pool = attention_of(Chosen(back_end, "", fused), policy, form, window)
        fill(pool.layer(1, 0), 1, start, limit)
        prompts = (
            PromptChunk(rows=slice(1, 1 + tokens), group=1, slot=1, start=start, total=900, row_limit=limit),
            PromptChunk(rows=slice(1 + tokens, 26 + tokens), group=0, slot=2, start=0, total=30, row_limit=31),
        )
        table = [[1, 1 + tokens], [tokens, 25], [4, 2], [start, 0], [limit, 31], [900, 30]]
        weights, decay = torch.zeros(26 + tokens), torch.ones(2)
        for n, (at, length) in enumerate(((1, tokens), (1 + tokens, 25))):
            of_chunk = attention._policy.query_weights(length, 0)
            weights[at : at + length] = torch.tensor(of_chunk[0]) if of_chunk else 1.0
            decay[n] = attention._policy.decay(length)
        names = ("offsets", "lengths", "slots", "starts", "row_limits", "totals")
        chunks = Chunks(
            **dict(zip(names, map(tuple, table), strict=True)), table=torch.tensor(table),
            query_weights=weights, decay=decay,
        )  # fmt: skip
        step = PackedStep(input_ids=None, positions=None, logits_at=0, chunks=chunks, prompts=prompts)
        found.append((attended(attention, step, 26 + tokens)[:, 1:], pool))
    assert_same(found)


@RANKED
@pytest.mark.parametrize(
    ("start", "tokens", "limit"), [(0, 30, 48), (0, 60, 40), (20, 30, 48), (30, 9, 48), (100, 64, 40)]
)
def test_heads_are_ranked_where_a_chunk_evicts(policy, start, tokens, limit):
    test_chunks_read_in_one_call_leave_what_policy_and_pool_leave(
        "reference", policy, "int8/int4", start, tokens, limit, None
    )


@pytest.mark.parametrize("form", ["model", "int8", "int4"])
def test_a_pool_holds_what_its_layouts_promise_and_empties_and_copies_all_heads(form):
    groups = (((20, 20), 2), *GROUPS)  # in the smallest slots, heads are alike
    _, pool = attention_of(Chosen("reference", "", True), "h2o", form, groups=groups)
    rows, numbers = pool.rows[0], set()
    for slot, capacities in enumerate(rows.capacities):
        for head, capacity in enumerate(capacities):
            begin = int(rows.first[slot, head])
            assert int(rows.capacity[slot, head]) == capacity
            numbers |= set(range(begin, begin + capacity))
    assert numbers == set(range(len(rows.positions)))  # rows of no two heads are the same, and none is nobody's
    assert pool.nbytes == sum(
        count * sum(part.layout.kv_bytes + part.layout.score_bytes for part in pool.layer(group, 0))
        for group, (_, count) in enumerate(groups)
    )
    fill(pool.layer(2, 0), 3, 18, 48)
    pool.copy_state(SlotIndex(2, 3), SlotIndex(0, 1), 18)
    for part, copy in zip(pool.layer(2, 0), pool.layer(0, 0), strict=True):
        assert torch.equal(copy.positions[1, :, :18], part.positions[3, :, :18])
        assert torch.equal(copy.keys.read(1, 18), part.keys.read(3, 18))
    pool.reset(0, 1)
    for part in pool.layer(0, 0):
        assert (part.positions[1] == -1).all()
        assert not part.values.read(1, 18).any()
