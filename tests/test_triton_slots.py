"""Triton's decoding step and choice of survivors do what the rules say, written here as loops in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

triton_decode = pytest.importorskip("bmx.kernels.triton_decode")
triton_splits = pytest.importorskip("bmx.kernels.triton_splits")
triton_evict = pytest.importorskip("bmx.kernels.triton_evict")

from bmx.compress.policy import CompressionPolicy
from bmx.compress.requests import EvictionRequest, PrefillChunk
from bmx.config import EngineConfig
from bmx.kernels import reference, triton
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.slot_views import Chunks, Rows
from bmx.kv.layout import LayerLayout
from bmx.kv.pool import LayerSlots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F16 = torch.float32, torch.float16
NEAR = {F32: {"atol": 2e-5, "rtol": 2e-5}, F16: {"atol": 4e-3, "rtol": 4e-3}}
CAPACITIES = (40, 24, 56, 33)
ROOT_MEAN_SQUARE = {"distance": 3, "power": 2}  # of the queries that come when a pair is not among the newest
INFINITY = float("inf")
STORED = ("keys", "values", "key_scales", "value_scales")

UNEVEN = ((40, 30), (24, 9), (20, 56), (33, 33))  # rows of two kv heads of each slot


def normal(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def strided(tokens, heads, dim, seed, dtype):
    """[tokens, heads, dim] as models give it: heads apart, and no two tokens side by side."""
    return normal(1, heads, tokens, dim, seed=seed, dtype=dtype)[0].transpose(0, 1)


def ranked(by="average", sink=2, recent=3, window=None, **counting):
    return EvictionOrder(by=by, sink=sink, recent=recent, window=window, **counting)


def make_rows(seen, limits, *, kv_heads=2, dim=16, value_dim=16, dtype=F32, mass=True, capacities=CAPACITIES, seed=0):
    """Slots of these capacities in any order; slot s has seen so many tokens, of which any limits[s] are left.

    A slot's capacity is a number for all kv heads, or one for each.
    """
    of_heads = tuple((c,) * kv_heads if isinstance(c, int) else tuple(c) for c in capacities)
    apart = any(len(set(of_slot)) > 1 for of_slot in of_heads)
    order = list(range(len(capacities)))[::-1]
    first, total = [[0] * kv_heads for _ in order], 5  # rows that are no slot's come before and after
    for slot in order:
        for head, capacity in enumerate(of_heads[slot]):
            first[slot][head] = total
            total += capacity + (2 if apart else 0)
        total += 3
    positions = torch.full((total,), -1, dtype=torch.int32)
    random = torch.Generator().manual_seed(seed)
    for slot, (tokens, limit) in enumerate(zip(seen, limits, strict=True)):
        for head in range(kv_heads):
            count = min(tokens, limit, of_heads[slot][head])
            left = torch.randperm(tokens, generator=random)[:count] if tokens > count else torch.arange(count)
            begin = first[slot][head]
            positions[begin : begin + count] = left.int()
    received = (torch.rand(total, generator=random) + 0.01) * (positions >= 0)
    return Rows(
        keys=normal(total, dim, seed=seed + 1, dtype=dtype),
        values=normal(total, value_dim, seed=seed + 2, dtype=dtype),
        positions=positions.to(DEVICE),
        mass=received.to(DEVICE) if mass else None,
        first=torch.tensor(first, device=DEVICE),
        capacity=torch.tensor(of_heads, device=DEVICE),
        kv_heads=kv_heads,
        largest=max(map(max, of_heads)),
        capacities=of_heads,
        apart=apart,
    )


def copied(rows, device=DEVICE):
    parts = (*STORED, "positions", "mass", "ranks", "first", "capacity")
    actual = {name: getattr(rows, name) for name in parts}
    return replace(rows, **{name: None if t is None else t.to(device, copy=True) for name, t in actual.items()})


def assert_same_rows(actual, expected, **tolerance):
    """The same bits, but where arithmetic of another kind gives the mass."""
    for name in (*STORED, "positions", "ranks"):
        one, other = getattr(actual, name), getattr(expected, name)
        if one is other is None:
            continue
        one, other = one.cpu(), other.cpu()
        assert torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0)), name
    if actual.mass is None:
        return
    if tolerance:
        torch.testing.assert_close(actual.mass.cpu(), expected.mass.cpu(), **tolerance)
    else:
        assert torch.equal(actual.mass.cpu(), expected.mass.cpu())


def with_ranks(rows, seed=4):
    """The same rows with ranks of two kinds, of which some are equal; others came after the last ranking."""
    kinds = torch.tensor([-0.5, 0.25, INFINITY], device=DEVICE)
    return replace(rows, ranks=kinds[(uniform(len(rows.positions), seed=seed) * 3).long()])


def score(position, mass, now, order):
    """What one pair is worth: the rules, one by one; float32, as scores are. Ranked pairs: their rank, not the mass."""
    value = mass
    if order.by == "rank" and mass == INFINITY:
        value = 1e30 * (1 + position / 2**23)
    if order.by == "age":
        value = float(position)
    if order.by == "average":
        queries = max(now - position - order.distance, 1)
        queries = queries if order.window is None else min(queries, max(order.window - order.distance, 1))
        value = float(torch.tensor(mass, dtype=F32) / torch.tensor(queries, dtype=F32))
    if position < order.sink or position >= now - order.recent:
        value = INFINITY
    if math.isnan(value) or position < 0:
        return -INFINITY
    if order.window is not None and position <= now - order.window:
        return -INFINITY
    return value


def true_decode(
    query, key, value, rows, slots, now, limits, *, scale, order, decay, accumulate, softcap=None, sinks=None
):
    """Output [B, H, E] float64; ``rows``, on the CPU, become what they should."""
    query, key, value = (t.cpu() for t in (query, key, value))
    batch, heads, _ = query.shape
    group = heads // rows.kv_heads
    output = torch.zeros(batch, heads, value.shape[-1], dtype=torch.float64)
    for one, slot in enumerate(slots):
        if slot < 0:
            continue
        at = now[one]
        for head in range(rows.kv_heads):
            begin, limit = int(rows.first[slot, head]), min(limits[one], int(rows.capacity[slot, head]))
            row = at
            if at >= limit:
                known = rows.ranks if order.by == "rank" else rows.mass
                mass = [0.0] * limit if known is None else known[begin : begin + limit].tolist()
                positions = rows.positions[begin : begin + limit].tolist()
                worth = [score(p, m, at, order) for p, m in zip(positions, mass, strict=True)]
                row = worth.index(min(worth))
            rows.keys[begin + row], rows.values[begin + row] = key[one, head], value[one, head]
            rows.positions[begin + row] = at
            if rows.mass is not None:
                rows.mass[begin + row] = 0.0
            if rows.ranks is not None:
                rows.ranks[begin + row] = INFINITY
            used = slice(begin, begin + min(at + 1, limit))
            hidden = rows.positions[used] <= at - (order.window or 10**9)
            seen = torch.zeros(used.stop - begin, dtype=torch.float64)
            for which in range(head * group, (head + 1) * group):
                logits = rows.keys[used].double() @ query[one, which].double() * scale
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                logits = logits.masked_fill(hidden, -INFINITY)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[which].cpu().double().view(1)])
                weights = torch.softmax(logits, 0)[: len(seen)]
                output[one, which] = weights @ rows.values[used].double()
                seen += weights**order.power / group
            if accumulate and rows.mass is not None:
                rows.mass[used] = (rows.mass[used].double() * decay + seen).float()
    return output


def decode(query, key, value, rows, slots, now, limits, **manner):
    """The kernel's output and rows; what is given stays as it is."""
    rows = copied(rows)
    output = torch.full((*query.shape[:2], value.shape[-1]), float("nan"), dtype=query.dtype, device=DEVICE)
    per_token = (torch.tensor(numbers, device=DEVICE) for numbers in (slots, now, limits))
    triton_decode.decode_step(output, query, key, value, rows, *per_token, **manner)
    return output, rows


