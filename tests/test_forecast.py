"""What a run is said to take: in proportion to rates and work, every token counted; cards by name, rates kept."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.engine.scheduler import Scheduler
from bmx.engine.sequence import Sequence
from bmx.errors import MemoryLimitError, UsageError
from bmx.kernels.registry import CAPABILITIES
from bmx.kv.layout import StateLayout
from bmx.model.spec import Costs, LayerSpec, ModelSpec
from bmx.plan import forecast as forecast_module
from bmx.plan import machine_speed as rates_module
from bmx.plan.cards import CARDS, card_named, card_rates
from bmx.plan.device import Device
from bmx.plan.forecast import fastest, forecast
from bmx.plan.machine_speed import Rates, forget, machine_rates
from bmx.plan.memory import Limits, SlotGroup, StepSize
from bmx.plan.planner import Length, plan
from bmx.request import Request, SamplingParams
from bmx.stats import Stats
from bmx.terminal.reports import summary_lines

MB = 10**6
H, WIDE, D, LAYERS = 1024, 4096, 64, 12  # hidden, intermediate, head_dim
PARAMETERS = LAYERS * H * (2 * H + 2 * 4 * D + 3 * WIDE)
SPEC = ModelSpec(
    name="Imagined",
    layers=tuple(
        LayerSpec(query_heads=16, kv_heads=4, key_dim=D, value_dim=D, window=None, owner=i) for i in range(LAYERS)
    ),
    costs=Costs(activation_bytes=32_768, traffic_bytes=LAYERS * 60 * H, flops=2 * PARAMETERS, operators=300),
    vocab=32_000,
    max_length=8192,
    weight_bytes=2 * (PARAMETERS + 32_000 * H),
    head_bytes=2 * 32_000 * H,
    itemsize=2,
)
RATES = Rates(flops=1e12, bandwidth=5e10, thin_bandwidth=5e10, operator_seconds=2e-6, source="imagined")
STEP = StepSize(chunk_size=512, max_num_batched_tokens=2048)
FULL = CompressionPolicy.from_config(EngineConfig(kv_policy="none"))
SMALL = CompressionPolicy.from_config(EngineConfig(kv_budget=256))
KERNELS = pytest.mark.parametrize("kernels", ["cpu", "reference"])
TILED = CAPABILITIES["cpu"].profile


def requests(number, policy=FULL, seed=0, prompts=(50, 2000), answers=(1, 200)):
    generator = random.Random(seed)
    drawn = [
        (int(math.exp(generator.uniform(*map(math.log, prompts)))), generator.randint(*answers)) for _ in range(number)
    ]
    return [Length(prompt, answer, policy.rows_needed(prompt, answer)) for prompt, answer in drawn]


def planned(lengths, policy=FULL, slots=None, step=STEP, total=10**12):
    def layout(capacity):
        return policy.layout(SPEC, capacity)

    return plan(SPEC, layout, Limits(total=total, slots=slots), lengths, step, Device.of("cpu", SPEC, 200 * MB))


def foreseen(lengths, policy=FULL, slots=20, rates=RATES, kernels="cpu", **others):
    return forecast(SPEC, planned(lengths, policy, slots, **others), lengths, rates, CAPABILITIES[kernels].profile)


def faster(times):
    return Rates(
        flops=times * RATES.flops,
        bandwidth=times * RATES.bandwidth,
        thin_bandwidth=times * RATES.thin_bandwidth,
        operator_seconds=RATES.operator_seconds / times,
        source="",
    )


# ---- rates ----


@KERNELS
def test_twice_the_rates_are_half_the_seconds(kernels):
    lengths = requests(100)
    once, twice = (foreseen(lengths, rates=faster(times), kernels=kernels) for times in (1, 2))
    assert twice.seconds == pytest.approx(once.seconds / 2)
    assert twice.prefill_rate == pytest.approx(2 * once.prefill_rate)
    assert twice.decode_rate == pytest.approx(2 * once.decode_rate)


@pytest.mark.parametrize("name", ["flops", "bandwidth", "thin_bandwidth", "operator_seconds"])
def test_every_rate_counts_and_none_counts_alone(name):
    lengths = requests(100)
    better = getattr(RATES, name) * (0.5 if name == "operator_seconds" else 2)
    before, after = foreseen(lengths).seconds, foreseen(lengths, rates=replace(RATES, **{name: better})).seconds
    assert before / 2 < after < 0.99 * before


def test_prompts_wait_for_products_and_answers_for_memory():
    """Products of a prompt's many tokens use every weight many times; a few decoding tokens must read them all."""
    reading, writing = [Length(2000, 1, 2001)] * 20, [Length(1, 200, 201)] * 20
    products, memory = replace(RATES, flops=2e12), replace(RATES, bandwidth=1e11, thin_bandwidth=1e11)

    def gain(lengths, rates):
        return foreseen(lengths, slots=4).seconds / foreseen(lengths, slots=4, rates=rates).seconds

    assert gain(reading, products) > 1.3 > gain(reading, memory)
    assert gain(writing, memory) > 1.3 > gain(writing, products)


