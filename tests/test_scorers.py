"""Every way to rank, against its definition written out slowly: float64, plain loops, one sequence, sets of positions.

Those that look at attention are judged in whole models: what stays in each layer and head, what it has received, and
the greedy answer. Those that look at keys and values are judged on random vectors as well.
"""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from conftest import as_requests, random_prompts, tiny_engine, tiny_loaded, word_tokenizer, words
from families import tiny_model
from test_compression import Spy, chunk_ends

from bmx import Engine, EngineConfig, PromptConfig
from bmx.compress.attention_scorers import RKV, Random, RoCo, Window
from bmx.compress.key_scorers import ExpectedAttention, KeyDiff, KeyNorm, LagKV
from bmx.compress.scorer_api import RANK_EVERY, QueryWeights, Seen
from bmx.compress.scorers import scorer_named
from bmx.engine.backend import ModelBackend
from bmx.model.loader import prepare
from bmx.model.spec import use_attention
from bmx.policies import POLICIES, SCORERS

SINK, RECENT, BUDGET, CHUNK, NEW = 3, 5, 20, 12, 20  # an answer in which pairs are ranked more than once
PROMPT = 50
SETTINGS = {"kv_sink": SINK, "kv_recent": RECENT, "kv_budget": BUDGET, "chunk_size": CHUNK}
WINDOWS = {"window": 32, "tova": 1, "r-kv": 8}  # newest queries that vote
SELDOM = {"window", "r-kv", "keydiff", "knorm", "lagkv"}  # ranked anew each so many decoding tokens
ATTENTIVE = ("average-attention", "h2o", "decay", "roco", "window", "tova", "r-kv")


# ---- the definitions ----


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def length(vector):
    return math.sqrt(dot(vector, vector))


def cosine(a, b):
    return dot(a, b) / (length(a) * length(b))


def mean_of(vectors):
    return [sum(channel) / len(vectors) for channel in zip(*vectors, strict=True)]


def unit(vector):
    return [x / length(vector) for x in vector]


def softmax(numbers):
    weights = [math.exp(x - max(numbers)) for x in numbers]
    return [weight / sum(weights) for weight in weights]


def spread(vector):
    """Standard deviation of a sample."""
    mean = sum(vector) / len(vector)
    return math.sqrt(sum((x - mean) ** 2 for x in vector) / (len(vector) - 1))


def keydiff(keys):
    """Minus the cosine with the mean of the unit keys."""
    anchor = mean_of([unit(key) for key in keys])
    return [-cosine(key, anchor) for key in keys]


def knorm(keys):
    """Minus the length."""
    return [-length(key) for key in keys]


