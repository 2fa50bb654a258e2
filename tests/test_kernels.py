"""Every attention kernel gives what a dense float64 attention, written out as loops, gives."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from instruction_sets import required

from bmx import kernels
from bmx.errors import UsageError
from bmx.kernels import cpu, reference
from bmx.kernels.contract import FUNCTIONS, KernelModule
from bmx.kernels.registry import CAPABILITIES

KERNELS = pytest.mark.parametrize("kernel", [reference, cpu], ids=["reference", "cpu"])
TIGHT = {"atol": 2e-5, "rtol": 2e-5}
# Eight (bfloat16) and eleven (float16) bits of a number: single probabilities and outputs are rounded to those.
LOOSE = {torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2}, torch.float16: {"atol": 4e-3, "rtol": 4e-3}}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(tokens, past, *, kv_heads=2, group=3, dim=8, value_dim=8, dtype=torch.float32):
    """query, key, value, past_key, past_value of a chunk."""
    shapes = (
        (tokens, kv_heads * group, dim),
        (tokens, kv_heads, dim),
        (tokens, kv_heads, value_dim),
        (kv_heads, past, dim),
        (kv_heads, past, value_dim),
    )
    return [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def dense_head(query, keys, values, unseen, *, scale, softcap=None, sink=None):
    """Queries [T, D] over keys [N, D] but the `unseen` [T, N]: output [T, E] and probabilities [T, N]."""
    scores = keys.double() @ query.double().T * scale  # one column per query
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.exp(scores - scores.max()).T * ~unseen
    extra = 0.0 if sink is None else torch.exp(sink.double() - scores.max())
    probabilities = weights / (weights.sum(1, keepdim=True) + extra)
    return probabilities @ values.double(), probabilities


def dense_chunk(
    query, key, value, past_key, past_value, *, sinks=None, hidden=None, query_weights=None, past_places=None,
    distance=0, power=1, **details,
):  # fmt: skip
    """A chunk's output [T, H, E] and sums [M + 1, K, P + T] (squares last), query head by query head."""
    tokens, heads, _ = query.shape
    kv_heads, past, _ = past_key.shape
    group = heads // kv_heads
    output = torch.zeros(tokens, heads, value.shape[-1], dtype=torch.float64)
    query_weights = (torch.ones(1, tokens) if query_weights is None else query_weights).double()
    sums = torch.zeros(len(query_weights) + 1, kv_heads, past + tokens, dtype=torch.float64)
    later = torch.arange(past + tokens)[None, :] > past + torch.arange(tokens)[:, None]
    for head in range(heads):
        owner = head // group
        unseen = later if hidden is None else later | hidden[owner]
        keys, values = torch.cat([past_key[owner], key[:, owner]]), torch.cat([past_value[owner], value[:, owner]])
        sink = None if sinks is None else sinks[head]
        output[:, head], weights = dense_head(query[:, head], keys, values, unseen, sink=sink, **details)
        places = torch.arange(tokens) if past_places is None else torch.cat([past_places[owner], torch.arange(tokens)])
        if distance:
            for token, row in enumerate(weights):
                row[[token - place < distance for place in places.tolist()]] = 0
        for way, ballots in enumerate(query_weights):
            for query_weight, row in zip(ballots, weights, strict=True):
                sums[way, owner] += query_weight * row**power / group
        for query_weight, row in zip(query_weights[0], weights, strict=True):
            sums[-1, owner] += query_weight * row * row / group
    return output, sums


def dense_slots(query, keys, values, *, sinks=None, hidden=None, **details):
    """Output [B, H, E] and sums [2, B, K, C] (squares last) of one token per slot, query head by query head."""
    batch, heads, _ = query.shape
    kv_heads, rows = keys.shape[1:3]
    hidden = torch.zeros(1, 1, 1, dtype=torch.bool) if hidden is None else hidden
    hidden = hidden.expand(batch, kv_heads, rows)
    output = torch.zeros(batch, heads, values.shape[-1], dtype=torch.float64)
    sums = torch.zeros(2, batch, kv_heads, rows, dtype=torch.float64)
    for slot in range(batch):
        for head in range(heads):
            owner = head // (heads // kv_heads)
            sink = None if sinks is None else sinks[head]
            one = query[slot, [head]], keys[slot, owner], values[slot, owner], hidden[slot, [owner]]
            output[slot, [head]], weights = dense_head(*one, sink=sink, **details)
            sums[0, slot, owner] += weights[0] * kv_heads / heads
            sums[1, slot, owner] += weights[0] * weights[0] * kv_heads / heads
    return output, sums