def test_a_prompt_alone_takes_what_its_products_take_at_least():
    """By hand: all parameters times two for each token, nothing else on a machine where nothing else costs anything."""
    free = Rates(flops=1e12, bandwidth=1e30, thin_bandwidth=1e30, operator_seconds=0.0, source="")
    seconds = foreseen([Length(10, 1, 11)], rates=free).seconds
    products = 10 * 2 * PARAMETERS + 2 * 32_000 * H  # the head for one token only
    assert products / 1e12 <= seconds <= 1.01 * products / 1e12


def test_a_decoding_token_reads_all_weights_at_least():
    free = Rates(flops=1e30, bandwidth=1e10, thin_bandwidth=1e10, operator_seconds=0.0, source="")
    seconds = foreseen([Length(1, 51, 52)], rates=free).seconds
    weights = 51 * SPEC.weight_bytes / 1e10
    assert weights <= seconds <= 1.05 * weights


def test_what_is_no_product_takes_the_bandwidth():
    memory = Rates(flops=1e30, bandwidth=1e10, thin_bandwidth=1e10, operator_seconds=0.0, source="")
    seconds = foreseen([Length(100, 1, 101)], rates=memory).seconds
    moved = SPEC.weight_bytes + 100 * SPEC.costs.traffic_bytes
    assert moved / 1e10 <= seconds <= 1.05 * moved / 1e10


def test_states_are_read_and_written_for_each_token_of_an_answer_and_each_chunk(monkeypatch):
    state = StateLayout(shape=(1000, 1000), itemsize=4, recurrent=True)
    chunks, answer = 3, 20  # of each of four rows
    lengths = [Length(chunks * STEP.chunk_size, answer, chunks * STEP.chunk_size + answer)] * 4
    before = foreseen(lengths)
    monkeypatch.setattr(sys.modules[__name__], "SPEC", replace(SPEC, states=(state,)))
    times = 4 * (chunks + answer - 1)  # the last chunk gives the first token
    assert foreseen(lengths).seconds - before.seconds == pytest.approx(times * 2 * state.nbytes / RATES.bandwidth)


def test_every_operator_takes_its_start():
    starts = Rates(flops=1e30, bandwidth=1e30, thin_bandwidth=1e30, operator_seconds=1.0, source="")
    seconds = foreseen([Length(100, 1, 101)], rates=starts).seconds
    assert 300 + LAYERS * 10 <= seconds <= 300 + LAYERS * 100


# ---- work ----


@KERNELS
@pytest.mark.parametrize("times", [2, 5])
def test_more_rows_take_proportionally_longer(times, kernels):
    lengths = requests(200)
    few, many = foreseen(lengths, kernels=kernels), foreseen(lengths * times, kernels=kernels)
    assert many.seconds == pytest.approx(times * few.seconds, rel=0.1)
    assert many.prefill_rate == pytest.approx(few.prefill_rate, rel=0.1)
    assert many.decode_rate == pytest.approx(few.decode_rate, rel=0.1)


