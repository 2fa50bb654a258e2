"""What is planned fits, nothing more would, and what is allocated is what was planned."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import answers, as_requests, random_prompts, tiny_engine
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from bmx.compress.policy import CompressionPolicy
from bmx.config import MAX_SLOTS, EngineConfig
from bmx.errors import MemoryLimitError
from bmx.hardware import FreeMemory
from bmx.kernels import reference_mixers as reference
from bmx.kernels.segments import SegmentBatch, Segments
from bmx.kernels.workspace import mixing
from bmx.kv.layout import StateLayout
from bmx.kv.pool import KVPool
from bmx.model.cost_trace import _CostMeter
from bmx.model.loader import prepare
from bmx.model.spec import Costs, LayerSpec, ModelSpec
from bmx.model.spec_settings import under_settings
from bmx.plan.capacities import ENOUGH, MAX_GROUPS, ROW_ALIGNMENT, capacities
from bmx.plan.device import Device
from bmx.plan.memory import Limits, ReadingSlots, SlotGroup, StepSize, limits, memory_needed
from bmx.plan.planner import (
    Length,
    plan,
    plan_record,
    shrunk,
    step_sizes,
)

MB = 10**6
SPEC = ModelSpec(
    name="Imagined",
    layers=tuple(
        LayerSpec(query_heads=8, kv_heads=2, key_dim=64, value_dim=64, window=None, owner=i) for i in range(6)
    ),
    costs=Costs(activation_bytes=10_500, traffic_bytes=60_000, flops=26 * MB, operators=300),
    vocab=10_000,
    max_length=8192,
    weight_bytes=50 * MB,
    head_bytes=10 * MB,
    itemsize=2,
)
HYBRID = replace(
    SPEC,
    states=(
        StateLayout(shape=(3, 500), itemsize=2, recurrent=False),
        StateLayout(shape=(8, 64, 100), itemsize=4, recurrent=True),
    ),
)
STATE_BYTES = 3 * 500 * 2 + 8 * 64 * 100 * 4
POLICY = CompressionPolicy.from_config(EngineConfig(kv_budget=1024, kv_format="model"))
HUGE = CompressionPolicy.from_config(
    EngineConfig(kv_budget=10**6, kv_format="model")
)  # slots of any capacity are no larger than it
FULL = CompressionPolicy.from_config(EngineConfig(kv_policy="none"))
STEP = StepSize(chunk_size=256, max_num_batched_tokens=1024)


def workspace(chunk, rows, slots):
    return 8 * chunk * rows * 4 + 1000 * slots


DEVICE = Device(kind="cpu", runtime=200 * MB, workspace=workspace, slack=10 * MB, share=0.1, mixes_in_place=True)


def layout(capacity):
    return HUGE.layout(SPEC, capacity)


def needed(groups, step=STEP, device=DEVICE):
    return memory_needed(SPEC, layout, groups, step, device)


def of_rows(rows, answer=100):
    """Requests that need slots of so many rows, each with an answer of so many tokens."""
    return [Length(max(1, need - answer), answer, need) for need in rows]


def planned(limits, lengths, step=STEP, device=DEVICE):
    """A plan for requests, or for needs of rows."""
    lengths = [length if isinstance(length, Length) else of_rows([length])[0] for length in lengths]
    return plan(SPEC, layout, limits, lengths, step, device)


def with_one_more(groups):
    """The groups with one more slot of the largest capacity."""
    *others, largest = sorted(groups, key=lambda group: group.capacity)
    return (*others, SlotGroup(largest.capacity, largest.slots + 1))


def log_uniform(low, high, number, seed=0):
    generator = random.Random(seed)
    return [int(math.exp(generator.uniform(math.log(low), math.log(high)))) for _ in range(number)]


def uniform(low, high, number, seed=0):
    generator = random.Random(seed)
    return [generator.randint(low, high) for _ in range(number)]


MIXED = log_uniform(200, 6000, 2000)


# ---- the formula and its inverse ----


@pytest.mark.parametrize("total", [500 * MB, 800 * MB, 3000 * MB])
@pytest.mark.parametrize("rows", [[1024] * 500, log_uniform(50, 1024, 500), [100] * 400 + [1024] * 3], ids=len)
def test_the_plan_fits_and_one_more_slot_would_not(rows, total):
    found = planned(Limits(total=total), rows)
    assert found.memory == needed(found.groups)
    assert found.memory.total <= total
    assert found.slots == len(rows) or needed(with_one_more(found.groups)).total > total
    assert found.layouts == tuple(layout(group.capacity) for group in found.groups)
    assert found.step == STEP
    assert found.limits == Limits(total=total)


@pytest.mark.parametrize("pool", [20 * MB, 100 * MB])
def test_a_limit_for_the_kv_cache_alone_is_kept_too(pool):
    found = planned(Limits(total=10**12, pool=pool), [1024] * 500)
    assert found.memory.pool <= pool < needed(with_one_more(found.groups)).pool


@pytest.mark.parametrize(
    ("total", "pool", "missing"),
    [(10**12, None, 0), (10**12, 10**12, 0), (-1, None, 1), (-1000, 10**12, 1000), (10**12, -5, 5), (-7, -5, 7)],
)
def test_the_missing_bytes_are_those_of_the_tighter_limit(total, pool, missing):
    """Negative limits stand for so much less than what is needed."""
    memory = needed((SlotGroup(1024, 4),))
    total = total if total > 0 else memory.total + total
    pool = pool if pool is None or pool > 0 else memory.pool + pool
    assert Limits(total=total, pool=pool).missing(memory) == missing
    assert Limits(total=total + missing, pool=None if pool is None else pool + missing).missing(memory) == 0


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
    assert memory.states == 0
    assert memory.pool == memory.kv + memory.scores


def test_keys_and_values_are_counted_by_hand():
    memory = needed((SlotGroup(1024, 4), SlotGroup(128, 10)))
    rows = 1024 * 4 + 128 * 10
    assert memory.kv == rows * 6 * 2 * (64 + 64) * 2  # layers, kv heads, key and value dims, bytes
    assert memory.scores == rows * 6 * 2 * 8  # a float32 score and an int32 position


@pytest.mark.parametrize("archive", ["none", "int8"])
def test_states_are_counted_by_hand_and_once_more_for_idle_rows(archive):
    """Every slot that an answer is written on holds them, of prefixes too; a slot to read prompts in does not."""
    policy = CompressionPolicy.from_config(EngineConfig(kv_budget=1024, kv_archive=archive, kv_format="model"))
    groups, prefixes = (SlotGroup(1024, 4), SlotGroup(128, 10)), (SlotGroup(64, 2),)
    reading = ReadingSlots(policy.layout(HYBRID, 256), 3) if policy.archive else None

    def memory(spec):
        layout = partial(policy.answering.layout, spec)
        return memory_needed(spec, layout, groups, STEP, DEVICE, prefixes, reading)

    hybrid, plain = memory(HYBRID), memory(SPEC)
    assert hybrid.states == (4 + 10 + 2 + 1) * STATE_BYTES
    assert replace(hybrid, states=0) == plain
    assert (hybrid.total, hybrid.pool) == (plain.total + hybrid.states, plain.pool + hybrid.states)
    assert hybrid.step == plain.step


def test_each_row_pays_for_its_states_and_compression_does_not_help():
    """Of two plans with the same pairs, the one with states has the slots that are left beside the states."""
    lengths = of_rows([1024] * MAX_SLOTS)

    def slots(spec, config):
        policy = CompressionPolicy.from_config(config, spec)
        served = [Length.of(policy, length.prompt_tokens, length.max_tokens) for length in lengths]
        found = plan(spec, partial(policy.layout, spec), Limits(total=800 * MB), served, STEP, DEVICE)
        assert found.memory.states == (found.slots + 1) * spec.state_bytes
        return found.slots

    heavy = replace(HYBRID, states=HYBRID.states * 10)
    small, full = EngineConfig(kv_budget=128, kv_format="model"), EngineConfig(kv_policy="none")
    plain, hybrid = (slots(spec, small) / slots(spec, full) for spec in (SPEC, heavy))
    assert plain > 2 * hybrid > 2


@pytest.mark.parametrize("pool", [40 * MB, 100 * MB])
def test_a_limit_for_the_kv_cache_holds_for_its_states_too(pool):
    hybrid = partial(POLICY.layout, HYBRID)
    found = plan(HYBRID, hybrid, Limits(total=10**12, pool=pool), of_rows([1024] * 500), STEP, DEVICE)
    one_more = memory_needed(HYBRID, hybrid, with_one_more(found.groups), STEP, DEVICE)
    assert found.memory.states > 0
    assert found.memory.pool <= pool < one_more.pool


def test_where_states_do_not_fit_the_error_names_them_and_the_limit_that_would_do():
    hybrid = partial(POLICY.layout, HYBRID)
    with pytest.raises(MemoryLimitError, match="for the KV cache and states") as error:
        plan(HYBRID, hybrid, Limits(total=10**12, pool=MB // 4), of_rows([16]), STEP, DEVICE)
    enough = int(re.search(r"--kv-cache-memory (\d+)M", error.value.hint)[1]) * MB
    assert plan(HYBRID, hybrid, Limits(total=10**12, pool=enough), of_rows([16]), STEP, DEVICE).slots == 1


def test_a_smaller_plan_and_one_group_alone_keep_their_states():
    """After memory has run out, and where a group is measured alone; a copy of a prefix costs its states too."""
    hybrid = partial(HUGE.layout, HYBRID)
    lengths = [Length(400, 100, rows, shared=64) for rows in [500] * 20 + [900] * 20]
    found = plan(HYBRID, hybrid, Limits(total=10**12, slots=12), lengths, STEP, DEVICE)
    copies = sum(group.slots for group in found.prefix_slots)
    assert copies
    assert found.memory.states == (12 + copies + 1) * STATE_BYTES
    smaller = shrunk(found, HYBRID, hybrid, DEVICE)
    assert smaller.memory.states == (9 + 1) * STATE_BYTES
    assert all(layout.states == HYBRID.states for layout in smaller.layouts)
    alone = found.alone(found.groups[0], found.layouts[0])
    assert alone.layouts[0].states == HYBRID.states


def test_states_in_bfloat16_take_half_and_windows_of_convolutions_stay():
    narrow = under_settings(HYBRID, EngineConfig(state_format="bfloat16"))
    assert narrow.state_bytes == 3 * 500 * 2 + 8 * 64 * 100 * 2
    assert under_settings(narrow, EngineConfig()) == HYBRID
    assert under_settings(SPEC, EngineConfig(state_format="bfloat16")) == SPEC


def test_where_states_are_rounded_answers_depend_on_chunks():
    """Chunks then have the configured size, as where pairs are rounded or evicted."""
    config = EngineConfig(kv_policy="none", state_format="bfloat16")
    assert {size.chunk_size for size in step_sizes(config, "cpu", of_rows([3000]))} == {512}


def test_a_record_says_what_a_slot_holds_of_states():
    def record(spec):
        return plan_record(plan(spec, partial(POLICY.layout, spec), Limits(total=10**12), of_rows([64]), STEP, DEVICE))

    assert "states" not in record(SPEC)
    assert record(HYBRID)["states"] == {"slot_bytes": STATE_BYTES, "format": "float32"}
    narrow = record(under_settings(HYBRID, EngineConfig(state_format="bfloat16")))
    assert narrow["states"]["format"] == "bfloat16"
    windows = record(replace(HYBRID, states=HYBRID.states[:1]))
    assert windows["states"] == {"slot_bytes": 3000, "format": None}


@pytest.mark.parametrize("sequences", [(1, 64), (12, 64), (4, 160), (24, 1)], ids=str)
@pytest.mark.parametrize("shape", [(4, 32, 32), (8, 32, 64), (64, 1, 16)], ids=str)
def test_what_mixers_hold_in_plain_torch_is_planned_and_bounded(shape, sequences):
    """A gated delta net, Mamba-2 and Mamba-1: in prompts of some lengths, and in decoding."""
    (count, length), (heads, rows, columns) = sequences, shape
    tokens = count * length
    slots, begins = torch.arange(count), tuple(range(0, tokens, length))
    batch = SegmentBatch(begins=begins, length=length, slots=slots, kept=True)
    segments = (
        Segments(decode_slots=slots, batches=()) if length == 1 else Segments(decode_slots=None, batches=(batch,))
    )
    states, of_heads = torch.zeros(count + 1, *shape), torch.ones(tokens, heads)
    meter = _CostMeter(SimpleNamespace(device=torch.device("cpu")))
    if rows == columns:
        x = torch.ones(tokens, heads, rows)
        with meter:
            reference.delta_rule(x, x, x, -of_heads, of_heads, states, segments, normalise=True)
    else:
        x, groups = torch.ones(tokens, heads, rows), torch.ones(tokens, 1, columns)
        rate = -torch.ones(heads, columns) if rows == 1 else -torch.ones(heads)
        with meter:
            reference.state_space(x, of_heads, rate, groups, groups, None, states, segments)
    promised = mixing(shape, tokens=tokens, slots=count, in_place=False)
    assert 0.25 * promised < meter.peak < 1.1 * promised


def test_kernels_that_mix_in_place_leave_room_for_more_slots():
    spec = replace(HYBRID, states=(StateLayout(shape=(32, 128, 128), itemsize=4, recurrent=True),))

    def slots(in_place):
        device = replace(DEVICE, mixes_in_place=in_place)
        limits, lengths = Limits(total=800 * MB), of_rows([1024] * 500)
        return plan(spec, partial(POLICY.layout, spec), limits, lengths, STEP, device).slots

    assert slots(True) > 1.5 * slots(False)


def test_states_are_no_part_of_a_budget_in_bytes():
    """A budget says how much of the KV cache stays, and states are none of it."""
    config = EngineConfig(kv_budget="25%bytes")
    assert CompressionPolicy.from_config(config, HYBRID) == CompressionPolicy.from_config(config, SPEC)


@pytest.mark.parametrize("larger", [{"chunk_size": 512}, {"max_num_batched_tokens": 4096}], ids=str)
def test_what_makes_a_step_larger_needs_more_memory(larger):
    assert needed((SlotGroup(1024, 4),), replace(STEP, **larger)).total > needed((SlotGroup(1024, 4),)).total


def test_a_step_of_more_slots_than_batched_tokens_is_counted_in_full():
    """Every decoding sequence is in every step, whatever the token budget says; and a chunk beside them."""
    small = StepSize(chunk_size=256, max_num_batched_tokens=300)
    few, many = (needed((SlotGroup(64, slots),), small) for slots in (20, 2000))
    assert few.activations == 10_500 * 300 + workspace(256, 64 + 256, 20)
    assert many.activations == 10_500 * (2000 + 256) + workspace(256, 64 + 256, 2000)


def test_attention_works_on_the_largest_slot_and_a_chunk_beside_it():
    asked = []

    def note(*sizes):
        asked.append(sizes)
        return 7

    groups = (SlotGroup(16, 3), SlotGroup(900, 1), SlotGroup(30, 5))
    memory = needed(groups, device=replace(DEVICE, workspace=note))
    assert set(asked) == {(256, 900 + 256, 9)}
    assert memory.activations == 10_500 * 1024 + 7


def test_slack_is_a_constant_and_a_share_of_activations_and_logits():
    memory = needed((SlotGroup(1024, 4),))
    assert memory.slack == 10 * MB + int(0.1 * (memory.activations + memory.logits))


def test_logits_are_counted_for_every_slot_and_sampling_for_a_few_at_once():
    one, many, more = (needed((SlotGroup(16, slots),)).logits for slots in (1, 100, 101))
    assert more - many == 10_000 * 2  # another row of the vocabulary, in the model's type
    assert many < 100 * one


@pytest.mark.parametrize(
    ("told", "captured"),
    [
        ({}, True),
        ({"kv_policy": "none"}, True),
        ({"kv_policy": "streaming"}, True),
        ({"enforce_eager": True}, False),
        ({"kv_policy": "keydiff"}, True),
        ({"kv_policy": "lagkv"}, False),
        ({"kv_value_norm": True}, False),
        ({"kv_format": "int8"}, True),
        ({"kv_format": "fp8"}, True),
        ({"kv_protect": "instructions"}, False),
    ],
)
def test_graphs_of_decoding_have_their_place_in_a_gpus_plan(told, captured):
    """They grow with the slots, and are not made where decoding is more than kernels do, or on a CPU."""
    config = EngineConfig(**told)
    step = StepSize(chunk_size=128, max_num_batched_tokens=512)

    def graphs(kind, slots):
        device = Device.of(kind, SPEC, 0, config)
        policy = CompressionPolicy.from_config(config)
        return memory_needed(SPEC, lambda rows: policy.layout(SPEC, rows), [SlotGroup(64, slots)], step, device).graphs

    assert (graphs("cuda", 8) > 0) == captured
    assert (graphs("cuda", 64) > graphs("cuda", 8)) == captured
    assert graphs("cpu", 8) == 0


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_a_device_asks_the_kernels_that_would_run_there(kernels, cpu_kernels):
    """The plain ones make whole matrices of scores, those for a CPU one tile after the other."""
    cpu_kernels(kernels)
    device = Device.of("cpu", SPEC, runtime=123)
    assert (device.kind, device.runtime) == ("cpu", 123)
    scores = 8 * 1024 * 5000 * 2  # of a chunk: heads, queries, keys, bytes
    assert (device.workspace(1024, 5000, 1) > 2 * scores) == (kernels == "reference")
    assert device.workspace(1024, 5000, 400) > device.workspace(1024, 5000, 1)
    assert device.slack > 0
    assert 0 < device.share < 1


def test_experts_that_loading_copies_together_are_slack_on_a_cpu():
    """The pages of the file that they come from stay mapped beside them; a GPU does not see those."""
    merged = replace(SPEC, merged_bytes=30 * MB)
    grown = {kind: Device.of(kind, merged, 0).slack - Device.of(kind, SPEC, 0).slack for kind in ("cpu", "cuda")}
    assert grown == {"cpu": 30 * MB, "cuda": 0}


def test_a_device_counts_with_the_widest_layer():
    narrow, wide = (replace(SPEC.layers[0], query_heads=heads, key_dim=dim) for heads, dim in ((2, 64), (16, 256)))
    of = [
        Device.of("cpu", replace(SPEC, layers=layers), 0).workspace(256, 1000, 4)
        for layers in ((wide, wide), (narrow, wide), (narrow, narrow))
    ]
    assert of[0] == of[1] > of[2]


SAMPLE = """
import resource, torch
from bmx.engine.sampler import SamplingRow as Row, sample
from bmx.kernels.drawing import draw
from bmx.request import SamplingParams
torch.set_num_threads(1)
row = Row(SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.05), 0.5)
sample(torch.randn(2, 60_000), [row] * 2, draw)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sample(torch.randn(64, 60_000), [row] * 64, draw)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in Linux's unit")
def test_sampling_takes_no_more_memory_than_was_planned():
    grown = int(subprocess.run([sys.executable, "-c", SAMPLE], capture_output=True, text=True, check=True).stdout)
    spec = replace(SPEC, vocab=60_000, itemsize=4)
    promised = memory_needed(spec, layout, (SlotGroup(16, 64),), STEP, DEVICE).logits
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