def tokens_of(batch, *, group=2, kv_heads=2, dim=16, value_dim=16, dtype=F32, seed=10):
    """query, key, value of decoding tokens."""
    shapes = ((kv_heads * group, dim), (kv_heads, dim), (kv_heads, value_dim))
    return [strided(batch, *shape, seed + i, dtype) for i, shape in enumerate(shapes)]


SLOTS, NOW, LIMITS = [2, -1, 0, 3, 1], [90, 7, 40, 17, 60], [56, 9, 36, 33, 99]  # the last may use all of its 24
PLAIN = {"scale": 0.3, "order": ranked(), "decay": 1.0, "accumulate": True}


def seen_by_slots(slots=SLOTS, now=NOW, limits=LIMITS):
    """Tokens and rows by slot."""
    actual = {slot: (tokens, limit) for slot, tokens, limit in zip(slots, now, limits, strict=True) if slot >= 0}
    return zip(*(actual.get(slot, (0, 1)) for slot in range(len(CAPACITIES))), strict=True)


def assert_decodes(tokens, rows, slots=SLOTS, now=NOW, limits=LIMITS, **manner):
    dtype = tokens[0].dtype
    output, actual = decode(*tokens, rows, slots, now, limits, **manner)
    expected = copied(rows, "cpu")
    answer = true_decode(*tokens, expected, slots, now, limits, **manner)
    torch.testing.assert_close(output.cpu().double(), answer, **NEAR[dtype])
    assert_same_rows(actual, expected, **NEAR[dtype])
    specified = copied(rows)
    per_token = (torch.tensor(numbers, dtype=torch.int64, device=DEVICE) for numbers in (slots, now, limits))
    plain = torch.empty_like(output)
    assert reference.decode_step(plain, *tokens, specified, *per_token, **manner)
    torch.testing.assert_close(output, plain, **NEAR[dtype])
    assert_same_rows(actual, specified, **NEAR[dtype])
    return actual