def test_longer_prompts_and_longer_answers_take_longer():
    seconds = [foreseen([Length(p, a, p + a)] * 30).seconds for p, a in ((200, 20), (400, 20), (400, 40))]
    assert seconds[0] < seconds[1] < seconds[2]


@KERNELS
@pytest.mark.parametrize("policy", [FULL, SMALL], ids=["full", "small"])
@pytest.mark.parametrize("slots", [1, 7, 100])
def test_every_token_is_accounted_for(slots, policy, kernels):
    """By the rates: reading the prompts takes no more than all seconds, and so does decoding what is left."""
    lengths = requests(60, policy)
    found = foreseen(lengths, policy, slots, kernels=kernels)
    prompts, generated = sum(length.prompt_tokens for length in lengths), sum(length.max_tokens for length in lengths)
    assert generated / found.generated_rate == pytest.approx(found.seconds)
    reading = prompts / found.prefill_rate
    assert reading < found.seconds < reading + generated / found.decode_rate


@pytest.mark.parametrize("policy", [FULL, SMALL], ids=["full", "small"])
@pytest.mark.parametrize("slots", [1, 7, 100])
def test_f_no_speed_of_decoding_is_above_what_reading_weights_and_pairs_allows(slots, policy):
    """By hand: a step of all slots reads the weights once; mixed steps, in which decoding is free, do not count."""
    for lengths in (requests(60, policy), [Length(2000, 100, policy.rows_needed(2000, 100))] * 60):
        found = foreseen(lengths, policy, slots)
        roof = slots / (SPEC.weight_bytes / RATES.thin_bandwidth)
        assert 0 < found.decode_rate <= roof
        assert found.generated_rate <= max(found.decode_rate, found.prefill_rate)


def test_answers_of_one_token_are_all_prompt():
    found = foreseen([Length(100, 1, 101)] * 10)
    assert found.decode_rate == 0
    assert found.generated_rate == pytest.approx(10 / found.seconds)
    assert found.prefill_rate == pytest.approx(1000 / found.seconds)


def test_f_a_run_counts_its_speeds_as_the_forecast_does():
    """By hand: two steps that read, one of them decoding beside, and one that only decodes, of two passes."""
    stats, more = Stats(), {"active": 1, "full_cache_bytes": 0}
    stats.count_step(prompt_tokens=90, decode_tokens=0, sampled=1, rounds=1, seconds=1.0, **more)
    stats.count_step(prompt_tokens=90, decode_tokens=10, sampled=11, rounds=1, seconds=2.0, **more)
    assert (stats.decode_rate, stats.prefill_rate) == (0, 60)
    assert "where no prompt was read" not in speeds_of(stats)
    stats.count_step(prompt_tokens=0, decode_tokens=20, sampled=20, rounds=2, seconds=1.0, **more)
    assert (stats.decode_rate, stats.decode_steps, stats.generated_rate) == (20, 2, 8)
    assert "generated 8 tok/s (32 tokens), decode 20 tok/s where no prompt was read" in speeds_of(stats)


def speeds_of(stats):
    """The line of a run's summary about its speeds."""
    lines = [line.text for line in summary_lines(stats, [planned(requests(1))], None, None)]
    return next(line for line in lines if "tok/s" in line)