def test_a_tiny_shortage_is_not_rounded_to_zero():
    exact = needed((SlotGroup(1024, 1),)).total
    with pytest.raises(MemoryLimitError) as caught:
        planned(Limits(total=exact - 1000), [1024])
    assert " 0 MB are missing" not in caught.value.message


@pytest.mark.parametrize("config", [{"kv_cache_memory": 1000}, {"memory_limit": 1000}], ids=str)
def test_an_engine_refuses_before_it_answers_a_row(config):
    engine = tiny_engine("llama", **config)
    with pytest.raises(MemoryLimitError, match="MB are missing"):
        next(engine.stream(as_requests(random_prompts([9]))))


# ---- groups of slots ----


@pytest.mark.parametrize("rows", [MIXED, [5], [7, 7, 7], list(range(1, 300)), [1] * 50 + [9000]], ids=len)
def test_each_sequence_belongs_to_one_of_at_most_sixteen_groups_that_holds_it(rows):
    found = capacities(rows)
    assert all(capacity >= need for capacity, need in zip(found, rows, strict=True))
    assert len(set(found)) <= 16
    assert max(found) == max(rows)
    assert found == [min(c for c in found if c >= need) for need in rows]


def of_tokens(policy, prompts, answer=100):
    return [Length(tokens, answer, policy.rows_needed(tokens, answer)) for tokens in prompts]


