"""Pairs in fewer bits: as near as their steps allow, independent of each other, exact where they are new, and small."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import answers, as_requests, random_prompts, reference_answers, tiny_engine
from families import tiny_model

from bmx.compress.kernel_orders import left_to_kernels
from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.errors import UsageError
from bmx.job.fingerprint import differences, fingerprint
from bmx.kernels import registry
from bmx.kernels.formats import FORMATS, KEY_GROUP, MODEL, Stored, hadamard
from bmx.kv.layout import LayerLayout
from bmx.kv.pool import KVPool, LayerSlots
from bmx.kv.stores import RowStore
from bmx.kv_formats import KV_FORMATS
from bmx.plan.device import Device
from bmx.plan.planner import Length, plan_record
from bmx.policies import POLICIES
from bmx.run_config import RunConfig

CPU = torch.device("cpu")
FEW = ("fp8", "int8", "int4", "int2")
LEVELLED = ("int8", "int4", "int2")
HALF = 2.0**-11  # relative rounding of a float16
PAIRS = tuple(map("/".join, product((MODEL, *FEW), (MODEL, *FEW))))  # of keys and values
LEVELS = {"int8": 254, "int4": 15, "int2": 3}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def back(name, vectors, dtype=torch.float32):
    if name == MODEL:
        return vectors.to(dtype)
    form = FORMATS[name]
    return form.decode(*form.encode(vectors), dtype)[..., : vectors.shape[-1]]


def store_of(name, shape, dim):
    return RowStore(Stored.zeros(name, shape, dim, torch.float32, CPU), dim, torch.float32, CPU)


def step(name, vectors):
    """Between two levels of each number: of the range that its vector's largest number, or its group's ends, span."""
    if name == "int2":
        ends = [group.aminmax(dim=-1, keepdim=True) for group in vectors.split(32, dim=-1)]
        widths = [(high - low).expand(*vectors.shape[:-1], 32) / LEVELS[name] for low, high in ends]
        return torch.cat(widths, dim=-1)[..., : vectors.shape[-1]]
    if name == "int8":
        return 2 * vectors.abs().amax(-1, keepdim=True) / LEVELS[name]
    return (vectors.amax(-1, keepdim=True) - vectors.amin(-1, keepdim=True)) / LEVELS[name]


def slack(vectors):
    """What float16 scales and offsets add to half a step."""
    return 2 * HALF * vectors.abs().amax(-1, keepdim=True) + 1e-6


def test_every_format_is_a_choice_of_the_setting():
    assert (MODEL, *FORMATS) == KV_FORMATS
    assert set(FORMATS) == set(FEW)


# ---- one vector ----


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("dim", [1, 2, 5, 8, 33, 64])
@pytest.mark.parametrize("name", LEVELLED)
def test_no_number_is_off_by_more_than_half_a_step(name, dim, scale):
    vectors = drawn(7, 3, dim) * scale + 0.4 * scale
    errors = (back(name, vectors) - vectors).abs()
    assert (errors <= step(name, vectors) / 2 + slack(vectors)).all()


@pytest.mark.parametrize("name", LEVELLED)
def test_steps_are_no_finer_than_the_bits(name):
    """Halves of steps do occur: the bound is tight, and the codes use their whole range."""
    vectors = drawn(200, 64)
    errors = (back(name, vectors) - vectors).abs() / step(name, vectors)
    assert 0.45 < errors.max() < 0.55
    codes, _ = FORMATS[name].encode(vectors)
    used = codes.view(torch.int8).unique() if name == "int8" else torch.cat([codes & 15, codes >> 4]).unique()
    assert len(used) >= (250 if name == "int8" else 16)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_fp8_rounds_each_number_to_four_significant_bits(scale):
    vectors = drawn(50, 64) * scale
    decoded, largest = back("fp8", vectors), vectors.abs().amax(-1, keepdim=True)
    normal = vectors.abs() > largest / 448 * 2**-6
    relative = (decoded - vectors).abs() / vectors.abs()
    assert (relative[normal] <= 2**-4 + 3 * HALF).all()
    assert relative[normal].max() > 0.9 * 2**-4
    assert ((decoded - vectors).abs() <= largest / 448 * 2**-10 + 3 * HALF * vectors.abs())[~normal].all()


def test_fp8_keeps_small_numbers_beside_large_ones_where_int8_does_not():
    vector = torch.tensor([[100.0, 0.1, -0.05]])
    assert back("int8", vector)[0, 1:].abs().max() == 0
    assert back("fp8", vector)[0, 1:].tolist() == pytest.approx([0.1, -0.05], rel=0.07)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-3, 250.0])
def test_constant_vectors_come_back(name, value):
    vectors = torch.full((2, 6), value)
    torch.testing.assert_close(back(name, vectors), vectors, rtol=2**-5 if name == "fp8" else 2 * HALF, atol=1e-6)


@pytest.mark.parametrize("name", FEW)
def test_zeros_come_back_as_zeros(name):
    assert (back(name, torch.zeros(3, 8)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e-5, 6e4])
def test_huge_and_tiny_numbers_stay_numbers_of_their_size(name, size, dtype):
    vectors = (drawn(20, 16).clamp(-1, 1) * size).to(dtype)
    decoded = back(name, vectors, dtype)
    assert decoded.dtype == dtype
    assert decoded.isfinite().all()
    assert decoded.float().abs().max() <= 1.1 * size + 1e-4
    assert (decoded - vectors).float().abs().max() <= (0.34 if name == "int2" else 0.1) * size + 2e-5


@pytest.mark.parametrize("name", FEW)
def test_numbers_beyond_float16_stay_numbers(name):
    """Of a bfloat16 or float32 model: they may be cut, but none becomes infinite or no number."""
    assert back(name, torch.tensor([[-1e5, 2e5, 3.0, 0.0]])).isfinite().all()


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_read_their_own_type(name, dtype):
    vectors = drawn(20, 16).to(dtype)
    decoded = back(name, vectors, dtype)
    assert decoded.dtype == dtype
    exact = back(name, vectors.float())
    ends = exact.abs().amax(-1, keepdim=True) * torch.finfo(dtype).eps * 2
    assert ((decoded.float() - exact).abs() <= ends).all()


@pytest.mark.parametrize("name", FEW)
def test_a_vector_that_was_read_is_written_as_it_was(name):
    """Moving a pair from slot to slot, through its numbers, loses next to nothing more."""
    once = back(name, drawn(40, 16))
    assert ((back(name, once) - once).abs() <= slack(once)).all()


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dim", [4, 7])
def test_the_empty_dimensions_of_a_store_are_any(name, dim):
    """Vectors are independent: shapes do not matter."""
    vectors = drawn(3, 4, 5, dim)
    together = back(name, vectors)
    one_by_one = torch.stack([back(name, vector) for vector in vectors.view(60, dim)]).view_as(vectors)
    assert torch.equal(together, one_by_one)


# ---- stores of one vector each ----


@pytest.mark.parametrize("dim", [8, 5])
@pytest.mark.parametrize("name", ["model", *FEW])
def test_overwriting_one_vector_leaves_all_others_as_they_were(name, dim):
    store = store_of(name, (2, 3, 6), dim)
    everything = slice(None)
    store.stored.write(everything, drawn(2, 3, 6, dim))
    before = store.read(everything, 6)[..., :dim].clone()
    new = 50 * drawn(3, dim, seed=1)
    at = (torch.tensor([[1]]), torch.arange(3), torch.tensor([[4, 0, 2]]))
    store.stored.write(at, new.unsqueeze(0))
    after = store.read(everything, 6)[..., :dim].clone()
    changed = torch.zeros(2, 3, 6, dtype=torch.bool)
    changed[at] = True
    assert torch.equal(after[~changed], before[~changed])
    assert torch.equal(after[at][0], new if name == "model" else back(name, new))


@pytest.mark.parametrize("name", ["model", *FEW])
def test_an_empty_store_and_a_cleared_slot_are_zero(name):
    store = store_of(name, (2, 3, 6), 8)
    assert (store.read(slice(None), 6) == 0).all()
    store.stored.write(slice(None), drawn(2, 3, 6, 8))
    other = store.read(1, 6).clone()
    store.clear(0)
    assert (store.read(0, 6) == 0).all()
    assert torch.equal(store.read(1, 6), other)


@pytest.mark.parametrize("name", FEW)
def test_numbers_that_are_none_go_with_the_slot(name):
    store = store_of(name, (2, 1, 4), 8)
    store.stored.write(slice(None), torch.full((2, 1, 4, 8), math.nan))
    store.clear(0)
    assert store.read(0, 6).isfinite().all()


# ---- rotated keys ----


@pytest.mark.parametrize("dim", [1, 6, 7, 24, 64, 192])
def test_a_rotation_leaves_dot_products_as_they_were(dim):
    """Its blocks are of the largest power of two that divides the head size."""
    matrix = hadamard(dim, torch.float64, CPU)
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim, dtype=torch.float64))
    size = dim & -dim
    blocks = torch.kron(torch.eye(dim // size), torch.ones(size, size)) > 0
    torch.testing.assert_close(matrix.abs()[blocks], torch.full((dim * size,), size**-0.5, dtype=torch.float64))
    assert (matrix[~blocks] == 0).all()


def test_rotated_keys_lose_less_where_a_channel_stands_out():
    keys = drawn(200, 64) + 20 * (torch.arange(64) == 5)
    matrix = hadamard(64, torch.float32, CPU)
    rotated = back("int4", keys @ matrix) @ matrix
    assert (rotated - keys).norm() < 0.5 * (back("int4", keys) - keys).norm()


@pytest.fixture
def rotated(monkeypatch):
    """All keys are rotated, in the model's own type too."""
    monkeypatch.setattr(LayerLayout, "rotates_keys", property(lambda _: True))


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3n_text", "gpt_oss", "deepseek_v3", "gemma4_k_eq_v", "opt"]
)
def test_rotated_queries_and_keys_answer_as_the_plain_ones(family, kernels, rotated, cpu_kernels):
    """With windows, sinks, capped scores, shared layers, and keys longer than values."""
    cpu_kernels(kernels)
    prompts = random_prompts((5, 30, 17))
    engine = tiny_engine(family, kv_policy="none", chunk_size=7, max_num_seqs=2)
    assert answers(engine, as_requests(prompts, max_tokens=6)) == reference_answers(tiny_model(family), prompts, 6)


