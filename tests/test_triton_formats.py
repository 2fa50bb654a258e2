"""Triton's steps read pairs in fewer bits as unpacking would, and store new ones in the same codes, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

jit = pytest.importorskip("triton").jit
tl = pytest.importorskip("triton.language")

from conftest import answers, as_requests, random_prompts, tiny_engine
from families import FAMILIES, tiny_model
from test_triton_slots import (
    DEVICE,
    EVICTING,
    F16,
    F32,
    FITTING,
    LIMITS,
    MIXED,
    NEAR,
    NOW,
    PLAIN,
    SLOTS,
    UNEVEN,
    assert_same_rows,
    copied,
    decode,
    make_chunks,
    make_rows,
    normal,
    ranked,
    seen_by_slots,
    slots_before,
    strided,
    tokens_of,
    true_decode,
    uniform,
)

from bmx.kernels import reference, triton, triton_decode, triton_evict, triton_splits, triton_vectors
from bmx.kernels.formats import FORMATS, MODEL
from bmx.kv_formats import formats_of

FORMS = ("fp8", "int8", "int4", "int8/int4", "int4/int8", "model/int4", "int8/model")
FAR = ranked("average", recent=9, distance=9, power=2)
WINDOW = ranked("average", window=25, recent=6, distance=6, power=2)


def packed(rows, form):
    """The same rows, their vectors in these formats."""
    found = {}
    for name, kind in zip(("keys", "values"), formats_of(form), strict=True):
        one = name.removesuffix("s")
        found[f"{one}_format"] = kind
        if kind != MODEL:
            found[name], found[f"{one}_scales"] = FORMATS[kind].encode(getattr(rows, name))
    return replace(rows, **found)


def unpacked(rows, dims, dtype=F32):
    """The same rows, their vectors in ``dtype``."""
    found = {"key_scales": None, "value_scales": None, "key_format": MODEL, "value_format": MODEL}
    for name, scales, kind, dim in zip(
        ("keys", "values"), (rows.key_scales, rows.value_scales), rows.formats, dims, strict=True
    ):
        if kind != MODEL:
            found[name] = FORMATS[kind].decode(getattr(rows, name), scales, dtype)[:, :dim]
    return replace(rows, **found)


def decoded_as(tokens, form):
    """The tokens' own pairs, as they are read once they are stored."""
    query, *pair = tokens
    for i, kind in enumerate(formats_of(form)):
        if kind != MODEL:
            pair[i] = FORMATS[kind].decode(*FORMATS[kind].encode(pair[i]), F32)[..., : pair[i].shape[-1]]
    return query, *pair


def each_in_turn(cases):
    """The first case in every form, the others by turns in one."""
    first, *others = cases
    return [(first, form) for form in FORMS] + [(name, FORMS[-turn]) for turn, name in enumerate(others, start=2)]


DECODING = {
    "far": ({"group": 3}, {"order": FAR}),
    "a window, sinks and a cap": ({"group": 4}, {"order": WINDOW, "sinks": normal(8, seed=5), "softcap": 0.8}),
    "one head, keys wider than values": ({"group": 1, "dim": 96, "value_dim": 64}, {"order": ranked("mass")}),
    "odd sizes": ({"group": 2, "dim": 33, "value_dim": 25}, {"order": FAR, "decay": 0.5}),
    "nothing added up": ({"group": 2, "dim": 24}, {"order": ranked("age"), "accumulate": False}),
}


@pytest.mark.parametrize(("name", "form"), each_in_turn(DECODING))
def test_a_decoding_step_reads_codes_as_unpacking_them_would(name, form):
    """Slots not full, just full, long full; what is stored is what the formats say."""
    shape, manner = DECODING[name]
    manner, tokens = {**PLAIN, **manner}, tokens_of(5, **shape)
    of_slots = {name: size for name, size in shape.items() if name != "group"}
    rows = packed(make_rows(*seen_by_slots(), **of_slots), form)
    output, actual = decode(*tokens, rows, SLOTS, NOW, LIMITS, **manner)
    dims = tokens[1].shape[-1], tokens[2].shape[-1]
    plain_rows = copied(unpacked(rows, dims), "cpu")
    plain = true_decode(*decoded_as(tokens, form), plain_rows, SLOTS, NOW, LIMITS, **manner)
    torch.testing.assert_close(output.cpu().double(), plain, **NEAR[F32])
    torch.testing.assert_close(actual.mass.cpu(), plain_rows.mass, **NEAR[F32])
    expected, answer = copied(rows), torch.empty_like(output)
    numbers = (torch.tensor(one, device=DEVICE) for one in (SLOTS, NOW, LIMITS))
    assert reference.decode_step(answer, *tokens, expected, *numbers, **manner)
    torch.testing.assert_close(output, answer, **NEAR[F32])
    assert_same_rows(actual, expected, **NEAR[F32])


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_decoding_step_in_splits_reads_and_stores_the_same_codes(form, monkeypatch):
    tokens, rows = tokens_of(5, group=3, dim=24), packed(make_rows(*seen_by_slots(), dim=24), form)
    whole, expected = decode(*tokens, rows, SLOTS, NOW, LIMITS, **PLAIN)
    monkeypatch.setattr(triton_decode, "SPLITS", triton_splits.Splits(whole=8, rows=16))
    output, actual = decode(*tokens, rows, SLOTS, NOW, LIMITS, **PLAIN)
    torch.testing.assert_close(output, whole, **NEAR[F32])
    assert_same_rows(actual, expected, **NEAR[F32])


