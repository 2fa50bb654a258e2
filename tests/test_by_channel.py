"""The compiled kernels read and store keys that are scaled by channel as the pool does, bit for bit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from instruction_sets import on_every_set, required
from test_kernels import dense_slots, normal

from bmx.kernels import cpu, reference
from bmx.kernels.compiled import kernels_for
from bmx.kernels.formats import KEY_GROUP
from bmx.kernels.instruction_sets import SETS
from bmx.kv.layout import KVLayout, LayerLayout
from bmx.kv.pool import KVPool, LayerSlots

BF16 = torch.bfloat16
FORMATS = [("int4", "int4"), ("int8", "int8"), ("int8", "int4"), ("int4", "model")]
POSITIONS = [0, 1, 31, 32, 33, 63, 64, 200]


@pytest.fixture(params=SETS)
def compiled(request):
    """The kernels compiled for each instruction set that this machine can have."""
    return kernels_for(required(request.param))


def cases(names, *lists):
    """All combinations of values on the best set of this machine; on each of the others, one for each format."""
    every = list(itertools.product(FORMATS, *lists))
    few = [(formats, *(some[i % len(some)] for some in lists)) for i, formats in enumerate(FORMATS)]
    return pytest.mark.parametrize(("compiled", "formats", *names), on_every_set(every, few), indirect=["compiled"])


def slots_of(formats, slots=3, capacity=210, kv_heads=2, dim=64, value_dim=32, dtype=BF16):
    """Empty slots."""
    layout = LayerLayout(
        capacity=capacity, kv_heads=kv_heads, key_dim=dim, value_dim=value_dim, itemsize=dtype.itemsize, window=None,
        owner=0, last_reader=0, by_age=False, key_format=formats[0], value_format=formats[1], by_channel=True,
    )  # fmt: skip
    return LayerSlots.allocate(layout, slots, dtype, torch.device("cpu"))


def vectors(tokens, dim=64, value_dim=32, kv_heads=2, seed=1):
    """Keys, some channels of which are large, and values."""
    channels = 10 ** normal(dim, seed=seed + 2)
    key = normal(tokens, kv_heads, dim, seed=seed) * channels / channels.norm() * dim**0.5 + channels.clamp(max=5)
    return key.to(BF16), (1 + normal(tokens, kv_heads, value_dim, seed=seed + 1)).to(BF16)


def append(part, slot, start, key, value):
    """What the pool does with a chunk."""
    part.append(slot, start, key, value, torch.arange(start, start + len(key)), {})


def write(part, slots, positions, key, value):
    """What the pool does with a token of each of these slots."""
    part.write(slots, positions.unsqueeze(1), key, value, positions)


def assert_same(part, expected):
    """All of two pools' tensors are equal; of float16 and bfloat16, bit for bit."""
    for name in ("codes", "scales", "exact_keys", "exact_values", "exact_rows"):
        one, other = (getattr(of.channel_rows, name) for of in (part, expected))
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name
    for one, other in zip(part.values.parts, expected.values.parts, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def decode(module, part, query, key, value, slots, positions, **options):
    """The output of decoding tokens."""
    output = query.new_full((*query.shape[:2], value.shape[-1]), torch.nan)
    options = {"scale": query.shape[-1] ** -0.5, **options}
    assert module.decode_by_channel(output, query, key, value, part.channel_rows, slots, positions, **options)
    return output


def filled(formats, positions, **sizes):
    """Slots in which the pool has stored sequences of these numbers of tokens."""
    part = slots_of(formats, slots=len(positions), **sizes)
    dims = {name: size for name, size in sizes.items() if name in ("dim", "value_dim")}
    for slot, tokens in enumerate(positions):
        if tokens:
            append(part, slot, 0, *vectors(tokens, seed=10 * slot, **dims))
    return part


def read_exactly(part, slot, rows):
    """A slot's pairs in float64, as `read` has them but without rounding what is decoded to the model's type."""
    exact = part.newest
    keys, values = (replace(store, dtype=torch.float32).read(slot, rows).double() for store in (part.keys, part.values))
    newest = slice(max(0, rows - KEY_GROUP), rows)
    entries = torch.arange(newest.start, rows) % KEY_GROUP
    keys[:, newest], values[:, newest] = exact.keys[slot][:, entries].double(), exact.values[slot][:, entries].double()
    return keys.unsqueeze(0), values.unsqueeze(0)


@cases(["dim", "cuts"], [64, 96, 128, 32], [(5, 31, 64, 70, 131, 200), (200,), (31, 32, 33, 200)])
def test_chunks_are_stored_as_the_pool_stores_them(compiled, cuts, dim, formats):
    part, expected = (slots_of(formats, dim=dim, value_dim=64) for _ in range(2))
    key, value = vectors(200, dim=dim, value_dim=64)
    key[40:44], key[50, 0, 3], key[90:130, 1, 7], value[3], value[150, 0, 1] = 0, 3e5, 1e-9, 7.5, -1e6
    for start, stop in itertools.pairwise((0, *cuts)):
        chunk = key[start:stop], value[start:stop]
        append(expected, 1, start, *chunk)
        assert compiled.append_by_channel(*chunk, part.channel_rows, 1, start)
    assert_same(part, expected)


@cases(["dim"], [64, 128])
def test_a_slot_is_read_as_the_pool_reads_it(compiled, dim, formats):
    """The newest pairs exactly, the others as decoded, to a last bit of rounding."""
    part = filled(formats, POSITIONS, dim=dim, value_dim=64)
    for slot, count in enumerate(POSITIONS):
        for read, expected in zip(
            compiled.read_by_channel(part.channel_rows, slot, count), part.read(slot, count), strict=True
        ):
            newest = slice(max(0, count - KEY_GROUP), count)
            assert torch.equal(read[:, newest], expected[:, newest])
            torch.testing.assert_close(read, expected, rtol=2**-7, atol=2**-9)


@cases(["dim"], [64, 128])
def test_tokens_are_stored_as_the_pool_stores_them(compiled, dim, formats):
    """Also into a slot that held another sequence before."""
    part, expected = (filled(formats, (70, 0, 25), dim=dim) for _ in range(2))
    for of in (part, expected):
        of.reset(0)
    key, value = vectors(2 * 70, dim=dim, seed=5)
    slots, query = torch.tensor([2, 0]), normal(2, 4, dim, dtype=BF16)
    for step in range(70):
        own, positions = slice(2 * step, 2 * step + 2), torch.tensor([25, 0]) + step
        decode(compiled, part, query, key[own], value[own], slots, positions)
        write(expected, slots, positions, key[own], value[own])
    assert_same(part, expected)


@cases(["sizes", "sinks"], [(3, 64, 64), (8, 128, 96), (1, 64, 32), (5, 96, 128)], [False, True])
def test_a_token_attends_to_its_rows_as_float64_does(compiled, sizes, sinks, formats):
    """Of positions in and out of whole groups."""
    group, dim, value_dim = sizes
    part = filled(formats, POSITIONS, dim=dim, value_dim=value_dim)
    key, value = vectors(len(POSITIONS), dim=dim, value_dim=value_dim, seed=77)
    query, slots = normal(len(POSITIONS), 2 * group, dim, dtype=BF16), torch.arange(len(POSITIONS))
    options = {"sinks": normal(2 * group, dtype=BF16) if sinks else None, "scale": 0.3 * dim**-0.5}
    output = decode(compiled, part, query, key, value, slots, torch.tensor(POSITIONS), **options)
    for slot, position in enumerate(POSITIONS):
        pairs = read_exactly(part, slot, position + 1)
        expected, _ = dense_slots(query[slot : slot + 1], *pairs, **options)
        torch.testing.assert_close(output[slot : slot + 1].double(), expected, atol=5e-3, rtol=8e-3)


@pytest.mark.parametrize("formats", [("int4", "int4"), ("int8", "int4")])
def test_a_token_alone_is_the_token_among_others_to_the_last_bit(compiled, formats):
    """Whatever the batch, and for any number of threads."""
    key, value = vectors(len(POSITIONS), value_dim=64, seed=77)
    query, positions = normal(len(POSITIONS), 6, 64, dtype=BF16), torch.tensor(POSITIONS)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            part, slots = filled(formats, POSITIONS, value_dim=64), torch.arange(len(POSITIONS))
            outputs.append(decode(compiled, part, query, key, value, slots, positions))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)
    part = filled(formats, POSITIONS, value_dim=64)
    for slot in range(len(POSITIONS)):
        own = slice(slot, slot + 1)
        alone = decode(compiled, part, query[own], key[own], value[own], torch.tensor([slot]), positions[own])
        assert torch.equal(alone[0], outputs[0][slot])