KEEPING = sorted(set(POLICIES) - {"none", "lagkv", "random"})


@pytest.mark.parametrize("policy", KEEPING)
def test_rotated_keys_rank_as_the_plain_ones(policy, monkeypatch):
    """Scores look at lengths and dot products. Those of lagkv look at channels, and are of rotated ones then."""
    requests = as_requests(random_prompts((40, 25), seed=3), max_tokens=20)
    settings = {"kv_policy": policy, "kv_budget": 14, "kv_sink": 2, "kv_recent": 4, "chunk_size": 10}
    plain = answers(tiny_engine("llama", **settings), requests)
    monkeypatch.setattr(LayerLayout, "rotates_keys", property(lambda _: True))
    assert answers(tiny_engine("llama", **settings), requests) == plain


# ---- layers of a pool ----


def layer(name, capacity, *, by_channel=False, heads=2, dim=6, row_stats=()):
    return LayerLayout(
        capacity=capacity,
        kv_heads=heads,
        key_dim=dim,
        value_dim=dim + 2,
        itemsize=4,
        window=None,
        owner=0,
        last_reader=0,
        by_age=False,
        key_format=name.split("/")[0],
        value_format=name.split("/")[-1],
        by_channel=by_channel,
        row_stats=row_stats,
    )


def allocated(layout, slots=3):
    return LayerSlots.allocate(layout, slots, torch.float32, CPU)