def steps_of(scheduler, lengths):
    """The steps that the scheduler takes when all of these wait and no more will come."""
    for i, length in enumerate(lengths):
        scheduler.enqueue(
            Sequence(
                request=Request(id=i, prompt="", params=SamplingParams(max_tokens=length.max_tokens)),
                prompt=[0] * length.prompt_tokens,
                max_tokens=length.max_tokens,
                rows_needed=length.rows_needed,
                end_token_ids=frozenset(),
                tokenizer=None,
            )
        )
    steps = 0
    while True:
        scheduler.admit_waiting(draining=True)
        step = scheduler.schedule()
        if step is None:
            return steps
        scheduler.launched(step)
        scheduler.update(step, [0] * sum(chunk.samples for chunk in step.chunks))
        steps += 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=40),
    slots=st.integers(1, 20),
    chunk_size=st.integers(1, 40),
    more_tokens=st.integers(0, 40),
    policy=st.sampled_from([FULL, CompressionPolicy.from_config(EngineConfig(kv_budget=80))]),
)
def test_a_forecast_takes_as_many_steps_as_the_scheduler_would(sizes, slots, chunk_size, more_tokens, policy):
    """Told by a model whose steps take a second each, whatever is in them."""
    step = StepSize(chunk_size=chunk_size, max_num_batched_tokens=chunk_size + more_tokens)
    lengths = [Length(prompt, answer, policy.rows_needed(prompt, answer)) for prompt, answer in sizes]
    made = planned(lengths, policy, slots, step)
    starting = replace(SPEC, costs=replace(SPEC.costs, operators=10**15))
    only_starts = Rates(flops=1e30, bandwidth=1e30, thin_bandwidth=1e30, operator_seconds=1e-15, source="")
    seconds = forecast(starting, made, lengths, only_starts, TILED).seconds
    assert seconds == pytest.approx(steps_of(Scheduler(made.groups, step), lengths), rel=1e-6)


@KERNELS
def test_attention_to_few_rows_takes_less_than_to_many(kernels):
    """A long prompt in a small slot, and before a model whose layers see a window."""
    long = 20_000
    full = foreseen([Length(long, 1, long)], FULL, kernels=kernels)
    small = foreseen([Length(long, 1, 256)], SMALL, kernels=kernels)
    sliding = replace(SPEC, layers=tuple(replace(layer, window=256) for layer in SPEC.layers))
    lengths = [Length(long, 1, long)]
    windowed = forecast(sliding, planned(lengths), lengths, RATES, CAPABILITIES[kernels].profile)
    assert small.seconds < 0.7 * full.seconds
    assert windowed.seconds == pytest.approx(small.seconds, rel=0.01)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", [FULL, SMALL], ids=["full", "small"])
def test_a_sample_of_a_long_job_stands_for_all_of_it(monkeypatch, policy, seed):
    lengths = requests(1500, policy, seed, prompts=(20, 1500), answers=(1, 60))
    sampled = foreseen(lengths, policy)
    monkeypatch.setattr(forecast_module, "PLAYED_ROWS", 10**9)
    whole = foreseen(lengths, policy)
    assert sampled != whole
    assert sampled.seconds == pytest.approx(whole.seconds, rel=0.1)
    assert sampled.prefill_rate == pytest.approx(whole.prefill_rate, rel=0.1)
    assert sampled.decode_rate == pytest.approx(whole.decode_rate, rel=0.1)


def test_a_sample_stands_for_a_file_that_alternates(monkeypatch):
    """Every other row has a long prompt and a word for an answer, the others the reverse."""
    lengths = [Length(600, 2, 602), Length(20, 60, 80)] * 512
    sampled = foreseen(lengths, slots=4)
    monkeypatch.setattr(forecast_module, "PLAYED_ROWS", 10**9)
    assert sampled.seconds == pytest.approx(foreseen(lengths, slots=4).seconds, rel=0.1)


def test_rows_that_no_slot_holds_take_no_time():
    lengths = requests(40)
    made = planned(lengths, slots=8)
    too_long = [Length(10**5, 10**4, 11 * 10**4)] * 40
    assert forecast(SPEC, made, lengths + too_long, RATES, TILED) == forecast(SPEC, made, lengths, RATES, TILED)


def test_pairs_in_fewer_bits_are_faster_where_kernels_read_them_as_they_lie():
    policy = CompressionPolicy.from_config(EngineConfig(kv_budget=1000, kv_format="int8"))
    plain = replace(policy, key_format="model", value_format="model")
    lengths = requests(60, plain, prompts=(1000, 2000), answers=(200, 200))
    rates = {}
    for name, kept, fused in (("model", plain, True), ("read", policy, True), ("unpacked", policy, False)):
        profile = CAPABILITIES["avx512bf16"].profile_for(SPEC.itemsize, fused)
        made = planned(lengths, kept, slots=20)
        rates[name] = forecast(SPEC, made, lengths, RATES, profile).decode_rate
    assert rates["unpacked"] < rates["model"] < rates["read"]