def window_mask(tokens, past, kv_heads, window):
    """[K, T, P + T]: what a window hides when a slot's rows are in another order for each head."""
    order = [torch.randperm(past, generator=torch.Generator().manual_seed(head)) for head in range(kv_heads)]
    own = torch.arange(past, past + tokens)
    positions = torch.stack([torch.cat([rows, own]) for rows in order])
    return positions[:, None, :] <= own[None, :, None] - window


def attended(kernel, chunk, **details):
    """A chunk's output, and what each key received when all queries weigh the same, with its squares: [2, K, P + T]."""
    return kernel.attend_chunk(*chunk, query_weights=torch.ones(1, len(chunk[0])), squares=True, **details)


def looked_up(kernel, slots, **details):
    """Slots' output and sums, squares included: [2, B, K, C]."""
    return kernel.attend_slots(*slots, want_mass=True, squares=True, **details)


def assert_same(actual, expected, **tolerance):
    output, sums = actual
    torch.testing.assert_close(output.double(), expected[0], **tolerance)
    torch.testing.assert_close(sums.double(), expected[1], **tolerance)
    assert sums.dtype == torch.float32


@KERNELS
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("past", [0, 19])
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_a_chunk_attends_to_its_slot_and_causally_to_itself(kernel, tokens, past, group):
    chunk = operands(tokens, past, group=group, kv_heads=2)
    assert_same(attended(kernel, chunk, scale=0.4), dense_chunk(*chunk, scale=0.4), **TIGHT)


def places_of(past, kv_heads, newest=0):
    """[K, P] places of a slot's tokens before a chunk, in another order for each head; some are long gone."""
    generator = torch.Generator().manual_seed(past)
    older = -1 - newest - torch.arange(past) - torch.arange(past) // 3 * 5
    return torch.stack([older[torch.randperm(past, generator=generator)] for _ in range(kv_heads)]).int()


@KERNELS
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("distance", [1, 7, 64, 400])
@pytest.mark.parametrize(("tokens", "past"), [(1, 30), (40, 0), (63, 5), (200, 90)])
def test_only_far_queries_count_for_a_key(kernel, tokens, past, distance, power):
    chunk = operands(tokens, past, group=3)
    details = {
        "scale": 0.4,
        "sinks": normal(6),
        "query_weights": torch.rand(2, tokens),
        "past_places": places_of(past, 2),
        "distance": distance,
        "power": power,
    }
    output, sums = kernel.attend_chunk(*chunk, **details)
    expected, expected_sums = dense_chunk(*chunk, **details)
    torch.testing.assert_close(output.double(), expected, **TIGHT)
    torch.testing.assert_close(sums.double(), expected_sums[:-1], **TIGHT)


@KERNELS
def test_a_slot_that_decodes_gives_squares_alone(kernel):
    slots = slot_operands()
    output, sums = kernel.attend_slots(*slots, scale=0.4, want_mass=True, power=2)
    expected, expected_sums = dense_slots(*slots, scale=0.4)
    torch.testing.assert_close(output.double(), expected, **TIGHT)
    torch.testing.assert_close(sums.double(), expected_sums[1:], **TIGHT)


@KERNELS
def test_a_chunk_of_several_uneven_tiles_is_one_attention(kernel):
    chunk = operands(300, 45, group=2)
    details = {"scale": 0.3, "softcap": 4.0, "sinks": normal(4), "hidden": window_mask(300, 45, 2, window=70)}
    assert_same(attended(kernel, chunk, **details), dense_chunk(*chunk, **details), **TIGHT)


