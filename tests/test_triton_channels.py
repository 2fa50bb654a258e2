"""Triton's kernels store and read keys that are scaled by channel as the pool does, and attend as float64 does."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

triton_channels = pytest.importorskip("bmx.kernels.triton_channels")
triton_channel_decode = pytest.importorskip("bmx.kernels.triton_channel_decode")

from conftest import answers, as_requests, random_prompts, tiny_engine
from families import FAMILIES
from test_by_channel import append, assert_same, decode, read_exactly, slots_of, vectors, write
from test_kernels import dense_slots, normal

from bmx import kernels
from bmx.config import EngineConfig
from bmx.engine import graphs
from bmx.kernels import triton
from bmx.kernels.triton_splits import Splits
from bmx.kv.layout import KVLayout
from bmx.kv.pool import KVPool
from bmx.plan.device import Device

F32 = torch.float32
NEAR = {"atol": 2e-5, "rtol": 2e-5}
FORMATS = [("int4", "int4"), ("int8", "fp8"), ("int8", "int4"), ("int4", "model")]
POSITIONS = [0, 30, 31, 32, 95, 140]


def pairs(tokens, dim=24, value_dim=16, seed=1):
    """Keys and values in float32."""
    return [one.float() for one in vectors(tokens, dim, value_dim, seed=seed)]


def filled(formats, positions, dim=24, value_dim=16):
    """Slots in which the pool has stored sequences of these numbers of tokens."""
    part = slots_of(formats, len(positions), 150, dim=dim, value_dim=value_dim, dtype=F32)
    for slot, tokens in enumerate(positions):
        if tokens:
            append(part, slot, 0, *pairs(tokens, dim, value_dim, seed=10 * slot))
    return part


@pytest.mark.parametrize("formats", FORMATS)
def test_chunks_are_stored_as_the_pool_stores_them(formats):
    part, expected = (slots_of(formats, 2, 80, dim=33, value_dim=21, dtype=F32) for _ in range(2))
    key, value = pairs(75, 33, 21)
    key[40:44], key[50, 0, 3], key[30:64, 1, 7], value[3], value[50, 0, 1] = 0, 3e5, 1e-9, 7.5, -1e6
    for start, stop in itertools.pairwise((0, 5, 31, 64, 75)):
        chunk = key[start:stop], value[start:stop]
        append(expected, 1, start, *chunk)
        assert triton.append_by_channel(*chunk, part.channel_rows, 1, start)
    assert_same(part, expected)


@pytest.mark.parametrize("formats", FORMATS)
def test_a_slot_is_read_as_the_pool_reads_it(formats):
    part = filled(formats, (0, 31, 70))
    for slot, count in enumerate((0, 31, 70)):
        for read, expected in zip(
            triton.read_by_channel(part.channel_rows, slot, count), part.read(slot, count), strict=True
        ):
            torch.testing.assert_close(read, expected, **NEAR)


@pytest.mark.parametrize("formats", FORMATS)
def test_tokens_are_stored_as_the_pool_stores_them(formats):
    """Also into a slot that held another sequence before."""
    part, expected = (filled(formats, (70, 0, 25)) for _ in range(2))
    for of in (part, expected):
        of.reset(0)
    key, value = pairs(2 * 8, seed=5)
    slots, query = torch.tensor([2, 0]), normal(2, 2, 24)
    for step in range(8):
        own, positions = slice(2 * step, 2 * step + 2), torch.tensor([25, 0]) + step
        decode(triton, part, query, key[own], value[own], slots, positions)
        write(expected, slots, positions, key[own], value[own])
    assert_same(part, expected)


@pytest.mark.parametrize("splits", [Splits(256, 32), Splits(32, 32)], ids=["whole", "in splits"])
@pytest.mark.parametrize(
    ("formats", "group", "dim", "options"),
    [
        (("int4", "int4"), 3, 24, {}),
        (("int8", "fp8"), 1, 33, {"sinks": True}),
        (("int8", "int4"), 2, 16, {"softcap": 0.8}),
        (("int4", "model"), 17, 24, {"sinks": True, "softcap": 2.0}),
    ],
)
def test_a_token_attends_to_its_rows_as_float64_does(formats, group, dim, options, splits, monkeypatch):
    """Of positions in and out of whole groups."""
    monkeypatch.setattr(triton_channel_decode, "CHANNEL_SPLITS", splits)
    part = filled(formats, POSITIONS, dim)
    key, value = pairs(len(POSITIONS), dim, seed=77)
    query, slots = normal(len(POSITIONS), 2 * group, dim), torch.arange(len(POSITIONS))
    sinks = normal(2 * group) if "sinks" in options else None
    options = {**options, "sinks": sinks, "scale": 0.3 * dim**-0.5}
    output = decode(triton, part, query, key, value, slots, torch.tensor(POSITIONS), **options)
    for slot, position in enumerate(POSITIONS):
        own = read_exactly(part, slot, position + 1)
        expected, _ = dense_slots(query[slot : slot + 1], *own, **options)
        torch.testing.assert_close(output[slot : slot + 1].double(), expected, **NEAR)


def test_slots_of_all_groups_are_read_at_once_and_each_as_alone(monkeypatch):
    """An idle row is zeros; an answer does not depend on how many programs read its slot."""
    sizes, formats, found = ((2, 40), (1, 150)), ("int4", "int4"), []
    layouts = tuple(
        KVLayout((slots_of(formats, 1, capacity, dim=24, value_dim=16, dtype=F32).layout,)) for _, capacity in sizes
    )
    positions, numbers = [39, 5, 140, 0], [1, 0, 2, -1]
    (key, value), query = pairs(4, seed=3), normal(4, 6, 24)
    monkeypatch.setattr(triton_channel_decode, "CHANNEL_SPLITS", Splits(32, 32))
    for count in (1, 3):
        monkeypatch.setattr(triton_channel_decode, "programs", lambda *_, count=count: count)
        pool = KVPool(layouts, tuple(count for count, _ in sizes), F32, torch.device("cpu"))
        parts = [(pool.layer(group, 0)[0], slot) for group, (slots, _) in enumerate(sizes) for slot in range(slots)]
        for number, position in zip(numbers[:-1], positions, strict=False):
            append(*parts[number], 0, *pairs(position, seed=number))
        tokens, output = (query, key, value, pool.channel_rows[0]), torch.full((4, 6, 16), math.nan)
        assert triton.decode_by_channel(output, *tokens, torch.tensor(numbers), torch.tensor(positions), scale=0.2)
        found.append(output)
        for i, number in enumerate(numbers[:-1]):
            part, slot = parts[number]
            alone = [t[i : i + 1] for t in (query, key, value)]
            place = torch.tensor([slot]), torch.tensor(positions[i : i + 1])
            assert torch.equal(decode(triton, part, *alone, *place, scale=0.2)[0], output[i])
        assert not output[3].any()
    assert torch.equal(*found)


def test_formats_that_kernels_do_not_know_are_left_to_the_pool():
    part = slots_of(("int2", "int2"), 1, 40, dim=32, value_dim=32, dtype=F32)
    key, value = pairs(1, 32, 32)
    rows, output = part.channel_rows, torch.zeros(1, 2, 32)
    slots = torch.tensor([0]), torch.tensor([0])
    assert not triton.decode_by_channel(output, normal(1, 2, 32), key, value, rows, *slots, scale=0.2)
    assert not triton.append_by_channel(key, value, rows, 0, 0)
    assert triton.read_by_channel(rows, 0, 1) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_policy": "none", "kv_format": "int4"},
        {"kv_policy": "none", "kv_format": "int8/int4", "max_num_seqs": 1},
        {"kv_archive": "int4", "kv_budget": 20, "kv_sink": 2, "kv_recent": 5},
    ],
)
def test_answers_are_those_of_plain_torch_and_rounds_follow_each_other(settings, cpu_kernels, monkeypatch):
    """Slots of two sizes, in the full cache and in an archive; groups of keys that end within an answer."""
    small, counted = FAMILIES["llama"](), []
    small.num_hidden_layers = 1
    monkeypatch.setitem(FAMILIES, "small", lambda: small)
    settings = {"chunk_size": 16, "max_num_seqs": 3, "max_num_batched_tokens": 40} | settings
    requests = as_requests(random_prompts((60, 11, 30)), max_tokens=6)
    cpu_kernels("triton")
    compute = graphs.Round._compute
    monkeypatch.setattr(graphs.Round, "_compute", lambda self: (counted.append(self), compute(self))[1])
    answered = answers(tiny_engine("small", **settings), requests)
    assert counted
    cpu_kernels("reference")
    assert answered == answers(tiny_engine("small", **settings), requests)


def test_plans_know_that_rounds_are_captured_and_slots_are_not_unpacked():
    spec, captured = tiny_engine("llama").spec, kernels.Kernels("triton", "")
    for settings, captures in [
        ({"kv_policy": "none", "kv_format": "int4"}, True),
        ({"kv_archive": "int4"}, True),
        ({"kv_policy": "none", "kv_format": "int2"}, False),
        ({"kv_archive": "int4", "kv_recall": "pages"}, False),
    ]:
        device = Device.of("cuda", spec, 0, EngineConfig(**settings), captured)
        assert device.captures == captures
        assert (device.workspace(16, 8192, 64) < 8 * device.workspace(16, 8192, 1)) == captures
