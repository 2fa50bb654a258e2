"""Text that prompts share is computed once, and no row's answer shows it: whatever is evicted, kept or goes wrong."""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import pytest
import torch
from conftest import answers, as_requests, one_first, random_prompts, tiny_engine, watched, words
from families import VOCAB, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from bmx import Engine, EngineConfig, PromptConfig, Request, SamplingParams
from bmx.compress.policy import CompressionPolicy
from bmx.engine.prefix_cache import LEAST, UNIT, PrefixCache, Reuse, common_tokens
from bmx.engine.scheduler import Scheduler
from bmx.engine.sequence import Sequence
from bmx.engine.window import Window
from bmx.model.spec import Costs, LayerSpec, ModelSpec
from bmx.plan.device import Device
from bmx.plan.memory import Limits, SlotGroup, StepSize
from bmx.plan.planner import Length, plan
from bmx.policies import POLICIES
from bmx.shutdown import Stop

DOCUMENT, OTHER, SYSTEM = random_prompts((150, 140, 66), seed=5)
CHUNK = 24  # 64 tokens, the least that is shared, end in the middle of one


def after(text, lengths, seed=1):
    return [text + question for question in random_prompts(lengths, seed)]


QUESTIONS = after(DOCUMENT, (12, 9, 30, 12))  # a document that is larger than most budgets
SHORT = after(SYSTEM, (1, 50, 9, 34, 70))  # a system prompt that most budgets hold, some rows with all that follows
ROWS = [*QUESTIONS[:3], *after(OTHER, (8, 11)), *random_prompts((20,)), *SHORT]
FEW_ROWS = [*QUESTIONS[:2], *random_prompts((20,)), *SHORT[:2]]
SOME_ROWS = [*QUESTIONS[:2], *after(OTHER, (8, 11)), *random_prompts((20,)), *SHORT[:3]]


def engine_of(family="llama", **config):
    defaults = {"chunk_size": CHUNK, "kv_sink": 2, "kv_recent": 5, "max_num_seqs": 3}
    config = defaults | config
    step = max(200, 3 * config["chunk_size"])  # a chunk of each slot; larger ones only take longer to profile_step
    return tiny_engine(family, max_num_batched_tokens=step, **config)


def listened(engine, requests):
    """Answers, and the logits of each of their tokens by request and place."""
    heard = {}

    def watch(request, place, logits):
        heard[request.id, place] = logits.clone()

    return answers(engine, requests, watch=watch), heard


def with_and_without(family="llama", rows=SOME_ROWS, new_tokens=3, **config):
    """Answers with reuse, without, and the tokens that were reused; their logits must be the same, but for rounding."""
    requests = as_requests(rows, max_tokens=new_tokens)
    engine = engine_of(family, **config)
    answered, logits = listened(engine, requests)
    plain = engine_of(family, prefix_reuse=False, **config)
    expected, others = listened(plain, requests)
    assert plain.stats.reused_prompt_tokens == 0
    assert plain.stats.prompt_tokens == engine.stats.prompt_tokens + engine.stats.reused_prompt_tokens
    worst = max(float((logits[key] - others[key]).abs().max()) for key in logits)
    assert worst < 1e-3 * max(float(other.abs().max()) for other in others.values())
    return answered, expected, engine.stats.reused_prompt_tokens


# ---- the same answers ----

BUDGETS = (24, 70, 0.3)  # at 70, the shortest rows never evict, and the others in the chunk that follows what is shared