DETAILS = {
    "values narrower than keys": {"value_dim": 4},
    "values wider than keys": {"value_dim": 12},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": normal(6)},
    "strong sinks": {"sinks": normal(6) + 50},
    "window": {"hidden": window_mask(33, 20, 2, window=7)},
    "one visible key": {"hidden": window_mask(33, 20, 2, window=1)},
    "all together": {"value_dim": 4, "softcap": 2.0, "sinks": normal(6), "hidden": window_mask(33, 20, 2, window=25)},
}


@KERNELS
@pytest.mark.parametrize("details", DETAILS.values(), ids=DETAILS)
def test_a_chunk_with_what_models_ask_for(kernel, details):
    details = dict(details)
    chunk = operands(33, 20, value_dim=details.pop("value_dim", 8))
    assert_same(attended(kernel, chunk, scale=0.5, **details), dense_chunk(*chunk, scale=0.5, **details), **TIGHT)


@KERNELS
@pytest.mark.parametrize("dtype", LOOSE, ids=str)
def test_a_chunk_in_half_precision_is_as_near_as_its_numbers(kernel, dtype):
    chunk = operands(150, 40, dtype=dtype)
    output, sums = attended(kernel, chunk, scale=0.35, sinks=normal(6, dtype=dtype))
    expected, columns = dense_chunk(*chunk, scale=0.35, sinks=normal(6, dtype=dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, **LOOSE[dtype])
    torch.testing.assert_close(sums.double(), columns, **LOOSE[dtype])


@KERNELS
@pytest.mark.parametrize("tokens", [1, 130])
def test_a_chunk_may_be_strided(kernel, tokens):
    """The engine passes views: heads before tokens, and some rows of a slot of a larger pool."""
    chunk = operands(tokens, 19)
    views = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in chunk[:3]]
    for rows in chunk[3:]:
        pool = torch.full((3, 2, 40, rows.shape[-1]), math.nan)
        pool[1, :, :19] = rows
        views.append(pool[1, :, :19])
    assert not any(view.is_contiguous() for view in views if view.shape[0] > 1)
    assert_same(attended(kernel, views, scale=0.4), dense_chunk(*chunk, scale=0.4), **TIGHT)


@KERNELS
def test_the_operands_are_not_changed(kernel):
    details = {"sinks": normal(6), "hidden": window_mask(33, 20, 2, window=7), "query_weights": torch.rand(2, 33)}
    chunk = operands(33, 20)
    before = [t.clone() for t in (*chunk, *details.values())]
    kernel.attend_chunk(*chunk, scale=0.5, softcap=2.0, squares=True, **details)
    assert all(torch.equal(old, new) for old, new in zip(before, (*chunk, *details.values()), strict=True))


@KERNELS
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_each_query_hands_out_one_unit_of_mass(kernel, tokens):
    """Summed over the keys, a kv head's mass is the number of queries: a head's probabilities add up to one."""
    _, (mass, _) = attended(kernel, operands(tokens, 19), scale=0.4)
    torch.testing.assert_close(mass.sum(-1), torch.full((2,), float(tokens)), rtol=1e-5, atol=0)


@KERNELS
def test_what_sinks_take_is_missing_from_the_mass(kernel):
    """A sink as strong as all keys together takes half of every query's unit."""
    query, key, value, past_key, past_value = operands(7, 9)
    level = torch.zeros_like(query)  # every score is 0: each query sees its n keys evenly
    one = level[:1], key[:1], value[:1], past_key, past_value
    _, (mass, squares) = attended(kernel, one, scale=1.0, sinks=torch.zeros(6))
    torch.testing.assert_close(mass.sum(-1), torch.full((2,), 10 / 11))
    torch.testing.assert_close(squares.sum(-1), torch.full((2,), 10 / 11**2))
    _, (mass, _) = attended(kernel, (level, key, value, past_key, past_value), scale=1.0, sinks=torch.zeros(6))
    torch.testing.assert_close(mass.sum(-1), torch.full((2,), sum(n / (n + 1) for n in range(10, 17))))


