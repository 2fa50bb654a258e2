"""The compiled kernels give what dense float64 arithmetic gives, do what policy and pool do, or say they cannot."""

from __future__ import annotations

import hashlib
import itertools
import platform
import re
import subprocess
import sys

import pytest
import torch
from conftest import answers, as_requests, random_prompts, tiny_engine, word_tokenizer
from families import VOCAB, tiny_model
from instruction_sets import HERE, on_every_set, required
from test_kernels import dense_chunk, dense_slots, normal, window_mask
from transformers import LlamaConfig, LlamaForCausalLM

from bmx import Engine, EngineConfig, PromptConfig, hardware, kernels
from bmx.engine.backend import ModelBackend
from bmx.errors import UsageError
from bmx.kernels import build, reference
from bmx.kernels.compiled import kernels_for
from bmx.kernels.formats import FORMATS, Stored
from bmx.kernels.instruction_sets import SETS
from bmx.kernels.linear import Linear
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.slot_views import Chunks, Rows
from bmx.model.fused_modules import Int8Linear, fused_modules
from bmx.model.loader import prepare, quantize

BF16 = torch.bfloat16
CHUNK_COLUMNS = ("offsets", "lengths", "slots", "starts", "row_limits", "totals")
NEAR = {"atol": 2e-2, "rtol": 2e-2}  # eight bits of a number


@pytest.fixture(params=SETS)
def instruction_set(request):
    """Each instruction set that this machine can have."""
    return required(request.param)


@pytest.fixture
def compiled(instruction_set):
    """The kernels compiled for it."""
    return kernels_for(instruction_set)


def linear(columns, inner, bias=False, seed=0, int8=False, dtype=BF16):
    """A linear layer as kernels see it."""
    made = torch.nn.Linear(inner, columns, bias=bias, dtype=dtype)
    with torch.no_grad():
        made.weight.copy_(normal(columns, inner, seed=seed) / inner**0.5)
        if bias:
            made.bias.copy_(normal(columns, seed=seed + 1))
    if not int8:
        return Linear(weight=made.weight.detach(), bias=made.bias.detach() if bias else None)
    small = Int8Linear(made)
    return Linear(weight=small.codes, bias=made.bias.detach() if bias else None, scales=small.scales, sums=small.sums)


def wide(layer):
    """The weights in float64, of bytes those that they stand for."""
    return layer.weight.double() if layer.scales is None else layer.weight.double() * layer.scales.double()[:, None]


def rounded_rows(x):
    """What is left of an input's rows when they are codes while they are multiplied, in float64."""
    least, greatest = x.double().amin(-1, keepdim=True).clamp(max=0), x.double().amax(-1, keepdim=True).clamp(min=0)
    steps = (greatest - least) / 255
    zeros = (-least / steps).round()
    return (((x.double() / steps).round() + zeros).clamp(0, 255) - zeros) * steps


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [
        (1, 32, 16),
        (3, 64, 48),
        (7, 96, 112),
        (8, 576, 192),
        (9, 2080, 64),
        (40, 4160, 80),
        (130, 64, 16),
        (300, 96, 160),
    ],
)
def test_a_linear_layer_is_what_float64_says(compiled, rows, inner, columns, int8):
    """Rows in and out of whole tiles, columns in and out of whole blocks, more words than a panel holds."""
    layer, x = linear(columns, inner, bias=True, int8=int8), normal(rows, inner, seed=7, dtype=BF16)
    [y] = compiled.product((layer,))(x)
    expected = (rounded_rows(x) if int8 else x.double()) @ wide(layer).T + layer.bias.double()
    assert y.dtype == BF16
    torch.testing.assert_close(y.double(), expected, atol=1.5e-2, rtol=1e-2)
    assert (y.double() - expected).norm() < 3e-3 * expected.norm()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [2, 50, 500])
