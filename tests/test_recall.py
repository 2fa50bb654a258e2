"""Recall: indexes of keys against brute force in float64, and the choice of rows against its definition."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmx import EngineConfig
from bmx.compress.recall import (
    NOTHING,
    Recall,
    estimated_attention,
    hidden_by_pages,
    page_scores,
    with_neighbours,
)
from bmx.kv.index import CLUSTER_GROUP, CLUSTER_SIZE, WAITING, allocate_index, clusters_of
from bmx.kv.layout import PAGE, KVLayout, LayerLayout, RecallLayout
from bmx.kv.pool import LayerSlots

HEADS, GROUP, DIM = 2, 3, 16
INDEXES = ("pages", "clusters", "bits")


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(by="pages", capacity=200, sink=4, kept=0, dtype=torch.float32):
    """A layout with an index."""
    return LayerLayout(
        capacity=capacity,
        kv_heads=HEADS,
        key_dim=DIM,
        value_dim=8,
        itemsize=dtype.itemsize,
        window=None,
        owner=0,
        last_reader=0,
        by_age=False,
        recall=RecallLayout(by=by, sink=sink, kept=kept),
    )


def index_of(by, slots=2, dtype=torch.float32, **sizes):
    return allocate_index(layer(by, dtype=dtype, **sizes), slots, dtype, torch.device("cpu"))


def fill(index, slot, keys, chunks, start=0):
    """Append keys [K, T, D] in chunks of these lengths; the rest token by token."""
    at = 0
    for length in chunks:
        index.append(slot, start + at, keys[:, at : at + length])
        at += length
    for token in range(at, keys.shape[1]):
        position = start + token
        index.write(torch.tensor([slot]), torch.tensor([position]), [position], keys[None, :, token])


def products(index, query, slot, rows, most=None):
    """[K, G, R] of one slot."""
    return index.products(query[None], torch.tensor([slot]), torch.tensor([rows - 1]), most or rows)[0, ..., :rows]


def true_products(query, keys):
    """[K, G, R] in float64."""
    return torch.einsum("kgd,krd->kgr", query.double().view(HEADS, GROUP, -1), keys.double())


CHUNKS = [(), (37,), (1, 2, 3, 64, 5), (64, 64), (100, 1), (150,)]


# ---- indexes ----


@pytest.mark.parametrize(("dtype", "chunks"), list(product((torch.float32, torch.bfloat16), CHUNKS)))
def test_no_key_has_a_greater_product_than_its_page_says(dtype, chunks):
    keys, query = drawn(HEADS, 151, DIM, dtype=dtype), drawn(HEADS * GROUP, DIM, seed=1, dtype=dtype)
    index = index_of("pages", dtype=dtype)
    fill(index, 1, keys, chunks)
    bounds = products(index, query, 1, 151).double()
    truth = true_products(query, keys)
    rounding = 1e-6 * true_products(query.abs(), keys.abs())  # of sums in float32
    assert (bounds >= truth - rounding).all()
    alone = torch.arange(151) // PAGE == 150 // PAGE  # the last page has three keys
    least = true_products(query.clamp(min=0), keys[:, alone].amax(1, keepdim=True)) + true_products(
        query.clamp(max=0), keys[:, alone].amin(1, keepdim=True)
    )
    torch.testing.assert_close(bounds[..., alone], least.expand(-1, -1, 3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("by", "chunks"), list(product(("pages", "bits"), CHUNKS)))
def test_keys_that_come_in_any_chunks_or_alone_leave_the_same_index(by, chunks):
    keys, query = drawn(HEADS, 151, DIM), drawn(HEADS * GROUP, DIM, seed=1)
    whole, parts = index_of(by), index_of(by)
    fill(whole, 0, keys, (151,))
    fill(parts, 0, drawn(HEADS, 180, DIM, seed=5), (90,))  # another sequence had the slot
    fill(parts, 0, keys, chunks)
    beside_longer = products(parts, query, 0, 151, most=180)
    assert torch.equal(products(whole, query, 0, 151, most=180), beside_longer)
    alone = products(whole, query, 0, 151)  # libraries add up products of another shape in another order
    torch.testing.assert_close(alone, beside_longer, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_every_row_is_in_one_cluster_or_waits_with_its_exact_key(chunks):
    keys, query = drawn(HEADS, 151, DIM), drawn(HEADS * GROUP, DIM, seed=1)
    index = index_of("clusters")
    fill(index, 1, drawn(HEADS, 180, DIM, seed=5), (180,))  # another sequence had the slot
    fill(index, 1, keys, chunks)
    labels = index.labels[1, :, :151]
    in_groups = 151 // CLUSTER_GROUP * CLUSTER_GROUP
    assert (labels[:, :in_groups] >= 0).all()
    assert (labels[:, in_groups:] == WAITING).all()
    assert labels.max() < in_groups // CLUSTER_SIZE
    truth, expected = true_products(query, keys), torch.empty(HEADS, GROUP, 151, dtype=torch.float64)
    for head, row in product(range(HEADS), range(151)):
        label = labels[head, row]
        members = labels[head] == label if label >= 0 else torch.arange(151) == row
        expected[head, :, row] = truth[head][:, members].mean(-1)
    torch.testing.assert_close(products(index, query, 1, 151, most=170).double(), expected, atol=1e-5, rtol=1e-5)


def test_the_first_tokens_are_a_cluster_of_their_own():
    labels, _ = clusters_of(drawn(HEADS, 64, DIM), sink=4)
    assert (labels[:, :4] == 0).all()
    assert (labels[:, 4:] > 0).all()
    assert (clusters_of(drawn(HEADS, 64, DIM), sink=100)[0] == 0).all()


def test_similar_keys_are_in_one_cluster():
    directions = torch.nn.functional.one_hot(torch.arange(4), DIM).float()
    keys = directions[torch.arange(64) % 4] * (1 + drawn(64, 1).abs()) + 0.01 * drawn(64, DIM, seed=1)
    labels, centroids = clusters_of(keys.expand(HEADS, -1, -1), sink=0)
    assert [len(labels[0, first::4].unique()) for first in range(4)] == [1] * 4
    assert len(labels.unique()) == 4
    torch.testing.assert_close(centroids[0, labels[0, 0]], keys[0::4].mean(0))


def test_products_with_two_bits_are_near_and_those_of_the_newest_exact():
    keys, query = drawn(HEADS, 151, DIM), drawn(HEADS * GROUP, DIM, seed=1)
    index = index_of("bits")
    fill(index, 0, keys, (140,))
    estimated, truth = products(index, query, 0, 151).double(), true_products(query, keys)
    torch.testing.assert_close(estimated[..., -32:], truth[..., -32:], atol=1e-5, rtol=1e-5)
    correlation = torch.corrcoef(torch.stack([estimated[..., :-32].flatten(), truth[..., :-32].flatten()]))[0, 1]
    assert 0.9 < correlation < 1


@pytest.mark.parametrize("by", INDEXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_index_takes_the_bytes_that_its_layout_says(by, dtype):
    for capacity in (1, 63, 64, 200):
        own, index = layer(by, capacity, dtype=dtype), index_of(by, slots=3, dtype=dtype, capacity=capacity)
        assert index.nbytes == 3 * own.recall_bytes


@pytest.mark.parametrize("by", INDEXES)
def test_a_copied_sequence_goes_on_as_the_first_one(by):
    keys, query = drawn(HEADS, 151, DIM), drawn(HEADS * GROUP, DIM, seed=1)
    first, second = index_of(by, capacity=170), index_of(by, capacity=300)
    fill(first, 0, keys[:, :90], (80,))
    second.copy_state(1, first, 0)
    for index, slot in ((first, 0), (second, 1)):
        fill(index, slot, keys[:, 90:], (40,), start=90)
    assert torch.equal(products(first, query, 0, 151), products(second, query, 1, 151))


@pytest.mark.parametrize("by", INDEXES)
def test_tokens_of_several_sequences_do_not_meet(by):
    index, alone = index_of(by, slots=3), index_of(by, slots=3)
    keys, query = drawn(3, HEADS, 140, DIM), drawn(3, HEADS * GROUP, DIM, seed=1)
    starts = (100, 63, 71)
    for slot, start in enumerate(starts):
        fill(index, slot, keys[slot, :, :start], (start,))
        fill(alone, slot, keys[slot, :, : start + 40], (start,))
    for step in range(40):
        positions = [start + step for start in starts]
        new = torch.stack([keys[slot, :, position] for slot, position in enumerate(positions)])
        index.write(torch.arange(3), torch.tensor(positions), positions, new)
    slots, last = torch.arange(3), torch.tensor([start + 39 for start in starts])
    together = index.products(query, slots, last, 140)
    for slot, start in enumerate(starts):
        own = products(alone, query[slot], slot, start + 40)
        torch.testing.assert_close(together[slot, ..., : start + 40], own, atol=1e-5, rtol=1e-5)


# ---- slots ----


def slots_of(format_, by="pages", dtype=torch.float32, kept=0):
    """Slots of an archive with what recall keeps beside them."""
    own = replace(
        layer(by, kept=kept, dtype=dtype),
        key_format=format_,
        value_format=format_,
        by_channel=format_ not in ("model", "fp8"),
    )
    return LayerSlots.allocate(own, 2, dtype, torch.device("cpu"))


@pytest.mark.parametrize("format_", ["model", "int8", "int4", "int2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_fetched_are_those_that_reading_all_gives_bit_for_bit(format_, dtype):
    part = slots_of(format_, dtype=dtype)
    for slot, tokens in enumerate((77, 5)):
        pairs = drawn(tokens, HEADS, DIM, dtype=dtype), drawn(tokens, HEADS, 8, seed=1, dtype=dtype)
        part.append(slot, 0, *pairs, torch.arange(tokens), {})
    slots, positions = torch.tensor([1, 0]), torch.tensor([5, 77])
    new = drawn(2, HEADS, DIM, seed=2, dtype=dtype), drawn(2, HEADS, 8, seed=3, dtype=dtype)
    part.write(slots, positions.unsqueeze(1), *new, positions)
    rows = torch.stack([torch.randint(0, used, (HEADS, 40)) for used in (6, 78)])
    got = part.read_rows(slots, rows)
    for fetched, whole in zip(got, part.read_slots(slots, 78), strict=True):
        expected = whole.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, whole.shape[-1]))
        assert torch.equal(fetched, expected)


@pytest.mark.parametrize("by", ["attention", *INDEXES])
@pytest.mark.parametrize("format_", ["model", "int4"])
def test_slots_take_the_bytes_that_are_planned_with_what_recall_keeps(by, format_):
    part = slots_of(format_, by, kept=30)
    layout = KVLayout((part.layout,))
    assert part.nbytes == 2 * layout.nbytes
    assert layout.recall_bytes > (0 if by == "attention" else HEADS * 30 * 4)


# ---- the choice ----


def recall(by="pages", pairs=16, every=1, sink=2, recent=5):
    return Recall(by=by, pairs=pairs, every=every, sink=sink, recent=recent)


def read_by_definition(how, scores, position, choosing_at):
    """The rows of one head: the first, the newest, and the best of those that are not newest until the next choice."""
    rows = {row for row in range(position + 1) if row < how.sink or row > position - how.recent}
    rivals = range(how.sink, choosing_at + how.every - how.recent)
    best = sorted(rivals, key=lambda row: (scores[row], row), reverse=True)
    return rows | set(best[: how.pairs - how.sink - how.recent])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_rows_that_are_read_are_the_best_and_none_twice(data):
    how = recall(
        every=data.draw(st.integers(1, 4)),
        sink=data.draw(st.integers(0, 4)),
        recent=data.draw(st.integers(4, 7)),
        pairs=data.draw(st.integers(12, 30)),
    )
    chose = data.draw(st.lists(st.integers(0, 39), min_size=1, max_size=3))
    later = data.draw(st.integers(0, how.every - 1))
    levels = data.draw(st.integers(2, 100))  # few levels: ties
    seed = data.draw(st.integers(0, 1000))
    scores = (drawn(len(chose), HEADS, 44, seed=seed).abs() * levels).round() / levels
    chosen = how.choose(scores, torch.tensor(chose), capacity=60)
    positions = [position + later for position in chose]
    rows, hidden = how.reading(chosen, torch.tensor(positions))
    assert rows.shape == hidden.shape == (len(chose), HEADS, how.pairs)
    for slot, head in product(range(len(chose)), range(HEADS)):
        read = rows[slot, head][~hidden[slot, head]].tolist()
        assert len(set(read)) == len(read) <= how.pairs
        expected = read_by_definition(how, scores[slot, head].tolist(), positions[slot], chose[slot])
        assert set(read) == expected


@pytest.mark.parametrize("every", [1, 3])
def test_where_all_fit_each_row_is_read_once(every):
    how = recall(pairs=50, every=every)
    for position in range(45):
        rows, hidden = how.reading(
            how.choose(drawn(1, HEADS, 48).abs(), torch.tensor([position]), 60), torch.tensor([position])
        )
        for head in range(HEADS):
            assert sorted(rows[0, head][~hidden[0, head]].tolist()) == list(range(position + 1))


def test_a_choice_depends_on_no_other_sequence_and_on_no_row_beyond():
    how, scores = recall(), drawn(3, HEADS, 40, seed=2).abs().mul(8).round()
    positions = torch.tensor([39, 20, 6])
    together = how.choose(scores, positions, 60)
    for slot, position in enumerate(positions.tolist()):
        alone = how.choose(scores[slot : slot + 1, :, : position + 1], positions[slot : slot + 1], 60)
        assert torch.equal(alone[0], together[slot])


def test_a_slot_that_holds_less_than_is_read_has_all_its_rows_read():
    how = recall(pairs=100)
    assert (how.others(20), how.others(5), recall(pairs=16).others(60)) == (13, 0, 9)
    rows, hidden = how.reading(how.choose(drawn(1, HEADS, 20).abs(), torch.tensor([19]), 20), torch.tensor([19]))
    assert sorted(rows[0, 0][~hidden[0, 0]].tolist()) == list(range(20))


def test_choices_are_due_by_the_tokens_number_in_the_answer():
    how = recall(every=4)
    assert [n for n in range(13) if how.due(37 + n, 37)] == [0, 4, 8, 12]
    assert all(recall(every=1).due(position, 5) for position in range(5, 20))


def test_what_is_remembered_takes_bytes_only_where_choices_are_kept():
    assert recall(every=1).layout(60) == RecallLayout(by="pages", sink=2, kept=0)
    assert recall(every=2).layout(60) == RecallLayout(by="pages", sink=2, kept=9)
    assert layer("attention", kept=9).recall_bytes == HEADS * 9 * 4


def test_recall_is_what_the_settings_say():
    config = EngineConfig(kv_archive="int4", kv_recall="clusters", kv_recall_pairs=128, kv_recall_every=3, kv_sink=2)
    assert Recall.from_config(config) == Recall(by="clusters", pairs=128, every=3, sink=2, recent=config.kv_recent)
    assert Recall.from_config(EngineConfig(kv_archive="int4")) is None


@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (3.0, True)])
def test_estimated_attention_is_the_mean_of_probabilities_over_rows_in_use(softcap, sinks):
    values, positions = drawn(2, HEADS, GROUP, 12), [11, 4]
    logits = drawn(HEADS * GROUP, seed=3) if sinks else None
    got = estimated_attention(values, torch.tensor(positions), 0.5, softcap, logits)
    for slot, head in product(range(2), range(HEADS)):
        mean = torch.zeros(12, dtype=torch.float64)
        for g in range(GROUP):
            scores = values[slot, head, g, : positions[slot] + 1].double() * 0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            below = scores.exp().sum() + (logits[head * GROUP + g].double().exp() if sinks else 0)
            mean[: positions[slot] + 1] += scores.exp() / below / GROUP
        torch.testing.assert_close(got[slot, head].double(), mean, atol=1e-6, rtol=1e-5)


def test_neighbours_of_what_is_attended_are_chosen_with_it():
    attention = torch.zeros(1, 1, 20)
    attention[0, 0, 10] = 1.0
    assert with_neighbours(attention)[0, 0].nonzero().flatten().tolist() == list(range(7, 14))


# ---- RocketKV's second stage ----


def rocket_pages(query, keys, pairs, scale):
    """One head, float64, plain loops: queries [G][D], keys [R][D] in the order of tokens; a score for each row."""
    rows, dim = len(keys), len(keys[0])
    ratio = max(1.0, rows / pairs)
    size = math.ceil(math.sqrt(ratio))
    looked = max(1, min(dim, int(dim * size / ratio)))
    greatness = [sum(abs(q[d]) for q in query) / len(query) for d in range(dim)]
    channels = sorted(range(dim), key=lambda d: greatness[d], reverse=True)[:looked]
    scores = []
    logits = [[] for _ in query]
    for start in range(0, rows, size):
        page = keys[start : start + size]
        for g, q in enumerate(query):
            total = 0.0
            for d in channels:
                bound = max if sum(other[d] for other in query) >= 0 else min
                total += q[d] * bound(key[d] for key in page)
            share = sum(abs(q[d]) for d in channels) / sum(map(abs, q))
            logits[g].append(total * scale / math.sqrt(share))
    weights = [torch.tensor(own, dtype=torch.float64).softmax(0).tolist() for own in logits]
    for row in range(rows):
        scores.append(sum(own[row // size] for own in weights) / len(query))
    return scores


@pytest.mark.parametrize(("rows", "pairs"), [(1, 16), (16, 16), (17, 16), (40, 16), (150, 12)])
def test_rocketkvs_estimate_is_its_definition(rows, pairs):
    query, keys = drawn(HEADS, GROUP, DIM), drawn(HEADS, rows, DIM, seed=1)
    got = page_scores(query, keys, pairs, 0.25)
    for head in range(HEADS):
        expected = rocket_pages(query[head].double().tolist(), keys[head].double().tolist(), pairs, 0.25)
        assert got[head].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("used", "pairs"), [((40, 23), 12), ((40, 3), 60)])
def test_rocketkv_reads_the_best_pages_in_the_order_of_tokens(used, pairs):
    how, capacity = recall(pairs=pairs), 40
    query, keys = drawn(2, HEADS * GROUP, DIM), drawn(2, HEADS, capacity, DIM, seed=1)
    positions = torch.full((2, HEADS, capacity), -1, dtype=torch.int32)
    generator = torch.Generator().manual_seed(4)
    for slot, head in product(range(2), range(HEADS)):
        positions[slot, head, : used[slot]] = torch.randperm(90, generator=generator)[: used[slot]].int()
    hidden = hidden_by_pages(how, query, keys, positions, used, 0.25)
    for slot, head in product(range(2), range(HEADS)):
        rows = used[slot]
        order = positions[slot, head, :rows].argsort().tolist()
        asking = query[slot].view(HEADS, GROUP, DIM)[head].double().tolist()
        scores = rocket_pages(asking, keys[slot, head, order].double().tolist(), pairs, 0.25)
        expected = {order[place] for place in read_by_definition(how, scores, rows - 1, rows - 1)}
        assert set((~hidden[slot, head]).nonzero().flatten().tolist()) == expected
        assert len(expected) == min(rows, pairs)


def test_nothing_marks_an_entry_that_stands_for_no_row():
    chosen = recall().choose(drawn(1, HEADS, 9).abs(), torch.tensor([8]), 60)
    assert chosen.shape == (1, HEADS, 9)
    assert chosen[0, 0].tolist() == [NOTHING] * 7 + [2, 3]