@KERNELS
def test_hidden_and_later_keys_receive_no_mass(kernel):
    mask = window_mask(33, 20, 2, window=7)
    _, (mass, _) = attended(kernel, operands(33, 20), scale=0.4, hidden=mask)
    never = mask.all(1)
    assert never.any()
    assert (mass[never] == 0).all()
    assert (mass[~never] > 0).all()


@KERNELS
def test_mass_nobody_asked_for_is_not_there(kernel):
    chunk = operands(33, 20)
    output, none = kernel.attend_chunk(*chunk, scale=0.4, squares=True)
    assert none is None
    assert torch.equal(output, attended(kernel, chunk, scale=0.4)[0])
    slots = normal(3, 6, 8), normal(3, 2, 10, 8), normal(3, 2, 10, 8)
    output, none = kernel.attend_slots(*slots, scale=0.4, squares=True)
    assert none is None
    assert torch.equal(output, looked_up(kernel, slots, scale=0.4)[0])


@KERNELS
def test_squares_nobody_asked_for_are_not_there(kernel):
    chunk, slots, query_weights = operands(33, 20), slot_operands(), torch.rand(2, 33)
    output, sums = kernel.attend_chunk(*chunk, scale=0.4, query_weights=query_weights)
    more, with_squares = kernel.attend_chunk(*chunk, scale=0.4, query_weights=query_weights, squares=True)
    assert (sums.shape, with_squares.shape) == ((2, 2, 53), (3, 2, 53))
    assert torch.equal(sums, with_squares[:2])
    assert torch.equal(output, more)
    output, sums = kernel.attend_slots(*slots, scale=0.4, want_mass=True)
    more, with_squares = looked_up(kernel, slots, scale=0.4)
    assert (sums.shape, with_squares.shape) == ((1, 3, 2, 20), (2, 3, 2, 20))
    assert torch.equal(sums, with_squares[:1])
    assert torch.equal(output, more)


def some_votes(kind, tokens):
    """[M, tokens] weights of queries."""
    ones, place = torch.ones(tokens), torch.arange(tokens)
    return {
        "one way": torch.rand(1, tokens, generator=torch.Generator().manual_seed(4)),
        "three ways": normal(3, tokens, seed=5),  # negative ones too
        "fading": (0.98 ** (tokens - 1 - place)).unsqueeze(0),
        "the newest query": (place == tokens - 1).float().unsqueeze(0),
        "the newest queries": (place >= tokens - 7).float().unsqueeze(0),
        "the first query": (place == 0).float().unsqueeze(0),
        "two that share no query": torch.stack([ones * (place < tokens - 3), ones * (place >= tokens - 3)]),
        "only the second way query_weights": torch.stack([0 * ones, ones]),
        "nobody": torch.zeros(2, tokens),
    }[kind]


WAYS = (
    *("one way", "three ways", "fading", "the newest query", "the newest queries", "the first query"),
    *("two that share no query", "only the second way query_weights", "nobody"),
)


@KERNELS
@pytest.mark.parametrize("tokens", [1, 33, 300])
@pytest.mark.parametrize("kind", WAYS)
def test_attention_is_added_up_as_the_votes_say(kernel, kind, tokens):
    """Votes of zero for whole tiles of queries are no reason to leave out the others."""
    chunk, query_weights = operands(tokens, 20, group=2), some_votes(kind, tokens)
    actual = kernel.attend_chunk(*chunk, scale=0.4, query_weights=query_weights, squares=True)
    assert actual[1].shape == (len(query_weights) + 1, 2, 20 + tokens)
    assert_same(actual, dense_chunk(*chunk, scale=0.4, query_weights=query_weights), **TIGHT)


@KERNELS
def test_votes_with_all_that_models_ask_for(kernel):
    chunk, query_weights = operands(190, 20, value_dim=4), some_votes("three ways", 190)
    details = {"scale": 0.5, "softcap": 2.0, "sinks": normal(6), "hidden": window_mask(190, 20, 2, window=25)}
    actual = kernel.attend_chunk(*chunk, query_weights=query_weights, squares=True, **details)
    assert_same(actual, dense_chunk(*chunk, query_weights=query_weights, **details), **TIGHT)