def test_layers_of_the_same_input_are_as_each_alone_for_any_number_of_threads(compiled, rows, threads, int8):
    layers = tuple(linear(columns, 96, bias=columns == 48, seed=columns, int8=int8) for columns in (112, 48, 16))
    x = normal(rows, 96, seed=3, dtype=BF16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = compiled.product(layers)(x)
        alone = [compiled.product((layer,))(x)[0] for layer in layers]
    finally:
        torch.set_num_threads(before)
    assert [t.shape for t in together] == [(rows, 112), (rows, 48), (rows, 16)]
    given = rounded_rows(x) if int8 else x.double()
    for one, other, layer in zip(together, alone, layers, strict=True):
        assert torch.equal(one, other)
        bias = 0 if layer.bias is None else layer.bias.double()
        torch.testing.assert_close(one.double(), given @ wide(layer).T + bias, **NEAR)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("columns", [48, 64, 160])
def test_a_gated_product_is_silu_times_the_other(compiled, columns, int8):
    gate, up = (linear(columns, 64, seed=seed, int8=int8) for seed in (1, 2))
    x = 20 * normal(2, 11, 64, seed=3, dtype=BF16)  # gates from -80 to 80: no power of e may overflow
    [y] = compiled.product((gate, up), gated=True)(x)
    given = rounded_rows(x) if int8 else x.double()
    g, u = given @ wide(gate).T, given @ wide(up).T
    assert y.shape == (2, 11, columns)
    expected = g * torch.sigmoid(g) * u
    if not int8:
        torch.testing.assert_close(y.double(), expected, atol=0.1, rtol=2e-2)
    assert (y.double() - expected).norm() < 1e-2 * expected.norm()  # a tie may be rounded the other way


@pytest.mark.parametrize("int8", [False, True])
def test_a_row_alone_is_the_row_among_others_to_the_last_bit(compiled, int8):
    layers = (linear(96, 576, int8=int8), linear(96, 576, seed=5, int8=int8))
    x = normal(333, 576, seed=1, dtype=BF16)
    for gated in (False, True):
        product = compiled.product(layers, gated)
        for row in (0, 5, 128, 332):
            for one, many in zip(product(x[row : row + 1]), product(x), strict=True):
                assert torch.equal(one[0], many[row])


@pytest.mark.parametrize(
    ("columns", "inner", "dtype"), [(20, 64, BF16), (32, 40, BF16), (32, 64, torch.float32), (32, 64, torch.float16)]
)
def test_what_the_compiled_code_cannot_take_is_computed_all_the_same(compiled, columns, inner, dtype):
    layer, x = linear(columns, inner, bias=True, dtype=dtype), normal(5, inner, dtype=dtype)
    assert torch.equal(compiled.product((layer,))(x)[0], torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_no_rows_are_no_work(compiled):
    [y] = compiled.product((linear(48, 64),))(torch.empty(1, 0, 64, dtype=BF16))
    assert y.shape == (1, 0, 48)


def test_norms_and_rotations_are_transformers_own_to_the_last_bit(compiled):
    x, weight = 3 * normal(1, 7, 576, dtype=BF16), normal(576, seed=2, dtype=BF16)
    assert torch.equal(compiled.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    query = normal(1, 7, 3, 64, dtype=BF16).transpose(1, 2)
    cos, sin = normal(1, 7, 64, seed=4, dtype=BF16), normal(1, 7, 64, seed=5, dtype=BF16)
    assert torch.equal(compiled.rotate(query, cos, sin), reference.rotate(query, cos, sin))
    assert torch.equal(compiled.rotate(query.float(), cos, sin), reference.rotate(query.float(), cos, sin))


def chunk_of(tokens, past, kv_heads=2, group=3, dim=64, value_dim=32):
    """query, key, value, past_key, past_value, as strided as the engine's."""
    query = normal(kv_heads * group, tokens, dim, dtype=BF16).transpose(0, 1)
    key, value = (normal(kv_heads, tokens, d, seed=d, dtype=BF16).transpose(0, 1) for d in (dim, value_dim))
    pool = [normal(kv_heads, past + 5, d, seed=d + 1, dtype=BF16)[:, :past] for d in (dim, value_dim)]
    return query, key, value, *pool


CHUNKS = [(1, 0, 1, 32), (5, 3, 3, 64), (33, 20, 4, 64), (130, 45, 1, 96), (70, 130, 5, 128)]


@pytest.mark.parametrize("details", ["plain", "window", "sinks", "both"])
@pytest.mark.parametrize(("tokens", "past", "group", "dim"), CHUNKS)
def test_a_chunk_of_a_prompt_attends_as_float64_does(compiled, tokens, past, group, dim, details):
    chunk = chunk_of(tokens, past, group=group, dim=dim)
    options = {"scale": dim**-0.5}
    if details in ("window", "both"):
        options["hidden"] = window_mask(tokens, past, 2, window=11)
    if details in ("sinks", "both"):
        options["sinks"] = normal(2 * group, dtype=BF16)
    query_weights = torch.stack([torch.ones(tokens), (torch.arange(tokens) >= tokens - 9).float()])
    output, sums = compiled.attend_chunk(*chunk, query_weights=query_weights, **options)
    expected, columns = dense_chunk(*chunk, query_weights=query_weights, **options)
    torch.testing.assert_close(output.double(), expected, **NEAR)
    torch.testing.assert_close(sums.double(), columns[:-1], **NEAR)
    unasked, none = compiled.attend_chunk(*chunk, **options)
    assert none is None
    assert torch.equal(unasked, output)


@pytest.mark.parametrize("details", ["plain", "hidden", "sinks"])
@pytest.mark.parametrize(("capacity", "group", "dim"), [(1, 1, 32), (20, 3, 64), (33, 4, 96), (50, 9, 128)])
def test_decoding_tokens_attend_as_float64_does(compiled, capacity, group, dim, details):
    query = normal(3, 2 * group, dim, dtype=BF16)
    keys, values = normal(5, 2, capacity, dim, seed=1, dtype=BF16), normal(5, 2, capacity, 64, seed=2, dtype=BF16)
    slots, options = torch.tensor([4, 0, 3]), {"scale": dim**-0.5}
    if details == "hidden":
        options["hidden"] = (torch.arange(capacity) > torch.tensor([0, 7, 19]).view(-1, 1, 1)).expand(3, 2, capacity)
    if details == "sinks":
        options["sinks"] = normal(2 * group, dtype=BF16)
    output, [mass] = compiled.attend_slots(query, keys, values, slots, want_mass=True, **options)
    expected, columns = dense_slots(query, keys[slots], values[slots], **options)
    torch.testing.assert_close(output.double(), expected, **NEAR)
    torch.testing.assert_close(mass.double(), columns[0], **NEAR)


def far_sums(
    query, keys, asked_at, kept_at, *, scale, distance, power, weights=None, window=None, sinks=None, answer=10**9
):
    """Powers of probabilities that keys [N, K, D] at [N, K] receive from queries [T, H, D] at [T], in float64: [K, N].

    Queries see keys up to their own place, and count for those that lie ``distance`` before them; those of the answer,
    from this place on, count for all.
    """
    heads, kv_heads = query.shape[1], keys.shape[1]
    gap = asked_at.view(-1, 1, 1) - kept_at  # [T, N, K]
    seen = (gap >= 0) & (gap < (window or 10**9))
    sums = torch.zeros(kv_heads, len(keys), dtype=torch.float64)
    for head in range(heads):
        owner = head * kv_heads // heads
        scores = scale * query[:, head].double() @ keys[:, owner].double().T
        scores = scores.masked_fill(~seen[..., owner], -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].double().expand(len(query), 1)], 1)
        counted = scores.softmax(1)[:, : len(keys)] ** power * (
            (gap[..., owner] >= distance) | (asked_at >= answer).view(-1, 1)
        )
        sums[owner] += (counted if weights is None else counted * weights.double()[:, None]).sum(0) * kv_heads / heads
    return sums


def assert_near(sums, expected):
    """Sums of probabilities that were rounded to eight bits; those that are small next to others, too."""
    torch.testing.assert_close(sums.double(), expected, atol=1e-6, rtol=1e-2)


FAR = pytest.mark.parametrize(("distance", "power"), [(0, 2), (1, 1), (7, 2), (37, 1), (64, 2), (300, 1)])


@FAR
@pytest.mark.parametrize("details", ["plain", "both"])
@pytest.mark.parametrize(("tokens", "past", "group", "dim"), CHUNKS)
def test_a_key_counts_for_far_queries_alone(compiled, tokens, past, group, dim, details, distance, power):
    """Rows of a slot lie in any order, with gaps, and differently in each head."""
    chunk = query, key, _, past_key, _ = chunk_of(tokens, past, group=group, dim=dim)
    random = torch.Generator().manual_seed(1)
    places = torch.stack([-1 - torch.randperm(3 * past, generator=random)[:past] for _ in range(2)]).int()
    asked_at = torch.arange(tokens)
    kept_at = torch.cat([places.T, asked_at[:, None].expand(-1, 2)])
    weights = torch.stack([torch.rand(tokens, generator=random), (asked_at >= tokens - 9).float()])
    options, details = {"scale": dim**-0.5}, {"window": 11, "sinks": normal(2 * group)} if details == "both" else {}
    if details:
        options["sinks"] = details["sinks"]
        options["hidden"] = kept_at.T[:, None, :] <= asked_at[None, :, None] - 11
    _, sums = compiled.attend_chunk(
        *chunk, query_weights=weights, past_places=places, distance=distance, power=power, **options
    )
    keys = torch.cat([past_key.transpose(0, 1), key])
    details |= {"scale": dim**-0.5, "distance": distance, "power": power}
    for one, of_one in zip(sums, weights, strict=True):
        torch.testing.assert_close(
            one.double(), far_sums(query, keys, asked_at, kept_at, weights=of_one, **details), **NEAR
        )


def test_attention_and_its_sums_are_the_same_for_any_number_of_threads(compiled):
    chunk = chunk_of(130, 45)
    rows = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output, sums = compiled.attend_chunk(*chunk, query_weights=torch.ones(1, 130), scale=0.125)
            slots = compiled.attend_slots(chunk[0][:2], *(one.expand(2, -1, -1, -1).contiguous() for one in chunk[3:]),
                                          scale=0.125, want_mass=True)  # fmt: skip
            rows.append((output, sums, *slots))
    finally:
        torch.set_num_threads(before)
    for other in rows[1:]:
        assert all(map(torch.equal, rows[0], other))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("group", [1, 3])
def test_powers_of_the_attention_of_decoding_tokens(compiled, group, power):
    query, keys = normal(3, 2 * group, 64, dtype=BF16), normal(3, 2, 33, 64, seed=1, dtype=BF16)
    _, [mass] = compiled.attend_slots(query, keys, keys, scale=0.125, want_mass=True, power=power)
    at = torch.zeros(33, 2)
    for one, asked, kept in zip(mass, query, keys, strict=True):
        options = {"scale": 0.125, "distance": 0, "power": power}
        expected = far_sums(asked[None], kept.transpose(0, 1), torch.zeros(1), at, **options)
        assert_near(one, expected)


def rows_of(capacity, kv_heads=2, dim=64, value_dim=32, dtype=BF16, formats=("model", "model")):
    """Two slots without pairs."""
    count = 2 * kv_heads * capacity
    keys, values = (
        Stored.zeros(name, (count,), size, dtype, torch.device("cpu"))
        for name, size in zip(formats, (dim, value_dim), strict=True)
    )
    return Rows(
        keys=keys.numbers, values=values.numbers, key_scales=keys.scales, value_scales=values.scales,
        key_format=keys.format, value_format=values.format,
        positions=torch.full((count,), -1, dtype=torch.int32), mass=torch.zeros(count),
        first=torch.arange(2 * kv_heads).view(2, -1) * capacity, capacity=torch.full((2, kv_heads), capacity),
        kv_heads=kv_heads, capacities=((capacity,) * kv_heads,) * 2, largest=capacity,
    )  # fmt: skip


def view_of(rows):
    """Slot 1, all heads."""
    ((_, view),) = rows.slot(1)
    return view


def read(module, rows, sequence, start, stop, order, limit, **options):
    """Slot 1 reads these tokens of a sequence (q, k, v), one alone as a decoding token; returns their output."""
    q, k, v = (one[start:stop] for one in sequence)
    output, options = q.new_empty(*q.shape[:2], v.shape[-1]), {"scale": 0.125, "order": order, **options}
    if stop - start == 1:
        numbers = (torch.tensor([n]) for n in (1, start, limit))
        done = module.decode_step(output, q, k, v, rows, *numbers, decay=1.0, accumulate=True, **options)
    else:
        columns = ((0,), (stop - start,), (1,), (start,), (limit,), (10**6,))
        chunks = Chunks(**dict(zip(CHUNK_COLUMNS, columns, strict=True)), table=torch.tensor(columns))
        done = module.prefill_step(output, q, k, v, rows, chunks, **options)
    assert done
    return output


def sequence_of(tokens, heads=6, kv_heads=2, dim=64, value_dim=32):
    sizes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    return [normal(tokens, *size, seed=i, dtype=BF16) for i, size in enumerate(sizes)]


@FAR
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("cuts", [(90,), (2, 30, 75), (64, 80, 88)])
def test_far_attention_of_a_whole_sequence_however_it_is_cut(compiled, cuts, window, distance, power):
    """Of prompt and answer: each key's sum is that of the full matrix."""
    query, key, _ = sequence = sequence_of(100)
    order = EvictionOrder(by="mass", sink=2, recent=distance, window=window, distance=distance, power=power)
    rows, at = rows_of(100), torch.arange(100)
    sinks = normal(6)
    for start, stop in itertools.pairwise((0, *cuts, *range(cuts[-1] + 1, 101))):
        read(compiled, rows, sequence, start, stop, order, 100, sinks=sinks)
    details = {"scale": 0.125, "distance": distance, "power": power, "window": window, "sinks": sinks}
    details["answer"] = cuts[-1]
    expected = far_sums(query, key, at, at[:, None].expand(-1, 2), **details)
    assert_near(view_of(rows).mass, expected)


@pytest.mark.parametrize("by", ["average", "mass"])
@pytest.mark.parametrize(("distance", "power"), [(0, 2), (9, 1), (30, 2)])
@pytest.mark.parametrize("window", [None, 80])
@pytest.mark.parametrize("cuts", [(170,), (40, 45, 120, 170)])
def test_far_attention_evicts_what_the_specification_evicts(compiled, cuts, window, distance, power, by):
    """Before each step, both have the same pairs and sums; the specification computes in float32."""
    query, key, _ = sequence = sequence_of(190)
    query[..., 0], key[..., 0] = 12, 3 * key[..., 0]  # some keys matter more than others: rounding decides nothing
    wide = [one.float() for one in sequence]
    order = EvictionOrder(by=by, sink=2, recent=distance + 4, window=window, distance=distance, power=power)
    rows, expected = rows_of(64), rows_of(64, dtype=torch.float32)
    for start, stop in itertools.pairwise((0, *cuts, *range(cuts[-1] + 1, 191))):
        expected.mass.copy_(rows.mass)
        output = read(compiled, rows, sequence, start, stop, order, 60)
        expected_output = read(reference, expected, wide, start, stop, order, 60)
        assert torch.equal(rows.positions, expected.positions)
        assert torch.equal(rows.keys.float(), expected.keys)
        assert torch.equal(rows.values.float(), expected.values)
        assert_near(rows.mass, expected.mass.double())
        torch.testing.assert_close(output.float(), expected_output, **NEAR)


def exact(stored, dim):
    """What stored vectors stand for, in float64 and without any rounding."""
    if stored.scales is None:
        return stored.numbers.double()
    scales = stored.scales.double()
    if stored.format == "int8":
        return stored.numbers.view(torch.int8).double() * scales
    levels = torch.cat([stored.numbers % 16, stored.numbers // 16], -1).double()
    assert levels.shape[-1] == dim
    return levels * scales[..., :1] + scales[..., 1:]


CODED = pytest.mark.parametrize(
    "formats", [("int8", "int8"), ("int4", "int4"), ("int8", "int4"), ("model", "int4"), ("int4", "model")]
)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_codes_are_those_of_the_specification_to_the_last_bit(compiled, step, dim, name):
    """Of plain numbers, and of some that a float16 scale or offset can hardly hold."""
    tokens = 60
    key = normal(tokens, 2, dim, seed=1) * 10 ** normal(tokens, 2, 1, seed=2)
    key[3], key[4], key[5, :, 1:], key[6], key[7, 0, 0], key[8], key[9, :, 5] = 0, 7.5, 0, 1e-9, torch.inf, 3e5, -2e8
    key[10:20] += 40
    value = normal(tokens, 2, dim, seed=3).to(BF16)
    sequence = normal(tokens, 4, dim, dtype=BF16), key.to(BF16), value
    order = EvictionOrder(by="age", sink=0, recent=0, window=None)
    rows = rows_of(tokens, dim=dim, value_dim=dim, formats=(name, name))
    bounds = (0, tokens) if step == "prefill" else range(tokens + 1)
    for start, stop in itertools.pairwise(bounds):
        read(compiled, rows, sequence, start, stop, order, tokens)
    keys, values, *_ = view_of(rows)
    for stored, vectors in ((keys, sequence[1]), (values, value)):
        codes, scales = FORMATS[name].encode(vectors.transpose(0, 1))
        assert torch.equal(stored.scales, scales)
        assert torch.equal(stored.numbers, codes)


@CODED
@pytest.mark.parametrize("sharp", [0.02, 0.3, 4.0])
@pytest.mark.parametrize(("group", "dim", "value_dim", "count"), [(1, 64, 32, 1), (3, 64, 64, 700), (9, 96, 128, 77)])
def test_decoding_tokens_read_codes_as_float64_does(compiled, group, dim, value_dim, count, sharp, formats):
    """Attention to all keys alike, and to few of them: weights of all sizes count."""
    rows = rows_of(count, dim=dim, value_dim=value_dim, formats=formats)
    key, value = normal(count, 2, dim, seed=1, dtype=BF16), 3 + normal(count, 2, value_dim, seed=2, dtype=BF16)
    query = normal(count, 2 * group, dim, seed=3, dtype=BF16)
    order, sinks = EvictionOrder(by="mass", sink=0, recent=0, window=None), normal(2 * group)
    if count > 1:
        read(compiled, rows, (query, key, value), 0, count - 1, order, count)
    rows.mass.zero_()
    output = read(compiled, rows, (query, key, value), count - 1, count, order, count, scale=sharp, sinks=sinks)
    keys, values, positions, mass, _ = view_of(rows)
    assert torch.equal(positions, torch.arange(count, dtype=torch.int32).expand(2, -1))
    read_keys, read_values = exact(keys, dim).unsqueeze(0), exact(values, value_dim).unsqueeze(0)
    expected, columns = dense_slots(query[-1:], read_keys, read_values, scale=sharp, sinks=sinks)
    torch.testing.assert_close(output.double(), expected, atol=5e-3, rtol=8e-3)
    torch.testing.assert_close(mass.double(), columns[0, 0], atol=1e-6, rtol=8e-3)


@CODED
@pytest.mark.parametrize(("tokens", "past", "group", "dim"), CHUNKS[1:])
def test_a_chunk_reads_codes_as_float64_does(compiled, tokens, past, group, dim, formats):
    """The chunk's own pairs are read as they are given."""
    sequence = [normal(past + tokens, heads, dim, seed=i, dtype=BF16) for i, heads in enumerate((2 * group, 2, 2))]
    query, key, value = sequence
    order = EvictionOrder(by="mass", sink=0, recent=0, window=None)
    rows = rows_of(past + tokens + 3, dim=dim, value_dim=dim, formats=formats)
    read(compiled, rows, sequence, 0, past, order, past + tokens)
    before = view_of(rows)
    slot = [exact(stored, dim)[:, :past] for stored in (before.keys, before.values)]
    rows.mass.zero_()
    output = read(compiled, rows, sequence, past, past + tokens, order, past + tokens)
    expected, columns = dense_chunk(query[past:], key[past:], value[past:], *slot, scale=0.125)
    torch.testing.assert_close(output.double(), expected, **NEAR)
    torch.testing.assert_close(view_of(rows).mass[:, : past + tokens].double(), columns[0], **NEAR)


def test_codes_without_a_number_stay_without(compiled):
    query, key, value = (normal(9, heads, 64, seed=heads, dtype=BF16) for heads in (6, 2, 2))
    order = EvictionOrder(by="mass", sink=0, recent=0, window=None)
    for formats, broken in itertools.product((("int8", "int8"), ("int4", "int4")), (query, key, value)):
        kept, broken[6, 0, 3] = broken[6, 0, 3].item(), torch.nan
        rows = rows_of(9, value_dim=64, formats=formats)
        before = read(compiled, rows, (query, key, value), 0, 6, order, 9)
        output = read(compiled, rows, (query, key, value), 6, 7, order, 9)
        broken[6, 0, 3] = kept
        assert before.isfinite().all()
        assert output[0, 0].isnan().all()
        assert output[0, 3:].isfinite().all()


@pytest.mark.parametrize(("formats", "dim"), [(("fp8", "int8"), 64), (("model", "fp8"), 64), (("int8", "model"), 544)])
def test_other_codes_are_declined_and_nothing_is_changed(compiled, formats, dim):
    rows = rows_of(9, dim=dim, formats=formats)
    q, k, v = normal(1, 4, dim, dtype=BF16), normal(1, 2, dim, dtype=BF16), normal(1, 2, 32, dtype=BF16)
    output, numbers = torch.zeros(1, 4, 32, dtype=BF16), (torch.tensor([n]) for n in (1, 0, 9))
    order = EvictionOrder(by="mass", sink=0, recent=0, window=None)
    options = {"scale": 0.1, "order": order}
    assert not compiled.decode_step(output, q, k, v, rows, *numbers, decay=1.0, accumulate=True, **options)
    columns = ((0,), (1,), (1,), (0,), (9,), (99,))
    chunks = Chunks(**dict(zip(CHUNK_COLUMNS, columns, strict=True)), table=torch.tensor(columns))
    assert not compiled.prefill_step(output, q, k, v, rows, chunks, **options)
    assert not output.any()
    assert (rows.positions == -1).all()


def test_what_is_left_to_torch_is_computed_in_float32_on_a_processor_without_bfloat16(compiled, monkeypatch):
    """There, torch takes a hundred times as long in bfloat16."""
    monkeypatch.setattr(hardware, "cpu_flags", frozenset)
    chunk = chunk_of(30, 20)
    seen = []
    monkeypatch.setattr(torch, "mm", lambda a, b, mm=torch.mm, **out: seen.append(a.dtype) or mm(a, b, **out))
    output, _ = compiled.attend_chunk(*chunk, scale=0.125, softcap=2.0)
    expected, _ = dense_chunk(*chunk, scale=0.125, softcap=2.0)
    assert output.dtype == BF16
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(output.double(), expected, **NEAR)
    query, keys = normal(3, 6, 64, dtype=BF16), normal(5, 2, 33, 64, seed=1, dtype=BF16)
    slots = torch.tensor([4, 0, 3])
    output, _ = compiled.attend_slots(query, keys, keys, slots, scale=0.125, softcap=2.0)
    expected, _ = dense_slots(query, keys[slots], keys[slots], scale=0.125, softcap=2.0)
    assert output.dtype == BF16
    torch.testing.assert_close(output.double(), expected, **NEAR)


def test_what_is_no_number_stays_none(compiled):
    """The engine finds broken rows by their logits: no kernel may make a number of them."""
    query, key, value, past_key, past_value = chunk_of(9, 4)
    query = query.clone()
    query[3, 2, 7] = float("nan")
    output, _ = compiled.attend_chunk(query, key, value, past_key, past_value, scale=0.1)
    assert output[3, 2].isnan().all()
    assert output[:3].isfinite().all()
    query = normal(2, 6, 64, dtype=BF16)
    query[1, 0, 0] = float("nan")
    keys = normal(2, 2, 8, 64, dtype=BF16)
    output, _ = compiled.attend_slots(query, keys, keys, scale=0.1)
    assert output[1, 0].isnan().all()
    assert output[0].isfinite().all()
    for int8, broken in itertools.product((False, True), ("nan", "inf")):
        x = normal(2, 64, dtype=BF16)
        x[1, 3] = float(broken)
        [y] = compiled.product((linear(16, 64, int8=int8),))(x)
        assert y[0].isfinite().all()
        assert not y[1].isfinite().any()


def bfloat16_model():
    """A small model in bfloat16 whose heads and layers the compiled kernels can take."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    return model.to(BF16).eval()


CACHES = [
    *((policy, "model") for policy in ("average-attention", "none", "streaming", "h2o", "far-attention")),
    *(("far-attention", name) for name in ("int8", "int4", "int8/int4")),
    *(("none", name) for name in ("int8", "int4", "int8/int4")),
]


@pytest.mark.parametrize(
    ("instruction_set", "policy", "kv_format", "int8"),
    on_every_set(
        [(*cache, int8) for cache in CACHES for int8 in (False, True)],
        few=[("none", "model", False), ("far-attention", "int8/int4", True), ("none", "int4", False)],
    ),
    indirect=["instruction_set"],
)
def test_in_bfloat16_too_a_row_alone_is_the_row_in_a_batch(instruction_set, policy, kv_format, int8, cpu_kernels):
    """With these kernels no number depends on its company, so not even rounding does."""
    cpu_kernels(instruction_set)
    loaded = prepare(bfloat16_model())
    loaded = quantize(loaded, "int8") if int8 else loaded
    settings = {
        "kv_policy": policy,
        "kv_format": kv_format,
        "kv_budget": 40,
        "kv_recent": 20,
        "chunk_size": 24,
        "prefix_reuse": False,
    }
    engine = Engine(EngineConfig(**settings), PromptConfig(), word_tokenizer(), ModelBackend(loaded))
    requests = as_requests(random_prompts([90, 13, 61, 47, 100]), max_tokens=20)
    together = answers(engine, requests)
    assert together == {name: tokens for request in requests for name, tokens in answers(engine, [request]).items()}
    assert len(set(together.values())) > 1


# norms, rotations and MLPs of their own, parts of heads that are not turned, sinks, windows, experts, no rotation
FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt_oss", "olmo2", "glm4", "phi", "gpt2"]


@pytest.mark.parametrize(
    ("instruction_set", "family"),
    on_every_set(((family,) for family in FAMILIES), few=[("llama",), ("gpt_oss",)]),
    indirect=["instruction_set"],
)
def test_compiled_and_plain_kernels_say_the_same_of_a_model(instruction_set, family, cpu_kernels):
    """bfloat16 rounds differently in each: logits are as near to float32 as those of plain torch."""
    logits = []
    for name, dtype in (("reference", torch.float32), ("reference", BF16), (instruction_set, BF16)):
        cpu_kernels(name)
        engine = tiny_engine(tiny_model(family).to(BF16).to(dtype), kv_policy="none")
        requests = as_requests(random_prompts([70]), max_tokens=1)
        answers(engine, requests, watch=lambda request, place, row: logits.append(row.float()))
    expected, plain, actual = logits
    assert (actual - expected).norm() < 2 * (plain - expected).norm()


def test_the_model_gets_its_own_forwards_back(instruction_set):
    model = bfloat16_model()
    x = torch.arange(5).unsqueeze(0)
    before = model(x).logits
    with fused_modules(model, kernels.Kernels(instruction_set, "")):
        assert not torch.is_inference_mode_enabled()  # whoever reads results in between is left as it was
        assert all("forward" in vars(layer.self_attn) for layer in model.model.layers)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(x).logits, before)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2"])
def test_another_model_of_the_family_is_left_alone(compiled, instruction_set, family, monkeypatch):
    """Its numbers are its own to the last bit meanwhile, and transformers' code is what it was."""
    model, other = tiny_model(family).to(BF16), tiny_model(family).to(BF16)
    code = sys.modules[type(model).__module__]
    contents, x = dict(vars(code)), torch.arange(5).unsqueeze(0)
    before = other(x).logits
    turned = []
    monkeypatch.setattr(compiled, "rotate", lambda *args: turned.append(args) or reference.rotate(*args))
    with fused_modules(model, kernels.Kernels(instruction_set, "")):
        turned.clear()
        assert torch.equal(other(x).logits, before)
        assert not turned
        model(x)
        assert turned
        assert vars(code) == contents


def test_a_norm_of_its_own_kind_is_left_alone(instruction_set):
    """Gemma's norm adds one to its weight: it looks the same and is not."""
    model = tiny_model("gemma2").to(BF16)
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    with torch.no_grad():
        for norm in norms:
            norm.weight.fill_(0.5)
    assert norms
    with fused_modules(model, kernels.Kernels(instruction_set, "")):
        assert not any("forward" in vars(norm) for norm in norms)


def test_a_projection_asked_alone_answers_for_itself(instruction_set):
    """Queries, keys and values of one input are computed together; another input must not get what was kept."""
    model = bfloat16_model()
    attention = next(module for module in model.modules() if hasattr(module, "k_proj"))
    x, other = normal(1, 5, 64, dtype=BF16), normal(1, 5, 64, seed=1, dtype=BF16)
    expected = attention.k_proj(other)
    with fused_modules(model, kernels.Kernels(instruction_set, "")):
        attention.q_proj(x)
        torch.testing.assert_close(attention.k_proj(other), expected, **NEAR)
        torch.testing.assert_close(attention.v_proj(other), attention.v_proj(other))


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """Nothing has been compiled yet in this process, nor kept, and what is compiled is small."""
    (tmp_path / "kernels.cpp").write_text('extern "C" int bmx_start() { return 0; }')
    monkeypatch.setattr(build, "SOURCE", tmp_path / "kernels.cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("BMX_KERNELS", raising=False)
    another_process()
    yield tmp_path
    another_process()


def another_process():
    """Nothing is loaded yet."""
    build.library.cache_clear()
    build.best.cache_clear()


@pytest.fixture
def best(afresh):
    """The best instruction set of this machine."""
    if not HERE:
        pytest.skip("this processor has none of the instruction sets")
    return required(HERE[0])


def test_kernels_are_compiled_once_and_kept(best, monkeypatch):
    another_process()
    monkeypatch.setattr(subprocess, "run", None)
    assert not isinstance(build.library(best), str)


def test_e2_a_damaged_copy_is_made_anew(best, afresh):
    [kept] = (afresh / "cache").rglob("*.so")
    content = kept.read_bytes()
    kept.unlink()  # it is mapped into this process
    kept.write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))  # loading it would end the process
    another_process()
    assert not isinstance(build.library(best), str)
    copies = (afresh / "cache").rglob("*.so")
    assert any(hashlib.sha256(copy.read_bytes()).hexdigest()[:32] in copy.name for copy in copies)


@pytest.mark.parametrize("name", HERE or [pytest.param("", marks=pytest.mark.skip(reason="it has none"))])
def test_the_kernels_are_compiled_for_every_set_that_the_processor_has(name):
    """A mistake in the C++ of one set is a failure, not a skipped test."""
    found = build.library(name)
    assert not isinstance(found, str) or found == build.NO_COMPILER or found.startswith("the system does not let"), (
        found
    )


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("PATH", "", "no C++ compiler"), ("CXX", "/bin/false", "cannot compile"), ("CXX", "/no/such", "does not work")],
)
def test_without_a_compiler_that_works_the_tiles_run_and_one_warning_tells_the_reason(
    best, monkeypatch, caplog, name, value, why
):
    another_process()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(name, value)
    for _ in range(2):
        chosen = kernels.choose("cpu")
        assert chosen.name == "cpu"
        assert why in chosen.why
    [warning] = caplog.messages
    assert why in warning