@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("shape", "manner"),
    [
        ({"group": 1}, {"order": ranked("age")}),
        ({"group": 1, "dim": 96, "value_dim": 64}, {"order": ranked("mass"), "decay": 0.5}),
        ({"group": 3, "kv_heads": 1, "dim": 8, "value_dim": 24}, {"order": ranked("average"), "decay": 0.9}),
        ({"group": 4}, {"order": ranked("average", window=25), "softcap": 0.8}),
        ({"group": 4}, {"order": ranked("mass", window=30, sink=0), "sinks": True}),
        ({"group": 3}, {"order": ranked("age", window=12, sink=0, recent=0), "sinks": True, "softcap": 2.0}),
        ({"group": 2}, {"order": ranked("mass", sink=8, recent=9), "accumulate": False}),
        ({"group": 2}, {"order": ranked("average", sink=0, recent=0), "decay": 0.0}),
        ({"group": 17, "kv_heads": 1}, {"order": ranked("mass")}),
        ({"group": 3}, {"order": ranked("average", recent=9, distance=9, power=2)}),
        ({"group": 1, "dim": 96, "value_dim": 64}, {"order": ranked("mass", distance=1), "decay": 0.5}),
        ({"group": 4}, {"order": ranked("average", window=25, recent=6, distance=6, power=2), "sinks": True}),
        ({"group": 2}, {"order": ranked("average", window=12, recent=30, distance=30, power=2), "softcap": 0.8}),
    ],
)
def test_a_decoding_step_is_what_float64_says(shape, manner, dtype):
    """Slots not full, just full, long full; limits below the capacity; a row that is idle."""
    manner = {**PLAIN, **manner}
    tokens = tokens_of(5, dtype=dtype, **shape)
    if "sinks" in manner:
        manner["sinks"] = normal(tokens[0].shape[1], seed=5)
    of_slots = {name: size for name, size in shape.items() if name != "group"}
    actual = assert_decodes(tokens, make_rows(*seen_by_slots(), dtype=dtype, **of_slots), **manner)
    assert actual.mass.isfinite().all()


@pytest.fixture(params=[1, 3])
def in_splits(monkeypatch, request):
    """Slots in splits of 8 rows, up to 7 of them, that one program or three read."""
    splits = triton_splits.Splits(whole=16, rows=8)
    monkeypatch.setattr(triton_decode, "SPLITS", splits)
    monkeypatch.setattr(triton_decode, "programs", lambda *_: request.param)
    return splits


@pytest.mark.usefixtures("in_splits")
@pytest.mark.parametrize(
    ("shape", "manner"),
    [
        ({"group": 1, "dim": 96, "value_dim": 64}, {"order": ranked("mass"), "decay": 0.5}),
        ({"group": 3, "kv_heads": 1, "value_dim": 24}, {"order": ranked("average", **ROOT_MEAN_SQUARE)}),
        ({"group": 3}, {"order": ranked("mass", window=12, sink=0, recent=0), "sinks": True, "softcap": 2.0}),
        ({"group": 2}, {"order": ranked("age"), "accumulate": False}),
        ({"group": 2}, {"order": ranked("rank"), "decay": 0.5}),
    ],
)
def test_a_decoding_step_in_splits_is_what_float64_says(shape, manner):
    """Slots of one split and of seven; splits of which a window hides all."""
    manner, tokens = {**PLAIN, **manner}, tokens_of(5, **shape)
    if "sinks" in manner:
        manner["sinks"] = normal(tokens[0].shape[1], seed=5)
    of_slots = {name: size for name, size in shape.items() if name != "group"}
    assert_decodes(tokens, with_ranks(make_rows(*seen_by_slots(), **of_slots)), **manner)


def test_more_splits_than_are_combined_at_once(monkeypatch):
    monkeypatch.setattr(triton_decode, "SPLITS", triton_splits.Splits(whole=16, rows=2))
    order = ranked("average", **ROOT_MEAN_SQUARE)
    assert_decodes(tokens_of(5, group=3), make_rows(*seen_by_slots()), **{**PLAIN, "order": order})


