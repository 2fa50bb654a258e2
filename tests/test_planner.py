"""What is planned fits, nothing more would, and what is allocated is what was planned."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import answers, as_requests, random_prompts, tiny_engine
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.errors import MemoryLimitError
from bmx.kv.pool import KVPool
from bmx.model.loader import prepare
from bmx.model.spec import LayerSpec, ModelSpec
from bmx.planner import MAX_SLOTS, Limits, SlotGroup, capacities, memory_needed, plan

MB = 10**6
LAYER = LayerSpec(query_heads=8, kv_heads=2, key_dim=64, value_dim=64, window=None, owner=0)
SPEC = ModelSpec(
    name="Imagined",
    layers=tuple(
        LayerSpec(query_heads=8, kv_heads=2, key_dim=64, value_dim=64, window=None, owner=i) for i in range(6)
    ),
    hidden=512,
    intermediate=1024,
    vocab=10_000,
    max_length=8192,
    weight_bytes=50 * MB,
    itemsize=2,
)
POLICY = CompressionPolicy.from_config(EngineConfig(kv_budget=1024))
SIZES = {"chunk_size": 256, "max_num_batched_tokens": 1024, "runtime": 200 * MB}


def workspace(chunk, rows, slots=1):
    return 8 * chunk * rows * 4


def layout(capacity):
    return POLICY.layout(SPEC, capacity)


def needed(groups, **sizes):
    return memory_needed(SPEC, layout, groups, workspace=workspace, **SIZES | sizes)


def planned(limits, rows, **sizes):
    return plan(SPEC, layout, limits, rows, workspace=workspace, **SIZES | sizes)


def with_one_more(groups):
    """The groups with one more slot of the largest capacity."""
    *others, largest = sorted(groups, key=lambda group: group.capacity)
    return (*others, SlotGroup(largest.capacity, largest.slots + 1))


def log_uniform(low, high, number, seed=0):
    generator = random.Random(seed)
    return [int(math.exp(generator.uniform(math.log(low), math.log(high)))) for _ in range(number)]


MIXED = log_uniform(200, 6000, 2000)


# ---- the formula and its inverse ----


@pytest.mark.parametrize("total", [500 * MB, 800 * MB, 3000 * MB])
@pytest.mark.parametrize("rows", [[1024] * 500, log_uniform(50, 1024, 500), [100] * 400 + [1024] * 3], ids=len)
def test_the_plan_fits_and_one_more_slot_would_not(rows, total):
    found = planned(Limits(total=total), rows)
    assert found.memory == needed(found.groups)
    assert found.memory.total <= total
    assert found.slots == len(rows) or needed(with_one_more(found.groups)).total > total


@pytest.mark.parametrize("pool", [20 * MB, 100 * MB])
def test_a_limit_for_the_kv_cache_alone_is_kept_too(pool):
    found = planned(Limits(total=10**12, pool=pool), [1024] * 500)
    assert found.memory.pool <= pool < needed(with_one_more(found.groups)).pool


def test_the_smaller_of_both_limits_decides():
    rows = [1024] * 500
    both = planned(Limits(total=800 * MB, pool=20 * MB), rows)
    assert both.groups == planned(Limits(total=10**12, pool=20 * MB), rows).groups
    roomy = planned(Limits(total=800 * MB, pool=10**12), rows)
    assert roomy.groups == planned(Limits(total=800 * MB), rows).groups
    assert both.slots < roomy.slots


@pytest.mark.parametrize("most", [1, 2, 3, 7, 40])
def test_a_limit_of_slots_is_kept_and_used_up(most):
    found = planned(Limits(total=10**12, slots=most), log_uniform(50, 1024, 300))
    assert found.slots == most


def test_there_are_never_more_slots_than_sequences():
    assert planned(Limits(total=10**12), [100, 1024, 300]).slots == 3


def test_there_are_never_more_slots_than_a_step_can_use():
    assert planned(Limits(total=10**13), [16] * 6000).slots == MAX_SLOTS


def test_the_total_is_the_sum_of_its_items():
    memory = needed((SlotGroup(1024, 4), SlotGroup(128, 10)))
    assert memory.runtime == 200 * MB
    assert memory.weights == 50 * MB
    items = (memory.activations, memory.logits, memory.kv, memory.scores, memory.slack)
    assert all(item > 0 for item in items)
    assert memory.total == memory.runtime + memory.weights + sum(items)
    assert memory.pool == memory.kv + memory.scores


def test_keys_and_values_are_counted_by_hand():
    memory = needed((SlotGroup(1024, 4), SlotGroup(128, 10)))
    rows = 1024 * 4 + 128 * 10
    assert memory.kv == rows * 6 * 2 * (64 + 64) * 2  # layers, kv heads, key and value dims, bytes
    assert memory.scores == rows * 6 * 2 * 8  # a float32 score and an int32 position


@pytest.mark.parametrize(
    "more", [{"chunk_size": 512}, {"max_num_batched_tokens": 4096}, {"runtime": 300 * MB}], ids=str
)
def test_what_makes_a_step_larger_needs_more_memory(more):
    assert needed((SlotGroup(1024, 4),), **more).total > needed((SlotGroup(1024, 4),)).total


def test_a_step_of_more_slots_than_batched_tokens_is_counted_in_full():
    """Every decoding sequence is in every step, whatever the token budget says."""
    few, many = (needed((SlotGroup(64, slots),), max_num_batched_tokens=300) for slots in (20, 2000))
    assert many.activations > 3 * few.activations


SAMPLE = """
import resource, torch
from bmx.engine.sampler import Row, sample
from bmx.request import SamplingParams
torch.set_num_threads(1)
row = Row(SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.05), 0.5)
sample(torch.randn(2, 150_000), [row] * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sample(torch.randn(64, 150_000), [row] * 64)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in Linux's unit")
def test_sampling_takes_no_more_memory_than_was_planned():
    grown = int(subprocess.run([sys.executable, "-c", SAMPLE], capture_output=True, text=True, check=True).stdout)
    spec = replace(SPEC, vocab=150_000, itemsize=4)
    promised = memory_needed(spec, layout, (SlotGroup(16, 64),), workspace=workspace, **SIZES).logits
    assert grown <= 1.1 * promised


# ---- a limit too small ----


@pytest.mark.parametrize(
    ("limits", "what"),
    [(Limits(total=100 * MB, source="memory_limit"), "in all"), (Limits(total=10**12, pool=MB), "for the KV cache")],
)
def test_a_limit_too_small_for_one_sequence_names_the_missing_megabytes(limits, what):
    one = needed((SlotGroup(1024, 1),))
    missing = one.pool - limits.pool if limits.pool else one.total - limits.total
    with pytest.raises(MemoryLimitError) as caught:
        planned(limits, [1024])
    assert f"{math.ceil(missing / MB):,} MB are missing" in caught.value.message
    assert what in caught.value.message
    assert limits.source in caught.value.message
    assert "--kv-budget" in caught.value.hint
    assert caught.value.exit_code == 4


def test_with_the_missing_megabytes_added_it_fits():
    with pytest.raises(MemoryLimitError) as caught:
        planned(Limits(total=100 * MB), [1024])
    missing = int(re.search(r"([\d,]+) MB are missing", caught.value.message)[1].replace(",", ""))
    assert planned(Limits(total=(100 + missing + 1) * MB), [1024]).slots == 1


def test_a_tiny_shortage_is_not_called_none():
    exact = needed((SlotGroup(1024, 1),)).total
    with pytest.raises(MemoryLimitError) as caught:
        planned(Limits(total=exact - 1000), [1024])
    assert " 0 MB are missing" not in caught.value.message


@pytest.mark.parametrize("config", [{"kv_cache_memory": 1000}, {"memory_limit": 1000}], ids=str)
def test_an_engine_refuses_before_it_answers_a_row(config):
    engine = tiny_engine("llama", **config)
    with pytest.raises(MemoryLimitError, match="MB are missing"):
        next(engine.generate(as_requests(random_prompts([9]))))


# ---- groups of slots ----


@pytest.mark.parametrize("rows", [MIXED, [5], [7, 7, 7], list(range(1, 300)), [1] * 50 + [9000]], ids=len)
def test_each_sequence_belongs_to_one_of_at_most_four_groups_that_holds_it(rows):
    found = capacities(rows)
    assert all(capacity >= need for capacity, need in zip(found, rows, strict=True))
    assert len(set(found)) <= 4
    assert max(found) == max(rows)


def waste(found, rows):
    return 1 - sum(rows) / sum(found)


@pytest.mark.parametrize("seed", range(5))
def test_four_groups_waste_well_under_half_of_what_one_does(seed):
    """Prompts of 200 to 6,000 tokens, log-uniform, full cache: 28 % of the rows with four groups, 71 % with one.

    Less is not to be had with four (see the next test); eight would waste 15 %, twelve 10 %.
    """
    rows = log_uniform(200, 6000, 2000, seed)
    assert waste(capacities(rows), rows) < 0.30
    assert waste([max(rows)] * len(rows), rows) > 0.70


@pytest.mark.parametrize("seed", range(5))
def test_with_a_budget_a_mixed_file_wastes_less_than_fifteen_percent(seed):
    """The same prompts under the default budget of 1,024: most of them fill their slots."""
    rows = [POLICY.rows_needed(tokens) for tokens in log_uniform(200, 6000, 2000, seed)]
    assert waste(capacities(rows), rows) < 0.15


def test_the_cut_is_the_best_there_is():
    """Against all ways to choose four capacities, on a file small enough to try them."""
    rows = [16 * i for i in (1, 2, 3, 5, 8, 13, 21, 34, 35, 36, 70, 71, 90)]
    best = min(
        sum(min(c for c in (*cut, rows[-1]) if c >= need) for need in rows)
        for cut in ((a, b, c) for a in rows for b in rows for c in rows)
    )
    assert sum(capacities(rows)) == best


def test_short_prompts_do_not_pay_for_the_budget():
    """200-token prompts beside long ones get slots of about 200 rows, and so more of them fit."""
    rows = [POLICY.rows_needed(tokens) for tokens in [200] * 900 + [5000] * 100]
    found = planned(Limits(total=10**12, pool=300 * MB), rows)
    small, large = sorted(found.groups, key=lambda group: group.capacity)
    assert small.capacity < 220
    assert large.capacity == 1024
    assert small.slots > 5 * large.slots
    assert found.slots > 3 * planned(Limits(total=10**12, pool=300 * MB), [1024] * 1000).slots


def test_slots_are_shared_out_as_the_sequences_are():
    found = planned(Limits(total=10**12, slots=100), [128] * 900 + [1024] * 100)
    assert found.groups == (SlotGroup(128, 90), SlotGroup(1024, 10))


def test_a_lone_long_sequence_has_a_slot_among_many_short_ones():
    found = planned(Limits(total=10**12, slots=4), [64] * 1000 + [1024])
    assert max(group.capacity for group in found.groups) == 1024
    assert found.slots == 4


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    total=st.integers(1, 2000),
    pool=st.none() | st.integers(1, 500),
    slots=st.none() | st.integers(1, 80),
)
def test_whatever_the_needs_and_limits_a_plan_keeps_to_them(rows, total, pool, slots):
    limits = Limits(total=total * MB, pool=pool and pool * MB, slots=slots)
    least = needed((SlotGroup(min(rows), 1),))
    try:
        found = planned(limits, rows)
    except MemoryLimitError:
        assert least.total > limits.total or least.pool > (limits.pool or math.inf)
        return
    assert found.memory == needed(found.groups)
    assert found.memory.total <= limits.total
    assert found.memory.pool <= (limits.pool or math.inf)
    assert 1 <= found.slots <= min(len(rows), slots or math.inf)
    assert all(group.slots >= 1 for group in found.groups)
    assert 1 <= len(found.groups) <= 4
    largest = max(group.capacity for group in found.groups)
    assert largest in rows
    assert found.too_large == sum(need > largest for need in rows)
    for need in set(rows) - set(range(largest + 1)):  # not one of those left out would fit, even alone
        alone = needed((SlotGroup(need, 1),))
        assert alone.total > limits.total or alone.pool > (limits.pool or math.inf)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.integers(300, 2000), st.integers(1, 500))