def lost(found, lengths):
    """Share of the bytes of slots that is lost to the rounding of capacities: each request in its smallest slot."""
    served = [length.rows_needed for length in lengths if length.rows_needed <= found.groups[-1].capacity]
    capacity = [min(g.capacity for g in found.groups if g.capacity >= need) for need in served]
    used, held = (sum(layout(rows).nbytes for rows in sizes) for sizes in (served, capacity))
    assert used / held == pytest.approx(found.fill, abs=1e-9)
    return 1 - used / held


@pytest.mark.parametrize(("spread", "seed"), [(log_uniform, 0), (uniform, 1)])
@pytest.mark.parametrize(("policy", "total"), [(FULL, 1000), (FULL, 20_000), (POLICY, 600), (POLICY, 20_000)])
def test_a_mixed_file_loses_less_than_a_tenth_to_rounding(policy, total, spread, seed):
    """Prompts of 200 to 6,000 tokens, with the full cache and with a budget of 1,024; total in MB."""
    lengths = of_tokens(policy, spread(200, 6000, 2000, seed))
    found = planned(Limits(total=total * MB), lengths)
    assert lost(found, lengths) < 0.10
    assert len(found.groups) <= 16
    assert found.too_large == 0


@pytest.mark.parametrize("spread", [log_uniform, uniform])
def test_slots_of_one_capacity_would_waste_nearly_half(spread):
    """What the groups are for: the same prompts, all in slots of the longest."""
    rows = spread(200, 6000, 2000)
    assert 1 - sum(rows) / (len(rows) * max(rows)) > 0.45