def test_an_answer_does_not_depend_on_how_many_programs_read_a_slot(monkeypatch):
    monkeypatch.setattr(triton_decode, "SPLITS", triton_splits.Splits(whole=16, rows=8))
    tokens, rows, found = tokens_of(5, group=3), make_rows(*seen_by_slots()), []
    for count in (1, 2, 7):
        monkeypatch.setattr(triton_decode, "programs", lambda *_, count=count: count)
        found.append(decode(*tokens, rows, SLOTS, NOW, LIMITS, **PLAIN))
    for output, actual in found[1:]:
        assert torch.equal(output, found[0][0])
        assert_same_rows(actual, found[0][1])


def test_programs_fill_a_device_and_no_more():
    device = torch.device(DEVICE)
    whole = triton_splits.PROGRAMS * triton_splits.multiprocessors(device)
    assert [triton_splits.programs(heads, 40, device) for heads in (1, whole, 3 * whole)] == [min(40, whole), 1, 1]


@pytest.mark.parametrize("window", [None, 20])
def test_what_is_not_added_up_is_not_asked_for(window):
    rows = make_rows(*seen_by_slots(), mass=False)
    assert_decodes(tokens_of(5), rows, **{**PLAIN, "order": ranked("age", window=window)})


@pytest.mark.parametrize(
    ("by", "counting"), [("age", {}), ("mass", {}), ("average", {}), ("average", ROOT_MEAN_SQUARE)]
)
def test_step_after_step_each_slot_gives_up_what_the_rules_say(by, counting):
    """From before the first eviction until everything but the first tokens has gone."""
    slots, limits, manner = [3, 1], [8, 10], {**PLAIN, "order": ranked(by, **counting), "decay": 0.8}
    rows = make_rows([0, 7, 0, 6], [1, 10, 1, 8])
    for step in range(9):
        rows = assert_decodes(tokens_of(2, seed=step), rows, slots, [6 + step, 7 + step], limits, **manner)
    begin = int(rows.first[3, 0])
    left = sorted(rows.positions[begin : begin + 8].tolist())
    assert left[:2] == [0, 1]
    assert left[-3:] == [12, 13, 14]
    assert left == [0, 1, 9, 10, 11, 12, 13, 14] or by != "age"


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 0), (2, 2)])
def test_the_first_tokens_of_all_are_no_exception(batch, tokens):
    rows = make_rows([tokens] * 4, [30] * 4)
    slots, now = list(range(batch)), [tokens] * batch
    assert_decodes(tokens_of(batch), rows, slots, now, [30] * batch, **PLAIN)


def one_full_slot(**kinds):
    """Slot 1's 24 rows, full after 50 tokens, and a token for it."""
    rows = make_rows([0, 50, 0, 0], [1, 24, 1, 1], **kinds)
    begin = int(rows.first[1, 0])
    return rows, [slice(begin, begin + 24), slice(begin + 24, begin + 48)]


def row_given_up(rows, heads, by="mass", **protected):
    actual = assert_decodes(tokens_of(1), rows, [1], [50], [24], **{**PLAIN, "order": ranked(by, **protected)})
    return [actual.positions[rows_of_head].tolist().index(50) for rows_of_head in heads]


@pytest.mark.parametrize("by", ["mass", "average"])
def test_of_equals_the_first_goes(by):
    rows, heads = one_full_slot()
    rows.mass[heads[0]], rows.mass[heads[1]] = 0.0, 1.0
    rows.mass[heads[1]][[5, 21]] = 0.25
    rows.positions[heads[1]] = torch.arange(20, 44, dtype=torch.int32)
    rows.positions[heads[1]][21] = rows.positions[heads[1]][5]
    assert row_given_up(rows, heads, by, sink=0, recent=0) == [0, 5]


def test_where_all_are_protected_the_first_goes():
    rows, heads = one_full_slot()
    assert row_given_up(rows, heads, recent=50) == [0, 0]


def test_what_no_query_can_see_and_what_is_no_number_goes_first():
    rows, heads = one_full_slot()
    rows.positions[heads[0]] = torch.arange(26, 50, dtype=torch.int32).flip(0)
    rows.positions[heads[1]] = torch.arange(27, 51, dtype=torch.int32)
    rows.mass[heads[1]][7] = float("nan")
    rows.mass[heads[1]][9] = 0.0
    assert row_given_up(rows, heads, sink=0, recent=0, window=24) == [23, 7]


@pytest.mark.parametrize("broken", [float("nan"), INFINITY])
def test_what_was_in_the_row_given_up_is_gone(broken):
    rows, heads = one_full_slot()
    for rows_of_head in heads:
        rows.mass[rows_of_head][11] = -1.0
        rows.keys[rows_of_head][11] = rows.values[rows_of_head][11] = broken
    rows.keys[heads[0].stop - 24 - 1] = broken  # before the slot
    assert row_given_up(rows, heads, sink=0, recent=0) == [11, 11]