def arrive(part, slot, key, value, sizes):
    """Tokens come in chunks of these sizes, then one by one."""
    start = 0
    for size in sizes:
        stop = start + size
        part.append(slot, start, key[start:stop], value[start:stop], torch.arange(start, stop), {})
        start = stop
    for position in range(start, len(key)):
        at = torch.tensor([position])
        part.write(torch.tensor([slot]), at.unsqueeze(1), key[position : position + 1], value[[position]], at)


def by_group(name, keys):
    """Keys [T, K, D] in whole groups, each channel with levels between its least and its greatest number."""
    levels = 2 ** FORMATS[name].bits - 1
    decoded = keys.double().clone()
    for start in range(0, len(keys) - KEY_GROUP + 1, KEY_GROUP):
        for head in range(keys.shape[1]):
            for channel in range(keys.shape[2]):
                numbers = keys[start : start + KEY_GROUP, head, channel]
                low = numbers.min().half()
                width = ((numbers.max() - numbers.min()) / levels).half()
                codes = ((numbers - low.float()) / width.float()).round().clamp(0, levels)
                decoded[start : start + KEY_GROUP, head, channel] = codes * width.float() + low.float()
    return decoded


ARRIVALS = [(90,), (1,) * 7, (7, 1, 24, 30), (31, 1, 1), (32, 32), (33, 40), (64, 26), (5, 90 - 5), ()]