def fewest(rows):
    """The least number of groups, and the rows they take in all, over every choice of capacities."""
    largest = max(rows)
    sizes = sorted({min(-(-need // ROW_ALIGNMENT) * ROW_ALIGNMENT, largest) for need in rows} - {largest})
    for others in range(len(sizes) + 1):
        cuts = [(*cut, largest) for cut in combinations(sizes, others)]
        best = min(sum(min(c for c in cut if c >= need) for need in rows) for cut in cuts)
        if 1 - sum(rows) / best <= ENOUGH or others == len(sizes):
            return others + 1, best
    raise AssertionError


@pytest.mark.parametrize(
    "rows",
    [
        [16 * i for i in (1, 2, 3, 5, 8, 13, 21, 34, 35, 36, 70, 71, 90)],
        [16 * i for i in range(1, 15)],
        [1024] * 40 + [960] * 8 + [200],
        [100, 200, 400, 800, 1600, 3200, 6400],
        [33] * 500 + [6000],
        [3, 5, 7],
    ],
    ids=str,
)
def test_groups_are_as_few_as_possible_on_small_files(rows):
    """Against every choice of capacities, on files small enough to try them."""
    found = capacities(rows)
    assert (len(set(found)), sum(found)) == fewest(rows)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 2000) | st.integers(1, 60), min_size=1, max_size=9))
def test_groups_are_as_few_as_possible_on_random_files(rows):
    found = capacities(rows)
    assert (len(set(found)), sum(found)) == fewest(rows)


def test_where_sixteen_groups_do_not_suffice_there_are_sixteen():
    """Sizes that grow by a quarter, as many rows of slots of each: every one of forty would like its own."""
    sizes = [round(16 * 1.25**i) for i in range(40)]
    rows = [size for size in sizes for _ in range(2 + 16 * 1000 // size)]
    found = capacities(rows)
    assert len(set(found)) == MAX_GROUPS == 16
    assert ENOUGH < 1 - sum(rows) / sum(found) < 0.2


def test_thousands_of_different_lengths_are_cut_as_well_as_a_few():
    rows = [200 + i % 5801 for i in range(40_000)]
    assert 1 - sum(rows) / sum(capacities(rows)) < 0.10


def test_short_prompts_do_not_pay_for_the_budget():
    """200-token prompts beside long ones get slots of about 200 rows, and so more of them fit."""
    rows = [POLICY.rows_needed(tokens, 0) for tokens in [200] * 900 + [5000] * 100]
    found = planned(Limits(total=10**12, pool=300 * MB), rows)
    small, large = sorted(found.groups, key=lambda group: group.capacity)
    assert small.capacity < 220
    assert large.capacity == 1024
    assert small.slots > 5 * large.slots
    assert found.slots > 3 * planned(Limits(total=10**12, pool=300 * MB), [1024] * 1000).slots


def test_slots_are_shared_out_as_the_sequences_are():
    lengths = [Length(100, 28, 128)] * 900 + [Length(100, 28, 1024)] * 100
    found = planned(Limits(total=10**12, slots=100), lengths)
    assert found.groups == (SlotGroup(128, 90), SlotGroup(1024, 10))


@pytest.mark.parametrize("long", [128, 1024])
def test_many_long_answers_get_more_slots_than_as_many_short_ones(long):
    """300 of each; a row stays for a step per chunk and per token of its answer: 199 + 1 against 19 + 1."""
    answers = {128: 19, 1024: 19} | {long: 199}
    lengths = [Length(60, answer, rows) for rows, answer in answers.items() for _ in range(300)]
    found = planned(Limits(total=10**12, slots=110), lengths)
    assert {group.capacity: group.slots for group in found.groups} == {128: 10, 1024: 10} | {long: 100}


def test_slots_are_shared_out_by_chunks_as_well_as_answers():
    """As many rows, as long an answer: one kind reads its prompt in one step, the other in 40."""
    lengths = [Length(256, 10, 100)] * 200 + [Length(40 * 256, 10, 1000)] * 200
    found = planned(Limits(total=10**12, slots=122), lengths)
    assert [group.slots for group in found.groups] == [22, 100]
    chunks_of_all = planned(Limits(total=10**12, slots=122), lengths, replace(STEP, chunk_size=40 * 256))
    assert [group.slots for group in chunks_of_all.groups] == [61, 61]


def test_a_group_never_has_more_slots_than_rows():
    lengths = [Length(10, 1000, 1010)] * 3 + [Length(10, 1, 16)] * 50
    found = planned(Limits(total=10**12, slots=40), lengths)
    assert found.groups == (SlotGroup(16, 37), SlotGroup(1010, 3))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.builds(Length, st.integers(1, 3000), st.integers(1, 500), st.integers(1, 3000)), min_size=1),
    st.integers(1, 60),
)
def test_moving_a_slot_to_another_group_would_not_shorten_the_job(lengths, slots):
    """The group that is busy longest decides how long a job takes. Whichever gave up a slot would be that group."""
    found = planned(Limits(total=10**13, slots=slots), lengths)
    rows, steps = {}, {}
    for length in lengths:
        capacity = min(g.capacity for g in found.groups if g.capacity >= length.rows_needed)
        stay = length.max_tokens + -(-length.prompt_tokens // STEP.chunk_size)
        rows[capacity] = rows.get(capacity, 0) + 1
        steps[capacity] = steps.get(capacity, 0) + stay
    assert found.slots == min(slots, len(lengths))
    busiest = max((steps[g.capacity] / g.slots for g in found.groups if g.slots < rows[g.capacity]), default=0)
    for group in found.groups:
        assert group.slots <= rows[group.capacity]
        assert group.slots == 1 or steps[group.capacity] / (group.slots - 1) >= busiest


def test_a_lone_long_sequence_has_a_slot_among_many_short_ones():
    found = planned(Limits(total=10**12, slots=4), [64] * 1000 + [1024])
    assert max(group.capacity for group in found.groups) == 1024
    assert found.slots == 4


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 15, 16, 17])
def test_with_fewer_slots_than_groups_the_larger_groups_serve_the_small_too(slots):
    lengths = of_tokens(FULL, log_uniform(200, 6000, 2000))
    found = planned(Limits(total=10**12, slots=slots), lengths)
    assert found.slots == slots
    assert len(found.groups) <= slots
    assert found.groups[-1].capacity == max(length.rows_needed for length in lengths)
    lost(found, lengths)  # and fill says so


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    total=st.integers(1, 2000),
    pool=st.none() | st.integers(1, 500),
    slots=st.none() | st.integers(1, 80),
    answer=st.integers(1, 400),
)
def test_whatever_the_needs_and_limits_a_plan_keeps_to_them(rows, total, pool, slots, answer):
    limits = Limits(total=total * MB, pool=pool and pool * MB, slots=slots)
    least = needed((SlotGroup(min(rows), 1),))
    try:
        found = planned(limits, of_rows(rows, answer))
    except MemoryLimitError:
        assert least.total > limits.total or least.pool > (limits.pool or math.inf)
        return
    assert found.memory == needed(found.groups)
    assert found.memory.total <= limits.total
    assert found.memory.pool <= (limits.pool or math.inf)
    assert 1 <= found.slots <= min(len(rows), slots or math.inf)
    assert all(group.slots >= 1 for group in found.groups)
    assert 1 <= len(found.groups) <= 16
    assert [group.capacity for group in found.groups] == sorted({group.capacity for group in found.groups})
    largest = found.groups[-1].capacity
    assert largest in rows
    assert not limits.missing(found.memory)
    most = min(len(rows) - found.too_large, slots or math.inf)
    assert found.slots == most or limits.missing(needed(with_one_more(found.groups)))
    lost(found, of_rows(rows))  # whatever it is, fill says so
    assert found.too_large == sum(need > largest for need in rows)
    for need in set(rows) - set(range(largest + 1)):  # not one of those left out would fit, even alone
        alone = needed((SlotGroup(need, 1),))
        assert alone.total > limits.total or alone.pool > (limits.pool or math.inf)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.integers(300, 2000), st.integers(1, 500))