@pytest.mark.parametrize("level", [-300.0, 300.0])
def test_large_sinks_and_large_scores_do_not_overflow(level):
    rows, _ = one_full_slot()
    manner = {**PLAIN, "sinks": torch.full((4,), level, device=DEVICE)}
    assert_decodes(tokens_of(1), rows, [1], [50], [24], **manner)
    query, key, value = tokens_of(1)
    output, actual = decode(200 * query, key, value, rows, [1], [50], [24], **PLAIN)
    assert output.isfinite().all()
    assert actual.mass.isfinite().all()


def test_a_token_alone_and_again_is_the_token_in_company_to_the_last_bit():
    tokens, rows = tokens_of(5, group=3), make_rows(*seen_by_slots())
    output, actual = decode(*tokens, rows, SLOTS, NOW, LIMITS, **PLAIN)
    again, actual_again = decode(*tokens, rows, SLOTS, NOW, LIMITS, **PLAIN)
    assert torch.equal(output, again)
    assert_same_rows(actual, actual_again)
    for one, slot in enumerate(SLOTS):
        alone = [t[one : one + 1] for t in tokens]
        answer, rows_alone = decode(*alone, rows, [slot], NOW[one : one + 1], LIMITS[one : one + 1], **PLAIN)
        assert torch.equal(answer[0], output[one])
        begin = slice(int(rows.first[slot, 0]), int(rows.first[slot, 0]) + 2 * CAPACITIES[slot])
        if slot >= 0:
            assert torch.equal(rows_alone.mass[begin], actual.mass[begin])
            assert torch.equal(rows_alone.positions[begin], actual.positions[begin])


def test_idle_rows_and_no_rows_touch_nothing():
    rows = make_rows(*seen_by_slots())
    output, actual = decode(*tokens_of(2), rows, [-1, -1], [3, 400], [5, 5], **PLAIN)
    assert not output.any()
    assert_same_rows(actual, rows)
    output, actual = decode(*tokens_of(0), rows, [], [], [], **PLAIN)
    assert output.shape == (0, 4, 16)
    assert_same_rows(actual, rows)


# (start, tokens, limit) of a chunk for each slot: of capacities 40, 24, 56, 33
FITTING = [(0, 30, 40), (20, 4, 99), (0, 1, 1), (5, 28, 33)]
MIXED = [(0, 30, 40), (20, 17, 99), (80, 30, 50), (40, 1, 30)]
EVICTING = [(0, 61, 37), (24, 1, 24), (56, 70, 56), (7, 33, 20)]


def make_chunks(wanted, slots=(0, 1, 2, 3), ahead=3):
    """Chunks of these slots, packed in this order behind some rows of others; and how many rows are packed."""
    starts, lengths, limits = zip(*wanted, strict=True)
    at = [ahead + sum(lengths[:n]) for n in range(len(lengths))]
    totals = [start + length + 9 for start, length in zip(starts, lengths, strict=True)]
    numbers = (at, lengths, slots, starts, limits, totals)
    table = torch.tensor(numbers, device=DEVICE)
    names = ("offsets", "lengths", "slots", "starts", "row_limits", "totals")
    return Chunks(**{name: tuple(of) for name, of in zip(names, numbers, strict=True)}, table=table), ahead + sum(
        lengths
    ) + 2


def true_evict(key, value, rows, chunks, sums, order, ranks):
    """``rows``, on the CPU, become what they should."""
    key, value, sums, ranks = (None if t is None else t.cpu() for t in (key, value, sums, ranks))
    columns = (chunks.offsets, chunks.lengths, chunks.slots, chunks.starts, chunks.row_limits)
    for at, tokens, slot, start, most in zip(*columns, strict=True):
        for head in range(rows.kv_heads):
            begin, limit = int(rows.first[slot, head]), min(most, int(rows.capacity[slot, head]))
            used = min(start, limit)
            positions = rows.positions[begin : begin + used].tolist() + list(range(start, start + tokens))
            own = [0.0] * tokens if sums is None else sums[head, at : at + tokens].tolist()
            mass = ([0.0] * used if rows.mass is None else rows.mass[begin : begin + used].tolist()) + own
            own = [INFINITY] * tokens if ranks is None else ranks[head, at : at + tokens].tolist()
            rank = ([0.0] * used if rows.ranks is None else rows.ranks[begin : begin + used].tolist()) + own
            known = rank if order.by == "rank" else mass
            worth = [score(p, m, start + tokens, order) for p, m in zip(positions, known, strict=True)]
            best = set(sorted(range(len(worth)), key=lambda i: (-worth[i], i))[:limit])
            if used + tokens <= limit:
                assert len(best) == used + tokens
            free = [row for row in range(limit) if row >= used or row not in best]
            for row, i in zip(free, sorted(i for i in best if i >= used), strict=False):
                rows.keys[begin + row] = key[at + i - used, head]
                rows.values[begin + row] = value[at + i - used, head]
                rows.positions[begin + row] = positions[i]
                if rows.mass is not None:
                    rows.mass[begin + row] = mass[i]
                if rows.ranks is not None:
                    rows.ranks[begin + row] = rank[i]