@KERNELS
@pytest.mark.parametrize("dtype", LOOSE, ids=str)
def test_votes_count_in_half_precision_too(kernel, dtype):
    chunk, query_weights = operands(150, 40, dtype=dtype), some_votes("fading", 150)
    _, sums = kernel.attend_chunk(*chunk, scale=0.35, query_weights=query_weights, squares=True)
    _, expected = dense_chunk(*chunk, scale=0.35, query_weights=query_weights)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, **LOOSE[dtype])


SLOTS = {
    "one head per kv head": {"group": 1},
    "three heads per kv head": {"group": 3},
    "four heads per kv head": {"group": 4},
    "narrow values": {"value_dim": 4},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": normal(6)},
    "empty rows": {"hidden": torch.arange(20) > torch.tensor([0, 7, 19]).view(-1, 1, 1)},
    "rows hidden by head": {"hidden": normal(3, 2, 20) > 0.5},
    "all together": {"value_dim": 4, "softcap": 2.0, "sinks": normal(6), "hidden": normal(3, 2, 20) > 0.5},
}


def slot_operands(group=3, value_dim=8, dtype=torch.float32):
    return (
        normal(3, 2 * group, 8, seed=1, dtype=dtype),
        normal(3, 2, 20, 8, seed=2, dtype=dtype),
        normal(3, 2, 20, value_dim, seed=3, dtype=dtype),
    )


@KERNELS
@pytest.mark.parametrize("details", SLOTS.values(), ids=SLOTS)
def test_decoding_tokens_attend_to_their_slots(kernel, details):
    details = dict(details)
    slots = slot_operands(details.pop("group", 3), details.pop("value_dim", 8))
    assert_same(looked_up(kernel, slots, scale=0.5, **details), dense_slots(*slots, scale=0.5, **details), **TIGHT)


@KERNELS
@pytest.mark.parametrize("slots", [[2], [0, 2], [2, 0, 1], [1, 0]], ids=str)
def test_only_some_slots_decode_in_any_order(kernel, slots):
    """Few are looked up by themselves; when they are many, all take part, and the others leave no trace."""
    query, keys, values = slot_operands()
    hidden = (torch.arange(20) > torch.tensor([5, 9, 19]).view(-1, 1, 1))[slots]
    actual = kernel.attend_slots(
        query[slots], keys, values, torch.tensor(slots), scale=0.4, hidden=hidden, want_mass=True, squares=True
    )
    expected = dense_slots(query[slots], keys[slots], values[slots], scale=0.4, hidden=hidden)
    assert_same(actual, expected, **TIGHT)


@KERNELS
@pytest.mark.parametrize("dtype", LOOSE, ids=str)
def test_decoding_in_half_precision_is_as_near_as_its_numbers(kernel, dtype):
    slots = slot_operands(dtype=dtype)
    output, sums = looked_up(kernel, slots, scale=0.35)
    expected, columns = dense_slots(*slots, scale=0.35)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, **LOOSE[dtype])
    torch.testing.assert_close(sums.double(), columns, **LOOSE[dtype])


@KERNELS
def test_decoding_slots_may_be_strided(kernel):
    query, keys, values = slot_operands()
    views = (
        query.transpose(0, 1).contiguous().transpose(0, 1),
        keys.transpose(1, 2).contiguous().transpose(1, 2),
        values.transpose(1, 2).contiguous().transpose(1, 2),
    )
    expected = dense_slots(query, keys, values, scale=0.4)
    assert_same(looked_up(kernel, views, scale=0.4), expected, **TIGHT)


@KERNELS
def test_each_decoding_token_hands_out_one_unit_of_mass(kernel):
    _, (mass, _) = looked_up(kernel, slot_operands(), scale=0.4)
    torch.testing.assert_close(mass.sum(-1), torch.ones(3, 2))