FORMATS = ("model", "fp8", "int8/int4", "int4")
EVICTING = [policy for policy in POLICIES if policy != "none"]
# Exact pairs with every budget that is a number; of the other formats and a share, each pair with some of the policies.
CASES = [
    *product(["none"], FORMATS, BUDGETS[:1]),
    *product(EVICTING, ["model"], BUDGETS[:2]),
    *((policy, FORMATS[1 + i % 3], BUDGETS[i // 3 % 3]) for i, policy in enumerate(EVICTING)),
    *product(["average-attention", "window", "keydiff", "expected-attention"], ["model"], BUDGETS[2:]),
]


def test_the_cases_hold_each_policy_and_each_pair_of_a_format_and_a_budget():
    assert {policy for policy, form, _ in CASES if form == "model"} == set(POLICIES)
    assert {policy for policy, form, _ in CASES if form != "model"} == set(POLICIES)
    assert {case[1:] for case in CASES if case[0] != "none"} == set(product(FORMATS, BUDGETS))


@pytest.mark.parametrize(("policy", "kv_format", "budget"), CASES)
def test_every_policy_format_and_budget_answers_as_without(policy, kv_format, budget):
    rows = [*QUESTIONS[:2], *SHORT[:3]]
    # In llama's first layer, keys of the same token have the same length but for rounding; in gpt2's, none have.
    family = "gpt2" if policy == "knorm" else "llama"
    answered, expected, reused = with_and_without(family, rows, kv_policy=policy, kv_format=kv_format, kv_budget=budget)
    assert answered == expected
    assert reused > 0 or budget == 0.3  # of a share, rows of other lengths keep other parts


@pytest.mark.parametrize(
    ("family", "policy", "kv_format"),
    [
        (family, policy, ("model", "int4")[(i + j) % 2])
        for (i, family), (j, policy) in product(
            enumerate(["mistral", "gemma3_text", "gpt_oss"]),
            enumerate(["none", "average-attention", "window", "streaming"]),
        )
    ],
)
def test_models_with_sliding_windows_answer_as_without(family, policy, kv_format):
    for budget in (24, 70) if kv_format == "model" and policy != "none" else (24,):
        answered, expected, reused = with_and_without(
            family, FEW_ROWS, kv_policy=policy, kv_format=kv_format, kv_budget=budget
        )
        assert answered == expected, budget
        assert reused > 0


@pytest.mark.parametrize("window", [60, 100])
def test_windows_between_slot_sizes_answer_as_without(window):
    """Whether a windowed layer keeps notes depends on the slot: copies go between such as do and such as do not."""
    for budget in (24, 70, 90, 250):
        model = tiny_model("mistral")
        model.config.sliding_window = window
        answered, expected, reused = with_and_without(model, FEW_ROWS, kv_budget=budget)
        assert answered == expected, budget
        assert reused > 0


@pytest.mark.parametrize(
    "config",
    [
        {"kv_layer_budgets": "pyramid"},
        {"kv_layer_budgets": "pyramid", "kv_probe": "w5 w6 w7"},
        {"kv_probe": "w5 w6 w7", "kv_policy": "h2o"},
        {"kv_probe": "w5 w6 w7", "kv_policy": "window", "kv_format": "int8"},
        {"kv_value_norm": True},
        {"kv_share_layers": "1:0"},
    ],
    ids=str,
)
def test_other_settings_of_the_cache_change_nothing(config):
    for budget in (24, 70, 110):
        answered, expected, reused = with_and_without(rows=FEW_ROWS, kv_budget=budget, **config)
        assert answered == expected, budget
        assert reused > 0


@pytest.mark.parametrize("chunk_size", [7, 33, 64, 300])
def test_chunks_of_any_size_change_nothing(chunk_size):
    for policy in ("none", "tova", "decay"):
        answered, expected, reused = with_and_without(
            rows=FEW_ROWS, kv_policy=policy, kv_budget=70, chunk_size=chunk_size
        )
        assert answered == expected
        assert reused > 0


@pytest.fixture(scope="module")
def each_row():
    """Answers without reuse."""
    return answers(engine_of(kv_budget=70, prefix_reuse=False), as_requests(ROWS, max_tokens=4))


@pytest.mark.parametrize(("seed", "slots"), [(0, 1), (1, 2), (2, 8), (0, 2), (1, 8)])
def test_the_order_of_rows_changes_nothing(seed, slots, each_row):
    requests = as_requests(ROWS, max_tokens=4)
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(seed)).tolist()
    engine = engine_of(kv_budget=70, max_num_seqs=slots)
    assert answers(engine, [requests[i] for i in order]) == each_row


@pytest.mark.parametrize(("rows", "reused"), [((0, 4), 0), ((4, 0), 64), ((0, 4, 1), 64), ((4, 0, 1), 128)])
def test_a_row_that_will_not_evict_is_no_source_for_one_that_will(rows, reused):
    """It adds up no attention; the first of these is read alone at first, and so computes what they share."""
    requests = as_requests([SHORT[i] for i in rows], max_tokens=3)
    engine = engine_of(kv_budget=70)
    answered, expected = {}, answers(engine_of(kv_budget=70, prefix_reuse=False), requests)
    source, paused = one_first(requests)
    for result in engine.run(source, engine.plan(engine.measure(requests)), paused=paused):
        answered[result.id] = result.token_ids
    assert answered == expected
    assert engine.stats.reused_prompt_tokens == reused


def test_protected_spans_and_templates_change_nothing():
    template = words(SYSTEM) + " {text}"
    prompt = PromptConfig(prompt_template=template)
    requests = [
        Request(id=str(i), prompt=words(row), params=SamplingParams(max_tokens=4)) for i, row in enumerate(SHORT)
    ]
    for budget in (80, 100):
        answered = {}
        for reuse in (True, False):
            engine = engine_of(kv_budget=budget, kv_protect="instructions", prefix_reuse=reuse)
            engine = Engine(engine.config, prompt, engine.tokenizer, engine.backend)
            answered[reuse] = answers(engine, requests)
        assert answered[True] == answered[False]


def test_the_same_prompt_several_times_is_read_once_but_for_its_end():
    rows = [DOCUMENT] * 4
    answered, expected, reused = with_and_without(rows=rows, kv_budget=24)
    assert answered == expected
    assert reused == 3 * 135  # the last chunk is read again: it gives the first token


# ---- it is worth it ----


@pytest.fixture
def steps():
    """(request, start, stop) of every chunk that an engine computes that ``seen_by`` has made."""
    return []


def seen_by(steps, engine):
    """The engine, whose chunks are noted."""

    def note(_, step):
        steps.extend((c.sequence.request.id, c.start, c.start + c.length) for c in step.chunks)

    return watched(engine, before=note)


def readers(steps, place):
    return [name for name, start, stop in steps if start <= place < stop]


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_what_is_shared_is_computed_once(steps, slots):
    engine = seen_by(steps, engine_of(kv_policy="none", max_num_seqs=slots))
    answers(engine, as_requests(QUESTIONS, max_tokens=3))
    common = len(DOCUMENT) // UNIT * UNIT
    assert [len(readers(steps, place)) for place in (0, common - 1, common)] == [1, 1, 4]
    assert engine.stats.reused_prompt_tokens == 3 * common
    total = sum(map(len, QUESTIONS))
    assert engine.stats.prompt_tokens == total - 3 * common
    assert (engine.stats.generated_tokens, engine.stats.ended_tokens) == (4 * 3, 4 * 3)


def test_of_a_document_beyond_the_budget_common_chunks_are_computed_once(steps):
    engine = seen_by(steps, engine_of(kv_budget=24))
    answers(engine, as_requests(QUESTIONS, max_tokens=3))
    ends = 120  # multiples of the chunk size until the last two chunks of the shortest
    assert len(readers(steps, ends - 1)) == 1
    assert engine.stats.reused_prompt_tokens >= 3 * ends


def test_one_prefix_may_go_on_in_another(steps):
    """A system prompt, then documents, then questions: each part once, since there is room for two."""
    rows = [SYSTEM + part for text in (OTHER[:70], DOCUMENT[:70]) for part in after(text, (8, 8, 8))]
    engine = seen_by(steps, engine_of(kv_policy="none", max_num_seqs=1))
    requests = as_requests(rows, max_tokens=2)
    answers(engine, requests)
    assert len(readers(steps, 100)) == 2  # documents
    assert len(readers(steps, 0)) == 1  # the system prompt


def test_rows_that_share_text_need_not_be_neighbours():
    texts = random_prompts((100,) * 4, seed=9)
    rows = [texts[i] + question for _ in range(3) for i in range(4) for question in random_prompts((6, 7))]
    engine = engine_of(kv_policy="none", max_num_seqs=2)
    answered = answers(engine, as_requests(rows, max_tokens=2))
    assert answered == answers(engine_of(kv_policy="none", prefix_reuse=False), as_requests(rows, max_tokens=2))
    assert engine.stats.reused_prompt_tokens == 20 * 96  # each text is computed once


def test_what_differs_is_not_shared():
    rows = random_prompts((100, 100, 100))
    rows.append([*rows[-1][: LEAST - 1], 1, 2, 3])
    engine = engine_of(kv_policy="none")
    answers(engine, as_requests(rows, max_tokens=2))
    assert engine.stats.reused_prompt_tokens == 0


def test_frequencies_that_depend_on_length_are_not_shared(monkeypatch):
    from families import FAMILIES

    config = FAMILIES["llama"]()
    config.update({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}})
    monkeypatch.setitem(FAMILIES, "llama", lambda: config)
    engine = engine_of(tiny_model("llama"), kv_policy="none")
    assert engine.plan(engine.measure(as_requests(QUESTIONS))).prefix_slots == ()


# ---- what goes wrong ----


def test_a_row_that_fails_spoils_no_other():
    poison = next(t for t in range(3, VOCAB) if t not in set().union(*QUESTIONS))
    rows = [[*DOCUMENT, poison, 5], *QUESTIONS]
    requests = as_requests(rows, max_tokens=1)
    answered = []
    for reuse in (True, False):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.embed_tokens.weight[poison] = float("nan")
        engine = engine_of(model, kv_policy="none", prefix_reuse=reuse)
        answered.append({r.id: (r.token_ids, r.error and r.error.code) for r in engine.stream(requests)})
    assert answered[0] == answered[1]
    assert answered[0]["0"][1] == "nan_logits"
    assert [error for _, error in answered[0].values()].count(None) == 4


@pytest.mark.parametrize("at", [1, 4, 7, 12, 20])
def test_rows_begin_again_when_memory_runs_out(at):
    requests = as_requests(ROWS, max_tokens=3)
    expected = answers(engine_of(kv_budget=24, prefix_reuse=False), requests)
    count = iter(range(10**6))

    def run_out(*_):
        if next(count) == at:
            raise MemoryError

    engine = watched(engine_of(kv_budget=24, max_num_seqs=4), before=run_out)
    assert answers(engine, requests) == expected
    assert len(engine.stats.shrunk_to) == 1


class Clock:
    """A clock that advances by these seconds, one number per step of an engine; the last number repeats."""

    def __init__(self):
        self.now, self.seconds = 0.0, [1.0]

    def tick(self, *_):
        self.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]

    def drives(self, engine, seconds):
        """The engine, whose steps take these seconds."""
        self.seconds = list(seconds)
        return watched(engine, before=self.tick)


