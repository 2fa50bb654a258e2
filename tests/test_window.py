"""Rows that share text run together wherever they stand, none waits for ever, and no answer shows it."""

from __future__ import annotations

import random
import tracemalloc
from itertools import groupby, takewhile

import pytest
from conftest import answers
from hypothesis import given, settings
from hypothesis import strategies as st

from bmx import Engine, EngineConfig, Request, SamplingParams
from bmx.engine import run as run_module
from bmx.engine.prefix_cache import UNIT, PrefixCache, Reuse
from bmx.engine.prompt_lengths import window_bytes
from bmx.engine.run import LOOKAHEAD
from bmx.engine.window import Window, chained_keys
from bmx.plan.planner import Length

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True)
TEXTS = st.text("ab", max_size=12)


def keys_of(text):
    return chained_keys(text, range(2, len(text) + 1, 2))


def shared(one, other):
    """How many keys the texts have in common, counted one by one."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(keys_of(one), keys_of(other), strict=False))))


def given_out(texts, size=10**6):
    window = Window(size, 10**6)
    for i, text in enumerate(texts):
        window.add(i, keys_of(text), 1)
    return [window.pop() for _ in texts]


@SETTINGS
@given(st.lists(TEXTS, max_size=40))
def test_beginnings_come_one_after_the_other_at_every_length(texts):
    order = given_out(texts)
    assert sorted(order) == list(range(len(texts)))
    for length in range(2, 13, 2):
        beginnings = [texts[i][:length] for i in order if len(texts[i]) >= length]
        groups = [text for text, _ in groupby(texts[i][:length] for i in order)]
        assert all(groups.count(text) == 1 for text in beginnings)


@SETTINGS
@given(st.lists(TEXTS, max_size=40))
def test_of_those_that_share_equally_much_the_first_comes_first(texts):
    """Next is one that shares the most with the one before; of these, and where nothing is shared, the oldest group."""
    order = given_out(texts)
    for place, i in enumerate(order[1:], 1):
        left = order[place:]
        most = max(shared(texts[order[place - 1]], texts[j]) for j in left)
        assert shared(texts[order[place - 1]], texts[i]) == most
        assert i == min(j for j in left if shared(texts[order[place - 1]], texts[j]) == most)


def test_rows_that_share_nothing_keep_their_order():
    assert given_out([f"{i:04}" for i in range(100)]) == list(range(100))
    assert given_out([""] * 100) == list(range(100))


@SETTINGS
@given(
    size=st.integers(1, 12),
    texts=st.lists(TEXTS, min_size=1, max_size=120),
    pops=st.lists(st.integers(0, 3), min_size=1, max_size=8),
)
def test_every_item_is_given_out_within_two_windows(size, texts, pops):
    """Whatever comes later, and in whatever portions; a full window takes nothing."""
    window, waiting, given, left = Window(size, 10**6), {}, 0, list(enumerate(texts))
    for moment in range(10**6):
        while left and not window.full:
            i, text = left.pop(0)
            waiting[i] = given
            window.add(i, keys_of(text), 1)
        for _ in range(min(len(window), pops[moment % len(pops)] or moment % 2)):
            assert given - waiting.pop(window.pop()) < 2 * size
            given += 1
        assert len(window) == len(waiting) <= size
        if not left and not window:
            break
    assert given == len(texts)


def test_a_large_group_that_goes_on_for_ever_lets_others_pass():
    window = Window(16, 10**6)
    window.add("lone", keys_of("zz"), 1)
    for _ in range(3):
        window.add("many", keys_of("aa"), 1)
    assert window.pop() == "lone"
    window.add("lone", keys_of("zy"), 1)
    given = []
    while "lone" not in given:
        window.add("many", keys_of("aa"), 1)
        given.append(window.pop())
    assert len(given) < 32


def test_a_window_is_full_by_weight_too():
    window = Window(100, 10)
    for weight, full in ((4, False), (5, False), (30, True)):
        window.add(weight, (), weight)
        assert window.full is full
    assert [window.pop() for _ in range(2)] == [4, 5]
    assert window.full
    assert window.pop() == 30
    assert not window.full
    with pytest.raises(IndexError):
        window.pop()


def test_one_that_comes_late_joins_the_group_that_was_given_out_last():
    window = Window(100, 100)
    for name, text in (("a1", "aaaa"), ("b1", "bbbb"), ("c1", "cccc")):
        window.add(name, keys_of(text), 1)
    assert window.pop() == "a1"
    window.add("b2", keys_of("bbba"), 1)
    window.add("a2", keys_of("aaab"), 1)
    window.add("d1", keys_of("dddd"), 1)
    assert [window.pop() for _ in range(5)] == ["a2", "b1", "b2", "c1", "d1"]


# ---- rows of a run ----


def questions(documents, each, seed):
    """Requests about documents of 110 words, in any order."""
    chance = random.Random(seed)
    texts = [" ".join(f"d{i}w{j}" for j in range(110)) for i in range(documents)]
    rows = [(f"{i}/{j}", f"{text} question {j}") for i, text in enumerate(texts) for j in range(each)]
    chance.shuffle(rows)
    return [Request(id=name, prompt=prompt, params=SamplingParams(max_tokens=5)) for name, prompt in rows]


def fake(**config):
    return Engine.open(EngineConfig(model="fake", kv_format="model", max_num_seqs=4, **config))


def test_shuffles_over_the_whole_window_change_no_answer_and_compute_no_more():
    engine = fake()
    expected = answers(fake(prefix_reuse=False), questions(30, 8, seed=0))
    total = sum(len(request.prompt.split()) for request in questions(30, 8, seed=0))
    for seed in range(3):
        assert answers(engine, questions(30, 8, seed)) == expected
        assert engine.stats.prompt_tokens == total - 30 * 7 * (110 // UNIT * UNIT)


def test_no_row_is_moved_so_far_that_the_order_of_the_input_cannot_be_written(monkeypatch):
    """Rows between the first unfinished one and the last one read: fewer than twice the window, whatever they share."""
    monkeypatch.setattr(run_module, "ROWS", 128)
    requests = questions(60, 10, seed=1)
    place = {request.id: i for i, request in enumerate(requests)}
    unfinished, spans = set(), []

    def source():
        for request in requests:
            unfinished.add(place[request.id])
            spans.append(place[request.id] - min(unfinished))
            yield request

    engine = fake()
    for result in engine.run(source(), engine.plan(engine.measure(requests))):
        unfinished.remove(place[result.id])
    assert not unfinished
    assert 128 < max(spans) < 2 * 128 + LOOKAHEAD


def test_rows_that_are_there_are_answered_when_no_more_come_for_now():
    """The window does not wait to be filled: reading pauses after each row, until that is answered."""
    requests, pending = questions(3, 4, seed=2), []

    def source():
        for request in requests:
            pending.append(request.id)
            yield request

    engine = fake()
    plan = engine.plan(engine.measure(requests))
    for result in engine.run(source(), plan, paused=lambda: bool(pending)):
        pending.remove(result.id)
    assert engine.stats.peak_active_slots == 1


@pytest.mark.parametrize(("owner", "name"), [(Engine, "_sequence"), (PrefixCache, "keys")])
def test_no_row_is_lost_when_memory_runs_out_between_the_source_and_the_slots(monkeypatch, owner, name):
    """Neither one that comes out of the window, nor one that goes in."""
    requests, engine, whole, calls = questions(3, 4, seed=2), fake(), getattr(owner, name), []

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return whole(*args)

    expected = answers(engine, requests)
    monkeypatch.setattr(owner, name, failing)
    assert answers(engine, requests) == expected
    assert len(engine.stats.shrunk_to) == 1


def test_rows_that_cannot_be_read_are_told_before_those_that_wait():
    requests = questions(3, 4, seed=3)
    requests[5] = Request(id="empty", prompt="")
    engine = fake()
    plan = engine.plan(engine.measure(requests))
    first, *others = engine.run(requests, plan)
    assert (first.id, first.error is not None) == ("empty", True)
    assert {result.error for result in others} == {None}


def test_the_plan_counts_the_rows_that_are_read_ahead():
    """As much as they take, and only where prompts share text."""
    engine = fake()
    plan = engine.plan(engine.measure(questions(30, 8, seed=0)))
    assert plan.prefix_slots
    lengths = [Length(4000, 4, 4004)] * 5000
    assert 0 < plan.memory.window < 2**20 < window_bytes(lengths) == window_bytes([*lengths, *lengths])
    apart = fake(prefix_reuse=False)
    assert apart.plan(apart.measure(questions(30, 8, seed=0))).memory.window == 0
    one = "".join(f" {i:04}" for i in range(2000))
    tracemalloc.start()
    window = Window(10**6, 10**9)
    for i in range(64):
        request = Request(id=str(i), prompt=f"{one} question {i}")
        encoded = engine._measurer.read(request)
        window.add((request, encoded), Reuse(spec=engine.spec, policy=engine.policy, chunk_size=512).keys(encoded), 1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.5 < held / window_bytes([encoded.length] * 64) < 1