def assert_evicts(rows, chunks, packed, sums, order, dtype=F32, seed=3, ranks=None):
    dims = rows.keys.shape[-1], rows.values.shape[-1]
    key, value = (strided(packed, rows.kv_heads, dim, seed + i, dtype) for i, dim in enumerate(dims))
    actual, expected = copied(rows), copied(rows, "cpu")
    assert triton_evict.evict(key, value, actual, chunks, sums, ranks, order=order)
    true_evict(key, value, expected, chunks, sums, order, ranks)
    assert_same_rows(actual, expected)
    specified = copied(rows)
    assert reference.evict(key, value, specified, chunks, sums, ranks, order=order)
    assert_same_rows(actual, specified)
    return actual


def slots_before(wanted, **kinds):
    """Slots as they are before such chunks."""
    return make_rows([start for start, _, _ in wanted], [limit for _, _, limit in wanted], **kinds)


ORDERS = [
    ranked("age"),
    ranked("mass"),
    ranked("average"),
    ranked("average", sink=0, recent=0, window=26),
    ranked("mass", sink=5, recent=12, window=40),
    ranked("age", sink=0, recent=0, window=12),
    ranked("average", recent=10, distance=10, power=2),
    ranked("average", recent=12, distance=12, window=40),
]


# All orders where all slots evict; where only some or none do, by turns.
@pytest.mark.parametrize(
    ("wanted", "order"),
    [*((EVICTING, order) for order in ORDERS), *((MIXED, order) for order in ORDERS[::2]), (FITTING, ORDERS[1])],
)
def test_survivors_are_those_of_the_rules(wanted, order):
    chunks, packed = make_chunks(wanted)
    rows = slots_before(wanted)
    actual = assert_evicts(rows, chunks, packed, uniform(2, packed, seed=8), order)
    assert not torch.equal(actual.positions, rows.positions)


def test_thousands_of_rows_are_chosen_from():
    wanted = [(11_000, 40, 10_990)]
    chunks, packed = make_chunks(wanted, slots=(0,))
    assert_evicts(slots_before(wanted, capacities=(11_000,), dim=4), chunks, packed, uniform(2, packed), ranked("mass"))


@pytest.mark.parametrize("mass", [True, False])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("wanted", "ranked_now"), [(EVICTING, True), (MIXED, True), (FITTING, False)])
def test_where_pairs_were_ranked_their_rank_decides_and_new_pairs_go_after_them(wanted, ranked_now, window, mass):
    chunks, packed = make_chunks(wanted)
    rows, order = with_ranks(slots_before(wanted, mass=mass)), ranked("rank", window=window)
    ranks = normal(2, packed, seed=9) if ranked_now else None
    assert_evicts(rows, chunks, packed, uniform(2, packed) if mass else None, order, ranks=ranks)
    rows = with_ranks(make_rows(*seen_by_slots(), mass=mass))
    assert_decodes(tokens_of(len(SLOTS)), rows, **PLAIN | {"order": order, "decay": 0.9})