@pytest.fixture
def clock(monkeypatch):
    from bmx.engine import run as module

    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


def test_when_a_row_takes_too_long_another_computes_what_those_wait_for_that_share_it(clock, steps):
    requests = as_requests(QUESTIONS, max_tokens=2)
    expected = answers(engine_of(kv_policy="none", prefix_reuse=False), requests)
    engine = seen_by(steps, engine_of(kv_policy="none", chunk_size=64, max_num_seqs=4))
    engine = clock.drives(engine, [50.0, 50.0, 1.0])
    plan_ = engine.plan(engine.measure(requests))
    source, paused = one_first(requests)
    answered = {r.id: r for r in engine.run(source, plan_, row_timeout=60.0, paused=paused)}
    assert answered["0"].error.code == "timeout"
    assert {name: answered[name].token_ids for name in "123"} == {name: expected[name] for name in "123"}
    assert readers(steps, 127) == ["1"]


def test_rows_are_answered_though_all_that_had_slots_took_too_long(clock):
    requests = as_requests(QUESTIONS, max_tokens=3)
    engine = clock.drives(engine_of(kv_budget=24, max_num_seqs=2), [100.0, 0.0])
    answered = {r.id: r.error for r in engine.run(requests, row_timeout=50.0)}
    assert sorted(answered) == ["0", "1", "2", "3"]
    assert [error and error.code for error in answered.values()] == ["timeout", "timeout", None, None]