def test_more_memory_never_means_fewer_slots(rows, total, more):
    """Unless rows are served that were too large before."""
    try:
        before = planned(Limits(total=total * MB), rows)
    except MemoryLimitError:
        return
    after = planned(Limits(total=(total + more) * MB), rows)
    assert after.too_large <= before.too_large
    assert after.slots >= before.slots or after.too_large < before.too_large


# ---- a smaller plan, for when memory ran out ----


def shrinking(made):
    """The plan and all that follow when memory runs out under each."""
    found = [made]
    while found[-1] is not None:
        assert len(found) < 60
        found.append(shrunk(found[-1], SPEC, layout, DEVICE))
    return found[:-1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    slots=st.none() | st.integers(1, 80),
    chunk_size=st.integers(1, 600),
    chunks=st.floats(1, 40),
)
def test_a_plan_shrinks_strictly_down_to_one_slot_and_one_chunk(rows, slots, chunk_size, chunks):
    step = StepSize(chunk_size=chunk_size, max_num_batched_tokens=int(chunk_size * chunks))
    plans = shrinking(planned(Limits(total=10**13, slots=slots), rows, step))
    for larger, smaller in pairwise(plans):
        before, after = ((p.slots, p.step.max_num_batched_tokens) for p in (larger, smaller))
        assert after != before
        assert after[0] <= before[0]
        assert after[1] <= before[1]
        assert smaller.memory.total <= larger.memory.total
        assert smaller.memory.pool < larger.memory.pool or larger.slots == 1
        assert smaller.memory == needed(smaller.groups, smaller.step)
        assert smaller.layouts == tuple(layout(group.capacity) for group in smaller.groups)
        assert smaller.step.chunk_size == chunk_size  # where chunks end decides what is evicted
        assert smaller.groups[-1].capacity == max(rows)
        assert {g.capacity for g in smaller.groups} <= {g.capacity for g in larger.groups}
        assert (smaller.limits, smaller.too_large) == (larger.limits, larger.too_large)
    assert plans[-1].groups == (SlotGroup(max(rows), 1),)
    assert plans[-1].step.max_num_batched_tokens == chunk_size
    assert len(plans) <= 20  # of 80 slots, and of steps of 40 chunks