def has(monkeypatch, *flags):
    """The processor has nothing but these."""
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(flags))


def test_a_processor_without_any_of_the_sets_gets_the_tiles(afresh, monkeypatch):
    has(monkeypatch, "sse2")
    chosen = kernels.choose("cpu")
    assert chosen.name == "cpu"
    assert "the processor has no AVX2" in chosen.why


@pytest.mark.parametrize("name", [name for name, one in SETS.items() if one.machine == platform.machine()])
def test_each_processor_gets_the_best_that_it_has_and_is_told_what_would_be_faster(name, afresh, monkeypatch):
    has(monkeypatch, *SETS[name].needs)
    built = []
    monkeypatch.setattr(build, "_built", lambda chosen, *_: built.append(chosen.name) or Started(0))
    chosen = kernels.choose("cpu")
    assert built == [chosen.name] == [name]
    assert f"compiled for {SETS[name].title}" in chosen.why
    for other in itertools.takewhile(lambda one: one.name != name, SETS.values()):
        assert other.title in chosen.why.partition(";")[2]
    assert ("would be faster" in chosen.why) is (name not in ("amx", "neon"))


class Started:
    """A library that says whether the system lets it start."""

    def __init__(self, refusal):
        self.bmx_start = lambda: refusal


def test_where_the_system_refuses_a_set_the_next_one_is_taken_and_a_warning_says_so(afresh, monkeypatch, caplog):
    has(monkeypatch, *SETS["amx"].needs)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "_built", lambda chosen, *_: Started(chosen.name == "amx"))
    chosen = kernels.choose("cpu")
    assert chosen.name == "avx512bf16"
    assert "AMX would be faster: the system does not let this process use AMX" in chosen.why
    [warning] = caplog.messages
    assert "AVX512-BF16, slower than AMX: the system does not let this process use AMX" in warning