def test_half_precision_is_as_near_as_its_numbers():
    tokens, rows = tokens_of(5, dtype=F16), packed(make_rows(*seen_by_slots(), dtype=F16), "int8/int4")
    output, actual = decode(*tokens, rows, SLOTS, NOW, LIMITS, **PLAIN)
    expected = copied(unpacked(rows, (16, 16)), "cpu")
    answer = true_decode(*decoded_as(tokens, "int8/int4"), expected, SLOTS, NOW, LIMITS, **PLAIN)
    torch.testing.assert_close(output.cpu().double(), answer, **NEAR[F16])
    torch.testing.assert_close(actual.mass.cpu(), expected.mass, **NEAR[F16])


READING = {
    "far": ({}, FAR, {}),
    "a window, sinks and a cap": ({}, WINDOW, {"sinks": normal(6, seed=5).to(DEVICE), "softcap": 0.8}),
    "two parts, keys wider than values": ({"dim": 96, "value_dim": 40}, ranked("mass"), {}),
    "odd sizes": ({"dim": 33, "value_dim": 21}, FAR, {}),
    "by age": ({"mass": False}, ranked("age"), {}),
    "kv heads with rows of their own": ({"capacities": UNEVEN}, FAR, {}),
}


@pytest.mark.parametrize(("name", "form"), each_in_turn(READING))
def test_chunks_read_codes_as_unpacking_them_would_and_store_their_own(name, form):
    shape, order, details = READING[name]
    chunks, tokens = make_chunks(MIXED)
    rows = packed(slots_before(MIXED, **shape), form)
    dims = shape.get("dim", 16), shape.get("value_dim", 16)
    shapes = (6, dims[0]), (2, dims[0]), (2, dims[1])
    vectors = [strided(tokens, *size, seed, F32) for seed, size in enumerate(shapes)]
    found = []
    for kernels in (triton, reference):
        stored, output = copied(rows), torch.zeros(tokens, 6, dims[1], device=DEVICE)
        assert kernels.prefill_step(output, *vectors, stored, chunks, scale=0.3, order=order, **details)
        found.append((output, stored))
    (output, actual), (wanted, expected) = found
    torch.testing.assert_close(output, wanted, **NEAR[F32])
    assert_same_rows(actual, expected, **NEAR[F32])


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
@pytest.mark.parametrize(("dim", "wanted"), [(1, EVICTING), (5, FITTING), (80, EVICTING), (128, FITTING)])
def test_codes_are_those_of_the_formats_bit_for_bit(form, dim, wanted):
    """Of vectors large and small, all alike, all zero, and too large for the scale."""
    chunks, tokens = make_chunks(wanted)
    rows = packed(slots_before(wanted, dim=dim, value_dim=dim), form)
    key, value = (strided(tokens, 2, dim, seed, F32) * 10.0 ** (seed * uniform(tokens, 2, 1) - 3) for seed in (3, 4))
    key[3:40:7], key[4:40:7], value[5:40:7], value[6:40:7] = 0.0, 1.25, -3e6, 1e-9
    found = []
    for kernels in (triton_evict, reference):
        stored = copied(rows)
        assert kernels.evict(key, value, stored, chunks, uniform(2, tokens), order=FAR)
        found.append(stored)
    assert_same_rows(*found)


@jit
def _encode(codes, numbers, count: tl.constexpr):
    at = tl.arange(0, count)
    tl.store(codes + at, triton_vectors.to_fp8(tl.load(numbers + at)))


def test_float8_is_rounded_as_torch_rounds_it():
    """All float16 numbers as far as it reaches, and some close to half of its smallest and to its smallest normal."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    numbers = torch.where(numbers.isnan(), 0.0, numbers).clamp(-448, 448).to(DEVICE)
    numbers[-3:] = torch.tensor([2.0**-6 - 2.0**-30, 2.0**-10 + 2.0**-33, -(2.0**-10)])
    codes = torch.empty(len(numbers), dtype=torch.uint8, device=DEVICE)
    _encode[1,](codes, numbers, len(numbers))
    assert torch.equal(codes, numbers.to(torch.float8_e4m3fn).view(torch.uint8))


def test_formats_that_kernels_do_not_know_are_left_to_others():
    rows = packed(make_rows(*seen_by_slots()), "int8")
    rows = replace(rows, key_format="int2")
    same = copied(rows)
    output, actual = decode(*tokens_of(5), rows, SLOTS, NOW, LIMITS, **PLAIN)
    assert output.isnan().all()
    assert_same_rows(actual, same)
    chunks, tokens = make_chunks(FITTING)
    vectors = [strided(tokens, heads, 16, heads, F32) for heads in (6, 2, 2)]
    assert not triton.prefill_step(torch.zeros(tokens, 6, 16), *vectors, actual, chunks, scale=0.3, order=FAR)
    assert_same_rows(actual, same)


@pytest.mark.parametrize("form", ["fp8", "int8/int4"])
def test_answers_are_those_of_unpacking_pairs(form, cpu_kernels, monkeypatch):
    small = FAMILIES["llama"]()
    small.num_hidden_layers = 1
    monkeypatch.setitem(FAMILIES, "small", lambda: small)
    settings = {"kv_policy": "far-attention", "kv_budget": 20, "kv_sink": 2, "kv_recent": 5, "kv_format": form}
    settings |= {"chunk_size": 16, "max_num_seqs": 3, "max_num_batched_tokens": 40}
    requests = as_requests(random_prompts((40, 11)), max_tokens=5)
    cpu_kernels("triton")
    engine = tiny_engine(tiny_model("small").to(DEVICE), **settings)
    answered = answers(engine, requests)
    assert engine.stats.eager == ""
    cpu_kernels("reference")
    assert answered == answers(tiny_engine("small", **settings), requests)