def test_a_stop_finishes_those_that_wait_in_their_slots():
    stop, requests = Stop(1e9), as_requests(QUESTIONS, max_tokens=3)
    expected = answers(engine_of(kv_budget=24, prefix_reuse=False), requests)
    engine, answered = engine_of(kv_budget=24, max_num_seqs=3), {}
    plan_ = engine.plan(engine.measure(requests))

    def source():
        yield from requests
        with stop.graceful():
            stop.request(2)

    for result in engine.run(source(), plan_, stop=stop):
        answered[result.id] = result.token_ids
    assert answered == {name: expected[name] for name in answered}


# ---- what it costs ----


def test_the_plan_counts_the_spare_slots():
    for config in ({"kv_policy": "none"}, {"kv_budget": 24}, {"kv_budget": 24, "kv_format": "int8"}):
        engine = engine_of(**config)
        made = engine.plan(engine.measure(as_requests(ROWS, max_tokens=3)))
        with engine.backend.runner(made, engine.policy) as runner:
            assert runner.pool.nbytes == made.memory.pool
        [spare] = made.prefix_slots
        assert spare.slots == 2
        assert spare.capacity <= max(group.capacity for group in made.groups)


def test_nothing_is_paid_where_nothing_is_shared():
    requests = as_requests(random_prompts((100, 90, 80, 100)), max_tokens=3)
    on, off = engine_of(), engine_of(prefix_reuse=False)
    plans = [engine.plan(engine.measure(requests)) for engine in (on, off)]
    assert plans[0].memory.pool == plans[1].memory.pool
    assert plans[0].prefix_slots == ()