def test_the_largest_plan_shrinks_to_one_slot_in_few_rounds():
    plans = shrinking(planned(Limits(total=10**13), [16] * 6000))
    assert plans[0].slots == MAX_SLOTS
    assert len(plans) <= 35


def test_a_plan_shrinks_by_a_quarter_of_its_slots_and_half_of_its_step():
    first, second, *_ = shrinking(planned(Limits(total=10**13), [96] * 60 + [1000] * 40))
    assert (first.slots, first.step.max_num_batched_tokens) == (100, 1024)
    assert (second.slots, second.step.max_num_batched_tokens) == (75, 512)
    assert second.groups == (SlotGroup(96, 45), SlotGroup(1000, 30))


def test_fill_is_computed_again_when_groups_are_dropped():
    """Down to one slot of 1,000 rows, the short rows waste most of it."""
    made = planned(Limits(total=10**13, slots=2), [96] * 99 + [1000])
    assert made.fill == 1.0
    assert shrinking(made)[-1].fill == pytest.approx((99 * 96 + 1000) / (100 * 1000))


# ---- how large steps may get ----


def sizes_of(lengths, kind="cpu", **config):
    """(chunk, tokens) of each size of step to choose from."""
    lengths = [Length(prompt, 10, prompt + 10) for prompt in lengths]
    found = step_sizes(EngineConfig(**config), kind, lengths)
    return [(size.chunk_size, size.max_num_batched_tokens) for size in found]