# ---- what it is for ----


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_where_memory_is_the_limit_a_compressed_cache_is_faster(kernels):
    """The same rows and the same gigabyte: full slots let few sequences share the reading of the weights."""
    total = SPEC.weight_bytes + 700 * MB
    found = {}
    for name, policy in (("full", FULL), ("small", SMALL)):
        lengths = requests(200, policy, prompts=(1000, 4000), answers=(100, 200))
        made = planned(lengths, policy, total=total)
        assert made.too_large == 0
        found[name] = made.slots, forecast(SPEC, made, lengths, RATES, CAPABILITIES[kernels].profile)
    assert found["small"][0] > 3 * found["full"][0]
    assert found["small"][1].seconds < 0.8 * found["full"][1].seconds
    assert found["small"][1].decode_rate > 1.5 * found["full"][1].decode_rate


def test_what_is_left_of_a_slot_after_its_prompt_makes_decoding_faster_and_nothing_else():
    lengths = [Length(4000, 100, 4100)] * 40
    made = planned(lengths, slots=20)
    kept = [SMALL.layout(SPEC, 256)] * len(made.groups)
    before = forecast(SPEC, made, lengths, RATES, TILED)
    after = forecast(SPEC, made, lengths, RATES, TILED, kept)
    assert after.decode_rate > 1.5 * before.decode_rate
    assert after.prefill_rate >= before.prefill_rate
    assert after.seconds < before.seconds


def no_rates():
    raise AssertionError("nobody needs rates here")


def test_the_first_of_plans_with_the_same_slots_is_taken_without_asking_for_rates():
    lengths = requests(30)
    steps = [replace(STEP, max_num_batched_tokens=tokens) for tokens in (4096, 2048)]
    plans = [partial(planned, lengths, slots=4, step=step) for step in steps]
    assert fastest(plans, SPEC, lengths, TILED, no_rates).step == steps[0]


def test_smaller_steps_for_hardly_more_slots_are_not_looked_at():
    lengths = requests(300)
    few, hardly_more, more = (planned(lengths, slots=slots) for slots in (100, 102, 130))
    assert fastest([lambda: few, lambda: hardly_more], SPEC, lengths, TILED, no_rates) is few
    with pytest.raises(AssertionError, match="nobody needs rates"):
        fastest([lambda: few, lambda: more], SPEC, lengths, TILED, no_rates)


def test_the_plan_that_is_foreseen_to_be_the_fastest_is_taken():
    lengths = requests(100)
    plans = {slots: planned(lengths, slots=slots) for slots in (1, 30, 3)}
    chosen = fastest([lambda made=made: made for made in plans.values()], SPEC, lengths, TILED, lambda: RATES)
    seconds = {slots: forecast(SPEC, made, lengths, RATES, TILED).seconds for slots, made in plans.items()}
    assert seconds[30] == min(seconds.values())
    assert chosen is plans[30]


def test_rows_answered_count_more_than_seconds():
    lengths = [Length(10, 5, 15)] * 30 + [Length(2000, 100, 2100)]
    all_of_them = planned(lengths, slots=1)
    without = replace(all_of_them, groups=(SlotGroup(15, 30),), layouts=(FULL.layout(SPEC, 15),), too_large=1)
    assert (
        forecast(SPEC, without, lengths, RATES, TILED).seconds
        < forecast(SPEC, all_of_them, lengths, RATES, TILED).seconds
    )
    plans = [lambda: without, lambda: all_of_them]
    assert fastest(plans, SPEC, lengths, TILED, lambda: RATES) is all_of_them