def lagkv(keys, values, most=128):
    """Of vectors in the order of tokens: each partition scaled by the channels' range in the next one."""
    lag = min(most, max(1, len(keys) // 4))
    bounds = list(range(len(keys), -1, -lag))[::-1]  # counted from the newest
    bounds = ([0] if bounds[0] else []) + bounds
    scores = []
    for (start, stop), (_, end) in pairwise(pairwise(bounds)):
        total = [0.0] * (stop - start)
        for vectors in (keys, values):
            after = list(zip(*vectors[stop:end], strict=True))
            scaled = [
                [
                    (x - min(channel)) / (max(channel) - min(channel) or 1e-6)
                    for x, channel in zip(v, after, strict=True)
                ]
                for v in vectors[start:stop]
            ]
            shares = softmax([spread(vector) for vector in scaled])
            total = [old + share / 2 for old, share in zip(total, shares, strict=True)]
        scores += total
    return scores + [math.inf] * lag


def expected_attention(queries, keys, values, scale, epsilon=0.02):
    """queries [G][T]: softmax of what normally distributed queries' exponents would be, averaged over the group."""
    expected = [0.0] * len(keys)
    for of_head in queries:
        mean = mean_of(of_head)
        around = [[x - m for x, m in zip(query, mean, strict=True)] for query in of_head]
        logits = []
        for key in keys:
            variance = sum(dot(query, key) ** 2 for query in around) / len(around)  # k' Sigma k
            logits.append(scale * dot(mean, key) + scale**2 * variance / 2)
        expected = [old + new / len(queries) for old, new in zip(expected, softmax(logits), strict=True)]
    return [(weight + epsilon) * length(value) for weight, value in zip(expected, values, strict=True)]


def redundancy(keys):
    """Softmax of each key's mean cosine with all keys of its head."""
    return softmax([sum(cosine(key, other) for other in keys) / len(keys) for key in keys])


def r_kv(mass, keys, importance=0.1):
    """Weighted attention less weighted redundancy, each of a sum of one."""
    alike = redundancy(keys)
    total = sum(mass)
    return [importance * m / total - (1 - importance) * r for m, r in zip(mass, alike, strict=True)]


def pooled(mass, width=5):
    """The mean over neighbours, those beyond the ends counted as none."""
    reach = width // 2
    return [
        sum(mass[j] for j in range(i - reach, i + reach + 1) if 0 <= j < len(mass)) / width for i in range(len(mass))
    ]


def peaks(mass, width):
    """The greatest among neighbours."""
    reach = width // 2
    return [max(mass[max(0, i - reach) : i + reach + 1]) for i in range(len(mass))]


def roco(mass, squares, lifetimes, surplus):
    """The average; on top of it the greatest one for the so many that vary most."""
    means = [m / n for m, n in zip(mass, lifetimes, strict=True)]
    variances = [s / n - mean**2 for s, n, mean in zip(squares, lifetimes, means, strict=True)]
    safe = sorted(range(len(mass)), key=lambda i: variances[i], reverse=True)[:surplus]
    return [mean + (max(means) if i in safe else 0.0) for i, mean in enumerate(means)]


class Reference:
    """One sequence by the definitions: an attention function that remembers every key, and the positions that are kept.

    Args:
        policy: a scorer's name.
        capacities: pairs of each layer, or of each of its kv heads.
        owners: the layer whose keys each reads.
        windows: of each layer.
        value_norm: as in the settings.
        weight: of the probe, as in the settings; 0 for no probe.
        spoken: positions of the job's own words, which are kept even where a window hides them.
    """

    def __init__(self, policy, capacities, owners, windows, value_norm=False, weight=0.0, spoken=()):
        self.policy, self.value_norm, self.weight, self.spoken = policy, value_norm, weight, set(spoken)
        self.capacities, self.owners, self.windows = capacities, owners, windows
        self.seldom = policy in SELDOM or value_norm
        self.far = policy == "far-attention"
        self.keys, self.values, self.kept, self.ranks = {}, {}, {}, {}
        self.mass, self.squares, self.probed, self.log = {}, {}, {}, {}
        self.layer = self.seen = self.probes = 0
        self.received = {}

    def begin(self, seen, probes):
        """A forward of tokens behind ``seen`` others, the last ``probes`` of which leave nothing."""
        self.layer, self.seen, self.probes, self.received = 0, seen, probes, {}

    def by_age(self, owner):
        return self.windows[owner] is not None and self.windows[owner] <= self.capacities[owner]

    def __call__(self, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        layer, count = self.layer, query.shape[2]
        self.layer += 1
        owner, new = self.owners[layer], range(self.seen, self.seen + count - self.probes)
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        window = self.windows[layer]
        if owner == layer:
            for store, tensor in ((self.keys, key), (self.values, value)):
                vectors = store.setdefault(layer, {})
                vectors.update({self.seen + i: tensor[0, :, i] for i in range(count)})
            for statistics in (self.mass, self.squares, self.probed, self.log, self.ranks):
                statistics.setdefault(layer, [{} for _ in range(heads)])
            self.kept.setdefault(layer, [set() for _ in range(heads)])
            if count == 1:
                self.evict(layer, new.start, room_for=1)
        output = torch.zeros(1, count, query.shape[1], value.shape[-1], dtype=torch.float64)
        received = self.received.setdefault(owner, [{} for _ in range(heads)])
        for head in range(heads):
            for i in range(count):
                position = self.seen + i
                candidates = [*self.kept[owner][head], *range(self.seen, position + 1)]
                visible = sorted(p for p in candidates if window is None or p > position - window)
                keys, values = (torch.stack([kv[owner][p][head] for p in visible]) for kv in (self.keys, self.values))
                for g in range(group):
                    q = query[0, head * group + g, i]
                    scores = keys @ q * scaling
                    if softcap:
                        scores = torch.tanh(scores / softcap) * softcap
                    if s_aux is not None:
                        scores = torch.cat([scores, s_aux[head * group + g : head * group + g + 1].double()])
                    weights = torch.softmax(scores, 0)[: len(visible)]
                    output[0, i, head * group + g] = weights @ values
                    for p, weight in zip(visible, weights.tolist(), strict=True):
                        far = count == 1 or position - p >= RECENT  # all queries count in decoding
                        counted = weight**2 * far if self.far else weight
                        received[head].setdefault(position, []).append((p, counted / group, weight**2 / group))
        if layer == max(i for i, other in enumerate(self.owners) if other == owner):
            self.settle(owner, new, query, scaling)
        return output, None

    def settle(self, owner, new, query, scaling):
        """All layers that read these keys have attended: sum the attention, then evict what exceeds the capacity."""
        weighed = WINDOWS.get(self.policy, math.inf)  # newest queries whose attention counts
        for head, received in enumerate(self.received[owner]):
            kept = self.kept[owner][head]
            mass, squares, log = self.mass[owner][head], self.squares[owner][head], self.log[owner][head]
            for p in [*kept, *new]:
                for sums in (mass, squares):
                    sums[p] = sums.get(p, 0.0) * max(0.0, 1 - len(new) / weighed)
            for position in new:
                for p, weight, square in received[position]:
                    log.setdefault(p, []).append((position, weight))
                    if position >= new.stop - weighed:
                        mass[p] += weight
                        squares[p] += square
            if self.policy == "decay":
                for p in [*kept, *new]:
                    mass[p] = sum(weight * 0.98 ** (new.stop - 1 - position) for position, weight in log.get(p, ()))
            if self.probes:
                probed = self.probed[owner][head] = dict.fromkeys([*kept, *new], 0.0)
                for position in range(new.stop, new.stop + self.probes):
                    for p, weight, _ in received[position]:
                        if p < new.stop:
                            probed[p] += weight
            kept.update(new)
        if len(new) > 1:
            queries = query[0].unflatten(0, (len(self.kept[owner]), -1))[:, :, : len(new)]
            self.evict(owner, new.stop, room_for=0, queries=queries, scale=scaling)
        for position in range(new.stop, new.stop + self.probes):
            del self.keys[owner][position], self.values[owner][position]

    def evict(self, owner, now, room_for, queries=None, scale=None):
        """Keep the best: sinks and newest first, then by rank, with unranked pairs above all ranked ones."""
        for head, kept in enumerate(self.kept[owner]):
            capacity = self.windows[owner] if self.by_age(owner) else self.capacities[owner]
            capacity = capacity[head] if isinstance(capacity, tuple) else capacity
            surplus = len(kept) + room_for - capacity
            if surplus <= 0:
                continue
            ranks = self.ranks[owner][head]
            every_so_often = self.seldom and (now - capacity) % RANK_EVERY == 0
            always = not self.seldom and self.policy != "expected-attention"
            if not self.by_age(owner) and (queries is not None or always or every_so_often):
                ranks.clear()
                ranks.update(self.rank(owner, head, now, surplus, queries, scale))
            window = self.windows[owner]

            def order(p, ranks=ranks, window=window):
                if self.by_age(owner):
                    return (True, False, False, p)
                protected = p < SINK or p >= now - RECENT
                unranked = ranks.get(p, math.inf) == math.inf
                if p in self.spoken:
                    return (True, True, True, p)
                return (window is None or p > now - window, protected, unranked, p if unranked else ranks[p])

            kept.intersection_update(sorted(kept, key=order, reverse=True)[: len(kept) - surplus])

    def rank(self, owner, head, now, surplus, queries, scale):
        """Scores of the kept pairs, by position."""
        places = sorted(self.kept[owner][head])
        window = self.windows[owner] or math.inf
        near = RECENT if self.far else 0
        lifetimes = [max(1, min(now - p, window) - near) for p in places]
        mass = [self.mass[owner][head][p] for p in places]
        squares = [self.squares[owner][head][p] for p in places]
        keys = [self.keys[owner][p][head].tolist() for p in places]
        values = [self.values[owner][p][head].tolist() for p in places]
        vectors = None if queries is None else queries[head].tolist()
        scores = {
            "average-attention": lambda: [m / n for m, n in zip(mass, lifetimes, strict=True)],
            "far-attention": lambda: [math.sqrt(m / n) for m, n in zip(mass, lifetimes, strict=True)],
            "h2o": lambda: mass,
            "decay": lambda: mass,
            "tova": lambda: mass,
            "roco": lambda: roco(mass, squares, lifetimes, surplus),
            "window": lambda: pooled(mass),
            "r-kv": lambda: r_kv(mass, keys),
            "keydiff": lambda: keydiff(keys),
            "knorm": lambda: knorm(keys),
            "lagkv": lambda: lagkv(keys, values),
            "expected-attention": lambda: expected_attention(vectors, keys, values, scale),
            "streaming": lambda: places,
        }[self.policy]()
        if self.value_norm:
            scores = [s * sum(map(abs, v)) for s, v in zip(scores, values, strict=True)]
        if self.weight:
            probed = {p: math.sqrt(sum_) if self.far else sum_ for p, sum_ in self.probed[owner][head].items()}
            received = [probed[p] for p in places if p in probed]
            mean, of_probe = sum(scores) / len(scores), sum(received) / len(received)
            scores = [
                (1 - self.weight) * s / mean + self.weight * probed[p] / of_probe if p in probed else s / mean
                for p, s in zip(places, scores, strict=True)
            ]
        return dict(zip(places, scores, strict=True))


def read(model, reference, prompt, ends, answer, probe=()):
    """Feed the prompt in chunks, each with the probe behind it, then the answer token by token; the greedy answer."""
    model = model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped one knows no float64
    tokens, greedy = [*prompt, *answer], []
    ends = [*ends, *range(len(prompt) + 1, len(tokens) + 1)]
    for start, stop in pairwise([0, *ends]):
        behind = list(probe) if stop <= len(prompt) else []
        reference.begin(start, len(behind))
        ids = [*tokens[start:stop], *behind]
        with torch.inference_mode(), use_attention(model, reference):
            logits = model(
                input_ids=torch.tensor([ids]),
                position_ids=torch.arange(start, start + len(ids)).unsqueeze(0),
                use_cache=False,
            ).logits
        if stop >= len(prompt):
            greedy.append(int(logits[0, stop - start - 1].argmax()))
    return greedy


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


def check(spy, family, policy, capacities=BUDGET, seed=3, window=None, prompt_tokens=PROMPT, spoken=(), **config):
    """An engine's kept sets, notes and answer against the reference; returns the reference."""

    def model():
        made = tiny_model(family)
        if window:
            made.config.sliding_window = window
        return made

    prompt = random_prompts((prompt_tokens,), seed=seed)[0]
    new_tokens = NEW
    if policy == "knorm":  # the length of a first layer's key depends on nothing but the token: no token twice
        prompt, new_tokens = random_prompts((400,), seed=seed)[0], RECENT
        prompt = list(dict.fromkeys(prompt))[:prompt_tokens]
    settings = EngineConfig(**SETTINGS | {"kv_policy": policy, "kv_format": "model"} | config)
    around = f"{words(prompt[:3])} {{document}} {words(prompt[-4:])}" if spoken else None
    loaded = prepare(model()) if window else tiny_loaded(family)
    engine = Engine(settings, PromptConfig(prompt_template=around), word_tokenizer(), ModelBackend(loaded))
    (result,) = engine.stream(as_requests([prompt], max_tokens=new_tokens))
    assert result.error is None
    spec = engine.spec
    reference = Reference(
        policy,
        capacities if isinstance(capacities, list) else [capacities] * len(spec.layers),
        [layer.owner for layer in spec.layers],
        [layer.window for layer in spec.layers],
        settings.kv_value_norm,
        settings.kv_probe_weight if settings.kv_probe else 0.0,
        spoken,
    )
    probe = engine.probe
    greedy = read(model(), reference, prompt, chunk_ends(len(prompt), CHUNK), result.token_ids[:-1], probe)
    for owner, kept in reference.kept.items():
        rows = spy.rows(owner)
        assert [set(row) for row in rows] == kept
        parts = [(part, row) for part in spy.pool.layer(0, owner) for row in range(part.layout.kv_heads)]
        for name, statistic in (("mass", reference.mass), ("squares", reference.squares), ("probe", reference.probed)):
            if name not in parts[0][0].row_stats:
                continue
            for head, expected in enumerate(statistic[owner]):
                part, row = parts[head]
                held = dict(zip(part.positions[0, row].tolist(), part.row_stats[name][0, row].tolist(), strict=True))
                wanted = {p: expected.get(p, -1.0 if name == "probe" else 0.0) for p in kept[head]}
                assert {p: held[p] for p in kept[head]} == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert list(result.token_ids) == greedy
    return reference


# ---- whole models ----


DETERMINED = [name for name in POLICIES if name not in ("none", "random", "rocketkv")]  # its 63 neighbours are all here


@pytest.mark.parametrize("policy", DETERMINED)
def test_what_stays_and_what_is_answered_is_what_the_definition_says(policy, spy):
    reference = check(spy, "llama", policy)
    sets = [frozenset(kept) for layer in reference.kept.values() for kept in layer]
    blind = {"streaming", "expected-attention"}  # the latter has dropped all that it ranked, after so long an answer
    assert (len(set(sets)) > 1) is (policy not in blind)  # what looks at something tells heads apart


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *[(family, policy) for policy in ("tova", "roco", "keydiff") for family in ("gemma2", "gpt_oss")],
        *[("gpt2", policy) for policy in ("decay", "window", "lagkv")],
        *[("deepseek_v3", policy) for policy in ("h2o", "knorm", "expected-attention")],
    ],
)
def test_sliding_windows_caps_sinks_and_narrow_values_change_no_definition(family, policy, spy):
    check(spy, family, policy)


@pytest.mark.parametrize("policy", ["average-attention", "roco", "tova", "window", "keydiff", "lagkv"])
def test_a_window_that_is_larger_than_the_budget_is_ranked_too(policy, spy):
    check(spy, "mistral", policy, window=30)


@pytest.mark.parametrize("policy", ["average-attention", "window", "keydiff"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_words_of_the_job_that_stay_are_not_seen_beyond_a_window(family, policy, spy):
    spoken = (*range(3), *range(PROMPT - 4, PROMPT))  # the last ones leave the window while it decodes
    window = 24 if family == "mistral" else None
    check(spy, family, policy, window=window, spoken=spoken, kv_protect="instructions")


@pytest.mark.parametrize("policy", ["average-attention", "keydiff"])
def test_layers_that_share_keys_rank_them_together(policy, spy):
    check(spy, "gemma3n_text", policy)


@pytest.mark.parametrize("policy", ["decay", "tova", "window"])
def test_votes_that_fade_count_once_per_token_where_layers_share_keys(policy, spy):
    """All layers that read a key vote on it: with each token the old votes fade once, not once per layer."""
    check(spy, "llama", policy, kv_share_layers="1:0")


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *(("llama", policy) for policy in ("average-attention", "h2o", "roco", "tova", "window")),
        *(("gemma2", policy) for policy in ("average-attention", "window")),
    ],
)
def test_the_value_norm_is_a_factor_of_the_score(family, policy, spy):
    check(spy, family, policy, kv_value_norm=True)


@pytest.mark.parametrize("policy", ["average-attention", "h2o", "decay", "roco", "window", "tova"])
def test_a_probe_is_mixed_into_the_score_of_the_prompts_tokens(policy, spy):
    reference = check(spy, "llama", policy, kv_probe=words((9, 17, 5)))
    assert all(len(probed) < len(summed) for probed, summed in zip(reference.probed[0], reference.mass[0], strict=True))


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_the_probes_weight_is_its_share(weight, spy):
    check(spy, "gemma2", "h2o", kv_probe=words((9, 17, 5, 6)), kv_probe_weight=weight, kv_value_norm=True)


@pytest.mark.parametrize("policy", ["average-attention", "roco", "window", "r-kv", "keydiff", "expected-attention"])
def test_a_share_of_the_prompt_is_a_budget_like_any_other(policy, spy):
    check(spy, "llama", policy, capacities=math.ceil(0.47 * PROMPT), kv_budget=0.47)


@pytest.mark.parametrize("policy", ["h2o", "tova", "lagkv"])
def test_each_layer_ranks_for_a_budget_of_its_own(policy, spy):
    fixed, rest = SINK + RECENT, BUDGET - SINK - RECENT
    capacities = [fixed + round(rest * 1.5), fixed + round(rest * 0.5)]
    check(spy, "llama", policy, capacities=capacities, kv_layer_budgets=(1.5, 0.5))


@pytest.mark.parametrize("policy", DETERMINED)
def test_each_head_ranks_for_a_budget_of_its_own(policy, spy):
    fixed, rest = SINK + RECENT, BUDGET - SINK - RECENT
    factors = ((1.5, 0.6), (0.4, 1.5))
    capacities = [tuple(fixed + max(1, round(rest * factor)) for factor in heads) for heads in factors]
    check(spy, "llama", policy, capacities=capacities, kv_layer_budgets=factors)


@pytest.mark.parametrize(
    ("policy", "prompt_tokens"),
    [
        *product(("h2o", "keydiff"), (10, BUDGET)),
        *product(("window", "expected-attention"), (BUDGET - 1, BUDGET + 1)),
        ("h2o", BUDGET - 1),
        ("window", BUDGET),
    ],
)
def test_a_slot_that_becomes_full_while_it_decodes_is_ranked_then(policy, prompt_tokens, spy):
    check(spy, "llama", policy, prompt_tokens=prompt_tokens)


# ---- random vectors ----


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shuffled(heads, rows, seed=0):
    """[K, R] positions, in another order and with other gaps for each head."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(2 * rows, generator=generator)[:rows] for _ in range(heads)])


def in_order(scores, positions):
    """Scores [K, R] as lists in the order of the tokens."""
    return scores.gather(-1, positions.argsort(-1)).double().tolist()


def sorted_vectors(vectors, positions):
    """[K, R, D] as lists in the order of the tokens."""
    order = positions.argsort(-1).unsqueeze(-1).expand(vectors.shape)
    return vectors.gather(-2, order).double().tolist()


def seen_of(rows, *, now=None, **shown):
    positions = shuffled(2, rows)
    return Seen(positions=positions, now=now or 2 * rows, inputs=shown, scale=0.3)


def assert_near(actual, expected):
    for row, expected_row in zip(actual, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-6)


def test_keydiff_and_knorm_are_their_definitions():
    keys = drawn(2, 30, 6) + 0.3
    seen = seen_of(30, keys=keys)
    assert_near(KeyDiff()(seen).tolist(), [keydiff(head) for head in keys.double().tolist()])
    assert_near(KeyNorm()(seen).tolist(), [knorm(head) for head in keys.double().tolist()])


def test_keydiffs_average_leaves_empty_rows_out():
    keys = drawn(2, 30, 6) + 0.3
    seen = seen_of(30, keys=keys)
    empty = Seen(positions=seen.positions.clone(), now=seen.now, inputs={"keys": keys.clone()})
    empty.positions[:, 20:] = -1
    part = Seen(positions=seen.positions[:, :20], now=seen.now, inputs={"keys": keys[:, :20]})
    torch.testing.assert_close(KeyDiff()(empty)[:, :20], KeyDiff()(part))


@pytest.mark.parametrize("rows", [4, 7, 16, 30, 33, 530])
def test_lagkv_is_its_definition(rows):
    keys, values = drawn(2, rows, 6), drawn(2, rows, 4, seed=1)
    seen = seen_of(rows, keys=keys, values=values)
    vectors = (sorted_vectors(keys, seen.positions), sorted_vectors(values, seen.positions))
    expected = [lagkv(*pair) for pair in zip(*vectors, strict=True)]
    assert_near(in_order(LagKV()(seen), seen.positions), expected)
    assert sum(math.isinf(score) for score in expected[0]) == min(128, rows // 4)


@pytest.mark.parametrize("tokens", [1, 9])
def test_expected_attention_is_its_definition(tokens):
    keys, values, queries = drawn(2, 20, 6), drawn(2, 20, 4, seed=1), drawn(tokens, 2, 3, 6, seed=2) + 0.2
    seen = seen_of(20, keys=keys, values=values, queries=queries)
    lists = (queries.permute(1, 2, 0, 3), keys, values)
    expected = [expected_attention(*head, 0.3) for head in zip(*(t.double().tolist() for t in lists), strict=True)]
    assert_near(ExpectedAttention()(seen).tolist(), expected)


def test_expected_attention_is_the_mean_attention_of_queries_that_do_not_vary():
    """Then nothing is expected: it is what they pay."""
    keys, values, query = drawn(2, 20, 6), drawn(2, 20, 4, seed=1), drawn(1, 2, 3, 6, seed=2)
    seen = seen_of(20, keys=keys, values=values, queries=query.expand(7, -1, -1, -1))
    weights = torch.softmax(torch.einsum("kgd,krd->kgr", query[0], keys) * 0.3, -1).mean(1)
    torch.testing.assert_close(ExpectedAttention(epsilon=0.0)(seen), weights * values.norm(dim=-1))


@pytest.mark.parametrize("importance", [0.1, 0.9])
def test_r_kv_is_its_definition(importance):
    keys, mass = drawn(2, 30, 6) + 0.3, drawn(2, 30, seed=1).abs()
    seen = seen_of(30, keys=keys, mass=mass)
    lists = zip(mass.double().tolist(), keys.double().tolist(), strict=True)
    for scores, expected in zip(
        RKV(importance=importance)(seen).tolist(), (r_kv(*h, importance) for h in lists), strict=True
    ):
        shift = scores[0] - expected[0]  # a number for each head, so that no score is negative
        assert scores == pytest.approx([score + shift for score in expected], rel=1e-4, abs=1e-6)
        assert min(scores) >= 0


def test_of_two_that_are_attended_alike_r_kv_keeps_the_one_unlike_the_others():
    keys = torch.ones(1, 10, 4)
    keys[0, 3] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    scores = RKV()(
        Seen(positions=torch.arange(10).view(1, 10), now=10, inputs={"keys": keys, "mass": torch.ones(1, 10)})
    )
    assert scores[0].argmax() == 3


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("pool", [1, 3, 5, 7])
def test_votes_are_smoothed_over_neighbours_in_the_order_of_tokens_and_fade_at_the_ends(rows, pool):
    mass = drawn(2, rows).abs()
    seen = seen_of(rows, mass=mass)
    expected = [pooled(head, pool) for head in in_order(mass, seen.positions)]
    assert_near(in_order(Window(pool=pool)(seen), seen.positions), expected)


@pytest.mark.parametrize("rows", [1, 31, 32, 200])
def test_rocketkv_counts_the_greatest_of_63_neighbours(rows):
    mass = drawn(2, rows).abs()
    seen = seen_of(rows, mass=mass)
    expected = [peaks(head, 63) for head in in_order(mass, seen.positions)]
    assert_near(in_order(scorer_named("rocketkv")(seen), seen.positions), expected)
    assert scorer_named("rocketkv").query_weights == QueryWeights(window=32)


@pytest.mark.parametrize("surplus", [1, 4, 16, 29])
def test_roco_is_its_definition(surplus):
    mass = drawn(2, 30).abs()
    squares = mass.square() * (0.1 + drawn(2, 30, seed=1).abs())
    seen = seen_of(30, mass=mass, squares=squares)
    seen = Seen(positions=seen.positions, now=seen.now, inputs=seen.inputs, surplus=surplus)
    lists = zip(*(t.double().tolist() for t in (mass, squares, seen.lifetime)), strict=True)
    assert_near(RoCo()(seen).tolist(), [roco(*head, surplus) for head in lists])


def test_roco_never_gives_up_what_varies_most():
    """Of three that receive as little, the one that was asked for once and strongly stays."""
    positions, mass = torch.arange(4).view(1, 4), torch.tensor([[0.8, 0.1, 0.1, 0.1]])
    squares = torch.tensor([[0.2, 0.001, 0.01, 0.001]])
    scores = RoCo()(Seen(positions=positions, now=10, inputs={"mass": mass, "squares": squares}, window=2))
    assert scores[0, 2] > scores[0, 1]
    assert (
        RoCo()(Seen(positions=positions, now=10, inputs={"mass": mass, "squares": squares * 0 + 0.3}))[0].argmin() > 0
    )


@pytest.mark.parametrize("name", SCORERS)
def test_the_order_of_rows_changes_no_score(name):
    """Rows of a slot are order-free."""
    positions, rows = shuffled(2, 24), 24
    shown = {
        "mass": drawn(2, rows).abs(),
        "squares": drawn(2, rows, seed=1).abs(),
        "keys": drawn(2, rows, 6, seed=2),
        "values": drawn(2, rows, 4, seed=3),
    }
    queries = drawn(5, 2, 3, 6, seed=4)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(9))
    scorer = scorer_named(name)
    scores = scorer(Seen(positions=positions, now=48, inputs=shown | {"queries": queries}))
    moved = {key: tensor[:, order] for key, tensor in shown.items()} | {"queries": queries}
    again = scorer(Seen(positions=positions[:, order], now=48, inputs=moved))
    torch.testing.assert_close(again, scores[:, order])
    assert scores.dtype == torch.float32
    assert scores.shape == (2, rows)


# ---- votes and the draw ----


def test_votes_are_weights_of_queries_and_what_is_left_of_the_old():
    assert (QueryWeights().weights(3), QueryWeights().decay_over(3)) == ([1.0, 1.0, 1.0], 1.0)
    fading = QueryWeights(decay=0.5)
    assert (fading.weights(3), fading.decay_over(3)) == ([0.25, 0.5, 1.0], 0.125)
    newest = QueryWeights(window=4)
    assert (newest.weights(3), newest.decay_over(3)) == ([1.0, 1.0, 1.0], 0.25)
    assert (newest.weights(6), newest.decay_over(6)) == ([0.0, 0.0, 1.0, 1.0, 1.0, 1.0], 0.0)
    assert newest.decay_over(4) == 0.0
    assert (QueryWeights(window=1).weights(2), QueryWeights(window=1).decay_over(1)) == ([0.0, 1.0], 0.0)


@pytest.mark.parametrize("window", [1, 8, 32])
def test_a_window_always_holds_about_as_many_votes_as_its_queries(window):
    votes, total = QueryWeights(window=window), 0.0
    for queries in (12, 12, 5, *[1] * 50):
        total = total * votes.decay_over(queries) + sum(votes.weights(queries))
        assert total <= window + 1e-9
    assert total > 0.85 * window


def test_the_vectors_that_rank_as_streaming_and_average_are_what_they_say():
    positions = torch.tensor([[7, 0, 3]])
    seen = Seen(positions=positions, now=10, inputs={"mass": torch.tensor([[3.0, 5.0, 7.0]])}, window=8)
    assert scorer_named("streaming")(seen).tolist() == [[7, 0, 3]]
    assert scorer_named("average-attention")(seen).tolist() == [[1.0, 0.625, 1.0]]  # no key was seen by more than 8
    assert all(scorer_named(name)(seen).tolist() == [[3.0, 5.0, 7.0]] for name in ("h2o", "decay", "tova"))


def test_the_draw_is_the_same_in_every_batch_and_place():
    positions = torch.stack([shuffled(3, 40, seed) for seed in range(4)])
    batch = Random()(Seen(positions=positions, now=80))
    for one, places in zip(batch, positions, strict=True):
        assert torch.equal(one, Random()(Seen(positions=places, now=1000)))
        assert torch.equal(one[:, :7], Random()(Seen(positions=places[:, :7], now=3)))


def test_the_draw_is_fair():
    """As many in each tenth of [0, 1), heads and neighbours independent of each other."""
    draw = Random()(Seen(positions=torch.arange(20_000).expand(4, -1), now=20_000))
    assert ((draw >= 0) & (draw <= 1)).all()
    counts = torch.stack([torch.histc(head, 10, 0, 1) for head in draw])
    assert (counts - 2000).abs().max() < 250
    centred = draw - draw.mean(-1, keepdim=True)
    correlated = centred @ centred.T / centred.square().sum(-1).mean()
    assert (correlated - torch.eye(4)).abs().max() < 0.03
    assert (centred[:, 1:] * centred[:, :-1]).mean(-1).abs().max() < 0.03 / 12


def test_what_random_keeps_is_drawn_by_position_and_head(spy):
    prompt = random_prompts((PROMPT,), seed=3)[0]
    engine = tiny_engine("llama", **SETTINGS, kv_policy="random")
    list(engine.stream(as_requests([prompt], max_tokens=NEW)))
    now = PROMPT + NEW - 1
    draw = Random()(Seen(positions=torch.arange(now).expand(2, -1), now=now)).tolist()
    for layer in range(2):
        kept = spy.rows(layer)
        for head, row in enumerate(kept):
            rivals = set(range(SINK, now - 1 - RECENT))  # those that the last eviction could choose from
            assert len(row) == BUDGET
            assert min(draw[head][p] for p in rivals & set(row)) > max(draw[head][p] for p in rivals - set(row))


def test_every_policy_has_a_scorer_but_none():
    assert set(POLICIES) == {*SCORERS, "none"}
    assert scorer_named("none") is None
    assert all(callable(scorer_named(name)) for name in SCORERS)