PROMPTS = [[3], [700], [10] * 30, [200, 5000, 900], [6000] * 100]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("config", [{}, {"kv_policy": "none"}, {"chunk_size": 64}, {"max_num_batched_tokens": 2048}])
@pytest.mark.parametrize("prompts", PROMPTS, ids=[f"{len(p)} of {max(p)}" for p in PROMPTS])
def test_no_step_is_larger_than_the_work_and_a_chunk_always_fits(prompts, config, kind):
    found = sizes_of(prompts, kind, **config)
    assert found
    assert len(set(found)) == len(found)
    for chunk, tokens in found:
        assert 1 <= chunk <= max(prompts)
        assert chunk <= tokens <= sum(prompts)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("chunk_size", [None, 64, 500])
def test_the_chunk_size_is_fixed_where_answers_depend_on_it(chunk_size, kind):
    found = sizes_of([6000] * 100, kind, chunk_size=chunk_size)
    assert {chunk for chunk, _ in found} == {chunk_size or 512}
    assert len({tokens for _, tokens in found}) > 1  # the rest of the step is free


def test_the_chunk_size_is_free_without_eviction_unless_it_is_set():
    free = sizes_of([6000] * 100, kv_policy="none")
    assert len({chunk for chunk, _ in free}) > 1
    assert {chunk for chunk, _ in sizes_of([6000] * 100, kv_policy="none", chunk_size=96)} == {96}


