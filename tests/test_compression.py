"""What stays in the cache is what the definition of the policy says, judged by a plain float64 reference.

The reference materialises everything: whole attention matrices, one sequence, Python sets of kept positions.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import answers, as_requests, random_prompts, tiny_engine, watched
from families import WINDOW, tiny_model

from bmx.engine.attention import SlotAttention
from bmx.model.spec import use_attention

SINK, RECENT, BUDGET, CHUNK, NEW = 3, 5, 20, 12, 9
SETTINGS = {
    "kv_policy": "average-attention",
    "kv_sink": SINK,
    "kv_recent": RECENT,
    "kv_budget": BUDGET,
    "chunk_size": CHUNK,
}
FAMILIES = ("llama", "qwen3", "gpt2", "gemma2", "gpt_oss", "deepseek_v3", "mistral", "granite")


class PlainReference:
    """Batch-Max by its definition on one sequence, in float64: an attention function that remembers every key.

    ``kept[layer][head]`` is the set of positions in the cache; ``mass[layer][head][position]`` the attention that
    each has received (mean over the group), however the cache changed in between.
    """

    def __init__(self, budget):
        self.budget = budget
        self.keys, self.values, self.kept, self.mass = {}, {}, {}, {}
        self.layer = self.seen = 0

    def __call__(self, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        window = kwargs.get("sliding_window")
        layer, n = self.layer, query.shape[2]
        self.layer += 1
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        self.keys.setdefault(layer, []).extend(key[0].unbind(1))
        self.values.setdefault(layer, []).extend(value[0].unbind(1))
        kept = self.kept.setdefault(layer, [set() for _ in range(heads)])
        mass = self.mass.setdefault(layer, [{} for _ in range(heads)])
        output = torch.zeros(1, n, query.shape[1], value.shape[-1], dtype=torch.float64)
        new = range(self.seen, self.seen + n)
        if n == 1:
            self.evict(layer, new.start, window, room_for=1)
        for head in range(heads):
            received = dict.fromkeys([*kept[head], *new], 0.0)
            for i, position in enumerate(new):
                visible = sorted(
                    p for p in [*kept[head], *new] if p <= position and (not window or p > position - window)
                )
                for g in range(group):
                    q = query[0, head * group + g, i]
                    scores = torch.stack([q @ self.keys[layer][p][head] for p in visible]) * scaling
                    if softcap:
                        scores = torch.tanh(scores / softcap) * softcap
                    if s_aux is not None:
                        scores = torch.cat([scores, s_aux[head * group + g : head * group + g + 1].double()])
                    weights = torch.softmax(scores, 0)[: len(visible)]
                    for p, weight in zip(visible, weights.tolist(), strict=True):
                        received[p] += weight / group
                        output[0, i, head * group + g] += weight * self.values[layer][p][head]
            for p, weight in received.items():
                mass[head][p] = mass[head].get(p, 0.0) + weight
            kept[head].update(new)
        if n > 1:
            self.evict(layer, new.stop, window, room_for=0)
        return output, None

    def evict(self, layer, now, window, room_for):
        """Keep the best ``capacity - room_for``: sinks and recent tokens first, then by attention per lifetime."""
        capacity = min(self.budget, window or self.budget) - room_for
        for kept, mass in zip(self.kept[layer], self.mass[layer], strict=True):

            def rank(position, mass=mass):
                lifetime = min(now - position, window or now)
                average = position if window and window <= self.budget else mass[position] / lifetime
                protected = position < SINK or position >= now - RECENT
                gone = bool(window) and position <= now - window
                return (not gone, protected, average)

            best = sorted(kept, key=rank, reverse=True)[:capacity]
            kept.intersection_update(best)


def run_reference(model, prompt, ends, answer, budget=BUDGET):
    """Feed the prompt in chunks, then the answer token by token; returns the reference and its greedy answer."""
    model = model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped one knows no float64
    reference = PlainReference(budget)
    tokens, greedy = [*prompt, *answer], []
    ends = [*ends, *range(ends[-1] + 1, len(tokens) + 1)]
    for start, stop in pairwise([0, *ends]):
        reference.layer, reference.seen = 0, start
        with torch.inference_mode(), use_attention(model, reference):
            logits = model(
                input_ids=torch.tensor([tokens[start:stop]]),
                position_ids=torch.arange(start, stop).unsqueeze(0),
                use_cache=False,
            ).logits
        if stop >= len(prompt):
            greedy.append(int(logits[0, -1].argmax()))
    return reference, greedy


class Spy:
    """Looks at the pool of a running engine through the attention function it registers."""

    def __init__(self, monkeypatch):
        self.pool = None
        original = SlotAttention.__init__

        def watched(attention, pool, *args):
            self.pool = pool
            original(attention, pool, *args)

        monkeypatch.setattr(SlotAttention, "__init__", watched)

    def rows(self, layer, slot=0, group=0):
        """Per head: {position: attention mass} of the rows in use."""
        heads = []
        for part in self.pool.layer(group, layer):
            places = part.positions[slot]
            received = part.row_stats["mass"][slot] if "mass" in part.row_stats else torch.zeros_like(places)
            heads += zip(places.tolist(), received.tolist(), strict=True)
        return [{p: m for p, m in zip(places, mass, strict=True) if p >= 0} for places, mass in heads]


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


def chunk_ends(length, size):
    """Where chunks end: whole ones, but the last two share evenly what is left."""
    ends = [0]
    while length - ends[-1] > 2 * size:
        ends.append(ends[-1] + size)
    if length - ends[-1] > size:
        ends.append((length + ends[-1]) // 2)
    return [*ends[1:], length]


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_tokens_scores_and_answers_equal_the_plain_reference(family, kernels, spy, cpu_kernels):
    cpu_kernels(kernels)
    prompt = random_prompts((50,), seed=3)[0]
    engine = tiny_engine(tiny_model(family), **SETTINGS)
    result = next(engine.stream(as_requests([prompt], max_tokens=NEW)))
    answer = result.token_ids[:-1]  # the last token was never fed back
    reference, greedy = run_reference(tiny_model(family), prompt, chunk_ends(50, CHUNK), answer)
    assert list(result.token_ids) == greedy
    for layer, kept in reference.kept.items():
        rows = spy.rows(layer)
        assert [set(row) for row in rows] == kept
        if not spy.pool.layer(0, layer)[0].layout.by_age:
            for row, mass in zip(rows, reference.mass[layer], strict=True):
                assert row == pytest.approx({p: mass[p] for p in row}, rel=1e-4, abs=1e-5)
    assert result.kv.kept == BUDGET
    assert result.kv.evicted == 50 + NEW - 1 - BUDGET


def test_scores_equal_a_float64_full_matrix_while_nothing_is_evicted(spy):
    """Column sums over all queries, mean over the group, of attention computed in one piece."""
    prompt = random_prompts((40,), seed=1)[0]
    engine = tiny_engine("llama", kv_policy="average-attention", kv_budget=45, kv_recent=RECENT, chunk_size=CHUNK)
    answer = next(engine.stream(as_requests([prompt], max_tokens=10))).token_ids
    early = as_requests([prompt], max_tokens=10, stop_token_ids=(answer[4],))  # might evict, but stops before
    result = next(engine.stream(early))
    assert result.kv.evicted == 0
    tokens = [*prompt, *result.token_ids[:-1]]
    reference, _ = run_reference(tiny_model("llama"), tokens, [len(tokens)], [], budget=45)
    for layer, expected in reference.mass.items():
        for row, mass in zip(spy.rows(layer), expected, strict=True):
            assert row == pytest.approx(mass, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3n_text", "phi3"])
def test_sinks_and_recent_tokens_stay_and_slots_never_exceed_the_budget(family, spy):
    """Looked at after every step of a crowded run, in every layer, head and slot."""
    looked = []

    def look(runner, step):
        for chunk in step.chunks:
            group, slot, _ = chunk.sequence.slot
            now = chunk.start + chunk.length
            for layer in range(len(engine.spec.layers)):
                layout = runner.pool.layer(group, layer)[0].layout
                for row in spy.rows(layer, slot, group):
                    looked.append(now)
                    assert len(row) == min(now, layout.capacity) <= BUDGET
                    if layout.window is None:
                        wanted = {*range(min(SINK, now)), *range(max(0, now - RECENT), now)}
                        assert wanted <= set(row)

    engine = watched(tiny_engine(family, **SETTINGS, max_num_seqs=3), after=look)
    list(engine.stream(as_requests(random_prompts((50, 7, 33, 26, 61)), max_tokens=NEW)))
    assert max(looked) == 61 + NEW - 1


def test_a_window_keeps_exactly_what_a_later_query_can_see(spy):
    prompt = random_prompts((40,))[0]
    engine = tiny_engine("mistral", **SETTINGS)
    next(engine.stream(as_requests([prompt], max_tokens=4)))
    now = 40 + 4 - 1
    for row in spy.rows(0):
        assert set(row) == set(range(now - WINDOW, now))


def test_unscored_work_is_not_done(monkeypatch):
    """No attention is added up for the full cache, nor for sequences that fit their slot."""
    from bmx.kernels import cpu

    scored = []
    chunk, slots = cpu.attend_chunk, cpu.attend_slots

    def watched_chunk(*args, query_weights, **kwargs):
        scored.append(query_weights is not None)
        return chunk(*args, query_weights=query_weights, **kwargs)

    def watched_slots(*args, want_mass, **kwargs):
        scored.append(want_mass)
        return slots(*args, want_mass=want_mass, **kwargs)

    monkeypatch.setattr(cpu, "attend_chunk", watched_chunk)
    monkeypatch.setattr(cpu, "attend_slots", watched_slots)
    prompts = random_prompts((10, 50))
    for kept, settings in ((prompts, {"kv_policy": "none"}), (prompts[:1], {"kv_budget": 80})):
        engine, requests = tiny_engine("llama", **settings), as_requests(kept, max_tokens=3)
        plan = engine.plan(engine.measure(requests))
        scored.clear()  # what was rehearsed is another matter
        list(engine.run(requests, plan))
        assert scored
        assert not any(scored)
    for policy, wanted in (
        ("far-attention", True),
        ("average-attention", True),
        ("keydiff", False),
        ("streaming", False),
    ):
        scored.clear()
        list(
            tiny_engine("llama", kv_budget=40, kv_recent=32, kv_policy=policy).stream(
                as_requests(prompts[1:], max_tokens=3)
            )
        )
        assert scored[-4:] == [wanted] * 4  # the decoding steps' two layers


def test_a_plan_made_from_shorter_rows_changes_no_answer():
    """Where chunks end decides what is evicted: it must not depend on which rows the plan was made from."""
    long = as_requests(random_prompts((40,)), max_tokens=6)
    engine = tiny_engine("llama", kv_budget=16, kv_recent=4, chunk_size=16)
    expected = answers(engine, long)
    short = engine.measure(as_requests(random_prompts((5, 7)), max_tokens=12))
    plan = engine.plan(short)
    assert plan.step.chunk_size == 7
    assert {result.id: result.token_ids for result in engine.run(long, plan)} == expected