@pytest.mark.parametrize("wanted", [FITTING, MIXED], ids=["fitting", "mixed"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
def test_vectors_of_any_size_move_whole(wanted, dtype):
    chunks, packed = make_chunks(wanted)
    rows = slots_before(wanted, dtype=dtype, dim=96, value_dim=20, kv_heads=3)
    assert_evicts(rows, chunks, packed, uniform(3, packed), ranked(), dtype)


@pytest.mark.parametrize("wanted", [FITTING, EVICTING], ids=["fitting", "evicting"])
@pytest.mark.parametrize("mass", [False, True])
def test_without_sums_tokens_begin_at_zero(wanted, mass):
    chunks, packed = make_chunks(wanted)
    assert_evicts(slots_before(wanted, mass=mass), chunks, packed, None, ranked("age"))
    if mass:
        assert_evicts(slots_before(wanted, mass=mass), chunks, packed, None, ranked("mass"))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_of_equals_the_first_stay_rows_before_tokens(levels):
    """Among so few values of mass that thresholds fall on many; zeros of either sign are one value."""
    chunks, packed = make_chunks(MIXED)
    rows = slots_before(MIXED)
    values = torch.tensor([0.0, 0.5, 1e30], device=DEVICE)
    rows.mass.copy_(values[(uniform(len(rows.mass)) * levels).long()])
    sums = values[(uniform(2, packed, seed=1) * levels).long()]
    sums = torch.where((uniform(2, packed, seed=2) < 0.5) & (sums == 0), -sums, sums)
    assert_evicts(rows, chunks, packed, sums, ranked("mass"))


@pytest.mark.parametrize("rich", ["slot", "chunk"])
def test_nothing_of_a_chunk_or_everything_may_stay(rich):
    wanted = [(50, 24, 99), (90, 40, 24)]
    chunks, packed = make_chunks(wanted, slots=(1, 0))
    rows = make_rows([90, 50, 0, 0], [24, 24, 1, 1])
    sums = uniform(2, packed) + 1
    rows.mass[int(rows.first[1, 0]) :][:24] = 5.0 if rich == "slot" else 0.0
    rows.mass[int(rows.first[0, 0]) :][:24] = 5.0 if rich == "slot" else 0.0
    actual = assert_evicts(rows, chunks, packed, sums, ranked("mass", sink=0, recent=0))
    stay = actual.positions[int(rows.first[1, 0]) :][:24] < 50
    assert stay.all() if rich == "slot" else not stay.any()


def test_negative_and_broken_scores_are_ranked_too():
    """Minus that stays as large as it is, and what is no number comes last."""
    chunks, packed = make_chunks(MIXED)
    rows = slots_before(MIXED)
    rows.mass.mul_(normal(len(rows.mass)))
    sums = normal(2, packed, seed=1)
    rows.mass[int(rows.first[2, 0]) + 3], sums[0, 40], sums[1, 41] = INFINITY, float("nan"), -INFINITY
    assert_evicts(rows, chunks, packed, sums, ranked("mass", sink=0, recent=0))


def test_a_chunk_alone_and_again_is_the_chunk_in_company_to_the_last_bit():
    chunks, packed = make_chunks(MIXED)
    rows, sums = slots_before(MIXED), uniform(2, packed)
    actual = assert_evicts(rows, chunks, packed, sums, ranked())
    assert_same_rows(actual, assert_evicts(rows, chunks, packed, sums, ranked()))
    together = copied(rows)
    for one in range(4):
        names = ("offsets", "lengths", "slots", "starts", "row_limits", "totals")
        part = {name: getattr(chunks, name)[one : one + 1] for name in names}
        alone = Chunks(**part, table=chunks.table[:, one : one + 1].contiguous())
        together = assert_evicts(together, alone, packed, sums, ranked())
    assert_same_rows(together, actual)


def test_too_many_rows_to_choose_from_are_left_to_others_but_not_to_append_to():
    wanted, capacities = [(2, 40, 40)], (30000, 40)
    chunks, packed = make_chunks(wanted, slots=(1,))
    rows = make_rows([0, 2], [1, 40], capacities=capacities, dim=4, value_dim=4, kv_heads=1)
    same = copied(rows)
    operands = [normal(packed, 1, 4, seed=i) for i in range(2)]
    assert not triton_evict.evict(*operands, same, chunks, uniform(1, packed), order=ranked())
    assert_same_rows(same, rows)
    chunks, packed = make_chunks([(2, 38, 40)], slots=(1,))
    assert_evicts(rows, chunks, packed, uniform(1, packed), ranked())


def test_no_chunks_are_no_work():
    rows = make_rows(*seen_by_slots())
    chunks = Chunks(
        offsets=(),
        lengths=(),
        slots=(),
        starts=(),
        row_limits=(),
        totals=(),
        table=torch.empty(6, 0, dtype=torch.int64),
    )
    assert triton_evict.evict(*tokens_of(0)[1:], copied(rows), chunks, None, order=ranked())


def twin_of(rows, slots, order):
    """The policy and the pool's slots that hold what these rows of one capacity hold."""
    name = {"age": "streaming", "mass": "h2o", "average": "average-attention"}[order.by]
    config = EngineConfig(kv_policy=name, kv_budget=24, kv_sink=order.sink, kv_recent=order.recent)
    policy = CompressionPolicy.from_config(config)
    layout = LayerLayout(
        capacity=24, kv_heads=2, key_dim=16, value_dim=16, itemsize=4, window=order.window, owner=0, last_reader=0,
        by_age=order.by == "age", row_stats=() if order.by == "age" else ("mass",),
    )  # fmt: skip
    part = LayerSlots.allocate(layout, slots, F32, torch.device(DEVICE))
    for slot in range(slots):
        begin = int(rows.first[slot, 0])
        there = slice(begin, begin + 48)
        part.keys.stored.numbers[slot] = rows.keys[there].view(2, 24, 16)
        part.values.stored.numbers[slot] = rows.values[there].view(2, 24, 16)
        part.positions[slot] = rows.positions[there].view(2, 24)
        for note in part.row_stats.values():
            note[slot] = rows.mass[there].view(2, 24)
    return policy, part


def assert_is_twin(rows, part, tolerance):
    for slot in range(part.slots):
        begin = int(rows.first[slot, 0])
        there = slice(begin, begin + 48)
        assert torch.equal(rows.positions[there].view(2, 24), part.positions[slot])
        assert torch.equal(rows.keys[there].view(2, 24, 16), part.keys.stored.numbers[slot])
        assert torch.equal(rows.values[there].view(2, 24, 16), part.values.stored.numbers[slot])
        for note in part.row_stats.values():
            torch.testing.assert_close(rows.mass[there].view(2, 24), note[slot], **tolerance)


@pytest.mark.parametrize("order", [ranked("age", window=90), ranked("mass"), ranked("average", window=60)], ids=str)
def test_policy_and_pool_say_the_same(order):
    """Two chunks, then a decoding step of the same two slots."""
    rows = make_rows([50, 10], [24, 24], capacities=(24, 24))
    policy, part = twin_of(rows, 2, order)
    chunks, packed = make_chunks([(50, 20, 24), (10, 12, 24)], slots=(0, 1))
    sums = uniform(2, packed)
    key, value = (strided(packed, 2, 16, seed, F32) for seed in (1, 2))
    assert triton_evict.evict(key, value, rows, chunks, sums if part.row_stats else None, order=order)
    for slot, (at, tokens, start) in enumerate(zip(chunks.offsets, chunks.lengths, chunks.starts, strict=True)):
        packing, used = slice(at, at + tokens), min(start, 24)
        received = torch.cat([torch.zeros(2, used, device=DEVICE), sums[:, packing]], 1).unsqueeze(0)
        policy.compress(part, PrefillChunk(
            slot=slot, start=start, row_limit=24, spans=(), key=key[packing], value=value[packing],
            queries=torch.zeros(tokens, 2, 1, 16, device=DEVICE), scale=1.0, sums=received if part.row_stats else None,
        ))  # fmt: skip
    mass_before = rows.mass.clone()
    assert_is_twin(rows, part, {"atol": 0, "rtol": 0})

    query, key, value = tokens_of(2)
    slots, now = torch.tensor([0, 1], device=DEVICE), torch.tensor([70, 22], device=DEVICE)
    output, actual = decode(query, key, value, rows, [0, 1], [70, 22], [24, 24], **{**PLAIN, "order": order})
    going = EvictionRequest(
        slots=slots, positions=now, slots_host=(0, 1), positions_host=(70, 22), row_limits_host=(24, 24)
    )
    victims = torch.where(now.unsqueeze(1) >= 24, policy.victims(part, going), now.unsqueeze(1))
    part.write(slots, victims, key, value, now)
    hidden = torch.arange(24, device=DEVICE) > now.view(-1, 1, 1)
    if order.window:
        hidden = hidden | (part.positions <= now.view(-1, 1, 1) - order.window)
    answer, received = reference.attend_slots(
        query, part.keys.stored.numbers, part.values.stored.numbers, slots, scale=0.3, hidden=hidden, want_mass=True
    )
    if part.row_stats:
        policy.observe(part, slots, received, first=True)
    torch.testing.assert_close(output, answer, **NEAR[F32])
    assert_is_twin(actual, part, NEAR[F32])
    assert torch.equal(rows.mass, mass_before)


@pytest.mark.parametrize("order", ORDERS[6:])
def test_kv_heads_with_rows_of_their_own_decode_and_evict(order):
    """Each by its own number; the rows of a slot's heads lie anywhere."""
    limits = [min(limit, max(UNEVEN[slot])) for slot, limit in zip(SLOTS, LIMITS, strict=True)]
    rows = make_rows(*seen_by_slots(limits=limits), capacities=UNEVEN)
    assert_decodes(tokens_of(len(SLOTS)), rows, limits=limits, **PLAIN | {"order": order})
    for wanted in (EVICTING, MIXED, FITTING):
        chunks, packed = make_chunks(wanted)
        assert_evicts(slots_before(wanted, capacities=UNEVEN), chunks, packed, uniform(2, packed), order)
        vectors = [strided(packed, heads, 16, heads + seed, F32) for seed, heads in enumerate((4, 2, 2))]
        found = []
        for kernels in (triton, reference):
            stored, output = slots_before(wanted, capacities=UNEVEN), torch.zeros(packed, 4, 16, device=DEVICE)
            assert kernels.prefill_step(output, *vectors, stored, chunks, scale=0.3, order=order)
            found.append((output, stored))
        (output, actual), (expected, specified) = found
        torch.testing.assert_close(output, expected, **NEAR[F32])
        assert_same_rows(actual, specified, **NEAR[F32])