@pytest.mark.parametrize("sizes", ARRIVALS, ids=str)
@pytest.mark.parametrize("name", LEVELLED)
def test_keys_by_channel_are_whole_groups_however_they_arrived(name, sizes):
    """A group is one of 32 tokens in a row; what is not yet a whole group is exact."""
    key, value = drawn(90, 2, 6) * torch.logspace(-2, 2, 6), drawn(90, 2, 8, seed=1)
    part = allocated(layer(name, 95, by_channel=True))
    arrive(part, 1, key, value, sizes)
    keys, values = part.read(1, 90)
    expected = by_group(name, key).transpose(0, 1)
    expected[:, 90 - KEY_GROUP :] = key.transpose(0, 1)[:, 90 - KEY_GROUP :].double()
    torch.testing.assert_close(keys.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(keys[:, 90 - KEY_GROUP :], key.transpose(0, 1)[:, 90 - KEY_GROUP :])
    stored = back(name, value.transpose(0, 1))
    stored[:, 90 - KEY_GROUP :] = value.transpose(0, 1)[:, 90 - KEY_GROUP :]
    assert torch.equal(values, stored)
    assert (part.positions[1, :, :90] == torch.arange(90)).all()
    assert all((part.newest.rows[slot] == -1).all() for slot in (0, 2))


@pytest.mark.parametrize("name", LEVELLED)
@pytest.mark.parametrize("capacity", [5, 32, 33, 70])
def test_a_slot_need_not_be_a_multiple_of_a_group(name, capacity):
    key, value = drawn(capacity, 2, 6), drawn(capacity, 2, 8, seed=1)
    part = allocated(layer(name, capacity, by_channel=True))
    arrive(part, 0, key, value, (3,))
    keys, values = part.read_slots(torch.tensor([0]), capacity)
    assert (keys.shape, values.shape) == ((1, 2, capacity, 6), (1, 2, capacity, 8))
    newest = slice(max(0, capacity - KEY_GROUP), capacity)
    assert torch.equal(keys[0, :, newest], key.transpose(0, 1)[:, newest])
    assert (keys[0] - key.transpose(0, 1)).abs().max() <= {"int8": 0.02, "int4": 0.3, "int2": 1.1}[name]


def test_scaling_by_channel_spares_small_channels_that_stand_beside_large_ones():
    key, value = drawn(90, 2, 6) * torch.tensor([100.0, 1, 1, 1, 1, 1]), drawn(90, 2, 8)
    errors = []
    for by_channel in (True, False):
        part = allocated(layer("int4", 90, by_channel=by_channel))
        arrive(part, 0, key, value, (90,))
        errors.append(float((part.read(0, 90)[0] - key.transpose(0, 1))[:, :58, 1:].abs().mean()))
    assert errors[0] < 0.1 < errors[1]


@pytest.mark.parametrize(
    ("name", "by_channel"), [*((name, False) for name in FEW), *((name, True) for name in FEW if name != "fp8")]
)
def test_heads_of_an_odd_size_are_stored_too(name, by_channel):
    """Two codes to a byte leave half a byte over."""
    key, value = drawn(40, 2, 7), drawn(40, 2, 9, seed=1)
    part = allocated(layer(name, 40, by_channel=by_channel, dim=7))
    arrive(part, 0, key, value, (37,))
    for decoded, given in zip(part.read(0, 40), (key.transpose(0, 1), value.transpose(0, 1)), strict=True):
        assert decoded.shape == given.shape
        assert (decoded - given).abs().max() < (1.1 if name == "int2" else 0.3)


@pytest.mark.parametrize("name", PAIRS)
def test_keys_and_values_have_formats_of_their_own(name):
    """In a full slot, where each head has given up other rows, and in chunks that replace some of them."""
    capacity, (keys_in, values_in) = 10, name.split("/")
    part = allocated(layer(name, capacity, dim=7))
    key, value = drawn(60, 2, 7), drawn(60, 2, 9, seed=1)
    arrive(part, 1, key[:capacity], value[:capacity], (7, 1))
    keep = torch.zeros(2, 22, dtype=torch.bool)
    for head in range(2):
        keep[head, torch.randperm(22, generator=torch.Generator().manual_seed(head))[:capacity]] = True
    part.replace(1, keep, key[capacity:22], value[capacity:22], torch.arange(capacity, 22), {})
    for position in range(22, 60):
        at = torch.tensor([position])
        rows = torch.tensor([[position % capacity, 3 * position % capacity]])
        part.write(torch.tensor([1]), rows, key[at], value[at], at)
    keys, values = part.read(1, capacity)
    for head in range(2):
        for row, place in enumerate(part.positions[1, head].tolist()):
            assert torch.equal(keys[head, row], back(keys_in, key[place, head]))
            assert torch.equal(values[head, row], back(values_in, value[place, head]))


@pytest.mark.parametrize("by_channel", [False, True])
def test_the_next_sequence_of_a_slot_finds_nothing_of_the_last(by_channel):
    part = allocated(layer("int8", 40, by_channel=by_channel, row_stats=("mass",)))
    key, value = drawn(40, 2, 6), drawn(40, 2, 8, seed=1)
    part.append(0, 0, key, torch.full_like(value, math.nan), torch.arange(40), {"mass": torch.ones(2, 40)})
    part.reset(0)
    assert by_channel or (part.positions[0] == -1).all()
    assert not by_channel or (part.newest.rows[0] == -1).all()
    assert (part.row_stats["mass"][0] == 0).all()
    assert (part.read_slots(slice(0, 1), 40)[1] == 0).all()
    other = allocated(part.layout)
    for here, slot in ((part, 0), (other, 1)):
        here.append(slot, 0, key[:9] + 1, value[:9], torch.arange(9), {"mass": torch.zeros(2, 9)})
    for decoded, expected in zip(part.read(0, 9), other.read(1, 9), strict=True):
        assert torch.equal(decoded, expected)


def test_a_short_sequence_is_not_overlaid_by_the_newest_keys_of_the_last_one():
    part = allocated(layer("int4", 40, by_channel=True), slots=1)
    key, value = drawn(40, 2, 6), drawn(40, 2, 8, seed=1)
    arrive(part, 0, key, value, (40,))
    part.reset(0)
    arrive(part, 0, -key[:2], -value[:2], (2,))
    keys, values = part.read(0, 2)
    assert torch.equal(keys, -key[:2].transpose(0, 1))
    assert torch.equal(values, -value[:2].transpose(0, 1))


# ---- two bits: keys by channel alone ----


def test_two_bits_have_a_scale_for_each_32_channels():
    """A large channel takes the levels of its neighbours, not of the whole vector (KIVI's values)."""
    vectors = drawn(50, 96) * (1 + 50 * (torch.arange(96) == 40))
    errors = (back("int2", vectors) - vectors).abs()
    assert errors[:, 64:].mean() < 0.4 < 1 < errors[:, 32:64].mean()
    assert torch.equal(back("int2", vectors)[:, 64:], back("int2", vectors[:, 64:]))


@pytest.mark.parametrize("policy", ["average-attention", "streaming", "keydiff"])
@pytest.mark.parametrize("name", ["int2", "int2/int4", "int2/model"])
def test_keys_in_two_bits_are_refused_where_they_are_replaced_one_by_one(policy, name):
    with pytest.raises(UsageError, match=f"{policy} replaces them one by one") as refused:
        EngineConfig(kv_policy=policy, kv_format=name)
    assert refused.value.hint.startswith(f"--kv-format int4/{name.partition('/')[2] or 'int2'} is for values alone")
    assert "--kv-policy none --kv-format int2, or --kv-archive int2" in refused.value.hint


def test_keys_in_two_bits_may_be_the_archive_s():
    config = EngineConfig(kv_archive="int2")
    assert (config.kv_archive, config.kv_format) == ("int2", "model")


@pytest.mark.parametrize("family", ["gemma2", "gemma3n_text", "gpt_oss", "mistral"])
def test_layers_with_a_window_hold_keys_in_four_bits_where_the_others_have_two(family):
    """A window holds rows one by one: its keys cannot be scaled by channel."""
    engine = tiny_engine(family, kv_policy="none", kv_format="int2", chunk_size=7)
    layout = engine.policy.layout(engine.spec, 40)
    for layer in layout.layers:
        windowed = layer.window is not None
        assert (layer.formats, layer.by_channel) == ((("int4", "int2"), False) if windowed else (("int2",) * 2, True))
        assert layer.rotates_keys == windowed
    results = list(engine.stream(as_requests(random_prompts((30, 4, 17)), max_tokens=12)))
    assert [result.kv.format for result in results] == ["int2"] * 3


@pytest.mark.parametrize("name", ["int2", "model/int2"])
def test_two_bits_answer_alike_alone_and_together_however_they_are_cut(name):
    """Chunks of a prompt read what was rounded before them, so chunks are alike; the company differs."""
    requests = as_requests(random_prompts((70, 9, 40)), max_tokens=40)
    settings = {"kv_policy": "none", "kv_format": name, "chunk_size": 16}
    together = answers(tiny_engine("llama", **settings, max_num_seqs=3), requests)
    assert answers(tiny_engine("llama", **settings, max_num_seqs=1), requests) == together


# ---- bytes ----


@pytest.mark.parametrize("capacity", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("dim", [6, 7])
@pytest.mark.parametrize(
    ("name", "by_channel"),
    [
        ("model", False),
        *((name, False) for name in PAIRS),
        *((name, True) for name in (*LEVELLED, "int8/int4", "int2/int4")),
    ],
)
def test_what_is_held_is_what_the_layout_promises(name, by_channel, dim, capacity):
    layout = layer(name, capacity, by_channel=by_channel, dim=dim, row_stats=("mass", "rank"))
    part = allocated(layout, slots=4)
    assert part.nbytes == 4 * (layout.kv_bytes + layout.score_bytes)


KEPT = ("none", "average-attention", "roco", "keydiff", "streaming")
STORED = (
    *product(KEPT, (MODEL, "fp8", "int8", "int4", "int8/int4", "int4/model", "model/int8", "int4/int2")),
    ("none", "int2"),
)


@pytest.mark.parametrize(("policy", "name"), STORED)
@pytest.mark.parametrize("family", ["llama", "gemma3n_text", "deepseek_v3"])
def test_a_pool_holds_what_its_layouts_promise(family, policy, name):
    engine = tiny_engine(family, kv_policy=policy, kv_format=name, kv_budget=20, kv_recent=5, kv_sink=3)
    layouts = tuple(engine.policy.layout(engine.spec, capacity) for capacity in (9, 20, 41))
    pool = KVPool(layouts, (2, 3, 1), torch.float32, CPU)
    assert pool.nbytes == sum(count * one.nbytes for count, one in zip((2, 3, 1), layouts, strict=True))


def pair_bytes(name, policy, dtype_bytes=2):
    """Bytes of a pair in a slot of 4,096 of a model with heads of 128."""
    chosen = CompressionPolicy.from_config(EngineConfig(kv_policy=policy, kv_format=name, kv_budget=4096))
    spec = tiny_engine("llama").spec
    wide = replace(spec.layers[0], key_dim=128, value_dim=128)
    spec = replace(spec, layers=(wide,), itemsize=dtype_bytes)
    return chosen.layout(spec, 4096).kv_bytes / (4096 * wide.kv_heads)


@pytest.mark.parametrize(
    ("name", "ratio", "policy"),
    [
        *product(("fp8", "int8"), (1.8,), ("none", "average-attention")),
        *(("int4", 3.3, policy) for policy in ("none", "average-attention")),
        ("int2", 5.1, "none"),
    ],
)
def test_fewer_bits_are_fewer_bytes(name, ratio, policy):
    """Of 16-bit models: scales, offsets and exact copies of the newest take little of what is saved."""
    assert pair_bytes("model", policy) == 2 * 2 * 128
    assert pair_bytes("model", policy) / pair_bytes(name, policy) > ratio


@pytest.mark.parametrize(
    ("told", "fused"),
    [
        ({"kv_format": "model"}, True),
        ({"kv_format": "int8"}, True),
        ({"kv_format": "int8/model"}, True),
        ({"kv_format": "int8/int4"}, False),  # kernels do not read it
        ({"kv_format": "int8", "kv_policy": "none"}, False),  # by channel
        ({"kv_format": "model/int8", "kv_policy": "none"}, True),
        ({"kv_format": "int8", "kv_policy": "keydiff"}, True),
        ({"kv_format": "int8", "kv_policy": "lagkv"}, False),
    ],
)
def test_memory_for_decoding_is_planned_where_kernels_do_not_read_codes(told, fused, monkeypatch):
    able = replace(registry.CAPABILITIES["triton"], row_formats=("int8",))
    monkeypatch.setitem(registry.CAPABILITIES, "reference", able)
    monkeypatch.setenv("BMX_KERNELS", "reference")
    config, spec = EngineConfig(**told), tiny_engine("llama").spec
    assert left_to_kernels(config, able) == fused
    device = Device.of("cpu", spec, 0, config)
    plain = able.workspace_bytes(fused)
    sizes = {"heads": max(layer.query_heads for layer in spec.layers), "head_dim": 8, "itemsize": 4}
    decoded = device.workspace(10, 100, 3) - plain(chunk=10, rows=100, slots=3, **sizes)
    assert (decoded > 0) == (not fused and told["kv_format"] != "model")


@pytest.mark.parametrize(("name", "more"), [("int8", 2.5), ("int4", 3)])
def test_a_slot_takes_less_of_the_memory_with_all_that_belongs_to_it(name, more):
    """Positions, too, of a float32 model with heads of 16."""
    engines = [
        tiny_engine("gemma", kv_policy="streaming", kv_format=f, kv_budget=200, kv_recent=4) for f in ("model", name)
    ]
    plain, few = (engine.policy.layout(engine.spec, 150).nbytes for engine in engines)
    assert plain / few > more


# ---- what was used ----


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("auto", "int8/int4"),
        ("model", "model"),
        ("int8", "int8"),
        ("int8/int8", "int8"),
        ("int8/int4", "int8/int4"),
        ("model/fp8", "model/fp8"),
    ],
)
def test_settings_results_and_plans_say_which_format_was_used(given, used):
    config = EngineConfig(kv_format=given, kv_budget=20, kv_recent=5, kv_sink=3)
    assert config.kv_format == used
    engine = tiny_engine("llama", kv_format=given, kv_budget=20, kv_recent=5, kv_sink=3)
    requests = as_requests(random_prompts((30, 4)), max_tokens=3)
    assert [result.kv.format for result in engine.stream(requests)] == [used, used]
    assert plan_record(engine.plan([Length(30, 3, 20)])).get("kv_format", "model") == used


@pytest.mark.parametrize("given", ["int3", "int8/", "/int8", "int8/int4/int4", "auto/int8", "int8,int4", ""])
def test_a_format_that_is_none_is_refused(given):
    with pytest.raises(UsageError, match="kv_format cannot be"):
        EngineConfig(kv_format=given)


def test_the_full_cache_is_exact_by_default():
    assert EngineConfig(kv_policy="none").kv_format == "model"
    assert EngineConfig(kv_policy="none", kv_format="int8").kv_format == "int8"


def test_an_output_of_an_earlier_default_is_not_gone_on_with():
    config = {"model": "fake"}
    before = fingerprint(RunConfig.of(("in.jsonl",), config | {"kv_format": "model"}))
    after = fingerprint(RunConfig.of(("in.jsonl",), config))
    assert differences(before, after) == 'kv_format was "model", is "int8/int4"'
    assert fingerprint(RunConfig.of(("in.jsonl",), config | {"kv_format": "int8/int4"})) == after