def test_more_memory_never_means_fewer_slots(rows, total, more):
    few = Limits(total=total * MB)
    try:
        before = planned(few, rows)
    except MemoryLimitError:
        return
    assert planned(Limits(total=(total + more) * MB), rows).slots >= before.slots


# ---- the pool and what it was promised ----

FAMILIES = {
    "llama": "plain",
    "gemma3_text": "sliding-window layers hold a window",
    "gemma3n_text": "layers that share keys hold nothing",
    "deepseek_v3": "keys wider than values",
    "mimo_v2_flash": "other heads in sliding layers",
}
GROUPS = {
    "one": (SlotGroup(40, 3),),
    "three": (SlotGroup(5, 4), SlotGroup(16, 1), SlotGroup(64, 2)),
}


@cache
def spec_of(family, dtype):
    return prepare(tiny_model(family).to(dtype)).spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pool_takes_the_bytes_that_were_planned(family, groups, dtype):
    spec = spec_of(family, dtype)
    promised = memory_needed(spec, lambda rows: POLICY.layout(spec, rows), groups, workspace=workspace, **SIZES)
    pool = KVPool(
        tuple(POLICY.layout(spec, group.capacity) for group in groups),
        tuple(group.slots for group in groups),
        dtype,
        torch.device("cpu"),
    )
    assert pool.nbytes == promised.kv + promised.scores