@KERNELS
@pytest.mark.parametrize("attend", ["attend_chunk", "attend_slots"])
def test_dot_products_too_large_for_float16_are_scaled_before_they_are_rounded(kernel, attend):
    """q . k is 160,000 here, above float16's 65,504; scaled it is 10,000. Trained keys with biases do get there."""
    large = torch.full((1, 2, 256), 25.0, dtype=torch.float16)
    value = torch.full((1, 2, 4), 2.0, dtype=torch.float16)
    if attend == "attend_chunk":
        empty = torch.empty(2, 0, 256, dtype=torch.float16), torch.empty(2, 0, 4, dtype=torch.float16)
        output, _ = kernel.attend_chunk(large, large, value, *empty, scale=1 / 16)
    else:
        output, _ = kernel.attend_slots(large, large[:, :, None], value[:, :, None], scale=1 / 16)
    assert torch.equal(output, value)


@KERNELS
def test_the_attention_of_a_chunk_depends_on_where_it_is_not_on_the_others(kernel):
    """The first tokens of a chunk do not see the later ones, whatever those are."""
    query, key, value, past_key, past_value = operands(130, 19)
    short, _ = kernel.attend_chunk(query[:40], key[:40], value[:40], past_key, past_value, scale=0.4)
    long, _ = kernel.attend_chunk(query, key, value, past_key, past_value, scale=0.4)
    torch.testing.assert_close(short, long[:40], **TIGHT)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_workspace_grows_with_the_keys_a_chunk_sees_and_with_slots(name, cpu_kernels):
    cpu_kernels(name)
    workspace = kernels.choose("cpu").capabilities.workspace
    sizes = [
        workspace(heads=8, chunk=256, rows=rows, slots=slots, head_dim=64, itemsize=2)
        for rows, slots in ((512, 4), (1024, 4), (4096, 4), (4096, 4000))
    ]
    assert 0 < sizes[0] < sizes[1] < sizes[2] < sizes[3]


@pytest.mark.parametrize(
    ("device", "variable", "name", "why"),
    [
        ("cpu", "cpu", "cpu", "BMX_KERNELS=cpu"),
        ("cpu", "reference", "reference", "BMX_KERNELS=reference"),
        ("cuda", "reference", "reference", "BMX_KERNELS=reference"),
    ],
)
def test_the_kernels_chosen_say_why(monkeypatch, device, variable, name, why):
    monkeypatch.setenv("BMX_KERNELS", variable)
    chosen = kernels.choose(device)
    assert chosen.name == name
    assert why in chosen.why
    assert callable(chosen.module.attend_chunk)
    assert callable(chosen.module.attend_slots)


@pytest.mark.parametrize("name", CAPABILITIES)
def test_every_back_end_has_the_functions_of_the_contract(name):
    """The same parameters, of the same kinds and with the same defaults."""
    if name == "triton":
        pytest.importorskip("triton")
    required(name)
    module = kernels.Kernels(name, "").module
    for function in FUNCTIONS:
        specified = list(inspect.signature(getattr(KernelModule, function)).parameters.values())[1:]
        offered = inspect.signature(getattr(module, function)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in offered] == [(p.name, p.kind, p.default) for p in specified]


@pytest.mark.parametrize(("device", "name"), [("cpu", "cuda"), ("cuda", "cpu"), ("cpu", "fast")])
def test_kernels_that_there_are_not_are_refused(monkeypatch, device, name):
    monkeypatch.setenv("BMX_KERNELS", name)
    with pytest.raises(UsageError, match=name):
        kernels.choose(device)


def test_what_gpus_do_by_themselves_takes_little_and_the_rest_what_plain_torch_takes():
    sizes = {"heads": 32, "chunk": 512, "rows": 1024, "slots": 400, "head_dim": 128, "itemsize": 2}
    fused, unfused = (CAPABILITIES["triton"].workspace_bytes(fused)(**sizes) for fused in (True, False))
    assert fused < unfused / 8
    assert unfused == CAPABILITIES["reference"].workspace(**sizes)


def test_a_device_without_kernels_of_its_own_gets_plain_ones_and_is_named(monkeypatch):
    monkeypatch.delenv("BMX_KERNELS", raising=False)
    chosen = kernels.choose("xpu")
    assert chosen.name == "reference"
    assert "xpu" in chosen.why