def test_one_text_takes_one_place_and_no_more_rows_than_it_has():
    engine = engine_of(kv_policy="none")
    lengths = engine.measure(as_requests(after(SYSTEM, (20, 90, 100)), max_tokens=3))
    assert [length.shared for length in lengths] == [0, 64, 64]
    assert engine.plan(lengths).prefix_slots == (SlotGroup(64, 1),)


LAYER = LayerSpec(query_heads=1, kv_heads=1, key_dim=8, value_dim=8, window=None, owner=0)
SPEC = ModelSpec(
    name="toy",
    layers=(LAYER,),
    costs=Costs(activation_bytes=1, traffic_bytes=1, flops=1, operators=1),
    vocab=32,
    max_length=1 << 20,
    weight_bytes=0,
    head_bytes=0,
    itemsize=2,
)
FULL = CompressionPolicy.from_config(EngineConfig(kv_policy="none"))


@pytest.mark.parametrize(("slots", "spare"), [(1, 0), (2, 0), (5, 0), (8, 2), (20, 2)])
def test_spare_slots_are_not_made_where_slots_are_few(slots, spare):
    lengths = [Length(1000, 10, 1010, 900), Length(1000, 10, 1010, 800)] * 50
    room = Limits(total=10**12, pool=slots * FULL.layout(SPEC, 1010).nbytes)
    step = StepSize(chunk_size=512, max_num_batched_tokens=512)
    made = plan(SPEC, lambda rows: FULL.layout(SPEC, rows), room, lengths, step, Device.of("cpu", SPEC, 0))
    assert sum(group.slots for group in made.prefix_slots) == spare
    assert made.memory.pool <= room.pool


def test_the_fake_engine_reuses_too():
    prompt = " ".join(f"w{i}" for i in range(200))
    requests = [Request(id=str(i), prompt=f"{prompt} q{i}", params=SamplingParams(max_tokens=5)) for i in range(9)]
    answered = []
    for reuse in (True, False):
        engine = Engine.open(EngineConfig(model="fake", kv_format="model", prefix_reuse=reuse))
        answered.append(answers(engine, requests))
        assert (engine.stats.reused_prompt_tokens > 0) is reuse
    assert answered[0] == answered[1]


# ---- any load, without a model ----


class Slots:
    """Slots that remember the tokens that were put into them."""

    def __init__(self):
        self.held = defaultdict(list)
        self.copies = 0

    def copy(self, source, target, tokens):
        assert len(self.held[source]) >= tokens
        self.held[target] = self.held[source][:tokens]
        self.copies += 1