@pytest.mark.parametrize("formats", [("int4", "int4"), ("int8", "model")])
def test_slots_of_all_groups_are_read_at_once(compiled, formats):
    """Each as in its own group, to the last bit; an idle row is zeros, and a position without a row is refused."""
    sizes = (3, 70), (2, 210)
    layouts = tuple(KVLayout((slots_of(formats, capacity=capacity).layout,)) for _, capacity in sizes)
    pool = KVPool(layouts, tuple(count for count, _ in sizes), BF16, torch.device("cpu"))
    positions, numbers = [69, 5, 32, 200, 64], [2, 0, 1, 4, 3]
    (key, value), query = vectors(6, seed=3), normal(6, 6, 64, dtype=BF16)
    parts = [(pool.layer(group, 0)[0], slot) for group, (count, _) in enumerate(sizes) for slot in range(count)]
    for number, position in zip(numbers, positions, strict=True):
        append(*parts[number], 0, *vectors(position, seed=number))
    alone = []
    for i, number in enumerate(numbers):
        part, slot = parts[number]
        of_token = [t[i : i + 1] for t in (query, key, value)]
        alone.append(decode(compiled, part, *of_token, torch.tensor([slot]), torch.tensor(positions[i : i + 1])))
    [rows] = pool.channel_rows
    together, slots = torch.full((6, 6, 32), torch.nan, dtype=BF16), torch.tensor([*numbers, -1])
    options = query, key, value, rows, slots, torch.tensor([*positions, 0])
    assert compiled.decode_by_channel(together, *options, scale=64**-0.5)
    assert torch.equal(together, torch.cat([*alone, torch.zeros(1, 6, 32, dtype=BF16)]))
    assert not compiled.decode_by_channel(together, *options[:-1], torch.tensor([70, 1, 1, 1, 1, 1]), scale=64**-0.5)