def test_a_set_that_the_processor_lacks_is_refused_and_the_flag_named(afresh, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    has(monkeypatch, *SETS["avx2"].needs)
    monkeypatch.setenv("BMX_KERNELS", "avx512")
    with pytest.raises(UsageError, match="BMX_KERNELS cannot be 'avx512': the processor has no avx512f") as refused:
        kernels.choose("cpu")
    assert re.match(r"here it takes reference, cpu(,| or) avx2", refused.value.hint)


def test_e2_without_a_place_to_keep_them_kernels_are_compiled_and_a_warning_says_so(best, afresh, caplog):
    another_process()
    (afresh / "cache" / "bmx").rename(afresh / "before")
    (afresh / "cache").rmdir()
    (afresh / "cache").write_text("a file, not a folder")
    assert kernels.choose("cpu").name == best
    [warning] = caplog.messages
    assert "cannot be kept (Not a directory), and are compiled in each run" in warning
    assert "XDG_CACHE_HOME" in warning


def test_e2_without_platformdirs_kernels_are_compiled_and_a_warning_names_the_package(best, monkeypatch, caplog):
    another_process()
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert kernels.choose("cpu").name == best
    [warning] = caplog.messages
    assert "(platformdirs is not installed), and are compiled in each run: pip install platformdirs" in warning