def test_layers_that_slide_or_share_take_less():
    plain, sliding = (POLICY.layout(spec_of(name, torch.float32), 64) for name in ("llama", "gemma3_text"))
    assert {layer.capacity for layer in plain.layers} == {64}
    assert {layer.capacity for layer in sliding.layers} == {8, 64}
    sharing = POLICY.layout(spec_of("gemma3n_text", torch.float32), 64)
    owners = {layer.owner for layer in sharing.layers}
    assert len(owners) < len(sharing.layers)
    assert sharing.nbytes == sum(sharing.layers[i].kv_bytes + sharing.layers[i].score_bytes for i in owners)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_holds_the_bytes_of_its_plan(family):
    engine = tiny_engine(family, kv_budget=32, kv_recent=4, chunk_size=16)
    requests = as_requests(random_prompts((5, 40, 70, 12)), max_tokens=3)
    made = engine.plan(engine.measure(requests))
    assert {r.id for r in engine.generate(requests, made)} == {"0", "1", "2", "3"}
    assert engine.stats.kv_bytes == made.memory.pool
    assert engine.stats.slots == made.slots


def test_a_sequence_longer_than_the_plan_fails_alone():
    engine = tiny_engine("llama", kv_policy="none")
    short, long = as_requests(random_prompts((6, 60)), max_tokens=3)
    made = engine.plan(engine.measure([short]))
    found = {result.id: result for result in engine.generate([short, long], made)}
    assert found["1"].error.code == "out_of_memory"
    assert found["0"].token_ids == answers(tiny_engine("llama"), [short])["0"]