def test_plans_that_do_not_fit_are_passed_over_and_the_last_error_is_raised_if_none_does():
    lengths = requests(30)
    made = planned(lengths, slots=4)

    def refuse(name):
        raise MemoryLimitError(name)

    plans = [partial(refuse, "first"), lambda: made, partial(refuse, "last")]
    assert fastest(plans, SPEC, lengths, TILED, no_rates) is made
    with pytest.raises(MemoryLimitError, match="last"):
        fastest([plans[0], plans[2]], SPEC, lengths, TILED, no_rates)


# ---- cards ----


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_however_it_is_spelt(card):
    spaced = card.name.replace("-", " ")
    spellings = [card.name, card.name.lower(), spaced, spaced.replace(" ", "")]
    spellings += [f"NVIDIA {spaced}", f"nvidia-{card.name}"]
    if "RTX" in card.name:
        bare = spaced.removeprefix("RTX ")
        spellings += [f"NVIDIA GeForce {spaced}", bare, bare.lower().replace(" ", ""), f"rtx{bare}"]
    if not re.search("-[0-9]+G$", card.name):
        spellings += [f"{spaced} {card.gigabytes}GB", f"{card.name}-{card.gigabytes}g", f"{spaced} {card.gigabytes}"]
    assert {card_named(spelling).name for spelling in spellings} == {card.name}


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("h100", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("rtx-4090", "RTX-4090"),
        ("a100-80g", "A100-80G"),
        ("A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("4090", "RTX-4090"),
        ("a10g", "A10G"),
        ("A6000", "RTX-A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("h100-80g", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("h100 80gb pcie", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA A100 80GB PCIe", "A100-80G"),
        ("Tesla V100-SXM2-16GB", "V100-16G"),
        ("4060 ti 16gb", "RTX-4060-Ti"),
        ("3090", "RTX-3090"),
        ("5090", "RTX-5090"),
        ("Tesla T4", "T4"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("rtx pro 6000", "RTX-PRO-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX-PRO-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
    ],
)
def test_f_a_card_by_its_usual_names(spelling, name):
    assert card_named(spelling).name == name


@pytest.mark.parametrize("name", ["A100", "v100", "NVIDIA A100 PCIe"])
def test_an_ambiguous_name_is_refused_with_the_names_there_are(name):
    with pytest.raises(UsageError, match="several cards") as caught:
        card_named(name)
    assert re.search("[AV]100-[0-9]+G, [AV]100-[0-9]+G$", caught.value.message)
    assert all(card.name in caught.value.hint for card in CARDS)


@pytest.mark.parametrize("name", ["MI300X", "H100 twin", "GTX 1080", "nothing", "rtx", "a", "", "80G", "L4 80G"])
def test_an_unknown_name_is_refused_with_the_names_there_are(name):
    with pytest.raises(UsageError, match="no card") as caught:
        card_named(name)
    assert name in caught.value.message
    assert all(card.name in caught.value.hint for card in CARDS)
    assert "--gpu-memory" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("H1000", "H100"), ("rtx 4090 ti", "RTX-4090"), ("L40X", "L40"), ("3O90", "RTX-3090"), ("A600", "RTX-A6000")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(UsageError, match="no card") as caught:
        card_named(name)
    assert nearest in re.match("perhaps (.*); known are A2", caught.value.hint)[1].split(" or ")


@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [
        *(("T4", 15360), ("L4", 23034), ("A10", 23028), ("A10G", 23028), ("L40S", 46068), ("A100-40G", 40960)),
        *(("A100-80G", 81920), ("H100", 81559), ("H200", 143771), ("RTX-4090", 24564), ("RTX-PRO-6000", 97887)),
    ],
)
def test_a_card_has_what_nvidia_smi_shows_but_for_what_the_driver_takes(name, mebibytes):
    assert mebibytes - 1024 < card_named(name).memory / 2**20 < mebibytes - 200


@pytest.mark.parametrize("name", ["RTX 4060", "RTX 4090 Laptop GPU", "A100 64GB", "RTX 3060 8GB"])
def test_a_card_is_not_mistaken_for_another_whose_name_goes_on(name):
    """An RTX 4060 has half the memory of the RTX 4060 Ti listed, a laptop's RTX 4090 two thirds of the desktop's."""
    with pytest.raises(UsageError):
        card_named(name)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_f_a_card_offers_less_memory_than_its_name_says(card):
    """ECC and the driver take their share; the data sheet's gigabytes are powers of two, or of ten."""
    assert 0.9 * card.gigabytes * 10**9 < card.memory < card.gigabytes * 2**30
    assert card.memory % 2**20 == pytest.approx(0, abs=2**20)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_reaches_less_than_its_data_sheet_says_and_most_of_it(card):
    found = card_rates(card)
    assert 0.4 * card.flops < found.flops < card.flops
    assert 0.6 * card.bandwidth < found.bandwidth < card.bandwidth
    assert 0 < found.operator_seconds < 1e-4
    assert card.name in found.source


# ---- rates of this machine ----


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The cache in a folder of its own, and a measurement that notes what it was asked."""
    calls = []

    def measure(device, dtype):
        calls.append((device, dtype))
        return replace(RATES, flops=len(calls) * 1e12)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates_module, "measure", measure)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return calls


def cached(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


DAY = 24 * 3600
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the cache has another place")


@linux
def test_a_machine_is_measured_once_and_its_rates_are_kept(measured, tmp_path):
    first = machine_rates("cpu", "bfloat16", "a chip")
    assert machine_rates("cpu", "bfloat16", "a chip") == first
    assert measured == [("cpu", "bfloat16")]
    (file,) = cached(tmp_path)
    assert json.loads(file.read_text()) == asdict(first)


@linux
@pytest.mark.parametrize(
    ("load", "age", "times"),
    [(0.0, 6 * DAY, 1), (0.0, 8 * DAY, 2), (0.0, -DAY, 2), (1e3, 300, 1), (1e3, 1200, 2)],
    ids=["idle, this week", "idle, long ago", "idle, from the future", "busy, just now", "busy, a while ago"],
)
def test_f_rates_are_measured_again_after_a_week_and_sooner_where_the_machine_was_busy(
    measured, monkeypatch, tmp_path, load, age, times
):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    first = machine_rates("cpu", "bfloat16", "a chip")
    assert ("busy" in first.source) == bool(load)
    (file,) = cached(tmp_path)
    os.utime(file, times=(time.time() - age,) * 2)
    machine_rates("cpu", "bfloat16", "a chip")
    assert len(measured) == times


@linux
def test_every_device_and_type_is_measured_for_itself(measured, tmp_path):
    asked = [
        ("cpu", "bfloat16", "a chip"),
        ("cpu", "float32", "a chip"),
        ("cuda", "bfloat16", "a card"),
        ("cuda", "bfloat16", "another card"),
        ("cuda", "bfloat16", "a chip"),
    ]
    found = [machine_rates(*what) for what in asked]
    assert measured == [what[:2] for what in asked]
    assert [machine_rates(*what) for what in asked] == found
    assert len(cached(tmp_path)) == 5


@linux
def test_with_other_cores_the_same_chip_is_measured_anew(measured, monkeypatch):
    machine_rates("cpu", "float32", "a chip")
    monkeypatch.setattr("bmx.hardware.usable_cores", lambda: 10_000)
    machine_rates("cpu", "float32", "a chip")
    assert len(measured) == 2


@linux
@pytest.mark.parametrize("name", ["", "Intel(R) Xeon(R) @ 2.1GHz / ../..", "\N{GREEK SMALL LETTER MU}chip"])
def test_a_machine_may_have_any_name(measured, tmp_path, name):
    first = machine_rates("cpu", "float32", name)
    assert machine_rates("cpu", "float32", name) == first
    assert [path.parent for path in cached(tmp_path)] == [tmp_path / "cache/bmx/rates"]


@linux
def test_what_is_forgotten_is_measured_anew(measured):
    forget("cpu", "float32", "a chip")  # nothing yet
    for device in ("cpu", "cuda"):
        machine_rates(device, "float32", "a chip")
    forget("cpu", "float32", "a chip")
    machine_rates("cuda", "float32", "a chip")
    assert len(measured) == 2
    machine_rates("cpu", "float32", "a chip")
    assert len(measured) == 3


BROKEN = {
    "empty": b"",
    "cut off": b'{"flops": 1e12, "bandwi',
    "no text": b"\xff\xfe\x00\x80",
    "no object": b"[]",
    "null": b"null",
    "a key too few": b'{"flops": 1e12, "bandwidth": 1e10, "source": ""}',
    "a key too many": b'{"flops": 1, "bandwidth": 1, "operator_seconds": 1, "source": "", "more": 1}',
    "no number": b'{"flops": null, "bandwidth": 1e10, "operator_seconds": 1e-6, "source": ""}',
    "nothing a second": b'{"flops": 0, "bandwidth": 0, "operator_seconds": 0, "source": ""}',
}


@linux
@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_cache_is_measured_anew_and_mended(measured, tmp_path, content):
    machine_rates("cpu", "float32", "a chip")
    cached(tmp_path)[0].write_bytes(content)
    again = machine_rates("cpu", "float32", "a chip")
    assert again.flops == 2e12
    assert machine_rates("cpu", "float32", "a chip") == again
    assert len(measured) == 2


@linux
@pytest.mark.parametrize("obstacle", ["cache", "cache/bmx", "cache/bmx/rates"])
def test_where_nothing_can_be_kept_rates_are_measured_each_time(measured, tmp_path, obstacle):
    """A file lies where a folder should be."""
    (tmp_path / obstacle).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / obstacle).write_text("")
    assert machine_rates("cpu", "float32", "a chip").flops == 1e12
    assert machine_rates("cpu", "float32", "a chip").flops == 2e12


@linux
def test_a_folder_in_place_of_the_file_is_survived(measured, tmp_path):
    machine_rates("cpu", "float32", "a chip")
    (file,) = cached(tmp_path)
    file.unlink()
    file.mkdir()
    assert machine_rates("cpu", "float32", "a chip").flops == 2e12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rates_measured_here_can_be_those_of_a_machine(dtype):
    found = rates_module.measure("cpu", dtype)
    assert 1e8 < found.flops < 1e16
    assert 1e8 < found.bandwidth < 1e14
    assert 1e-8 < found.operator_seconds < 1e-2
    assert "measured" in found.source


# ---- without torch ----


@pytest.mark.parametrize(
    "module", ["bmx.plan.forecast", "bmx.plan.planner", "bmx.plan.machine_speed", "bmx.compress.policy"]
)
def test_plans_and_forecasts_need_no_torch(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'triton'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


WHOLE = """
import sys
from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.kernels.registry import CAPABILITIES
from bmx.plan.forecast import forecast
from bmx.kv.layout import StateLayout
from bmx.model.spec import Costs, LayerSpec, ModelSpec
from bmx.plan.device import Device
from bmx.plan.memory import Limits, StepSize
from bmx.plan.planner import Length, plan
from bmx.plan.cards import card_named, card_rates
policy = CompressionPolicy.from_config(EngineConfig())
layer = LayerSpec(query_heads=4, kv_heads=4, key_dim=64, value_dim=64, window=None, owner=0)
costs = Costs(activation_bytes=10**4, traffic_bytes=10**4, flops=10**7, operators=100)
spec = ModelSpec(name="", layers=(layer,), costs=costs, vocab=100, max_length=8192, weight_bytes=10**7,
                 head_bytes=10**5, itemsize=2)
lengths, step = [Length(3000, 9, 1024)] * 9, StepSize(chunk_size=512, max_num_batched_tokens=512)
device = Device.of("cuda", spec, 0)
made = plan(spec, lambda rows: policy.layout(spec, rows), Limits(total=10**9), lengths, step, device)
assert forecast(spec, made, lengths, card_rates(card_named("h100")), CAPABILITIES["reference"].profile).seconds > 0
print(*sorted({"torch", "transformers", "triton"} & set(sys.modules)))
"""


def test_a_whole_plan_and_its_forecast_load_no_torch():
    done = subprocess.run([sys.executable, "-c", WHOLE], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