@st.composite
def families(draw):
    """Prompts that begin with one of a few texts, each a part of a longer one or not."""
    roots = [[root] * draw(st.integers(0, 90)) for root in (1, 2)]
    roots += [roots[0] + [3] * draw(st.integers(0, 90)), roots[0] + [4] * draw(st.integers(0, 90))]
    prompts = []
    for i in range(draw(st.integers(2, 14))):
        text = roots[draw(st.integers(0, 3))]
        prompts.append([*text, *range(10 + 100 * i, 10 + 100 * i + draw(st.integers(1, 60)))])
    return prompts


def sequence_of(name, prompt, answer, policy):
    return Sequence(
        request=Request(id=str(name), prompt="", params=SamplingParams(max_tokens=answer)),
        prompt=prompt,
        max_tokens=answer,
        rows_needed=policy.rows_needed(len(prompt), answer),
        end_token_ids=frozenset(),
        tokenizer=None,
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    prompts=families(),
    answer=st.integers(1, 4),
    slots=st.integers(1, 5),
    spare=st.integers(0, 3),
    chunk_size=st.integers(1, 70),
    policy=st.sampled_from(["none", "far-attention", "window", "expected-attention"]),
    budget=st.sampled_from([40, 80, 120]),
    drops=st.sets(st.integers(0, 60)),
)
def test_every_token_is_computed_or_copied_and_someone_always_goes_on(
    prompts, answer, slots, spare, chunk_size, policy, budget, drops
):
    """Rows that are dropped at any moment, too, leave nobody waiting."""
    policy = CompressionPolicy.from_config(EngineConfig(kv_policy=policy, kv_budget=budget))
    rows = [sequence_of(i, prompt, answer, policy) for i, prompt in enumerate(prompts)]
    largest = max(row.rows_needed for row in rows)
    scheduler = Scheduler([SlotGroup(largest, slots)], StepSize(chunk_size=chunk_size, max_num_batched_tokens=80))
    places = Slots()
    reuse = Reuse(spec=SPEC, policy=policy, chunk_size=chunk_size, rows=10**6)
    prefixes = PrefixCache(reuse, [SlotGroup(10**6, spare)] if spare else [], 1, places.copy)
    copied = computed = finished = 0
    dropped = []
    unread = list(rows)
    for moment in range(10**5):
        while unread and len(scheduler.waiting) < 4:
            scheduler.enqueue(unread.pop(0))
            prefixes.join(scheduler.waiting[-1])
        scheduler.admit_waiting()
        if moment in drops and scheduler.in_slots:
            dropped.append(scheduler.in_slots[0])
            scheduler.drop(dropped[-1:])
        copied += prefixes.arrange(scheduler.in_slots)
        step = scheduler.schedule()
        if step is None:
            if not scheduler.running and not scheduler.waiting and not unread:
                break
            assert not scheduler.running, "those that have slots wait for nobody"
            continue
        for chunk in step.chunks:
            held = places.held[chunk.sequence.slot_index]
            if not chunk.start:
                held.clear()
            if chunk.start < len(chunk.sequence.prompt):
                assert held == chunk.sequence.prompt[: chunk.start]
                computed += chunk.length
            held.extend(known(chunk.sequence)[chunk.start : chunk.start + chunk.length])
        scheduler.launched(step)
        finished += len(scheduler.update(step, [0] * sum(chunk.samples for chunk in step.chunks)))
        prefixes.keep(step, scheduler.unfinished)
    assert finished + len(dropped) == len(rows)
    if not dropped:
        assert computed + copied == sum(map(len, prompts))
    if not spare:
        assert places.copies == copied == 0


def known(sequence):
    return [*sequence.prompt, *sequence.answer]