def test_what_is_no_number_stays_none(compiled):
    query, (key, value) = normal(1, 6, 64, dtype=BF16), vectors(1, value_dim=64)
    for broken in (query, key, value):
        kept, broken[0, 0, 3] = broken[0, 0, 3].item(), torch.nan
        part = filled(("int4", "int4"), (95,), value_dim=64)
        output = decode(compiled, part, query, key, value, torch.tensor([0]), torch.tensor([95]))
        assert output[0, 0].isnan().any()
        assert not output[0, 3:].isnan().any()
        broken[0, 0, 3] = kept


def test_what_the_kernels_do_not_read_is_left_to_the_pool(compiled):
    """Capped scores, types and sizes; the plain kernels leave everything."""
    slots, positions = torch.tensor([0]), torch.tensor([0])
    for module, dim, dtype, options in [
        (reference, 64, BF16, {}),
        (cpu, 64, BF16, {}),
        (compiled, 40, BF16, {}),
        (compiled, 64, torch.float32, {}),
        (compiled, 64, BF16, {"softcap": 20.0}),
    ]:
        part = slots_of(("int4", "int4"), dim=dim, dtype=dtype)
        query, (key, value) = normal(1, 6, dim, dtype=dtype), (one.to(dtype) for one in vectors(1, dim=dim))
        tokens = torch.zeros_like(query[..., :32]), query, key, value, part.channel_rows, slots, positions
        assert not module.decode_by_channel(*tokens, scale=0.1, **options)
        assert options or not module.append_by_channel(key, value, part.channel_rows, 0, 0)
        assert_same(part, slots_of(("int4", "int4"), dim=dim, dtype=dtype))