@pytest.mark.parametrize("policy", ["average-attention", "none"])
@pytest.mark.parametrize("tokens", [512, 600, 1000, 5000])
def test_max_num_batched_tokens_is_the_size_of_every_step(tokens, policy):
    found = sizes_of([6000] * 100, max_num_batched_tokens=tokens, kv_policy=policy)
    assert {size for _, size in found} == {tokens}
    assert all(chunk <= tokens for chunk, _ in found)


def test_a_gpu_may_take_larger_steps_than_a_cpu():
    largest = {kind: max(tokens for _, tokens in sizes_of([6000] * 100, kind)) for kind in ("cpu", "cuda")}
    assert largest["cuda"] > 2 * largest["cpu"]


def test_step_sizes_fall_from_the_largest_to_one_chunk():
    for kind in ("cpu", "cuda"):
        tokens = [size for _, size in sizes_of([6000] * 100, kind)]
        assert tokens == sorted(tokens, reverse=True)
        assert tokens[-1] == 512


# ---- what may be used ----


FREE = FreeMemory(free=8000 * MB, total=16_000 * MB, source="MemAvailable")


def test_without_a_limit_a_share_of_what_is_free_may_be_used():
    found = limits(EngineConfig(gpu_memory_utilization=0.5), FREE, held=0)
    assert found == Limits(total=4000 * MB, source="50% of what is free, MemAvailable")


def test_memory_that_bmx_holds_already_counts_as_free():
    assert limits(EngineConfig(gpu_memory_utilization=0.5), FREE, held=1000 * MB).total == 4500 * MB


def test_by_default_92_percent_of_the_free_memory_may_be_used():
    found = limits(EngineConfig(), FREE, held=0)
    assert 0.8 * FREE.free < found.total < FREE.free
    assert "92%" in found.source


@pytest.mark.parametrize(("asked", "total"), [(300 * MB, 300 * MB), (10**12, 4000 * MB)])
def test_a_memory_limit_holds_unless_less_is_free(asked, total):
    found = limits(EngineConfig(memory_limit=asked, gpu_memory_utilization=0.5), FREE, held=0)
    assert found.total == total
    assert (found.source == "memory_limit") == (total == asked)
    assert "MemAvailable" in found.source or total == asked


def test_the_limits_of_the_cache_and_of_sequences_are_passed_on():
    assert limits(EngineConfig(kv_cache_memory=5 * MB, max_num_seqs=7), FREE, held=0).pool == 5 * MB
    assert limits(EngineConfig(kv_cache_memory=5 * MB, max_num_seqs=7), FREE, held=0).slots == 7
    assert (limits(EngineConfig(), FREE, held=0).pool, limits(EngineConfig(), FREE, held=0).slots) == (None, None)


def test_both_limits_of_a_configuration_hold_in_its_plan():
    config = EngineConfig(memory_limit=800 * MB, kv_cache_memory=20 * MB, max_num_seqs=3)
    found = planned(limits(config, FREE, held=0), [1024] * 500)
    assert found.memory.total <= 800 * MB
    assert found.memory.pool <= 20 * MB
    assert found.slots == 3
    with pytest.raises(MemoryLimitError, match="memory_limit"):
        planned(limits(replace(config, memory_limit=MB), FREE, held=0), [1024])


# ---- the pool and what it was promised ----

FAMILIES = {
    "llama": "plain",
    "gemma3_text": "sliding-window layers hold a window",
    "gemma3n_text": "layers that share keys hold nothing",
    "qwen3_5_text": "layers without attention keep a state",
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
    promised = memory_needed(spec, lambda rows: POLICY.layout(spec, rows), groups, STEP, DEVICE)
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
    assert {r.id for r in engine.run(requests, made)} == {"0", "1", "2", "3"}
    assert engine.stats.kv_bytes == made.memory.pool
    assert engine.stats.slots == made.slots


def test_a_sequence_longer_than_the_plan_fails_alone():
    engine = tiny_engine("llama", kv_policy="none")
    short, long = as_requests(random_prompts((6, 60)), max_tokens=3)
    made = engine.plan(engine.measure([short]))
    found = {result.id: result for result in engine.run([short, long], made)}
    assert found["1"].error.code == "out_of_memory"
    assert found["0"].token_ids == answers(tiny_engine("llama"), [short])["0"]


def test_what_ranking_takes_beside_fused_steps_is_planned_and_bounded():
    spec = tiny_engine("llama").spec

    def ranking(policy, rows, slots, kind="cuda"):
        return Device.of(kind, spec, 0, EngineConfig(kv_policy=policy)).ranking(rows, slots)

    assert ranking("r-kv", 1000, 100) > ranking("window", 1000, 100) > 0
    assert ranking("r-kv", 1000, 10**6) == ranking("r-kv", 1000, 10**7)
    assert ranking("r-kv", 10**7, 1) == ranking("r-kv", 10**7, 9) > ranking("r-kv", 1000, 10**6)
    assert ranking("far-attention", 1000, 100) == ranking("lagkv", 1000, 100) == 0
    assert ranking("r-kv", 1000, 100, kind="cpu") == 0