def test_spans_matter_once_something_is_evicted():
    policy = CompressionPolicy.from_config(EngineConfig(kv_budget=80, kv_format="model"))
    for spans, shared in (([(0, 30)] * 2, 200), ([(0, 30), (0, 40)], 64), ([(0, 300), (0, 400)], 200)):
        one, other = (sequence_of(i, [1] * 250 + [2 + i] * 100, 3, policy) for i in range(2))
        one.spans, other.spans = [(span,) for span in spans]
        assert Reuse(spec=SPEC, policy=policy, chunk_size=100).shared(one, other) == shared


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    common=st.integers(0, 200),
    tails=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    chunk_size=st.integers(1, 90),
    policy=st.sampled_from(["none", "far-attention", "window", "expected-attention"]),
    kv_format=st.sampled_from(["model", "int8"]),
    budget=st.sampled_from([40, 100, 0.5]),
)
def test_what_two_prompts_share_is_the_same_either_way(common, tails, chunk_size, policy, kv_format, budget):
    policy = CompressionPolicy.from_config(EngineConfig(kv_policy=policy, kv_format=kv_format, kv_budget=budget))
    reuse = Reuse(spec=SPEC, policy=policy, chunk_size=chunk_size)
    one, other = (sequence_of(i, [1] * common + [2 + i] * tail, 3, policy) for i, tail in enumerate(tails))
    shared = reuse.shared(one, other)
    assert common_tokens(one.prompt, other.prompt) == common
    assert shared in {0, reuse.shared(other, one)}
    assert shared == 0 or LEAST <= shared <= common


# ---- as much as can be shared is shared ----


@st.composite
def trees(draw):
    """Prompts in any order: a system prompt or two, documents behind them, questions behind these, and some alone."""
    fresh = iter(range(10, 10**6))

    def text(least, most):
        return [next(fresh)] * draw(st.integers(least, most))

    prompts = [text(1, 200) for _ in range(draw(st.integers(0, 3)))]
    for _ in range(draw(st.integers(1, 2))):
        system = text(0, 150)
        for _ in range(draw(st.integers(1, 3))):
            document = [*system, *text(0, 200)]
            prompts += [[*document, *text(20, 60)] for _ in range(draw(st.integers(1, 4)))]
    return draw(st.permutations(prompts))


def cuts(reuse, row):
    """The states of a row that another one may have too: leading tokens, and what ``Reuse`` says of them."""
    keys = {n: reuse.reuse_key(row, n) for n in range(LEAST, len(row.prompt))}
    return {(tuple(row.prompt[:n]), k) for n, k in keys.items() if k is not None and (k != () or n % UNIT == 0)}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(prompts=trees(), slots=st.integers(1, 4), policy=st.sampled_from(["none", "far-attention"]))
def test_what_is_computed_is_what_a_tree_of_all_prompts_has(prompts, slots, policy):
    """By brute force: of each row, all but the longest state that any other row before it has."""
    policy = CompressionPolicy.from_config(EngineConfig(kv_policy=policy, kv_budget=16, kv_sink=2, kv_recent=4))
    rows = [sequence_of(i, prompt, 2, policy) for i, prompt in enumerate(prompts)]
    reuse = Reuse(spec=SPEC, policy=policy, chunk_size=32)
    known, least, longest = set(), 0, defaultdict(set)
    for row in rows:
        mine = cuts(reuse, row)
        for other in rows:
            common = mine & cuts(reuse, other) if other is not row else ()
            longest[row] |= {max(len(tokens) for tokens, _ in common)} if common else set()
        least += len(row.prompt) - max((len(tokens) for tokens, _ in mine & known), default=0)
        known |= mine
    depth = max(map(len, longest.values()))
    assert computed_tokens(rows, reuse, slots, spare=depth) == least


def computed_tokens(rows, reuse, slots, spare):
    """Prompt tokens that are computed when rows go through a window."""
    size = StepSize(chunk_size=reuse.chunk_size, max_num_batched_tokens=100)
    scheduler = Scheduler([SlotGroup(max(row.rows_needed for row in rows), slots)], size)
    prefixes = PrefixCache(reuse, [SlotGroup(10**6, spare)] if spare else [], 1, lambda *_: None)
    window, computed = Window(100, 10**6), 0
    for row in rows:
        window.add(row, prefixes.keys(row), 1)
    while window:
        scheduler.enqueue(window.pop())
        prefixes.join(scheduler.waiting[-1])
    while scheduler.unfinished:
        scheduler.admit_waiting()
        prefixes.arrange(scheduler.in_slots)
        step = scheduler.schedule()
        computed += sum(chunk.length for chunk in step.chunks if not chunk.decodes)
        scheduler.launched(step)
        scheduler.update(step, [0] * sum(chunk.samples for chunk in step.chunks))
        prefixes.keep(step, scheduler.unfinished)
    return computed
